"""The loss of a connection, and the deadlines that detect it."""

import time

import anyio
import pytest
import trio
import trio.testing
from redis.exceptions import (
    RedisError,
    TimeoutError,  # noqa: A004
)

from bandsync.redis_link.errors import LinkLostError, loss_reason
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_links import link_to, proxied
from tests.support.scripted_redis import ADDRESS, ScriptedRedis, start
from tests.support.servers import PATIENCE_S


async def test_loss_fails_all_waiting_commands(proxy: FaultProxy, nursery: trio.Nursery) -> None:
    link = link_to(proxied(proxy))
    outcome = await start(nursery, link)
    errors: list[RedisError] = []

    async def wait() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute("BLPOP", "nothing", 0)
        errors.append(raised.value)

    async def wait_for_several() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute_all([("PING",), ("PING",)])
        errors.append(raised.value)

    async with trio.open_nursery() as callers:
        for _ in range(10):
            callers.start_soon(wait)
        # Before them, it would be answered.
        await trio.testing.wait_all_tasks_blocked()
        callers.start_soon(wait_for_several)
        await trio.testing.wait_all_tasks_blocked()
        proxy.reset()
    lost = await outcome.wait()
    assert loss_reason(lost) == "reset"
    assert {loss_reason(error) for error in errors} == {"reset"}
    assert len({id(error) for error in errors}) == 11
    assert not link.usable
    assert link.outstanding == 0
    with pytest.raises(LinkLostError):
        await link.execute("PING")


async def test_killed_redis_is_a_loss(redis_server: RedisServer, nursery: trio.Nursery) -> None:
    outcome = await start(nursery, link_to(redis_server.url()))
    redis_server.kill()
    assert loss_reason(await outcome.wait()) == "reset"


async def test_cancelled_run_closes_the_connection(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url())
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as links:
            await links.start(link.run)

            async def wait() -> None:
                with pytest.raises(LinkLostError, match="closed"):
                    await link.execute("BLPOP", "nothing", 0)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            links.cancel_scope.cancel()
    assert not link.usable


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"junk\r\n", "protocol"),
        (b"$100\r\nhalf", "reset"),
        (b"", "reset"),
        (b"+PONG\r\n+PONG\r\n", "protocol"),
    ],
)
async def test_malformed_replies_are_a_loss(
    said: bytes, reason: str, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS)
    outcome = await start(nursery, link, scripted)

    async def call() -> None:
        try:
            assert await link.execute("PING") == b"PONG"
        except RedisError as error:
            assert loss_reason(error) == reason

    async with trio.open_nursery() as callers:
        callers.start_soon(call)
        await scripted.command()
        await scripted.send(said)
        await scripted.stream.send_eof()
    assert loss_reason(await outcome.wait()) == reason


