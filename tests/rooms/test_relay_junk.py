"""Malformed and impossible relay messages: no peer may notice. On virtual time."""

import msgspec
import pytest
import trio
from msgspec import Raw
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.model.session import Member, Tip
from bandsync.rooms.room import Room
from bandsync.storage.channel_messages import CommittedChange
from tests.support.rooms import RelayHarness, assert_versions_in_order, chat
from tests.support.states import NOW


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> RelayHarness:
    band = RelayHarness(nursery)
    await band.meet()
    return band


async def plays_on(stage: RelayHarness) -> None:
    """The session was read once at the most, and later messages are applied."""
    assert stage.reads <= 1
    stage.receive(*await stage.chats(2))
    for peer in (stage.ann, stage.bob):
        assert chat(peer)[-2:] == ["0", "1"]
        assert peer.closed is None
        assert_versions_in_order(peer)
    assert stage.room.mirror.session == stage.stored()


DEEP = b"[" * 100_000 + b"]" * 100_000
JUNK = {
    "nothing": b"",
    "no JSON": b"\xff\x00{",
    "a number": b"1",
    "an array": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "no UTF-8": b'{"prev":null,"version":1,"eventId":"\xff"}',
    "half a character": b'{"prev":null,"version":1,"eventId":"\\ud800"}',
    "an endless number": b'{"version":' + b"9" * 5000 + b"}",
    "nested deeply": b'{"frames":' + DEEP + b"}",
    "half a whisper": b'{"to":"member Ann","frame":',
    "a whisper to nobody": b'{"to":1,"frame":{}}',
    "a whisper without end": b'{"to":"member Ann","frame":' + b"[" * 100_000,
}


@pytest.mark.parametrize("payload", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_malformed_message_is_ignored(
    stage: RelayHarness,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    payload: bytes,
    busy: bool,
) -> None:
    if busy:
        stage.remote.gate = trio.Event()
        nursery.start_soon(stage.send_chat, stage.room, stage.ann, "ours")
        await wait_all_tasks_blocked()
    stage.receive(payload, payload)
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    await plays_on(stage)


def crafted(room: Room, **changes: object) -> bytes:
    """A message that follows the mirrored state, apart from these changes."""
    known = room.mirror.tip
    assert known is not None
    change = CommittedChange(known, known.version + 1, "crafted", "hall", {}, [])
    return msgspec.json.encode(replace(change, **changes))


def a_member(text: bytes) -> dict[str, object]:
    return {"delta": {"member:X": Raw(text)}}


YVES = Member("Y", 1, NOW, "b", True, "c", "s", "b", True, NOW, NOW, "Yves", "h")

CRAFTED: dict[str, dict[str, object]] = {
    "of no version": {"version": 0},
    "of a negative version": {"version": -(2**63)},
    "of the same version": {"version": 3},
    "of a version beyond counting": {"version": 2**53},
    "of another epoch": {"prev": Tip("another", 3, "x"), "version": 4},
    "of nothing before": {"prev": None},
    "of a member that is none": a_member(b"7"),
    "of a member without parts": a_member(b"{}"),
    "of a member nested deeply": a_member(DEEP),
    "of a member under another name": a_member(msgspec.json.encode(YVES)),
    "of a head that is none": {"delta": {"head": Raw(b'"x"')}},
    "of a head of a newer version": {"delta": {"head": Raw(b'{"format":99}')}},
    "of an epoch that is none": {"delta": {"epoch": Raw(b"{}")}},
    "of a chat out of the ring": {"delta": {"chat:99": Raw(b"{}")}},
    "of more events than versions": {"frames": [Raw(b'{"type":"play","version":9}')] * 9},
}


@pytest.mark.parametrize("changes", CRAFTED.values(), ids=CRAFTED)
async def test_impossible_change_causes_at_most_one_read(
    stage: RelayHarness, autojump_clock: MockClock, changes: dict[str, object]
) -> None:
    before = stage.room.mirror.session
    stage.receive(crafted(stage.room, **changes))
    assert stage.room.mirror.session is before
    await stage.hub.finished()
    await plays_on(stage)
