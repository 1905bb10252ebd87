"""What a room makes of what its channel brings, word by word. On virtual time."""

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
    Band,
    chat,
    in_order,
    said,
    shown,
    texts,
)


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Band:
    band = Band(nursery)
    await band.meet()
    return band


@pytest.fixture(autouse=True)
def both_agree(stage: Band) -> Iterator[None]:
    """Whatever was heard: nobody misses a version, and here is known what is stored."""
    yield
    assert stage.room.mirror.session == stage.stored()
    for peer in (stage.ann, stage.bob):
        in_order(peer)


async def test_news_are_passed_on_once_and_in_order(stage: Band, autojump_clock: MockClock) -> None:
    for payload in await stage.chats(5):
        stage.hear(payload, payload)
        # At once: nothing is waited for.
        assert stage.room.mirror.session is not None
    for peer in (stage.ann, stage.bob):
        assert chat(peer) == ["0", "1", "2", "3", "4"]
    await stage.hub.finished()
    assert (stage.reads, stage.hub.counters.relayed) == (0, 1 + 5)


async def test_the_frames_of_the_other_server_are_passed_on_as_they_are(
    stage: Band, autojump_clock: MockClock
) -> None:
    payload = await stage.hall(ChatMessage(text="hi"))
    stage.hear(payload.replace(b'"type":"chat_message"', b'"news" : 1, "type":"chat_message"'))
    assert [message["news"] for message in stage.ann.heard("chat_message")] == [1]
    assert b'"news" : 1, "type"' in stage.ann._data  # noqa: SLF001


async def test_what_we_said_ourselves_is_not_heard_twice(
    stage: Band, autojump_clock: MockClock
) -> None:
    ours = []
    for text in ("one", "two", "three"):
        base = stage.stored()
        await stage.say(stage.room, stage.ann, text)
        ours.append(said(base, stage.stored(), b'{"type":"chat_message","text":"again"}'))
        stage.hear(ours[-1])
    stage.hear(*ours, *reversed(ours))
    await stage.hub.finished()
    assert chat(stage.bob) == ["one", "two", "three"]
    assert stage.reads == 0


async def test_what_is_older_says_nothing(stage: Band, autojump_clock: MockClock) -> None:
    payloads = await stage.chats(3)
    stage.hear(*payloads)
    stage.hear(payloads[0], payloads[1], payloads[2], payloads[0])
    await stage.hub.finished()
    assert chat(stage.ann) == ["0", "1", "2"]
    assert stage.reads == 0


async def test_a_gap_is_read_once_however_many_wait(stage: Band, autojump_clock: MockClock) -> None:
    stage.remote.gate = trio.Event()
    first, *others = await stage.chats(20)
    stage.hear(*others)
    await wait_all_tasks_blocked()
    stage.hear(*others, first)
    stage.remote.gate.set()
    await stage.hub.finished()
    assert stage.reads == 1
    assert chat(stage.ann) == []
    assert shown(stage.ann) == [str(number) for number in range(20)]
    assert stage.hub.counters.reconciled == 0
    # And then it goes on as before.
    stage.hear(await stage.hall(ChatMessage(text="next")))
    assert chat(stage.ann) == ["next"]
    assert stage.reads == 1


