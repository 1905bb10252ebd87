"""Everything that the rooms of one server share."""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.session import Session
from bandsync.rooms.graces import Finish, Graces
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.rules.draft import ServerContext
from bandsync.storage.base import StorageType
from bandsync.storage.era import Era
from bandsync.storage.memory import MemoryStorage


class Stores(Protocol):
    """The storages of a server.

    Attributes:
        memory: sessions that are not in Redis, or not yet.
    """

    memory: MemoryStorage

    @property
    def era(self) -> Era | None:
        """The era of Redis use in which sessions are opened; None in memory mode."""

    @property
    def awaited(self) -> bool:
        """Whether Redis is configured, so that sessions move there sooner or later."""

    @property
    def storage_type(self) -> StorageType:
        """The storage in use."""


class TimedRoom(Protocol):
    """A room, as far as periodic work needs it."""

    def tick(self) -> None:
        """Send a ``scroll_tick``."""

    def send_stats(self) -> None:
        """Send ``room_stats``."""


class RoomContext(Struct, frozen=True):
    """Everything that the rooms of one server share.

    Attributes:
        stores: the storages in use.
        isolated: this server as the rules see it while a session is in memory only.
        connected: the same while the session is in Redis.
        now: the session clock, milliseconds since the Unix epoch.
        timer: a monotonic clock for durations, seconds.
        finish: runs work in the background.
        graces: the graces of members without a connection.
        ticks: sends ``scroll_tick`` in the rooms that play; None if ticks are disabled.
        stats: sends ``room_stats`` in the rooms that have connections.
        close: called once with the session id and the room when a room closes.
        unreadable: the reason for each stored session that could not be read, by session id.
        counters: the metrics of the server.
        commit_seconds: observes the duration of every commit.
        log: the log of the server.
    """

    stores: Stores
    isolated: ServerContext
    connected: ServerContext
    now: Callable[[], float]
    timer: Callable[[], float]
    finish: Finish
    graces: Graces
    ticks: TimerWheel[TimedRoom] | None
    stats: TimerWheel[TimedRoom]
    close: Callable[[str, TimedRoom], None]
    unreadable: dict[str, str]
    counters: Counters
    commit_seconds: Callable[[float], None]
    log: FilteringBoundLogger

    @property
    def boot_id(self) -> str:
        """Names this process; new at every start."""
        return self.connected.boot_id

    def schedule_ticks(self, room: TimedRoom, session: Session) -> None:
        """Visit ``room`` at every tick while its song plays or is about to."""
        if self.ticks is None:
            return
        transport = session.transport.value
        if transport.is_playing or transport.next is not None:
            self.ticks.add(room)
        else:
            self.ticks.discard(room)
