"""The relay of a server that hosts thousands of sessions: all are subscribed, some at a time."""

from collections.abc import Callable

import anyio
import pytest
import structlog
import trio
from structlog.testing import CapturingLogger
from trio.testing import MockClock

from bandsync.counters import Counters
from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.redis_address import RedisAddress, parse_address
from bandsync.redis_link.subscriber import Subscriber
from bandsync.storage.redis import Keys
from bandsync.storage.relay import Relay
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_storages import IMPATIENT, PATIENT, open_link
from tests.support.servers import PATIENCE_S

ROOM_IN_THE_QUEUE = 1000


class CountingSubscriber(Subscriber):
    """Confirms what is asked for a second later; counts how many wait at once.

    Attributes:
        waiting, most: how many wait now, and how many ever did.
        channels: what is subscribed.
    """

    def __init__(self, heard: Callable[[bytes, bytes], None]) -> None:
        super().__init__(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
            on_message=heard,
            probe_channel=b"probe",
            probe=trio.sleep,
        )
        self.waiting = 0
        self.most = 0
        self.channels: set[bytes] = set()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._usable = True
        task_status.started()
        await trio.sleep_forever()

    async def subscribe(self, channel: bytes) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        if self.waiting > ROOM_IN_THE_QUEUE:
            raise LinkLostError("too much waits", "overloaded")
        await trio.sleep(1)
        self.waiting -= 1
        self.channels.add(channel)


class Channel:
    """A relay with many sessions, and what came of it.

    Attributes:
        caught_up: set when all is subscribed.
        lost: why it never was.
    """

    def __init__(
        self, count: int, make_subscriber: Callable[[Callable[[bytes, bytes], None]], Subscriber]
    ) -> None:
        self.keys = Keys("bandsync:")
        self.caught_up = trio.Event()
        self.log = CapturingLogger()
        self.session_ids = [f"song {number}" for number in range(count)]
        self.heard: list[str] = []
        self.relay = Relay(
            make_subscriber,
            self.keys,
            hosted=lambda: self.session_ids,
            on_message=lambda session_id, payload: self.heard.append(session_id),
            resync=self._catch_up,
            counters=Counters(),
            log=structlog.wrap_logger(self.log, processors=[]),
        )

    async def _catch_up(self) -> None:
        self.caught_up.set()

    @property
    def lost(self) -> list[object]:
        return [call.kwargs["detail"] for call in self.log.calls]


@pytest.mark.parametrize("count", [0, 1, ROOM_IN_THE_QUEUE, 5 * ROOM_IN_THE_QUEUE + 1])
async def test_number_of_pending_subscriptions_is_bounded(
    nursery: trio.Nursery, autojump_clock: MockClock, count: int
) -> None:
    made: list[CountingSubscriber] = []

    def make(heard: Callable[[bytes, bytes], None]) -> CountingSubscriber:
        made.append(CountingSubscriber(heard))
        return made[-1]

    channel = Channel(count, make)
    nursery.start_soon(channel.relay.run)
    with trio.fail_after(600):
        await channel.caught_up.wait()
    (subscriber,) = made
    # Before it is compared with what is stored, each one is heard.
    assert len(subscriber.channels) == count
    assert subscriber.most <= ROOM_IN_THE_QUEUE
    assert (subscriber.waiting, channel.lost) == (0, [])


async def test_thousands_of_sessions_are_received_through_a_small_queue(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    async with open_link(shared_redis.url()) as link:

        def make(heard: Callable[[bytes, bytes], None]) -> Subscriber:
            return Subscriber(
                parse_address(shared_redis.url()),
                name="test",
                timeouts=PATIENT,
                on_message=heard,
                probe_channel=b"probe",
                probe=lambda payload: link.execute("PUBLISH", "probe", payload),
                max_queued=ROOM_IN_THE_QUEUE,
            )

        channel = Channel(5 * ROOM_IN_THE_QUEUE, make)
        async with trio.open_nursery() as listening:
            listening.start_soon(channel.relay.run)
            with trio.fail_after(PATIENCE_S):
                await channel.caught_up.wait()
            counted = await link.execute(
                "PUBSUB", "NUMSUB", *map(channel.keys.events, channel.session_ids)
            )
            assert isinstance(counted, list)
            assert counted[1::2] == [1] * len(channel.session_ids)
            listening.cancel_scope.cancel()
        assert channel.lost == []
