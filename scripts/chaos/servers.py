"""The servers of a run with several servers, each behind a fault proxy of its own to one Redis."""

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from scripts.chaos.cluster_records import GRACE_S, Registers, ServerRun
from scripts.chaos.player import HOST, ChaosError
from scripts.chaos.stage import AsyncServerProcess, FaultProxy, RedisServer, as_snapshot
from scripts.testbed.json_messages import JsonMessage

_POLL_S = 0.05
_TRACED_SERVER = ("-m", "scripts.chaos.traced_server")


class ChaosServer:
    """One of the servers, over all its processes.

    Attributes:
        name: its SERVER_ID.
        proxy: between it and Redis.
        runs: its processes so far.
        log: file for the logs of all its processes.
        process: the current one.
    """

    def __init__(self, name: str, proxy: FaultProxy, directory: Path, prefix: str) -> None:
        self.name = name
        self.proxy = proxy
        self.runs: list[ServerRun] = []
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
        self.process = AsyncServerProcess(self.log, *self._flags)

    @property
    def latest_run(self) -> ServerRun:
        """The current process, or the last one."""
        return self.runs[-1]

    @property
    def serving(self) -> bool:
        """Whether clients may try to connect: nothing has ended it, as far as clients can know."""
        return bool(self.runs) and self.latest_run.end_signal is None

    async def start(self) -> None:
        """Start a process, on the same port as before."""
        trace = self._trace.with_suffix(f".trace.{len(self.runs)}")
        port = self.process.port
        self.process = AsyncServerProcess(
            self.log, *self._flags, program=(*_TRACED_SERVER, str(trace))
        )
        if self.runs:
            self.process.port = port
        begun = trio.current_time()
        await self.process.start()
        self.runs.append(ServerRun(self.name, trace, begun))

    async def end(self, number: signal.Signals) -> None:
        """End the process with a signal; return when it has exited."""
        latest_run = self.latest_run
        latest_run.end_signal, latest_run.ended = number, trio.current_time()
        self.process.signal(number)
        await self.process.gone()
        latest_run.gone = trio.current_time()

    def suspend(self) -> None:
        """Send SIGSTOP."""
        self.latest_run.suspensions.append([trio.current_time(), float("inf")])
        self.process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self.latest_run.suspensions[-1][1] = trio.current_time()
        self.process.signal(signal.SIGCONT)


class ChaosCluster:
    """The Redis and the servers of a run.

    Attributes:
        redis: the Redis that all servers share.
        servers: the servers.
        clock_offset_s: added to the time of a trace entry, gives the time of this process.
        data_losses: times at which Redis lost data.
    """

    def __init__(self, redis: RedisServer, servers: list[ChaosServer]) -> None:
        self.redis = redis
        self.servers = servers
        self.clock_offset_s = trio.current_time() - time.perf_counter()
        self.data_losses: list[float] = []

    async def query_redis(self, *command: str) -> Any:  # noqa: ANN401  # any Redis reply
        """Send a command to Redis, past the proxies; return the reply."""
        return await trio.to_thread.run_sync(partial(self.redis.cli, *command))

    async def stored(self, session: str) -> tuple[JsonMessage, Registers] | None:
        """A session in Redis, as a snapshot and its registers; None if it is not there."""
        fields = await self.query_redis("HGETALL", f"bandsync:session:{{{session}}}")
        if not fields:
            return None
        head = json.loads(fields["head"])
        registers = Registers(
            leader=head["leader"],
            transport=head["transport"]["stamp"],
            message=head["message"]["stamp"],
        )
        return as_snapshot(session, fields), registers

    async def until_all_on_redis(self, patience_s: float) -> None:
        """Wait until every server reports that all its sessions are in Redis.

        Raises:
            ChaosError: it takes too long, or a server exited.
        """
        for server in self.servers:
            with trio.move_on_after(patience_s):
                while server.process.running:
                    if (await server.process.get("/api/health")).get("storageType") == "redis":
                        break
                    await trio.sleep(_POLL_S)
                else:
                    raise ChaosError(f"server {server.name} exited by itself")
                continue
            status = await server.process.get("/api/storage/status")
            raise ChaosError(f"{server.name} is not on Redis after {patience_s} s: {status}")


@asynccontextmanager
async def start_cluster(
    nursery: trio.Nursery, directory: Path, prefix: str, count: int
) -> AsyncIterator[ChaosCluster]:
    """Start a Redis and servers; kill them at the end. Only their logs remain."""
    redis = RedisServer()
    servers: list[ChaosServer] = []
    try:
        await trio.to_thread.run_sync(redis.start)
        for number in range(count):
            proxy = await nursery.start(FaultProxy(redis.port).run)
            servers.append(ChaosServer(f"s{number + 1}", proxy, directory, prefix))
        async with trio.open_nursery() as starting:
            for server in servers:
                starting.start_soon(server.start)
        yield ChaosCluster(redis, servers)
    finally:
        for server in servers:
            server.process.kill()
        redis.close()
