"""Workers that run under a supervisor in this process, and its log."""

import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from msgspec.structs import replace

from bandsync.settings import Settings
from bandsync.workers.supervisor import RestartDelays, Supervising, supervise
from tests.support.log_capture import LogCapture
from tests.support.servers import PATIENCE_S, TEST_SETTINGS
from tests.test_serve import SCRIPT

COMMAND = [sys.executable, str(SCRIPT), "--worker"]
QUICK = RestartDelays(first=0.01, longest=0.05)


class WorkerGroup:
    """Workers that run under a supervisor in this process.

    Attributes:
        settings: those of the group.
        log: the supervisor's log.
        lines: what the supervisor announced.
        done: set when the supervisor has returned.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = LogCapture()
        self.lines: list[str] = []
        self.done = trio.Event()
        self.supervising: Supervising

    @property
    def port(self) -> int:
        return self.supervising.port

    async def start(
        self,
        nursery: trio.Nursery,
        command: list[str] = COMMAND,
        restart_delays: RestartDelays = QUICK,
    ) -> None:
        async def run(*, task_status: trio.TaskStatus[Supervising]) -> None:
            try:
                await supervise(
                    self.settings,
                    self.log.logger,
                    command=command,
                    announce=self.lines.append,
                    restart_delays=restart_delays,
                    task_status=task_status,
                )
            finally:
                self.done.set()

        self.supervising = await nursery.start(run)

    async def stop(self) -> None:
        self.supervising.stop()
        with trio.fail_after(PATIENCE_S):
            await self.done.wait()

    def pid(self, server_id: str) -> int:
        """The process that runs as this server now."""
        return self.log.all("worker.started", server_id=server_id)[-1]["pid"]


def group_settings(redis_url: str, **changes: object) -> Settings:
    ours = {
        "redis_enabled": True,
        "redis_url": redis_url,
        "redis_max_retries": 0,
        "redis_health_interval_ms": 50,
        "redis_retry_delay_on_failure": 20,
        "workers": 2,
    }
    return replace(TEST_SETTINGS, **(ours | changes))


@asynccontextmanager
async def working(
    redis_url: str, **changes: object
) -> AsyncIterator[tuple[WorkerGroup, trio.Nursery]]:
    """Workers that all listen, and are stopped at the end."""
    group = WorkerGroup(group_settings(redis_url, **changes))
    async with trio.open_nursery() as nursery:
        await group.start(nursery)
        yield group, nursery
        await group.stop()
        nursery.cancel_scope.cancel()


def upgrade(path: str) -> bytes:
    """The head of a handshake: RFC 6455, section 4.1."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: stage",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def ask_health(client: socket.socket) -> tuple[int, str]:
    """The status and the server id that `/api/health` answers over this connection."""
    client.sendall(b"GET /api/health HTTP/1.1\r\nHost: stage\r\n\r\n")
    received = b""
    while (
        found := re.search(rb'^HTTP/1.1 (\d+).*"serverId":"([^"]+)"', received, re.DOTALL)
    ) is None:
        received += client.recv(4096)
    return int(found[1]), found[2].decode()
