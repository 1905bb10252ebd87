"""The relay itself, with subscribers that obey, and rooms that come and go. On virtual time."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import anyio
import pytest
import structlog
import trio
from redis.exceptions import NoPermissionError, RedisError
from structlog.testing import CapturingLogger
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.counters import Counters
from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.subscriber import Subscriber
from bandsync.rooms.room import Room
from bandsync.storage.base import Lost
from bandsync.storage.redis import Keys
from bandsync.storage.relay import Relay
from bandsync.wire.commands import LeaveSession
from tests.support.redis_storages import IMPATIENT
from tests.support.rooms import HubHarness, RecordingPeer, RelayHarness, cancel_when_all_wait

RETRY_CAP_S = 2.0


class ScriptedSubscriber(Subscriber):
    """Subscribes to nothing, and tells the test."""

    def __init__(self, channel: "Channel", heard: Callable[[bytes, bytes], None]) -> None:
        super().__init__(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
            on_message=heard,
            probe_channel=b"probe",
            probe=trio.sleep,
        )
        self.channel = channel
        self.heard = heard
        self.channels: set[str] = set()
        self.died = trio.Event()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self.channel.attempts.append(trio.current_time())
        if self.channel.refusals:
            raise self.channel.refusals.popleft()
        self._usable = True
        task_status.started()
        try:
            await self.died.wait()
        finally:
            self._usable = False
        raise LinkLostError("gone", "reset")

    async def subscribe(self, channel: bytes) -> None:
        await self._obey("subscribe", channel, self.channels.add)

    async def unsubscribe(self, channel: bytes) -> None:
        await self._obey("unsubscribe", channel, self.channels.discard)

    async def _obey(self, verb: str, channel: bytes, work: Callable[[str], None]) -> None:
        self.channel.log.append(f"{verb} {channel.decode()}")
        if self.channel.errors:
            raise self.channel.errors.popleft()
        # In the order in which it is asked, like Redis; the confirmation comes when it comes.
        work(channel.decode())
        await self.channel.gate.wait()


class Channel:
    """A relay that runs, and what its subscribers are told to do.

    Attributes:
        hosted: the sessions that are wanted.
        attempts: when a subscriber was started.
        refusals, errors: what the next starts, and the next (un)subscriptions, end with.
        gate: (un)subscriptions are not confirmed before it is set.
        log: what was asked for, in order.
        heard: what was passed on.
    """

    def __init__(self) -> None:
        self.hosted: set[str] | dict[str, Room] = set()
        self.attempts: list[float] = []
        self.refusals: deque[RedisError] = deque()
        self.errors: deque[RedisError] = deque()
        self.gate = trio.Event()
        self.gate.set()
        self.log: list[str] = []
        self.heard: list[tuple[str, bytes]] = []
        self.subscribers: list[ScriptedSubscriber] = []
        self.caught_up = 0
        self.events = CapturingLogger()
        self.counters = Counters()
        self.relay = Relay(
            self._subscriber,
            Keys("bandsync:"),
            hosted=lambda: self.hosted,
            on_message=lambda session_id, payload: self.heard.append((session_id, payload)),
            resync=self._catch_up,
            counters=self.counters,
            log=structlog.wrap_logger(self.events, processors=[]),
        )

    def _subscriber(self, heard: Callable[[bytes, bytes], None]) -> ScriptedSubscriber:
        self.subscribers.append(ScriptedSubscriber(self, heard))
        return self.subscribers[-1]

    async def _catch_up(self) -> None:
        self.log.append("catch up")
        self.caught_up += 1

    @property
    def channels(self) -> set[str]:
        """The subscribed channels."""
        return self.subscribers[-1].channels

    def die(self) -> None:
        self.subscribers[-1].died.set()


@pytest.fixture
async def channel() -> Channel:
    return Channel()


async def test_hosted_sessions_are_subscribed_and_resynced(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    channel.hosted = {"a", "b"}
    assert not channel.relay.listening
    channel.gate = trio.Event()
    nursery.start_soon(channel.relay.run)
    await wait_all_tasks_blocked()
    # Subscribed, but not confirmed: what is published now may be missed.
    assert channel.caught_up == 0
    channel.gate.set()
    await wait_all_tasks_blocked()
    assert sorted(channel.log[:2]) == [f"subscribe bandsync:events:{{{each}}}" for each in "ab"]
    assert channel.log[2:] == ["catch up"]
    assert channel.relay.listening


async def test_sessions_hosted_after_a_loss_are_subscribed_and_resynced(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    channel.hosted = {"a", "b"}
    nursery.start_soon(channel.relay.run)
    await trio.sleep(1)
    channel.log.clear()
    channel.die()
    channel.hosted = {"b", "c"}
    await wait_all_tasks_blocked()
    assert not channel.relay.listening
    # Nothing to do without a subscription: the next one begins with all of them.
    await channel.relay.subscribe("c")
    await channel.relay.unsubscribe("a")
    assert channel.log == []
    await trio.sleep(1)
    assert sorted(channel.log[:2]) == [f"subscribe bandsync:events:{{{each}}}" for each in "bc"]
    assert channel.log[2:] == ["catch up"]
    assert (channel.counters.relay_losses, len(channel.subscribers)) == (1, 2)
    assert [call.kwargs["event"] for call in channel.events.calls] == ["relay.lost"]


async def test_unreachable_redis_is_retried_with_backoff(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    channel.refusals.extend(LinkLostError("nobody there", "refused") for _ in range(12))
    nursery.start_soon(channel.relay.run)
    await channel.relay.tried.wait()
    assert not channel.relay.listening
    await trio.sleep(60)
    delays = [after - before for before, after in pairwise(channel.attempts)]
    assert len(delays) == 12
    for number, delay in enumerate(delays, 1):
        most = min(RETRY_CAP_S, 0.05 * 2**number)
        assert most / 2 <= delay <= most
    assert (channel.relay.listening, channel.counters.relay_losses, channel.caught_up) == (
        True,
        0,
        1,
    )
    # After a success from the bottom.
    channel.die()
    lost_at = trio.current_time()
    await trio.sleep(1)
    assert channel.relay.listening
    assert channel.attempts[-1] - lost_at <= 0.1


async def test_refused_subscription_is_retried_for_hours(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """As by an ACL: two to the power of all those failures is no float any more."""
    channel.refusals.extend(NoPermissionError("NOPERM") for _ in range(1100))
    nursery.start_soon(channel.relay.run)
    await trio.sleep(1100 * RETRY_CAP_S)
    assert channel.relay.listening


async def test_failing_subscription_does_not_spin(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    nursery.start_soon(channel.relay.run)
    for _ in range(20):
        await trio.sleep(1)
        channel.die()
        await wait_all_tasks_blocked()
    assert len(channel.attempts) == 20
    assert channel.counters.relay_losses == 20


async def test_redis_errors_do_not_escape(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    channel.hosted = {"a", "b"}
    channel.refusals.extend([NoPermissionError("no"), LinkLostError("no"), RedisError("no")])
    channel.errors.extend([LinkLostError("gone"), NoPermissionError("no")])
    nursery.start_soon(channel.relay.run)
    await trio.sleep(10)
    assert not channel.errors
    assert channel.relay.listening
    channel.errors.extend([LinkLostError("gone"), LinkLostError("gone")])
    await channel.relay.subscribe("c")
    await channel.relay.unsubscribe("c")
    assert not channel.errors
    assert channel.relay.listening


async def test_relay_ends_when_cancelled(channel: Channel, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.relay.run)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert not channel.relay.listening


async def test_messages_of_other_channels_are_ignored(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    nursery.start_soon(channel.relay.run)
    await wait_all_tasks_blocked()
    for name in ("bandsync:events:{a}", "other:events:{a}", "bandsync:events:a", "", "\udcff{}"):
        channel.subscribers[-1].heard(name.encode(errors="surrogateescape"), b"news")
    channel.subscribers[-1].heard(b"bandsync:events:{{}}", b"\xff")
    assert channel.heard == [("a", b"news"), ("{}", b"\xff")]


async def test_hosted_session_is_not_unsubscribed(
    channel: Channel, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    channel.hosted = {"a"}
    nursery.start_soon(channel.relay.run)
    await wait_all_tasks_blocked()
    await channel.relay.unsubscribe("a")
    assert channel.channels == {"bandsync:events:{a}"}
    channel.hosted = set()
    await channel.relay.unsubscribe("a")
    assert channel.channels == set()


class Hosting(RelayHarness):
    """A hub whose channels are subscribed."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.channel = Channel()
        self.channel.hosted = self.hub.rooms
        self.era.relay = self.channel.relay
        nursery.start_soon(self.channel.relay.run)

    async def left(self) -> set[str]:
        """The subscribed channels, once all work has ended."""
        await self.hub.finished()
        await wait_all_tasks_blocked()
        return self.channel.channels


