"""Callers that are cancelled during a read or a commit. On virtual time."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.model.session import present
from bandsync.rooms.hub import Hub
from bandsync.storage.relay import Relay
from bandsync.wire.commands import (
    LeaveSession,
    UpdateMessage,
)
from tests.support.rooms import (
    GRACE_S,
    HubHarness,
    assert_versions_in_order,
    cancel_when_all_wait,
    texts,
)


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> HubHarness:
    return HubHarness(nursery)


@pytest.mark.parametrize("back", [True, False], ids=["answered", "lost"])
async def test_join_cancelled_during_commit_leaves_no_room(
    stage: HubHarness, back: bool, autojump_clock: MockClock
) -> None:
    stage.remote.commit_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as connection:
            nursery.start_soon(cancel_when_all_wait, connection)
            await stage.join("Ann")
    if not back:
        stage.remote.broken = True
    stage.remote.commit_gate.set()
    await stage.hub.finished()
    await trio.sleep(GRACE_S + 1)
    if not back:
        await stage.recover()
        await stage.hub.compare(stage.era)
        await trio.sleep(GRACE_S + 1)
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []
    session = stage.remote.find("song")
    if back:
        assert session is not None
        assert list(present(session)) == []


@pytest.mark.parametrize("back", [True, False], ids=["answered", "lost"])
async def test_command_cancelled_during_commit_reaches_the_others(
    stage: HubHarness, back: bool, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    stage.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as connection:
            nursery.start_soon(cancel_when_all_wait, connection)
            await room.command(ann, UpdateMessage(message="last words"), "", "r")
    if not back:
        stage.remote.broken = True
    stage.remote.gate.set()
    await stage.hub.finished()
    if not back:
        # The command was never acknowledged, but Redis carried it out.
        await stage.recover()
    assert not room.mirror.uncertain
    assert room.mirror.session == stage.stored()
    assert bob.received("snapshot")[-1]["message"] == "last words"
    assert_versions_in_order(bob)


async def test_move_cancelled_during_commit_is_completed_later(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    era = stage.stores.begin(stage.remote)
    stage.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(room.move, era)
            # The read first, then the commit.
            await wait_all_tasks_blocked()
            stage.remote.gate.set()
            stage.remote.gate = trio.Event()
            nursery.start_soon(cancel_when_all_wait, scope)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    stage.lose()
    stage.remote.gate.set()
    await stage.hub.finished()
    await stage.send_chat(room, ann, "hi")
    await stage.recover()
    assert room.mirror.session == stage.stored()
    assert texts(stage.stored()) == ["hi"]
    assert room.mirror.era is stage.era
    assert_versions_in_order(ann)


async def test_room_waiting_for_lost_commit_closes(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()
    room.unregister(ann, ann.member_id)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as caller:
            nursery.start_soon(cancel_when_all_wait, caller)
            await room.leave(ann.member_id, ann.connection_id)
    stage.remote.broken = True
    stage.remote.gate.set()
    await stage.hub.finished()
    await stage.recover()
    await trio.sleep(GRACE_S + 1)
    assert list(present(stage.stored())) == []
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_error_in_buffered_message_releases_the_lock(
    stage: HubHarness,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()

    def stumble(payload: bytes) -> None:
        raise FloatingPointError

    async def say() -> None:
        with pytest.raises(FloatingPointError):
            await stage.send_chat(room, ann, "first")

    with monkeypatch.context() as patched:
        patched.setattr("bandsync.rooms.relay_inbox.read_channel_message", stumble)
        nursery.start_soon(say)
        await wait_all_tasks_blocked()
        stage.hub.receive("song", b"{}")
        stage.remote.gate.set()
        await wait_all_tasks_blocked()
    assert not room.lock.locked()
    await stage.send_chat(room, ann, "second")
    assert texts(stage.stored()) == ["first", "second"]


class Subscriptions(Relay):
    """A relay that only records subscriptions."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.wanted: set[str] = set()

    async def subscribe(self, session_id: str) -> None:
        self.wanted.add(session_id)

    async def unsubscribe(self, session_id: str) -> None:
        if session_id not in self.hub.rooms:
            self.wanted.discard(session_id)


@pytest.fixture
async def subscriptions(stage: HubHarness) -> Subscriptions:
    stage.era.relay = Subscriptions(stage.hub)
    return stage.era.relay


async def test_join_cancelled_during_read_leaves_no_subscription(
    stage: HubHarness, subscriptions: Subscriptions, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    for number in range(20):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as connection:
                nursery.start_soon(cancel_when_all_wait, connection)
                await stage.join("Ann", f"song {number}")
        assert stage.remote.reads[f"song {number}"] == 1
    await stage.hub.finished()
    assert stage.hub.rooms == {}
    assert subscriptions.wanted == set()


@pytest.mark.parametrize("since", ["before", "while they play", "never"])
async def test_closed_room_leaves_no_subscription(
    stage: HubHarness, subscriptions: Subscriptions, since: str, autojump_clock: MockClock
) -> None:
    if since == "before":
        stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    if since == "while they play":
        stage.remote.unreadable.add("song")
    await stage.send_chat(room, ann, "hi")
    await stage.hub.compare(stage.era)
    assert (room.mirror.era is None) == (since != "never")
    assert subscriptions.wanted == {"song"}
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    await stage.hub.finished()
    assert stage.hub.rooms == {}
    assert subscriptions.wanted == set()
