import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from msgspec.structs import replace
from redis.exceptions import NoPermissionError, RedisError, TimeoutError  # noqa: A004

from bandsync.redis_link.errors import LinkLostError, loss_reason
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress, parse_address
from bandsync.redis_link.subscriber import Subscriber
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST, RedisServer
from tests.support.redis_storages import PATIENT
from tests.support.scripted_redis import ADDRESS, ScriptedRedis, start
from tests.support.servers import PATIENCE_S

PROBE = b"probe:stage"


@pytest.fixture
async def link(shared_redis: RedisServer, nursery: trio.Nursery) -> AsyncIterator[Link]:
    link = Link(
        parse_address(shared_redis.url()),
        name="bandsync-test",
        timeouts=PATIENT,
    )
    await nursery.start(link.run)
    yield link
    nursery.cancel_scope.cancel()


class Ears:
    """Records the messages of a subscriber."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, bytes]] = []
        self._more = trio.Event()

    def __call__(self, channel: bytes, payload: bytes) -> None:
        self.heard.append((channel, payload))
        self._more.set()

    async def wait(self, count: int) -> list[tuple[bytes, bytes]]:
        with trio.fail_after(PATIENCE_S):
            while len(self.heard) < count:
                self._more = trio.Event()
                await self._more.wait()
        return self.heard


def ignore(channel: bytes, payload: bytes) -> None:
    pass


async def no_probe(payload: bytes) -> None:
    raise LinkLostError("no link")


class Prober:
    """Publishes over a link, and counts."""

    def __init__(self, link: Link) -> None:
        self.sent = 0
        self._link = link
        self._more = trio.Event()

    async def __call__(self, payload: bytes) -> None:
        await self._link.execute("PUBLISH", PROBE, payload)
        self.sent += 1
        self._more.set()

    async def wait(self, count: int) -> None:
        with trio.fail_after(PATIENCE_S):
            while self.sent < count:
                self._more = trio.Event()
                await self._more.wait()


def subscriber_to(
    address: RedisAddress,
    *,
    on_message: Callable[[bytes, bytes], None] = ignore,
    probe: Callable[[bytes], Awaitable[object]] = no_probe,
    probe_interval_s: float = 10 * PATIENCE_S,
    on_removed: Callable[[bytes], None] | None = None,
    **deadlines: float,
) -> Subscriber:
    return Subscriber(
        address,
        name="bandsync-test-sub",
        on_message=on_message,
        probe_channel=PROBE,
        probe=probe,
        probe_interval_s=probe_interval_s,
        timeouts=replace(PATIENT, **deadlines),
        on_removed=on_removed,
    )


async def test_subscribed_messages_are_received(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    ears = Ears()
    subscriber = subscriber_to(parse_address(shared_redis.url()), on_message=ears)
    await start(nursery, subscriber)
    assert subscriber.usable
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as callers:
            for number in range(20):
                callers.start_soon(subscriber.subscribe, b"c%d" % number)
        # Confirmed means: whatever is published from now on comes.
        for number in range(20):
            assert await link.execute("PUBLISH", b"c%d" % number, b"\xff%d" % number) == 1
        await subscriber.subscribe(b"c0")
        await subscriber.unsubscribe(b"c1")
        await subscriber.unsubscribe(b"never")
        assert await link.execute("PUBLISH", b"c1", b"nobody") == 0
        assert await link.execute("PUBLISH", b"c0", b"once") == 1
    expected = [(b"c%d" % number, b"\xff%d" % number) for number in range(20)] + [(b"c0", b"once")]
    assert await ears.wait(21) == expected
    assert subscriber.outstanding == 0


async def test_callers_may_be_cancelled(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    ears = Ears()
    subscriber = subscriber_to(parse_address(shared_redis.url()), on_message=ears)
    await start(nursery, subscriber)
    for number in range(20):
        with trio.CancelScope() as scope:
            scope.cancel()
            await subscriber.subscribe(b"gone%d" % number)
        assert scope.cancelled_caught
    with trio.fail_after(PATIENCE_S):
        await subscriber.subscribe(b"here")
    assert await link.execute("PUBLISH", "here", "x") == 1
    assert await ears.wait(1) == [(b"here", b"x")]


async def test_refused_channel_is_an_error(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    redis_server.cli("ACL", "SETUSER", "deaf", "on", ">pw", "~*", "&probe:*", "+@all")
    subscriber = subscriber_to(parse_address(f"redis://deaf:pw@{HOST}:{redis_server.port}"))
    await start(nursery, subscriber)
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(NoPermissionError):
            await subscriber.subscribe(b"secret")
        await subscriber.subscribe(b"probe:other")
    assert subscriber.usable
    nursery.cancel_scope.cancel()


async def test_refused_probe_channel_is_a_loss(redis_server: RedisServer) -> None:
    redis_server.cli("ACL", "SETUSER", "stone", "on", ">pw", "~*", "resetchannels", "+@all")
    subscriber = subscriber_to(parse_address(f"redis://stone:pw@{HOST}:{redis_server.port}"))
    with trio.fail_after(PATIENCE_S), pytest.raises(NoPermissionError):
        await subscriber.run()
    assert not subscriber.usable


async def test_probes_are_not_delivered(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    ears = Ears()
    prober = Prober(link)
    subscriber = subscriber_to(
        parse_address(shared_redis.url()), on_message=ears, probe=prober, probe_interval_s=0.2
    )
    await start(nursery, subscriber)
    await subscriber.subscribe(b"c")
    await prober.wait(8)
    assert subscriber.usable
    await link.execute("PUBLISH", "c", "x")
    assert await ears.wait(1) == [(b"c", b"x")]


async def test_missing_probes_are_a_loss(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    proxy = FaultProxy(shared_redis.port)
    await nursery.start(proxy.run)
    prober = Prober(link)
    subscriber = subscriber_to(
        RedisAddress(host=HOST, port=proxy.port), probe=prober, probe_interval_s=0.1
    )
    outcome = await start(nursery, subscriber)
    proxy.black_hole("down")
    error = await outcome.wait()
    assert isinstance(error, TimeoutError)
    assert loss_reason(error) == "timed_out"
    assert prober.sent >= 3
    with pytest.raises(TimeoutError):
        await subscriber.subscribe(b"c")


async def test_killed_connection_is_a_loss(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    outcome = await start(nursery, subscriber_to(parse_address(shared_redis.url())))
    assert await link.execute("CLIENT", "KILL", "TYPE", "pubsub") == 1
    assert loss_reason(await outcome.wait()) == "reset"


# In virtual time, with a Redis of our own


async def started(nursery: trio.Nursery, scripted: ScriptedRedis, subscriber: Subscriber) -> Any:
    async def welcome() -> None:
        await scripted.answer(b"+OK\r\n", confirmation(b"subscribe", PROBE))

    nursery.start_soon(welcome)
    return await start(nursery, subscriber)


def confirmation(verb: bytes, channel: bytes) -> bytes:
    return b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n:1\r\n" % (len(verb), verb, len(channel), channel)


def message(channel: bytes, payload: bytes) -> bytes:
    return b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(channel),
        channel,
        len(payload),
        payload,
    )


async def test_silent_subscription_is_a_loss(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    deaf = False

    async def probe(payload: bytes) -> None:
        if not deaf:
            await scripted.send(message(PROBE, payload))
        else:
            # Nobody else's probe is proof of our life.
            await scripted.send(message(PROBE, b"foreign:1") + message(b"c", b"x"))

    outcome = await started(
        nursery, scripted, subscriber_to(ADDRESS, probe=probe, probe_interval_s=1)
    )
    await trio.sleep(60.5)
    assert outcome.error is None
    deaf = True
    began = trio.current_time()
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(3.5)


async def test_late_probe_counts(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)

    async def late(payload: bytes) -> None:
        await trio.sleep(1.7)
        await scripted.send(message(PROBE, payload))

    async def probe(payload: bytes) -> None:
        nursery.start_soon(late, payload)

    outcome = await started(
        nursery, scripted, subscriber_to(ADDRESS, probe=probe, probe_interval_s=1)
    )
    await trio.sleep(60)
    assert outcome.error is None
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("hangs", [False, True])
async def test_failed_probe_is_not_a_loss_of_the_subscription(
    hangs: bool,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)

    async def probe(payload: bytes) -> None:
        if hangs:
            await trio.sleep_forever()
        raise LinkLostError("no link")

    outcome = await started(
        nursery, scripted, subscriber_to(ADDRESS, probe=probe, probe_interval_s=1)
    )
    began = trio.current_time()
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(3)


async def test_unconfirmed_subscription_is_a_loss(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    subscriber = subscriber_to(ADDRESS, silence_s=1)
    await started(nursery, scripted, subscriber)
    with pytest.raises(TimeoutError):
        await subscriber.subscribe(b"c")


async def test_unconfirmed_probe_channel_is_a_loss(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    nursery.start_soon(scripted.answer, b"+OK\r\n")
    with pytest.raises(TimeoutError):
        await subscriber_to(ADDRESS, silence_s=1).run()


@pytest.mark.parametrize(
    "said",
    [
        b"+PONG\r\n",
        b"-ERR surprise\r\n",
        b"*1\r\n:1\r\n",
        confirmation(b"subscribe", b"surprise"),
        b"junk\r\n",
    ],
)
async def test_unexpected_messages_are_a_loss(
    said: bytes, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    outcome = await started(nursery, scripted, subscriber_to(ADDRESS))
    await scripted.send(said)
    assert loss_reason(await outcome.wait()) == "protocol"


async def test_wrong_confirmation_is_a_loss(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    subscriber = subscriber_to(ADDRESS)
    outcome = await started(nursery, scripted, subscriber)
    nursery.start_soon(scripted.answer, confirmation(b"subscribe", b"other"))
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisError):
        await subscriber.subscribe(b"c")
    assert loss_reason(await outcome.wait()) == "protocol"


async def test_own_stall_is_not_silence_of_redis(
    shared_redis: RedisServer, link: Link, nursery: trio.Nursery
) -> None:
    prober = Prober(link)
    subscriber = subscriber_to(
        parse_address(shared_redis.url()), probe=prober, probe_interval_s=0.2
    )
    outcome = await start(nursery, subscriber)
    for count in range(1, 6):
        await prober.wait(count)
        time.sleep(0.5)  # noqa: ASYNC251
    assert outcome.error is None


def test_subscriber_works_on_asyncio(shared_redis: RedisServer) -> None:
    async def main() -> None:
        heard = anyio.Event()

        def on_message(channel: bytes, payload: bytes) -> None:
            assert (channel, payload) == (b"c", b"x")
            heard.set()

        address = parse_address(shared_redis.url())
        link = Link(address, name="test", timeouts=PATIENT)

        async def probe(payload: bytes) -> None:
            await link.execute("PUBLISH", PROBE, payload)

        subscriber = subscriber_to(
            address, on_message=on_message, probe=probe, probe_interval_s=0.1
        )
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                await tasks.start(link.run)
                await tasks.start(subscriber.run)
                await subscriber.subscribe(b"c")
                await link.execute("PUBLISH", "c", "x")
                await heard.wait()
                tasks.cancel_scope.cancel()

    anyio.run(main, backend="asyncio")
