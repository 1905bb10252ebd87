"""All WebSocket connections of a server, and what they share."""

from collections.abc import Callable
from typing import Protocol

import trio
from structlog.typing import FilteringBoundLogger

from bandsync.model.transport import MAX_TEMPO_BPM, MIN_TEMPO_BPM
from bandsync.net.outbox import OutboxPolicy
from bandsync.rooms.hub import Hub
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.settings import Settings
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import ConnectionLimits, StorageStatus, Welcome, encode

PROTOCOL_VERSION = 1
PING_SLOTS = 20
RESTART_REASON = "the server restarts: reconnect"


class OpenConnection(Protocol):
    """A connection, as the registry and the drain see it."""

    @property
    def push(self) -> Callable[[bytes], None]:
        """Send frames; never blocks."""

    def ping(self) -> None:
        """Ping the client, or close the connection if the client has timed out; never blocks."""

    def announce_drain(self, reconnect_in_ms: int) -> None:
        """Send ``server_draining``; never blocks."""

    def close(self, code: CloseCode, reason: str) -> None:
        """Close the connection soon; never blocks."""


class ConnectionRegistry:
    """All WebSocket connections of this server, and what they share.

    Args:
        command_seconds: receives the time from a message's bytes to its answer, seconds.

    Attributes:
        hub: the rooms.
        settings: the server's settings.
        log: the server's log.
        command_seconds: see above.
        policy: the limits of every outbox.
        open: the connections whose opening handshake is complete.
        timeout_s: how long a client may be silent, seconds.
        pings: one visit of each open connection per ping interval.
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
        self.open: set[OpenConnection] = set()
        self.timeout_s = settings.connection_timeout_ms / 1000
        self.pings: TimerWheel[OpenConnection] = TimerWheel(
            settings.ping_interval_ms / 1000, PING_SLOTS
        )
        self.draining = False
        self._empty = trio.Event()

    def add(self, connection: OpenConnection) -> tuple[CloseCode, str] | None:
        """Register a connection; from now on it counts and is pinged.

        The check and the registration are one step, because any number of handshakes may be under
        way at the same time.

        Returns:
            The close code and the reason, if the connection must be turned away.
        """
        full = len(self.open) >= self.settings.max_connections
        self.open.add(connection)
        self.pings.add(connection)
        if self.draining:
            return CloseCode.SERVICE_RESTART, RESTART_REASON
        if full:
            return CloseCode.TRY_AGAIN_LATER, "the server is full, try again later"
        return None

    def discard(self, connection: OpenConnection) -> None:
        """Remove a connection that has ended; nothing happens if it was not registered."""
        self.open.discard(connection)
        self.pings.discard(connection)
        if not self.open:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.open:
            self._empty = trio.Event()
            await self._empty.wait()

    async def run_pings(self, lag: Callable[[float], None]) -> None:
        """Ping every connection once per interval, and close silent ones, for ever.

        Args:
            lag: receives how late each wake-up was, seconds.
        """
        await self.pings.run(lambda connection: connection.ping(), lag)

    def broadcast_storage_status(self, status: StorageStatus) -> None:
        """Send every client the storage that is in use from now on."""
        frame = text_frame(encode(status))
        for connection in self.open:
            connection.push(frame)

    def welcome(self, connection_id: str) -> Welcome:
        """The first message of a new connection."""
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
