"""Commands over one link: pipelining, cancellation, scripts, error replies."""

import random
import socket
import time

import anyio
import pytest
import trio
import trio.testing
from redis.exceptions import (
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from bandsync.redis_link.errors import LinkLostError, loss_reason
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.script import Script
from scripts.testbed.redis_server import HOST, RedisServer
from tests.support.redis_links import link_to
from tests.support.scripted_redis import ADDRESS, ScriptedRedis, start
from tests.support.servers import PATIENCE_S


async def test_replies_have_their_types(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    assert await link.execute("SET", "replies", "né") == b"OK"
    assert await link.execute(b"GET", "replies") == "né".encode()
    assert await link.execute("GET", "no such") is None
    assert await link.execute("INCRBY", "replies:n", 7) == 7
    assert await link.execute("EVAL", "return {1, 'two', {3}, false}", 0) == [1, b"two", [3], None]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await link.execute("LPUSH", "replies", "x")
    with pytest.raises(TypeError):
        await link.execute("SET", None)  # type: ignore[arg-type]
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_concurrent_commands_get_their_replies(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    first, error, last = await link.execute_all(
        [("SET", "several", "1"), ("LPUSH", "several", "x"), ("INCR", "several")]
    )
    assert (first, last) == (b"OK", 2)
    assert isinstance(error, ResponseError)
    assert await link.execute_all([]) == []
    with pytest.raises(TypeError):
        await link.execute_all([("INCR", "several"), ("SET", None)])  # type: ignore[list-item]
    assert await link.execute("GET", "several") == b"2"
    nursery.cancel_scope.cancel()


async def test_queued_commands_leave_in_one_write(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS)
    await start(nursery, link, scripted)
    scripted.wire.writes.clear()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as callers:
            for _ in range(20):
                callers.start_soon(link.execute, "PING")
            callers.start_soon(link.execute_all, [("PING",), ("PING",)])
            await trio.testing.wait_all_tasks_blocked()
            assert link.outstanding == 22
            assert len(scripted.wire.writes) == 1
            await scripted.send(b"+PONG\r\n" * 22)
    nursery.cancel_scope.cancel()


async def test_callers_may_be_cancelled_at_any_moment(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    rng = random.Random(20)
    answered = cancelled = 0

    async def call(number: int, patience: int) -> None:
        nonlocal answered, cancelled
        with trio.CancelScope() as scope:
            asking.start_soon(lose_patience, scope, patience)
            assert await link.execute("ECHO", number) == str(number).encode()
            replies = await link.execute_all([("ECHO", number), ("ECHO", -number)])
            assert replies == [str(number).encode(), str(-number).encode()]
            answered += 1
        cancelled += scope.cancelled_caught

    async def lose_patience(scope: trio.CancelScope, patience: int) -> None:
        for _ in range(patience):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(PATIENCE_S):
        for _ in range(20):
            async with trio.open_nursery() as asking:
                for number in range(50):
                    asking.start_soon(call, number, rng.choice([0, 1, 2, 3, 5, 8, 1000]))
        assert await link.execute("ECHO", "end") == b"end"
    assert answered
    assert cancelled
    assert link.outstanding == 0
    nursery.cancel_scope.cancel()


async def test_unknown_scripts_are_loaded(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    script = Script("return {KEYS[1], ARGV[1]}")
    for _ in range(2):
        assert await link.execute("SCRIPT", "FLUSH") == b"OK"
        assert await script.execute(link, ["k"], [1]) == [b"k", b"1"]
        assert await script.execute(link, ["k"], [2]) == [b"k", b"2"]
    with pytest.raises(ResponseError):
        await Script("return redis.call('NOPE')").execute(link, [], [])
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("config", "verb", "reason"),
    [
        ({"maxmemory": "1"}, "INCR", "oom"),
        ({"min-replicas-to-write": "1"}, "INCR", "readonly"),
        ({"replicaof": "127.0.0.1 1"}, "INCR", "readonly"),
        ({"replicaof": "127.0.0.1 1", "replica-serve-stale-data": "no"}, "GET", "masterdown"),
    ],
)
async def test_unwritable_redis_is_a_loss(
    config: dict[str, str], verb: str, reason: str, nursery: trio.Nursery, redis_binary: None
) -> None:
    script = Script(f"return redis.call('{verb}', KEYS[1])")
    with RedisServer() as server:
        link = link_to(server.url())
        await start(nursery, link)
        await script.execute(link, ["k"], [])
        for name, value in config.items():
            if name == "replicaof":
                server.cli("REPLICAOF", *value.split())
            else:
                server.cli("CONFIG", "SET", name, value)
        with pytest.raises(RedisError) as raised:
            await link.execute(verb, "k")
        assert loss_reason(raised.value) == reason
        with pytest.raises(RedisError) as raised:
            await script.execute(link, ["k"], [])
        assert loss_reason(raised.value) == reason
        # That is for the supervisor to judge.
        assert link.usable
        nursery.cancel_scope.cancel()


def test_link_works_on_asyncio(redis_server: RedisServer) -> None:
    async def main() -> None:
        link = link_to(redis_server.url(), silence_s=1.0)
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                await tasks.start(link.run)
                async with anyio.create_task_group() as callers:

                    async def call(number: int) -> None:
                        with anyio.move_on_after(0 if number % 3 == 0 else None):
                            reply = await link.execute("ECHO", number)
                            assert reply == str(number).encode()

                    for number in range(100):
                        callers.start_soon(call, number)
                assert await link.execute_all([("PING",)] * 3) == [b"PONG"] * 3
                async with anyio.create_task_group() as callers:
                    callers.start_soon(link.execute, "BLPOP", "nothing", 0.1)
                    await anyio.wait_all_tasks_blocked()
                    time.sleep(1.1)  # noqa: ASYNC251
                assert link.usable
                tasks.cancel_scope.cancel()

            link = link_to(redis_server.url(), silence_s=0.2)
            lost: RedisError | None = None
            ended = anyio.Event()

            async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
                nonlocal lost
                try:
                    await link.run(task_status=task_status)
                except RedisError as error:
                    lost = error
                ended.set()

            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                redis_server.stop()
                with pytest.raises(TimeoutError):
                    await link.execute("PING")
                await ended.wait()
            assert isinstance(lost, TimeoutError)

    try:
        anyio.run(main, backend="asyncio")
    finally:
        redis_server.resume()


def test_reset_on_asyncio_is_a_loss() -> None:
    async def main() -> None:
        listener = socket.create_server((HOST, 0))
        with listener:

            def serve() -> None:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1000)
                    peer.sendall(b"+OK\r\n")
                    peer.recv(1000)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

            link = link_to(RedisAddress(host=HOST, port=listener.getsockname()[1]))
            with anyio.fail_after(PATIENCE_S), pytest.raises(ExceptionGroup) as raised:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, serve)
                    await tasks.start(link.run)
                    with pytest.raises(LinkLostError):
                        await link.execute("PING")
            (error,) = raised.value.exceptions
            assert loss_reason(error) == "reset"

    anyio.run(main, backend="asyncio")
