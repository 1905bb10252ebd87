"""All WebSocket connections of a server, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from structlog.typing import FilteringBoundLogger

from bandsync.model.transport import MAX_TEMPO_BPM, MIN_TEMPO_BPM
from bandsync.net.outbox import OutboxPolicy
from bandsync.rooms.hub import Hub
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.settings import Settings
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import ConnectionLimits, StorageStatus, Welcome, encode

if TYPE_CHECKING:
    from bandsync.net.connection import Connection

PROTOCOL_VERSION = 1
PING_SLOTS = 20


class ConnectionRegistry:
    """All WebSocket connections of this server, and what they have in common.

    Args:
        hub: the rooms.
        command_seconds: told how long each message took, from its bytes to its answer.

    Attributes:
        draining: set to turn new connections away.
    """

    def __init__(
        self,
        hub: Hub,
        settings: Settings,
        log: FilteringBoundLogger,
        command_seconds: Callable[[float], None],
    ) -> None:
        self.hub = hub
        self.settings = settings
        self.log = log
        self.command_seconds = command_seconds
        self.policy = OutboxPolicy(
            settings.outbox_limit_bytes, settings.write_timeout_ms / 1000, hub.counters
        )
        self.open: set[Connection] = set()
        self.timeout_s = settings.connection_timeout_ms / 1000
        self.pings: TimerWheel[Connection] = TimerWheel(
            settings.ping_interval_ms / 1000, PING_SLOTS
        )
        self.draining = False
        self._empty = trio.Event()

    def add(self, connection: Connection) -> None:
        """Count and ping a connection from now on."""
        self.open.add(connection)
        self.pings.add(connection)

    def discard(self, connection: Connection) -> None:
        """The connection is gone."""
        self.open.discard(connection)
        self.pings.discard(connection)
        if not self.open:
            self._empty.set()

    async def all_gone(self) -> None:
        """Wait until no connection is open."""
        while self.open:
            self._empty = trio.Event()
            await self._empty.wait()

    async def run_pings(self, lag: Callable[[float], None]) -> None:
        """Ping every connection once per interval and close those that are silent, for ever."""
        await self.pings.run(lambda connection: connection.ping(), lag)

    def tell_storage(self, status: StorageStatus) -> None:
        """Tell every client where sessions are kept from now on."""
        frame = text_frame(encode(status))
        for connection in self.open:
            connection.push(frame)

    def welcome(self, connection_id: str) -> Welcome:
        """What a new connection is told."""
        settings = self.settings
        limits = ConnectionLimits(
            settings.max_message_bytes, settings.max_members, MIN_TEMPO_BPM, MAX_TEMPO_BPM
        )
        return Welcome(
            PROTOCOL_VERSION,
            self.hub.server_context.server_id,
            connection_id,
            self.hub.now(),
            self.hub.stores.storage_type,
            settings.ping_interval_ms,
            limits,
        )
