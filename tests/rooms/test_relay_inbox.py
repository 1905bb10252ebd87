"""Relay messages: applied, buffered, ignored, or a reason to read. On virtual time."""

from collections.abc import Iterator

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.model.session import Session, find, leader_of
from bandsync.rooms.relay_inbox import MAX_BUFFERED
from bandsync.rules.actions import Actor, Decision, Drop
from bandsync.rules.decide import decide
from bandsync.rules.reconcile import Write, reconcile
from bandsync.rules.tokens import ResumeToken
from bandsync.storage.channel_messages import write_direct_message
from bandsync.storage.memory import MemoryStorage
from bandsync.wire.commands import ChatMessage, LeaveSession, SetRole, UpdateMessage
from tests.support.rooms import (
    GRACE_S,
    OTHER,
    RelayHarness,
    assert_versions_in_order,
    change_message,
    chat,
    shown,
    texts,
)


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> RelayHarness:
    band = RelayHarness(nursery)
    await band.meet()
    return band


@pytest.fixture(autouse=True)
def both_agree(stage: RelayHarness) -> Iterator[None]:
    """After each test no peer has missed a version, and mirror and stored state are equal."""
    yield
    assert stage.room.mirror.session == stage.stored()
    for peer in (stage.ann, stage.bob):
        assert_versions_in_order(peer)


