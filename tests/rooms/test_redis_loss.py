"""Commands, joins and leaves while Redis is lost or a session is unreadable. On virtual time."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.model.session import Session, present
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Play,
)
from tests.support.rooms import Stage, in_order, texts


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Stage:
    return Stage(nursery)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_command_whose_answer_is_lost_is_acknowledged_once(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await stage.say(room, ann, "before")
    stage.remote.fates.append(fate)
    await stage.say(room, ann, "lost?")
    await stage.say(room, bob, "after")
    assert stage.stores.storage_type == "memory"
    for peer in (ann, bob):
        heard = [message["text"] for message in peer.heard("chat_message")]
        assert heard == ["before", "lost?", "after"]
        in_order(peer)
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["before", "lost?"]
    kept = stage.stores.memory.find("song")
    assert kept == room.mirror.session

    await trio.sleep(1)
    assert await stage.recover() == {"moved": 1}
    assert stage.stores.memory.ids() == []
    stored = stage.stored()
    assert stored == room.mirror.session
    assert texts(stored) == ["before", "lost?", "after"]
    assert len({chat.message_id for chat in stored.chat}) == 3
    for peer in (ann, bob):
        assert len(peer.heard("chat_message")) == 3
        in_order(peer)
    await stage.say(room, ann, "at last")
    assert texts(stage.stored())[-1] == "at last"
    in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_join_whose_answer_is_lost_makes_one_member(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    stage.remote.fates.append(fate)
    await trio.sleep(1)
    ann, same = await stage.join("Ann")
    assert same is room
    await trio.sleep(1)
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob", "Ann"]
    assert len(bob.heard("user_joined")) == 1
    assert room.peers.keys() == {"member Bob", "member Ann"}
    assert (ann.closed, bob.closed) == (None, None)
    in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_leave_whose_answer_is_lost_is_not_undone(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    ann, _ = await stage.join("Ann")
    stage.remote.fates.append(fate)
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob"]
    assert len(bob.heard("user_left")) == 1
    in_order(bob)


async def test_all_that_wait_are_decided_again_in_their_order(
    stage: Stage, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()
    for number in range(5):
        nursery.start_soon(stage.say, room, ann, str(number))
        await wait_all_tasks_blocked()
    stage.remote.broken = True
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["0", "1", "2", "3", "4"]
    assert texts(room.mirror.session or stage.stored()) == ["0", "1", "2", "3", "4"]
    in_order(ann)


async def test_what_happened_in_memory_meets_what_others_wrote_meanwhile(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.hub.compare(stage.era)
    stage.lose()
    await stage.say(room, ann, "from here")
    await trio.sleep(1)
    await stage.elsewhere(ChatMessage(text="from there"), "Cid", fresh_id="theirs")
    await stage.recover()
    assert sorted(texts(stage.stored())) == ["from here", "from there"]
    assert room.mirror.session == stage.stored()
    snapshot = ann.heard("snapshot")[-1]
    assert isinstance(snapshot["chat"], list)
    assert len(snapshot["chat"]) == 2
    in_order(ann)


async def test_a_session_that_cannot_be_read_is_played_in_memory(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.remote.keep(stored := await foreign_session(stage))
    stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    assert await room.command(ann, Play(), "", "r") is None
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.say(room, ann, "hi")
    assert len(ann.heard("ack")) == 2
    assert stage.stored() is stored
    assert stage.remote.commits == 0
    assert stage.stores.memory.ids() == ["song"]
    assert len(stage.logged("session.unreadable")) == 1
    assert stage.hub.counters.unreadable == 1
    # Others are not concerned.
    await stage.join("Bob", "other song")
    assert stage.remote.find("other song") is not None
    assert stage.stores.memory.ids() == ["song"]
    # Somebody has looked after it by hand.
    stage.remote.unreadable.clear()
    stage.remote.discard("song")
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["hi"]
    assert stage.stores.memory.ids() == []
    in_order(ann)


async def foreign_session(stage: Stage) -> Session:
    session = await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    stage.remote.discard("song")
    return session


async def test_a_session_that_becomes_unreadable_goes_on_in_memory(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stored = stage.stored()
    stage.remote.unreadable.add("song")
    await stage.say(room, ann, "one")
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.say(room, ann, "two")
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["one", "two"]
    assert stage.stored() is stored
    assert len(stage.logged("session.unreadable")) == 1
    stage.remote.unreadable.clear()
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["one", "two"]
    in_order(ann)