SONG = "bandsync:events:{song}"


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Hosting:
    hosting = Hosting(nursery)
    await wait_all_tasks_blocked()
    return hosting


async def test_channel_is_subscribed_before_the_session_is_read(
    stage: Hosting, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage.channel.gate = trio.Event()
    nursery.start_soon(stage.join, "Ann")
    await wait_all_tasks_blocked()
    assert stage.channel.log[1:] == [f"subscribe {SONG}"]
    assert stage.reads == 0
    stage.channel.gate.set()
    await wait_all_tasks_blocked()
    assert stage.reads == 1
    assert await stage.left() == {SONG}


async def test_joiner_sees_changes_published_during_the_read(
    stage: Hosting, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    await stage.commit_elsewhere(stage.bind("Cid"), "Cid", "far away")
    stage.remote.gate = trio.Event()
    joined: list[tuple[RecordingPeer, Room]] = []

    async def join() -> None:
        joined.append(await stage.join("Ann"))

    nursery.start_soon(join)
    await wait_all_tasks_blocked()
    read = stage.reads
    # Read, and the answer on its way: what is said now is only heard.
    (payload,) = await stage.chats(1)
    stage.receive(payload, payload)
    stage.remote.gate.set()
    await stage.left()
    ((ann, room),) = joined
    (snapshot,) = ann.received("snapshot")
    assert [chat["text"] for chat in snapshot["chat"]] == ["0"]  # type: ignore[attr-defined]
    assert ann.received("chat_message") == []
    assert room.mirror.session == stage.stored()
    assert stage.reads == read


async def leave(stage: HubHarness, ann: RecordingPeer, room: Room) -> None:
    assert await room.command(ann, LeaveSession(), "", "bye") is None


async def test_last_leave_unsubscribes(stage: Hosting, autojump_clock: MockClock) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await leave(stage, ann, room)
    assert await stage.left() == {SONG}
    await leave(stage, bob, room)
    assert stage.hub.rooms == {}
    assert await stage.left() == set()


async def test_session_reopened_while_closing_stays_subscribed(
    stage: Hosting, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    # The one that leaves holds the lock while the other one waits for it.
    stage.remote.commit_gate = trio.Event()
    nursery.start_soon(leave, stage, ann, room)
    await wait_all_tasks_blocked()
    nursery.start_soon(stage.join, "Bob")
    await wait_all_tasks_blocked()
    stage.remote.commit_gate.set()
    assert await stage.left() == {SONG}
    assert stage.hub.rooms["song"] is not room
    assert stage.hub.rooms["song"].peers.keys() == {"member Bob"}


async def test_session_opened_during_an_unsubscribe_is_subscribed_again(
    stage: Hosting, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.channel.gate = trio.Event()
    nursery.start_soon(leave, stage, ann, room)
    await wait_all_tasks_blocked()
    nursery.start_soon(stage.join, "Bob")
    await wait_all_tasks_blocked()
    # In the order in which Redis gets them.
    assert stage.channel.log[-2:] == [f"unsubscribe {SONG}", f"subscribe {SONG}"]
    stage.channel.gate.set()
    assert await stage.left() == {SONG}


async def test_cancelled_join_leaves_no_subscription(
    stage: Hosting, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as connection:
            nursery.start_soon(cancel_when_all_wait, connection)
            await stage.join("Ann")
    stage.remote.gate.set()
    assert stage.hub.rooms == {}
    assert await stage.left() == set()


async def test_unreadable_session_leaves_no_subscription(
    stage: Hosting, autojump_clock: MockClock
) -> None:
    stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    await leave(stage, ann, room)
    assert stage.hub.rooms == {}
    assert await stage.left() == set()


async def test_room_opens_without_a_subscription(stage: Hosting, autojump_clock: MockClock) -> None:
    stage.channel.errors.append(LinkLostError("gone"))
    ann, room = await stage.join("Ann")
    await stage.send_chat(room, ann, "hi")
    assert not isinstance(await stage.remote.get_session("song"), Lost)
    assert room.mirror.session == stage.stored()