async def test_what_comes_while_a_commit_is_outstanding_waits_for_its_turn(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    base = stage.stored()
    nursery.start_soon(stage.say, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.hear(said(base, stage.stored(), b'{"type":"chat_message","text":"again"}'))
    stage.hear(*await stage.chats(3))
    await wait_all_tasks_blocked()
    assert chat(stage.bob) == []
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    for peer in (stage.ann, stage.bob):
        assert chat(peer) == ["ours", "0", "1", "2"]
    assert stage.reads == 0


async def test_what_came_before_our_commit_is_not_heard_after_it(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    theirs = await stage.hall(ChatMessage(text="theirs"))
    # Here it is not known yet: the commit loses, and finds it.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.say, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.hear(theirs)
    stage.remote.gate.set()
    await stage.hub.finished()
    await wait_all_tasks_blocked()
    assert shown(stage.bob) == ["theirs"]
    assert chat(stage.bob) == ["ours"]
    assert stage.reads == 0


@pytest.mark.parametrize(
    ("count", "reads"), [(MAX_BUFFERED, 0), (MAX_BUFFERED + 1, 1), (3 * MAX_BUFFERED, 1)]
)
async def test_a_room_that_is_far_behind_reads_once_instead(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock, count: int, reads: int
) -> None:
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.say, stage.room, stage.ann, "ours")
    await wait_all_tasks_blocked()
    stage.hear(*await stage.chats(count))
    stage.remote.gate.set()
    await stage.hub.finished()
    assert stage.reads == reads
    assert texts(stage.stored())[-1] == str(count - 1)


async def apart(stage: Band) -> tuple[Session, Session]:
    """The other server, alone for a while: Cid claims the lead, then it finds what is stored."""
    mine = await MemoryStorage.get_session(stage.remote, "song")
    assert mine is not None
    alone = replace(OTHER, isolated=True)
    for command in (SetRole(role="leader"), UpdateMessage(message="Bridge")):
        actor = Actor(alone, "far away", "member Cid", "fresh")
        decision = decide(mine, command, actor, stage.hub.now())
        assert isinstance(decision, Decision)
        mine = replace(decision.session, event_id=f"alone {decision.session.version}")
    await stage.say(stage.room, stage.ann, "meanwhile")
    return mine, stage.stored()


async def test_a_merge_is_shown_whole_and_then_who_leads(
    stage: Band, autojump_clock: MockClock
) -> None:
    mine, stored = await apart(stage)
    plan = reconcile(mine, stored, {}, OTHER, stage.hub.now())
    assert isinstance(plan, Write)
    stage.hear(await stage.put(stored, plan.session, plan.events))
    for peer in (stage.ann, stage.bob):
        snapshot, *roles = peer.heard("snapshot", "role_changed")[-3:]
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


async def test_a_merge_that_changed_no_role_is_a_snapshot_and_no_more(
    stage: Band, autojump_clock: MockClock
) -> None:
    base = stage.stored()
    # As after two changes on the other side, and the merge: three versions, no event.
    session = replace(base, version=base.version + 3, last_active_at=base.last_active_at + 1)
    stage.hear(await stage.put(base, session, ()))
    assert stage.ann.heard("snapshot")[-1]["version"] == session.version
    assert stage.reads == 0


async def test_a_whisper_reaches_whom_it_is_for(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    def asked() -> tuple[int, int]:
        return len(stage.ann.heard("leader_requested")), len(stage.bob.heard("leader_requested"))

    whisper = write_direct_message("member Ann", b'{"type":"leader_requested"}')
    stage.hear(whisper)
    assert asked() == (1, 0)
    stage.hear(write_direct_message("member Cid", b'{"type":"leader_requested"}'))
    stage.hear(write_direct_message("", b'{"type":"leader_requested"}'))
    stage.hub.hear("another song", whisper)
    # It waits its turn like anything else.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.say, stage.room, stage.ann, "hi")
    await wait_all_tasks_blocked()
    stage.hear(whisper)
    assert asked() == (1, 0)
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert asked() == (2, 0)
    assert stage.reads == 0


async def test_a_member_taken_over_elsewhere_is_let_go(
    stage: Band, autojump_clock: MockClock
) -> None:
    token = ResumeToken("member Ann", 1, "secret of Ann")
    bind = replace(stage.bind("Ann"), resume=(token,))
    stage.hear(await stage.hall(bind, "Ann", "farther away"))
    assert (stage.ann.closed, stage.bob.closed) == (4001, None)
    assert stage.room.peers == {"member Bob": stage.bob}
    # The end of the old connection, and what it still wants, are nobody's.
    stage.hub.dropped(stage.room, stage.ann, "timeout")
    await trio.sleep(2 * GRACE_S)
    member = find(stage.stored(), "member Ann")
    assert member is not None
    assert (member.connected, member.server_id) == (True, "hall")
    assert leader_of(stage.stored()) == member
    # Whoever was let go hears nothing more.
    stage.hear(await stage.hall(ChatMessage(text="hi")))
    assert (chat(stage.ann), chat(stage.bob)) == ([], ["hi"])
    assert stage.reads == 0


async def lost_sight_of_ann(stage: Band) -> None:
    """The other server found us absent; we were only slow."""
    stage.hear(await stage.hall(Drop(), "Ann"))
    await stage.hub.finished()


async def test_whose_connection_is_here_is_asserted_again(
    stage: Band, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    assert stage.stored().members["member Ann"].connected
    told = [(each["memberId"], each["connected"]) for each in stage.bob.heard("member_connection")]
    assert told == [("member Ann", False), ("member Ann", True)]
    assert stage.ann.closed is None
    await trio.sleep(2 * GRACE_S)
    assert stage.stored().members["member Ann"].connected
    assert stage.bob.heard("user_left") == []


async def test_whose_connection_is_here_is_not_refused_although_others_removed_it(
    stage: Band, autojump_clock: MockClock
) -> None:
    stage.hear(await stage.hall(LeaveSession(), "Ann"))
    # Before there was time to assert it again.
    await stage.say(stage.room, stage.ann, "I am here")
    await stage.hub.finished()
    assert find(stage.stored(), "member Ann") is not None
    assert texts(stage.stored()) == ["I am here"]


async def test_a_member_that_was_asserted_again_still_has_its_whole_grace(
    stage: Band, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    await trio.sleep(GRACE_S - 1)
    stage.hub.dropped(stage.room, stage.ann, "timeout")
    await trio.sleep(GRACE_S - 1)
    assert find(stage.stored(), "member Ann") is not None
    await trio.sleep(2)
    assert find(stage.stored(), "member Ann") is None


async def test_whose_connection_is_here_is_not_removed_when_an_old_grace_ends(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    await lost_sight_of_ann(stage)
    # The grace that nobody needs ends behind a slow command, as she is lost sight of again.
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.say, stage.room, stage.bob, "slow")
    await trio.sleep(GRACE_S + 1)
    stage.hear(await stage.hall(Drop(), "Ann"))
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert stage.stored().members["member Ann"].connected
    assert stage.bob.heard("user_left") == []


@pytest.mark.parametrize("connected", [True, False])
async def test_ours_that_are_heard_of_without_a_connection_get_their_grace(
    stage: Band, autojump_clock: MockClock, connected: bool
) -> None:
    base = stage.stored()
    zoe = replace(base.members["member Ann"], member_id="member Zoe", connection_id="of old")
    members = {**base.members, "member Zoe": replace(zoe, connected=connected)}
    session = replace(base, version=base.version + 1, members=members)
    stage.hear(await stage.put(base, session, ()))
    await trio.sleep(GRACE_S - 1)
    assert not stage.stored().members["member Zoe"].connected
    assert stage.bob.heard("user_left") == []
    await trio.sleep(2)
    (left,) = stage.bob.heard("user_left")
    assert (left["memberId"], left["reason"]) == ("member Zoe", "timeout")
    assert stage.reads == 0


async def test_what_is_on_its_way_is_no_reason_to_read(
    stage: Band, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    payload = await stage.hall(ChatMessage(text="hi"))
    # The tips are compared while the message is under way.
    nursery.start_soon(stage.hub.compare, stage.era)
    await wait_all_tasks_blocked()
    stage.hear(payload)
    await trio.sleep(1)
    await stage.hub.finished()
    assert stage.reads == 0
    assert chat(stage.ann) == ["hi"]


async def test_a_channel_that_is_silent_is_waited_for_once(
    stage: Band, autojump_clock: MockClock
) -> None:
    """Who waits in vain after each race that is lost loses the next one, too."""
    stage.era.relay = object()  # type: ignore[assignment]

    async def rival() -> None:
        while True:
            await stage.hall(ChatMessage(text="faster"))
            await trio.sleep(0.005)

    async with trio.open_nursery() as rivals:
        rivals.start_soon(rival)
        await wait_all_tasks_blocked()
        await stage.say(stage.room, stage.ann, "at last")
        rivals.cancel_scope.cancel()
    stage.era.relay = None
    assert shown(stage.ann)[0] == "faster"
    assert stage.room.mirror.session is not None
    await stage.room.catch_up()