async def test_unexpected_reply_is_a_loss(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    outcome = await start(nursery, link_to(ADDRESS), scripted)
    await scripted.send(b"+PONG\r\n")
    assert loss_reason(await outcome.wait()) == "protocol"


async def test_full_queue_is_a_loss(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, max_queued=3)
    outcome = await start(nursery, link, scripted)
    reasons: list[str | None] = []

    async def call() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute("PING")
        reasons.append(loss_reason(raised.value))

    async with trio.open_nursery() as callers:
        for _ in range(4):
            callers.start_soon(call)
    assert reasons == ["overloaded"] * 4
    assert loss_reason(await outcome.wait()) == "overloaded"


async def test_silence_is_a_loss(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    # Idle is not silent.
    await trio.sleep(100)
    assert link.usable
    nursery.start_soon(scripted.answer, b"+PONG\r\n")
    assert await link.execute("PING") == b"PONG"
    await trio.sleep(100.5)
    assert link.usable
    began = trio.current_time()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert trio.current_time() - began == pytest.approx(1)
    assert isinstance(await outcome.wait(), TimeoutError)


async def test_silence_counts_from_the_latest_data(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=5)
    await start(nursery, link, scripted)
    replies: list[object] = []

    async def call() -> None:
        replies.append(await link.execute("GET", "long"))

    async with trio.open_nursery() as callers:
        callers.start_soon(call)
        await scripted.send(b"$4\r\n")
        for _ in range(4):
            await trio.sleep(0.9)
            await scripted.send(b"x")
        await scripted.send(b"\r\n")
    assert replies == [b"xxxx"]
    # But not for ever: a reply that trickles in is too late some time.
    began = trio.current_time()
    async with trio.open_nursery() as callers:

        async def trickle() -> None:
            await scripted.send(b"$100\r\n")
            while True:
                await trio.sleep(0.9)
                await scripted.send(b"x")

        callers.start_soon(trickle)
        with pytest.raises(TimeoutError):
            await link.execute("GET", "long")
        callers.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(5)


async def test_oldest_command_counts_for_silence(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    began = trio.current_time()

    async def call() -> None:
        with pytest.raises(TimeoutError):
            await link.execute("PING")

    async with trio.open_nursery() as callers:
        while link.usable:
            callers.start_soon(call)
            await trio.sleep(0.3)
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(1.2)


async def test_watch_sleeps_while_replies_arrive(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=5)
    await start(nursery, link, scripted)
    sleep_until = anyio.sleep_until
    deadlines: list[float] = []

    async def counted(deadline: float) -> None:
        deadlines.append(deadline)
        await sleep_until(deadline)

    monkeypatch.setattr("anyio.sleep_until", counted)
    for _ in range(1000):
        nursery.start_soon(scripted.answer, b"+PONG\r\n")
        await link.execute("PING")
        await trio.sleep(0.01)
    # In ten seconds.
    assert len(deadlines) <= 20


async def test_peer_that_does_not_read_is_a_loss(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch, lockstep=True)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    began = trio.current_time()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(1)


async def test_stopped_redis_and_dropped_packets_are_a_loss(
    redis_server: RedisServer, proxy: FaultProxy, nursery: trio.Nursery
) -> None:
    link = link_to(proxied(proxy), silence_s=0.2)
    outcome = await start(nursery, link)
    proxy.black_hole()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert isinstance(await outcome.wait(), TimeoutError)
    proxy.heal()
    link = link_to(redis_server.url(), command_s=0.2)
    outcome = await start(nursery, link)
    redis_server.stop()
    try:
        # More than the kernel takes: the writer is stuck.
        with pytest.raises(TimeoutError):
            await link.execute("ECHO", b"x" * 30_000_000)
        assert isinstance(await outcome.wait(), TimeoutError)
    finally:
        redis_server.resume()


async def test_own_stall_is_not_silence_of_redis(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    silence_s = 1.0
    link = link_to(shared_redis.url(), silence_s=silence_s, command_s=silence_s)
    await start(nursery, link)
    for _ in range(3):
        async with trio.open_nursery() as callers:
            callers.start_soon(link.execute, "BLPOP", "nothing", 0.1)
            await trio.testing.wait_all_tasks_blocked()
            assert link.outstanding == 1
            time.sleep(silence_s * 1.1)  # noqa: ASYNC251
        assert link.usable
    nursery.cancel_scope.cancel()


async def test_reply_in_flight_is_awaited_after_a_stall(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url(), silence_s=1.0)
    await start(nursery, link)
    async with trio.open_nursery() as callers:
        callers.start_soon(link.execute, "BLPOP", "nothing", 2.2)
        await trio.testing.wait_all_tasks_blocked()
        time.sleep(2)  # noqa: ASYNC251
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_stall_before_the_send_is_not_silence(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=1)
    await start(nursery, link, scripted)

    async def stall() -> None:
        autojump_clock.jump(1.5)

    async def answer() -> None:
        await scripted.command()
        await trio.sleep(0.9)
        await scripted.send(b"+PONG\r\n")

    # Often enough that the stall comes after the call and before the writer some time.
    for _ in range(20):
        async with trio.open_nursery() as callers:
            callers.start_soon(link.execute, "PING")
            callers.start_soon(stall)
            callers.start_soon(answer)
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_stall_of_the_reader_is_not_silence(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=1)
    await start(nursery, link, scripted)
    sleep = anyio.sleep

    async def stalled_sleep(seconds: float) -> None:
        monkeypatch.setattr("anyio.sleep", sleep)
        await scripted.answer(b"+PONG\r\n")
        callers.start_soon(link.execute, "PING")
        await scripted.command()
        autojump_clock.jump(1.5)
        callers.start_soon(scripted.send, b"+PONG\r\n")

    async with trio.open_nursery() as callers:
        monkeypatch.setattr("anyio.sleep", stalled_sleep)
        callers.start_soon(link.execute, "PING")
    assert link.usable
    nursery.cancel_scope.cancel()
