"""What `chaos.py --servers` breaks: servers, each behind a proxy of its own to one Redis."""

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from scripts.chaos.judge import Message
from scripts.chaos.player import HOST, ChaosError
from scripts.chaos.stage import SERVE, BandSync, FaultProxy, RedisServer, as_snapshot

GRACE_S = 3.0

_POLL_S = 0.05
_TRACED = str(Path(SERVE[0]).with_name("chaosserve.py"))


@dataclass
class Life:
    """A server process, from its start to its end.

    Attributes:
        trace: where it writes down what it commits.
        ended: when it was told to end; ``gone``, when it had.
        how: it was ended; None if it was not.
        pauses: from a SIGSTOP to the SIGCONT.
    """

    server: str
    trace: Path
    begun: float
    ended: float = float("inf")
    gone: float = float("inf")
    how: signal.Signals | None = None
    pauses: list[list[float]] = field(default_factory=list)

    def paused(self, begin: float, end: float) -> bool:
        """Whether it was, for a part of this time."""
        return any(start <= end and stop >= begin for start, stop in self.pauses)

    @property
    def paused_now(self) -> bool:
        """Whether it is."""
        return bool(self.pauses) and self.pauses[-1][1] == float("inf")


class Host:
    """One of the servers, over all its lives."""

    def __init__(self, name: str, proxy: FaultProxy, directory: Path, prefix: str) -> None:
        self.name = name
        self.proxy = proxy
        self.lives: list[Life] = []
        self._trace = directory / f"{prefix}-{name}.trace"
        self.log = directory / f"{prefix}-{name}.log"
        for path in (self.log, *directory.glob(f"{prefix}-{name}.trace.*")):
            path.unlink(missing_ok=True)
        self._flags = (
            *("--server-id", name, "--redis-url", f"redis://{HOST}:{proxy.port}/0"),
            *("--resume-grace-ms", str(round(GRACE_S * 1000))),
            *("--redis-health-interval-ms", "100", "--redis-connect-timeout", "1000"),
            *("--drain-timeout-ms", "3000"),
        )
        self.process = BandSync(self.log, *self._flags)

    @property
    def life(self) -> Life:
        """The latest."""
        return self.lives[-1]

    @property
    def up(self) -> bool:
        """Whether it serves, as far as anybody can know who is not connected."""
        return bool(self.lives) and self.life.how is None

    async def start(self) -> None:
        """Start it, again."""
        trace = self._trace.with_suffix(f".trace.{len(self.lives)}")
        port = self.process.port
        self.process = BandSync(self.log, *self._flags, program=(_TRACED, str(trace)))
        if self.lives:
            self.process.port = port
        begun = trio.current_time()
        await self.process.start()
        self.lives.append(Life(self.name, trace, begun))

    async def end(self, number: signal.Signals) -> None:
        """End it, and wait until it has ended."""
        life = self.life
        life.how, life.ended = number, trio.current_time()
        self.process.end(number)
        await self.process.gone()
        life.gone = trio.current_time()

    def pause(self) -> None:
        """SIGSTOP."""
        self.life.pauses.append([trio.current_time(), float("inf")])
        self.process.end(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.life.pauses[-1][1] = trio.current_time()
        self.process.end(signal.SIGCONT)


class Cast:
    """All of it together.

    Attributes:
        lag: what must be added to a time of a trace to have one of ours.
        wiped: when Redis lost data.
    """

    def __init__(self, redis: RedisServer, hosts: list[Host]) -> None:
        self.redis = redis
        self.hosts = hosts
        self.lag = trio.current_time() - time.perf_counter()
        self.wiped: list[float] = []

    async def ask_redis(self, *command: str) -> Any:  # noqa: ANN401  # whatever Redis replies
        """The reply of Redis itself, past the proxies."""
        return await trio.to_thread.run_sync(partial(self.redis.cli, *command))

    async def stored(self, session: str) -> tuple[Message, Message] | None:
        """A session in Redis: as a snapshot, and its head with all stamps; None if it is not."""
        fields = await self.ask_redis("HGETALL", f"bandsync:session:{{{session}}}")
        return (as_snapshot(session, fields), json.loads(fields["head"])) if fields else None

    async def until_all_on_redis(self, patience_s: float) -> None:
        """Wait until every server says that all its sessions are in Redis.

        Raises:
            ChaosError: it takes too long, or one died.
        """
        for host in self.hosts:
            with trio.move_on_after(patience_s):
                while host.process.running:
                    if (await host.process.get("/api/health")).get("storageType") == "redis":
                        break
                    await trio.sleep(_POLL_S)
                else:
                    raise ChaosError(f"server {host.name} died by itself")
                continue
            status = await host.process.get("/api/storage/status")
            raise ChaosError(f"{host.name} is not on Redis after {patience_s} s: {status}")


@asynccontextmanager
async def cast(
    nursery: trio.Nursery, directory: Path, prefix: str, servers: int
) -> AsyncIterator[Cast]:
    """A cast that is ready; nothing of it is left afterwards but its logs."""
    redis = RedisServer()
    hosts: list[Host] = []
    try:
        await trio.to_thread.run_sync(redis.start)
        for number in range(servers):
            proxy = await nursery.start(FaultProxy(redis.port).run)
            hosts.append(Host(f"s{number + 1}", proxy, directory, prefix))
        async with trio.open_nursery() as starting:
            for host in hosts:
                starting.start_soon(host.start)
        yield Cast(redis, hosts)
    finally:
        for host in hosts:
            host.process.kill()
        redis.close()
