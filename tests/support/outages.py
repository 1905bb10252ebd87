"""Servers that use Redis, a Redis behind a fault proxy, and members who chat all the time."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio
from msgspec import Struct

from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST, RedisServer
from tests.support.servers import (
    PATIENCE_S,
    Message,
    Musician,
    Server,
    start_server,
)

KEY = "bandsync:session:{song}"

# The defaults with shorter periods.
QUICK: dict[str, Any] = {
    "redis_enabled": True,
    "redis_health_interval_ms": 50,
    "redis_retry_delay_on_failure": 20,
    "redis_connect_timeout": 500,
    "tick_interval_ms": 0,
}

# Messages without a version of their own.
VOLATILE = {"room_stats", "scroll_tick", "leader_requested", "leader_denied", "drift_correction"}


async def blocking(work: Callable[..., Any], *args: object) -> Any:
    """Run a blocking function in a thread, while the servers of this process go on."""
    return await trio.to_thread.run_sync(work, *args)


async def get(server: Server, path: str) -> Any:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        answer = await client.get(path)
    return answer.text if path == "/metrics" else answer.json()


async def until(wanted: Callable[[], Awaitable[Any]]) -> Any:
    """Poll until ``wanted`` returns a true value; for conditions without an event."""
    with trio.fail_after(PATIENCE_S):
        while not (found := await wanted()):  # noqa: ASYNC110
            await trio.sleep(0.02)
    return found


async def mode(server: Server, wanted: str) -> Message:
    """The storage status, when the mode is ``wanted``."""

    async def look() -> Message | None:
        status = await get(server, "/api/storage/status")
        return status if status["mode"] == wanted else None

    found: Message = await until(look)
    return found


async def start(nursery: trio.Nursery, url: str, **changes: object) -> Server:
    """A server that uses Redis."""
    server = await start_server(nursery, **(QUICK | {"redis_url": url} | changes))
    await mode(server, "redis")
    return server


def head(redis: RedisServer, key: str = KEY) -> Any:
    return json.loads(redis.cli("HGET", key, "head"))


def stored_chat(redis: RedisServer, key: str = KEY) -> list[str]:
    """The texts in the ring, the oldest first."""
    fields = redis.cli("HGETALL", key)
    ring = [json.loads(value) for name, value in fields.items() if name.startswith("chat:")]
    return [chat["text"] for chat in sorted(ring, key=lambda chat: chat["sentAt"])]


def in_order(player: Musician) -> None:
    """No version goes backwards within an epoch, or skips anything without a snapshot."""
    epoch, known = "", 0
    for message in player.inbox:
        kind = message["type"]
        if kind == "snapshot":
            assert message["epoch"] != epoch or message["version"] >= known, message
            epoch, known = message["epoch"], message["version"]
        elif "sessionId" in message and kind not in VOLATILE | {"sync_response"}:
            assert message["version"] == known + 1, (known, message)
            known = message["version"]


def heard(player: Musician) -> set[str]:
    """The texts received as an event, at most once, or in a snapshot."""
    events = [message["text"] for message in player.all("chat_message")]
    assert len(events) == len(set(events))
    shown = [chat["text"] for message in player.all("snapshot") for chat in message["chat"]]
    return {*events, *shown}


class Chatter:
    """Members who chat without a pause and wait for each ack."""

    def __init__(self, players: Sequence[Musician]) -> None:
        self.texts: list[str] = []
        self._players = players
        self._done = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number, player in enumerate(self._players):
                nursery.start_soon(self._talk, number, player)

    async def _talk(self, number: int, player: Musician) -> None:
        count = 0
        while not self._done.is_set():
            count += 1
            text = f"{number}: {count}"
            await player.ok("chat_message", text=text)
            self.texts.append(text)
            await trio.sleep(0.002)

    async def more(self, count: int = 5) -> None:
        """Wait until so many more have been acknowledged."""
        wanted = len(self.texts) + count
        with trio.fail_after(PATIENCE_S):
            while len(self.texts) < wanted:  # noqa: ASYNC110 (they come by themselves)
                await trio.sleep(0.002)

    def stop(self) -> None:
        self._done.set()


@asynccontextmanager
async def chatter(*players: Musician) -> AsyncIterator[Chatter]:
    """Members chat until the end of the block."""
    talk = Chatter(players)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        await talk.more()
        yield talk
        talk.stop()


class ProxiedRedis(Struct):
    """A Redis, and a proxy before it."""

    redis: RedisServer
    proxy: FaultProxy

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.proxy.port}/0"


def kill(proxied_redis: ProxiedRedis) -> Awaitable[object]:
    return blocking(proxied_redis.redis.kill)


async def reset(proxied_redis: ProxiedRedis) -> None:
    proxied_redis.proxy.refuse()
    proxied_redis.proxy.reset()


class Process:
    """A server in this process that can be killed without a drain."""

    def __init__(self, server: Server, scope: trio.CancelScope, ended: trio.Event) -> None:
        self.server = server
        self._scope = scope
        self._ended = ended

    async def kill(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


async def start_process(nursery: trio.Nursery, url: str, **changes: object) -> Process:
    async def run(*, task_status: trio.TaskStatus[Process]) -> None:
        ended = trio.Event()
        try:
            async with trio.open_nursery() as process:
                server = await start(process, url, **changes)
                task_status.started(Process(server, process.cancel_scope, ended))
                await trio.sleep_forever()
        finally:
            ended.set()

    process: Process = await nursery.start(run)
    return process
