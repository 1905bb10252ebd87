"""What chaos.py breaks and what must not notice: a Redis, a proxy before it, a BandSync server."""

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
from scripts.chaos.judge import Message
from scripts.chaos.player import HOST, ChaosError, patience
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import RedisServer, free_port, reaper_of

ROOT = Path(__file__).resolve().parents[2]


__all__ = ["BandSync", "FaultProxy", "RedisServer", "Stage", "stage"]

SERVE = (str(ROOT / "scripts" / "serve.py"),)

_POLL_S = 0.05


class BandSync:
    """A server as operators start it, on a port that it keeps across restarts.

    Args:
        log: the file for its log.
        flags: of `scripts/serve.py`.
        program: what is started, if it is not that.
    """

    def __init__(self, log: Path, *flags: str, program: Sequence[str] = SERVE) -> None:
        self.port = free_port()
        self.log = log
        self._flags = flags
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it; returns when it serves.

        Raises:
            ChaosError: it does not.
        """
        ours = {option.name for option in OPTIONS}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220  # it only starts; our own script
                [sys.executable, *self._program, *self._arguments()],
                # No `.env` there that would change the settings.
                cwd=self.log.parent,
                env={name: text for name, text in os.environ.items() if name not in ours}
                | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C is for us, who then end it.
                start_new_session=True,
            )
        self._reaper = reaper_of(self._process.pid)
        with patience("the start of the BandSync server"):
            while self._process.poll() is None:
                if await self.get("/api/health"):
                    return
                await trio.sleep(_POLL_S)
        raise ChaosError("the BandSync server does not start")

    async def get(self, path: str) -> Message:
        """A JSON document of its HTTP interface; empty while it does not answer."""
        request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
        try:
            async with await trio.open_tcp_stream(HOST, self.port) as stream:
                await stream.send_all(request.encode())
                received = b"".join([data async for data in stream])
        except (OSError, trio.BrokenResourceError):
            return {}
        document: Message = json.loads(received.partition(b"\r\n\r\n")[2] or b"{}")
        return document

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def end(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def gone(self) -> None:
        """Wait until it has ended."""
        assert self._process is not None
        with patience("the end of the BandSync server"):
            await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
        self.kill()

    def kill(self) -> None:
        """End it, if it still runs, and its reaper."""
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
            # Long enough for a restart, and short enough not to hide a member who was lost.
            *("--resume-grace-ms", "60000", "--max-members", "32"),
            *("--log-format", "json", "--log-level", "debug"),
            *self._flags,
        ]


def as_snapshot(session: str, fields: Mapping[str, str]) -> Message:
    """A session as Redis has it, in the form of a snapshot."""
    stored = read_session(session, {name: text.encode() for name, text in fields.items()})
    members = [
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


class Stage:
    """All of it together; `redis` is None for a run on memory only."""

    def __init__(
        self, redis: RedisServer | None, proxy: FaultProxy | None, server: BandSync
    ) -> None:
        self.maybe_redis = redis
        self.maybe_proxy = proxy
        self.server = server

    @property
    def redis(self) -> RedisServer:
        """The Redis."""
        assert self.maybe_redis is not None
        return self.maybe_redis

    @property
    def proxy(self) -> FaultProxy:
        """The proxy between it and the server."""
        assert self.maybe_proxy is not None
        return self.maybe_proxy

    async def ask_redis(self, *command: str) -> Any:  # noqa: ANN401  # whatever Redis replies
        """The reply of Redis itself, past the proxy."""
        return await trio.to_thread.run_sync(partial(self.redis.cli, *command))

    async def on_redis(self) -> bool:
        """Whether all sessions are on Redis, says the server."""
        health = await self.server.get("/api/health")
        return health.get("storageType") == "redis"

    async def until_on_redis(self, patience_s: float) -> None:
        """Wait for it.

        Raises:
            ChaosError: it takes too long, or the server died.
        """
        with trio.move_on_after(patience_s):
            while self.server.running:
                if await self.on_redis():
                    return
                await trio.sleep(_POLL_S)
            raise ChaosError("the BandSync server died")
        status = await self.server.get("/api/storage/status")
        raise ChaosError(f"not back on Redis after {patience_s} s: {status}")


@asynccontextmanager
async def stage(nursery: trio.Nursery, log: Path, *, memory: bool) -> AsyncIterator[Stage]:
    """A stage that is ready to be played on; nothing of it is left afterwards."""
    redis = proxy = None
    server: BandSync | None = None
    try:
        if memory:
            server = BandSync(log, "--redis-enabled", "false")
        else:
            redis = RedisServer()
            await trio.to_thread.run_sync(redis.start)
            proxy = await nursery.start(FaultProxy(redis.port).run)
            server = BandSync(log, "--redis-url", f"redis://{HOST}:{proxy.port}/0")
        await server.start()
        yield Stage(redis, proxy, server)
    finally:
        if server is not None:
            server.kill()
        if redis is not None:
            redis.close()
