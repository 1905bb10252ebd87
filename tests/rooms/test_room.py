"""Rooms on a storage that is slow and shared with other servers."""

from collections.abc import Sequence

import pytest
import structlog
import trio
from msgspec import UNSET
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session, leader_of, present
from bandsync.rooms.hub import Hub
from bandsync.rooms.room import Room
from bandsync.rules.actions import Actor, Bind, Decision
from bandsync.rules.decide import decide
from bandsync.rules.tokens import ResumeToken
from bandsync.storage.base import Committed, Conflict
from bandsync.storage.memory import MemoryStorage
from bandsync.wire.commands import ChatMessage, Play, Refusal, UpdateMessage
from tests.support.rooms import RecordingPeer, cancel_when_all_wait
from tests.support.states import HERE, NOW
from tests.support.stores import FixedStores


class SharedStorage(MemoryStorage):
    """A slow storage to which other servers write.

    Attributes:
        gate: commits wait until it is set.
        rivals: how many changes of other servers still come just before ours.
    """

    def __init__(self) -> None:
        super().__init__("boot-1", "for a test")
        self.gate = trio.Event()
        self.gate.set()
        self.rivals = 0

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict:
        if self.rivals:
            self.rivals -= 1
            stored = await self.get_session(change.session_id)
            assert stored is not None
            leader = leader_of(stored)
            assert leader is not None
            actor = Actor(HERE, leader.connection_id, leader.member_id)
            rival = decide(stored, UpdateMessage(message=f"rival {self.rivals}"), actor, NOW)
            assert isinstance(rival, Decision)
            await super().commit(stored, rival.session, ())
        result = await super().commit(base, change, events)
        # As with a real network: written, with the answer under way.
        await self.gate.wait()
        return result


