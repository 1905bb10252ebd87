"""The running server as others see it: operators, Prometheus, and other servers."""

import os

import trio

from bandsync.model.clock import ServerClock
from bandsync.model.session import Session
from bandsync.net.registry import ConnectionRegistry
from bandsync.ops.process import machine
from bandsync.rooms.hub import Hub
from bandsync.storage.base import Presence
from bandsync.storage.manager import StorageManager


class ServerState:
    """All is read at the moment when somebody asks.

    Args:
        stopping: set once the server drains.
        url: where clients find it.

    Attributes:
        storage: where sessions are kept.
        clock: the session clock.
    """

    def __init__(
        self,
        hub: Hub,
        connections: ConnectionRegistry,
        storage: StorageManager,
        clock: ServerClock,
        stopping: trio.Event,
        url: str,
    ) -> None:
        self.storage = storage
        self.clock = clock
        self._hub = hub
        self._connections = connections
        self._stopping = stopping
        self._url = url
        self._machine = machine()
        self._started = trio.current_time()

    @property
    def server_id(self) -> str:
        """Its name."""
        return self._hub.server_context.server_id

    @property
    def boot_id(self) -> str:
        """Its life: another after every start."""
        return self._hub.server_context.boot_id

    @property
    def draining(self) -> bool:
        """Whether it lets nobody in any more."""
        return self._stopping.is_set()

    @property
    def max_connections(self) -> int:
        """How many connections it takes."""
        return self._connections.settings.max_connections

    def now(self) -> float:
        """The instant on the session clock, milliseconds."""
        return self._hub.now()

    def uptime_ms(self) -> float:
        """How long it has been running, milliseconds."""
        return (trio.current_time() - self._started) * 1000

    def connections(self) -> int:
        """Open WebSocket connections."""
        return len(self._connections.open)

    def rooms(self) -> int:
        """Sessions with a room here."""
        return len(self._hub.rooms)

    def members(self) -> int:
        """Members whose connection is here."""
        return sum(len(room.peers) for room in self._hub.rooms.values())

    def tasks(self) -> int:
        """Trio tasks that have not ended."""
        return trio.lowlevel.current_statistics().tasks_living

    def sessions(self) -> int:
        """Sessions that are in this server's memory, hosted or kept."""
        kept = self.storage.memory.ids()
        return len(self._hub.rooms) + sum(id_ not in self._hub.rooms for id_ in kept)

    def hosted(self) -> list[Session]:
        """The sessions of its rooms, as they are now."""
        mirrors = [room.mirror.session for room in self._hub.rooms.values()]
        return [session for session in mirrors if session is not None]

    def presence(self) -> Presence:
        """What other servers, and whoever debugs, can read of this one in Redis."""
        return Presence(
            self.boot_id,
            self.now() - self.uptime_ms(),
            self._url,
            list(self._hub.rooms),
            self.connections(),
            self._machine,
            os.getpid(),
        )
