"""The setup under test (the stage): a Redis, a fault proxy before it, and a BandSync server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from bandsync.model.session import present, role_of
from bandsync.settings import OPTIONS
from bandsync.storage.records import read_session
from scripts.chaos.player import HOST, ChaosError, patience
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.json_messages import JsonMember, JsonMessage
from scripts.testbed.redis_server import RedisServer, free_port, reaper_of

ROOT = Path(__file__).resolve().parents[2]


__all__ = ["AsyncServerProcess", "ChaosSetup", "FaultProxy", "RedisServer", "start_setup"]

SERVE = (str(ROOT / "scripts" / "serve.py"),)

_POLL_S = 0.05


class AsyncServerProcess:
    """A server process as operators start it, on a port that it keeps across restarts.

    Args:
        log: the file for its log.
        flags: of `scripts/serve.py`.
        program: arguments of the interpreter, instead of `scripts/serve.py`.

    Attributes:
        port: the listening port.
        log: the file for its log.
    """

    def __init__(self, log: Path, *flags: str, program: Sequence[str] = SERVE) -> None:
        self.port = free_port()
        self.log = log
        self._flags = flags
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the server; return when it answers.

        Raises:
            ChaosError: it does not.
        """
        own_settings = {option.name for option in OPTIONS}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220  # it only starts; our own script
                [sys.executable, *self._program, *self._arguments()],
                # Not the repository's directory: it may contain an .env.
                cwd=self.log.parent,
                # A traced server is a module of this repository.
                env={name: text for name, text in os.environ.items() if name not in own_settings}
                | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C goes to this process only, which then ends the server.
                start_new_session=True,
            )
        self._reaper = reaper_of(self._process.pid)
        with patience("the start of the BandSync server"):
            while self._process.poll() is None:
                if await self.get("/api/health"):
                    return
                await trio.sleep(_POLL_S)
        raise ChaosError("the BandSync server does not start")

    async def get(self, path: str) -> Mapping[str, object]:
        """GET a JSON document over HTTP; empty while the server does not answer."""
        request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
        try:
            async with await trio.open_tcp_stream(HOST, self.port) as stream:
                await stream.send_all(request.encode())
                received = b"".join([data async for data in stream])
        except (OSError, trio.BrokenResourceError):
            return {}
        document: Mapping[str, object] = json.loads(received.partition(b"\r\n\r\n")[2] or b"{}")
        return document

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def gone(self) -> None:
        """Wait until the process has exited."""
        assert self._process is not None
        with patience("the end of the BandSync server"):
            await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
        self.kill()

    def kill(self) -> None:
        """Kill the process, if it still runs, and its reaper."""
        for process in (self._reaper, self._process):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        self._process = self._reaper = None

    def _arguments(self) -> list[str]:
        return [
            *("--host", HOST, "--port", str(self.port), "--rate-limit-factor", "0"),
            # Long enough for a restart, and short enough to show a member who was lost.
            *("--resume-grace-ms", "60000", "--max-members", "32"),
            *("--log-format", "json", "--log-level", "debug"),
            *self._flags,
        ]


def as_snapshot(session: str, fields: Mapping[str, str]) -> JsonMessage:
    """A session in Redis, in the form of a snapshot."""
    stored = read_session(session, {name: text.encode() for name, text in fields.items()})
    members: list[JsonMember] = [
        {
            "memberId": member.member_id,
            "displayName": member.display_name,
            "role": role_of(stored, member.member_id),
            "connected": member.connected,
        }
        for member in present(stored)
    ]
    return {
        "epoch": stored.epoch.id,
        "version": stored.version,
        "message": stored.headline.value,
        "transport": msgspec.to_builtins(stored.transport.value),
        "leaderId": stored.leader.member_id,
        "members": members,
        "chat": [{"messageId": chat.message_id} for chat in stored.chat],
    }


class ChaosSetup:
    """The parts of the setup. In a run without Redis there is no Redis and no proxy.

    Attributes:
        maybe_redis: the Redis, or None.
        maybe_proxy: the fault proxy between it and the server, or None.
        server: the server under test.
    """

    def __init__(
        self, redis: RedisServer | None, proxy: FaultProxy | None, server: AsyncServerProcess
    ) -> None:
        self.maybe_redis = redis
        self.maybe_proxy = proxy
        self.server = server

    @property
    def redis(self) -> RedisServer:
        """The Redis; only in a run with one."""
        assert self.maybe_redis is not None
        return self.maybe_redis

    @property
    def proxy(self) -> FaultProxy:
        """The proxy; only in a run with Redis."""
        assert self.maybe_proxy is not None
        return self.maybe_proxy

    async def query_redis(self, *command: str) -> Any:  # noqa: ANN401  # any Redis reply
        """Send a command to Redis, past the proxy; return the reply."""
        return await trio.to_thread.run_sync(partial(self.redis.cli, *command))

    async def on_redis(self) -> bool:
        """Whether the server reports that all sessions are in Redis."""
        health = await self.server.get("/api/health")
        return health.get("storageType") == "redis"

    async def until_on_redis(self, patience_s: float) -> None:
        """Wait until the server reports that all sessions are in Redis.

        Raises:
            ChaosError: it takes too long, or the server exited.
        """
        with trio.move_on_after(patience_s):
            while self.server.running:
                if await self.on_redis():
                    return
                await trio.sleep(_POLL_S)
            raise ChaosError("the BandSync server exited")
        status = await self.server.get("/api/storage/status")
        raise ChaosError(f"not back on Redis after {patience_s} s: {status}")


@asynccontextmanager
async def start_setup(
    nursery: trio.Nursery, log: Path, *, memory: bool
) -> AsyncIterator[ChaosSetup]:
    """Start a setup; kill its processes at the end."""
    redis = proxy = None
    server: AsyncServerProcess | None = None
    try:
        if memory:
            server = AsyncServerProcess(log, "--redis-enabled", "false")
        else:
            redis = RedisServer()
            await trio.to_thread.run_sync(redis.start)
            proxy = await nursery.start(FaultProxy(redis.port).run)
            server = AsyncServerProcess(log, "--redis-url", f"redis://{HOST}:{proxy.port}/0")
        await server.start()
        yield ChaosSetup(redis, proxy, server)
    finally:
        if server is not None:
            server.kill()
        if redis is not None:
            redis.close()