class Stage:
    """A hub on a `SharedStorage`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.storage = SharedStorage()
        self.hub = Hub(
            nursery,
            stores=FixedStores(self.storage),
            clock=ServerClock(NOW, trio.current_time()),
            server_context=HERE,
            counters=Counters(),
            log=structlog.wrap_logger(structlog.testing.CapturingLogger()),
            grace_s=10,
            tick_s=0,
        )
        nursery.start_soon(self.hub.run_graces)

    def bind(self, name: str) -> Bind:
        return Bind("song", f"epoch of {name}", f"secret of {name}", name)

    async def join(self, name: str) -> tuple[RecordingPeer, Room]:
        peer = RecordingPeer(f"connection of {name}")
        outcome = await self.hub.bind(peer, self.bind(name), f"member {name}", UNSET)
        assert not isinstance(outcome, Refusal)
        return peer, outcome[0]

    async def stored(self) -> Session:
        session = await self.storage.get_session("song")
        assert session is not None
        return session


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return Stage(nursery)


async def test_conflicting_change_is_decided_again_after_a_snapshot(stage: Stage) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    stage.storage.rivals = 2
    assert await room.command(ann, ChatMessage(text="hi"), "m1", "r1") is None
    session = await stage.stored()
    assert session == room.mirror.session
    assert (session.headline.value, len(session.chat)) == ("rival 0", 1)
    for peer in (ann, bob):
        assert [message["version"] for message in peer.received("snapshot")][-2:] == [3, 4]
        (chat,) = peer.received("chat_message")
        assert chat["version"] == 5
    assert ann.received("ack") == [{"type": "ack", "requestId": "r1", "version": 5}]


async def test_change_is_refused_after_too_many_conflicts(stage: Stage) -> None:
    ann, room = await stage.join("Ann")
    stage.storage.rivals = 1000
    refused = await room.command(ann, ChatMessage(text="hi"), "m1", "r1")
    assert isinstance(refused, Refusal)
    assert refused.code == "conflict"
    assert ann.received("chat_message", "ack") == []


async def test_deleted_session_is_restored_by_next_command(stage: Stage) -> None:
    ann, room = await stage.join("Ann")
    before = await stage.stored()
    await stage.storage.delete_session("song")
    assert await room.command(ann, Play(), "", UNSET) is None
    after = await stage.stored()
    assert after.epoch == before.epoch
    # One version for the restored state, one for the command.
    assert after.version == before.version + 2
    assert [message["version"] for message in ann.received("snapshot", "play")] == [1, 2, 3]


async def test_change_is_sent_only_after_its_commit(stage: Stage, nursery: trio.Nursery) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    stage.storage.gate = trio.Event()
    for number in range(3):
        nursery.start_soon(room.command, ann, ChatMessage(text=str(number)), f"m{number}", "r")
        await wait_all_tasks_blocked()
    assert bob.received("chat_message") == []
    assert ann.received("ack") == []
    stage.storage.gate.set()
    await wait_all_tasks_blocked()
    # Commands are committed in the order of their arrival.
    assert [message["text"] for message in bob.received("chat_message")] == ["0", "1", "2"]
    assert [message["version"] for message in ann.received("ack")] == [3, 4, 5]


async def test_connection_lost_during_join_leaves_no_member(
    stage: Stage, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    stage.storage.gate = trio.Event()
    with trio.CancelScope() as connection:
        nursery.start_soon(cancel_when_all_wait, connection)
        await stage.join("Ann")
    assert len(list(present(await stage.stored()))) == 2
    stage.storage.gate.set()
    await stage.hub.finished()
    (ghost,) = [member for member in present(await stage.stored()) if not member.connected]
    assert ghost.display_name == "Ann"
    await trio.sleep(10.1)
    assert [member.display_name for member in present(await stage.stored())] == ["Bob"]
    assert room.mirror.session == await stage.stored()
    assert bob.received("user_left")


async def test_room_stays_open_while_a_join_is_uncertain(
    stage: Stage, nursery: trio.Nursery
) -> None:
    stage.storage.gate = trio.Event()
    with trio.CancelScope() as connection:
        nursery.start_soon(cancel_when_all_wait, connection)
        await stage.join("Ann")
    room = stage.hub.rooms["song"]
    stage.storage.gate.set()
    await stage.hub.finished()
    assert stage.hub.rooms == {"song": room}
    (ann,) = present(await stage.stored())
    assert not ann.connected
    _, joined = await stage.join("Bob")
    assert joined is room


async def test_change_of_disconnected_leader_reaches_the_others(
    stage: Stage, nursery: trio.Nursery
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    stage.storage.gate = trio.Event()
    with trio.CancelScope() as connection:
        nursery.start_soon(cancel_when_all_wait, connection)
        await room.command(ann, UpdateMessage(message="last words"), "", "r1")
    stage.storage.gate.set()
    await stage.hub.finished()
    assert bob.received("snapshot")[-1]["message"] == "last words"
    assert room.mirror.session == await stage.stored()


async def test_join_waiting_for_closing_room_gets_a_new_room(
    stage: Stage, nursery: trio.Nursery
) -> None:
    ann, room = await stage.join("Ann")
    stage.storage.gate = trio.Event()
    nursery.start_soon(room.leave, ann.member_id, ann.connection_id)
    room.unregister(ann, ann.member_id)
    await wait_all_tasks_blocked()
    joined: list[Room] = []

    async def join() -> None:
        _, opened = await stage.join("Bob")
        joined.append(opened)

    nursery.start_soon(join)
    await wait_all_tasks_blocked()
    stage.storage.gate.set()
    await wait_all_tasks_blocked()
    assert joined[0] is not room
    assert stage.hub.rooms == {"song": joined[0]}
    assert (await stage.stored()).leader.member_id == "member Bob"


async def test_takeover_closes_the_old_connection(stage: Stage) -> None:
    ann, room = await stage.join("Ann")
    member = next(present(await stage.stored()))
    token = ResumeToken(member.member_id, 1, "secret of Ann")
    again = RecordingPeer("second connection")
    bind = replace(stage.bind("Ann"), resume=(token,))
    outcome = await stage.hub.bind(again, bind, "unused", UNSET)
    assert not isinstance(outcome, Refusal)
    assert ann.closed == 4001
    # The end of the old connection does not affect the member.
    stage.hub.dropped(room, ann, "timeout")
    await stage.hub.finished()
    (bound,) = present(await stage.stored())
    assert bound.connected
    assert room.peers == {member.member_id: again}
