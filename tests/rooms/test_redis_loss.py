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
from tests.support.rooms import HubHarness, assert_versions_in_order, texts


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> HubHarness:
    return HubHarness(nursery)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_command_with_lost_answer_is_acknowledged_once(
    stage: HubHarness, fate: str, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await stage.send_chat(room, ann, "before")
    stage.remote.fates.append(fate)
    await stage.send_chat(room, ann, "lost?")
    await stage.send_chat(room, bob, "after")
    assert stage.stores.storage_type == "memory"
    for peer in (ann, bob):
        heard = [message["text"] for message in peer.received("chat_message")]
        assert heard == ["before", "lost?", "after"]
        assert_versions_in_order(peer)
    assert [ack["requestId"] for ack in ann.received("ack")] == ["before", "lost?"]
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
        assert len(peer.received("chat_message")) == 3
        assert_versions_in_order(peer)
    await stage.send_chat(room, ann, "at last")
    assert texts(stage.stored())[-1] == "at last"
    assert_versions_in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_join_with_lost_answer_creates_one_member(
    stage: HubHarness, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    stage.remote.fates.append(fate)
    await trio.sleep(1)
    ann, same = await stage.join("Ann")
    assert same is room
    await trio.sleep(1)
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob", "Ann"]
    assert len(bob.received("user_joined")) == 1
    assert room.peers.keys() == {"member Bob", "member Ann"}
    assert (ann.closed, bob.closed) == (None, None)
    assert_versions_in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_leave_with_lost_answer_is_not_undone(
    stage: HubHarness, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    ann, _ = await stage.join("Ann")
    stage.remote.fates.append(fate)
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob"]
    assert len(bob.received("user_left")) == 1
    assert_versions_in_order(bob)


async def test_waiting_commands_are_decided_again_in_order(
    stage: HubHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()
    for number in range(5):
        nursery.start_soon(stage.send_chat, room, ann, str(number))
        await wait_all_tasks_blocked()
    stage.remote.broken = True
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert [ack["requestId"] for ack in ann.received("ack")] == ["0", "1", "2", "3", "4"]
    assert texts(room.mirror.session or stage.stored()) == ["0", "1", "2", "3", "4"]
    assert_versions_in_order(ann)


async def test_changes_in_memory_merge_with_remote_changes(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.commit_elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.hub.compare(stage.era)
    stage.lose()
    await stage.send_chat(room, ann, "from here")
    await trio.sleep(1)
    await stage.commit_elsewhere(ChatMessage(text="from there"), "Cid", fresh_id="theirs")
    await stage.recover()
    assert sorted(texts(stage.stored())) == ["from here", "from there"]
    assert room.mirror.session == stage.stored()
    snapshot = ann.received("snapshot")[-1]
    assert isinstance(snapshot["chat"], list)
    assert len(snapshot["chat"]) == 2
    assert_versions_in_order(ann)


async def test_unreadable_session_is_hosted_in_memory(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    stage.remote.keep(stored := await foreign_session(stage))
    stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    assert await room.command(ann, Play(), "", "r") is None
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.send_chat(room, ann, "hi")
    assert len(ann.received("ack")) == 2
    assert stage.stored() is stored
    assert stage.remote.commits == 0
    assert stage.stores.memory.ids() == ["song"]
    assert len(stage.logged("session.unreadable")) == 1
    assert stage.hub.counters.unreadable == 1
    # Other sessions are not affected.
    await stage.join("Bob", "other song")
    assert stage.remote.find("other song") is not None
    assert stage.stores.memory.ids() == ["song"]
    # An operator deletes the unreadable state.
    stage.remote.unreadable.clear()
    stage.remote.discard("song")
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["hi"]
    assert stage.stores.memory.ids() == []
    assert_versions_in_order(ann)


async def foreign_session(stage: HubHarness) -> Session:
    session = await stage.commit_elsewhere(stage.bind("Cid"), "Cid", "far away")
    stage.remote.discard("song")
    return session


async def test_session_that_becomes_unreadable_continues_in_memory(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stored = stage.stored()
    stage.remote.unreadable.add("song")
    await stage.send_chat(room, ann, "one")
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.send_chat(room, ann, "two")
    assert [ack["requestId"] for ack in ann.received("ack")] == ["one", "two"]
    assert stage.stored() is stored
    assert len(stage.logged("session.unreadable")) == 1
    stage.remote.unreadable.clear()
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["one", "two"]
    assert_versions_in_order(ann)