async def test_changes_are_sent_once_and_in_order(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    for payload in await stage.chats(5):
        stage.receive(payload, payload)
        # Applied at once, without a pass of the scheduler.
        assert stage.room.mirror.session is not None
    for peer in (stage.ann, stage.bob):
        assert chat(peer) == ["0", "1", "2", "3", "4"]
    await stage.hub.finished()
    assert (stage.reads, stage.hub.counters.relayed) == (0, 1 + 5)


async def test_frames_of_other_server_are_sent_unchanged(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    payload = await stage.commit_remotely(ChatMessage(text="hi"))
    stage.receive(payload.replace(b'"type":"chat_message"', b'"news" : 1, "type":"chat_message"'))
    assert [message["news"] for message in stage.ann.received("chat_message")] == [1]
    assert b'"news" : 1, "type"' in stage.ann._data  # noqa: SLF001


async def test_own_changes_on_the_channel_are_ignored(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    ours = []
    for text in ("one", "two", "three"):
        base = stage.stored()
        await stage.send_chat(stage.room, stage.ann, text)
        ours.append(change_message(base, stage.stored(), b'{"type":"chat_message","text":"again"}'))
        stage.receive(ours[-1])
    stage.receive(*ours, *reversed(ours))
    await stage.hub.finished()
    assert chat(stage.bob) == ["one", "two", "three"]
    assert stage.reads == 0


async def test_older_changes_are_ignored(stage: RelayHarness, autojump_clock: MockClock) -> None:
    payloads = await stage.chats(3)
    stage.receive(*payloads)
    stage.receive(payloads[0], payloads[1], payloads[2], payloads[0])
    await stage.hub.finished()
    assert chat(stage.ann) == ["0", "1", "2"]
    assert stage.reads == 0


async def test_gap_is_read_once_for_many_messages(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    first, *others = await stage.chats(20)
    stage.receive(*others)
    await wait_all_tasks_blocked()
    stage.receive(*others, first)
    stage.remote.gate.set()
    await stage.hub.finished()
    assert stage.reads == 1
    assert chat(stage.ann) == []
    assert shown(stage.ann) == [str(number) for number in range(20)]
    assert stage.hub.counters.reconciled == 0
    # Later messages are applied as usual.
    stage.receive(await stage.commit_remotely(ChatMessage(text="next")))
    assert chat(stage.ann) == ["next"]
    assert stage.reads == 1


async def test_messages_during_commit_are_buffered(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    base = stage.stored()
    nursery.start_soon(stage.send_chat, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.receive(change_message(base, stage.stored(), b'{"type":"chat_message","text":"again"}'))
    stage.receive(*await stage.chats(3))
    await wait_all_tasks_blocked()
    assert chat(stage.bob) == []
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    for peer in (stage.ann, stage.bob):
        assert chat(peer) == ["ours", "0", "1", "2"]
    assert stage.reads == 0


async def test_change_before_conflicting_commit_is_not_sent_twice(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    theirs = await stage.commit_remotely(ChatMessage(text="theirs"))
    # The mirror does not have the change yet, so the commit conflicts.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.send_chat, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.receive(theirs)
    stage.remote.gate.set()
    await stage.hub.finished()
    await wait_all_tasks_blocked()
    assert shown(stage.bob) == ["theirs"]
    assert chat(stage.bob) == ["ours"]
    assert stage.reads == 0


@pytest.mark.parametrize(
    ("count", "reads"), [(MAX_BUFFERED, 0), (MAX_BUFFERED + 1, 1), (3 * MAX_BUFFERED, 1)]
)
async def test_overflowing_buffer_causes_one_resync(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock, count: int, reads: int
) -> None:
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.send_chat, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.receive(*await stage.chats(count))
    stage.remote.gate.set()
    await stage.hub.finished()
    assert stage.reads == reads
    assert texts(stage.stored())[-1] == str(count - 1)


async def apart(stage: RelayHarness) -> tuple[Session, Session]:
    """Partition: Cid claims the lead on the other server; returns both states."""
    mine = await MemoryStorage.get_session(stage.remote, "song")
    assert mine is not None
    alone = replace(OTHER, isolated=True)
    for command in (SetRole(role="leader"), UpdateMessage(message="Bridge")):
        actor = Actor(alone, "far away", "member Cid", "fresh")
        decision = decide(mine, command, actor, stage.hub.now())
        assert isinstance(decision, Decision)
        mine = replace(decision.session, event_id=f"alone {decision.session.version}")
    await stage.send_chat(stage.room, stage.ann, "meanwhile")
    return mine, stage.stored()


async def test_merge_is_sent_as_snapshot_and_role_events(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    mine, stored = await apart(stage)
    plan = reconcile(mine, stored, {}, OTHER, stage.hub.now())
    assert isinstance(plan, Write)
    stage.receive(await stage.commit_state(stored, plan.session, plan.events))
    for peer in (stage.ann, stage.bob):
        snapshot, *roles = peer.received("snapshot", "role_changed")[-3:]
        assert (snapshot["type"], snapshot["version"]) == ("snapshot", plan.shown.version)
        assert (snapshot["message"], snapshot["leaderId"]) == ("Bridge", "member Cid")
        assert shown(peer) == ["meanwhile"]
        assert [(role["memberId"], role["role"], role["reason"]) for role in roles] == [
            ("member Ann", "follower", "merged"),
            ("member Cid", "leader", "merged"),
        ]
        assert [role["version"] for role in roles] == [
            plan.session.version - 1,
            plan.session.version,
        ]
    assert plan.session.version == stage.stored().version
    await stage.hub.finished()
    assert stage.reads == 0


async def test_merge_without_role_change_is_sent_as_snapshot_only(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    base = stage.stored()
    # As after a merge of two remote changes: three versions and no event.
    session = replace(base, version=base.version + 3, last_active_at=base.last_active_at + 1)
    stage.receive(await stage.commit_state(base, session, ()))
    assert stage.ann.received("snapshot")[-1]["version"] == session.version
    assert stage.reads == 0


async def test_direct_message_reaches_its_member_only(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    def asked() -> tuple[int, int]:
        return len(stage.ann.received("leader_requested")), len(
            stage.bob.received("leader_requested")
        )

    whisper = write_direct_message("member Ann", b'{"type":"leader_requested"}')
    stage.receive(whisper)
    assert asked() == (1, 0)
    stage.receive(write_direct_message("member Cid", b'{"type":"leader_requested"}'))
    stage.receive(write_direct_message("", b'{"type":"leader_requested"}'))
    stage.hub.receive("another song", whisper)
    # It is buffered like every other message.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.send_chat, stage.room, stage.ann, "hi")
    await wait_all_tasks_blocked()
    stage.receive(whisper)
    assert asked() == (1, 0)
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert asked() == (2, 0)
    assert stage.reads == 0


async def test_member_taken_over_remotely_is_closed(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    token = ResumeToken("member Ann", 1, "secret of Ann")
    bind = replace(stage.bind("Ann"), resume=(token,))
    stage.receive(await stage.commit_remotely(bind, "Ann", "farther away"))
    assert (stage.ann.closed, stage.bob.closed) == (4001, None)
    assert stage.room.peers == {"member Bob": stage.bob}
    # The end of the old connection no longer affects the member.
    stage.hub.dropped(stage.room, stage.ann, "timeout")
    await trio.sleep(2 * GRACE_S)
    member = find(stage.stored(), "member Ann")
    assert member is not None
    assert (member.connected, member.server_id) == (True, "hall")
    assert leader_of(stage.stored()) == member
    # The closed connection receives nothing more.
    stage.receive(await stage.commit_remotely(ChatMessage(text="hi")))
    assert (chat(stage.ann), chat(stage.bob)) == ([], ["hi"])
    assert stage.reads == 0


async def lost_sight_of_ann(stage: RelayHarness) -> None:
    """The other server disconnects Ann by mistake."""
    stage.receive(await stage.commit_remotely(Drop(), "Ann"))
    await stage.hub.finished()


async def test_connected_member_is_reasserted(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    assert stage.stored().members["member Ann"].connected
    told = [
        (each["memberId"], each["connected"]) for each in stage.bob.received("member_connection")
    ]
    assert told == [("member Ann", False), ("member Ann", True)]
    assert stage.ann.closed is None
    await trio.sleep(2 * GRACE_S)
    assert stage.stored().members["member Ann"].connected
    assert stage.bob.received("user_left") == []


async def test_connected_member_removed_remotely_can_send_commands(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    stage.receive(await stage.commit_remotely(LeaveSession(), "Ann"))
    # The command comes before the reassertion.
    await stage.send_chat(stage.room, stage.ann, "I am here")
    await stage.hub.finished()
    assert find(stage.stored(), "member Ann") is not None
    assert texts(stage.stored()) == ["I am here"]


async def test_reasserted_member_has_a_full_grace_later(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    await trio.sleep(GRACE_S - 1)
    stage.hub.dropped(stage.room, stage.ann, "timeout")
    await trio.sleep(GRACE_S - 1)
    assert find(stage.stored(), "member Ann") is not None
    await trio.sleep(2)
    assert find(stage.stored(), "member Ann") is None


async def test_connected_member_survives_end_of_old_grace(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    # The obsolete grace ends behind a slow command, while Ann is disconnected again.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.send_chat, stage.room, stage.bob, "slow")
    await trio.sleep(GRACE_S + 1)
    stage.receive(await stage.commit_remotely(Drop(), "Ann"))
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert stage.stored().members["member Ann"].connected
    assert stage.bob.received("user_left") == []


@pytest.mark.parametrize("connected", [True, False])
async def test_own_member_without_connection_gets_a_grace(
    stage: RelayHarness, autojump_clock: MockClock, connected: bool
) -> None:
    base = stage.stored()
    zoe = replace(base.members["member Ann"], member_id="member Zoe", connection_id="of old")
    members = {**base.members, "member Zoe": replace(zoe, connected=connected)}
    session = replace(base, version=base.version + 1, members=members)
    stage.receive(await stage.commit_state(base, session, ()))
    await trio.sleep(GRACE_S - 1)
    assert not stage.stored().members["member Zoe"].connected
    assert stage.bob.received("user_left") == []
    await trio.sleep(2)
    (left,) = stage.bob.received("user_left")
    assert (left["memberId"], left["reason"]) == ("member Zoe", "timeout")
    assert stage.reads == 0


async def test_comparison_waits_for_relay_message_under_way(
    stage: RelayHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    payload = await stage.commit_remotely(ChatMessage(text="hi"))
    # Compare the tips while the relay message is under way.
    nursery.start_soon(stage.hub.compare, stage.era)
    await wait_all_tasks_blocked()
    stage.receive(payload)
    await trio.sleep(1)
    await stage.hub.finished()
    assert stage.reads == 0
    assert chat(stage.ann) == ["hi"]


async def test_silent_channel_is_waited_for_once(
    stage: RelayHarness, autojump_clock: MockClock
) -> None:
    """Waiting in vain after every conflict would lose every later race."""
    stage.era.relay = object()  # type: ignore[assignment]

    async def rival() -> None:
        while True:
            await stage.commit_remotely(ChatMessage(text="faster"))
            await trio.sleep(0.005)

    async with trio.open_nursery() as rivals:
        rivals.start_soon(rival)
        await wait_all_tasks_blocked()
        await stage.send_chat(stage.room, stage.ann, "at last")
        rivals.cancel_scope.cancel()
    stage.era.relay = None
    assert shown(stage.ann)[0] == "faster"
    assert stage.room.mirror.session is not None
    await stage.room.catch_up()
