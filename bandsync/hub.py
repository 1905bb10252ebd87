"""The hub: all rooms of this server, and what is due in them by the clock."""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import trio
from msgspec import Struct, UnsetType
from structlog.typing import FilteringBoundLogger

from bandsync.clock import SessionClock
from bandsync.commands import Refusal
from bandsync.counters import Counters
from bandsync.decide import Bind
from bandsync.draft import Here
from bandsync.messages import LeaveReason, You
from bandsync.rooms import CLOSED, Peer, Room
from bandsync.rota import Rota
from bandsync.storage.base import Storage

STATS_PERIOD_S = 5.0

# Each slot costs a wake-up, and keeps everybody else waiting for its share: a quarter of a
# thousand ticks take about three milliseconds.
TICK_SLOTS = 4
STATS_SLOTS = 20


class Grace(Struct, frozen=True):
    """A member without a connection, and when it is removed.

    Attributes:
        deadline: on Trio's clock, seconds.
    """

    deadline: float
    room: Room
    member_id: str
    connection_id: str
    reason: LeaveReason


class Hub:
    """All rooms of this server.

    Args:
        nursery: parent of what must be finished although the connection that caused it is gone.
        clock: the session clock.
        here: what the rules need to know of this server.
        grace_s: how long a member is kept without a connection, seconds.
        tick_s: how often playing rooms send a ``scroll_tick``, seconds; 0 for never.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        storage: Storage,
        clock: SessionClock,
        here: Here,
        counters: Counters,
        log: FilteringBoundLogger,
        grace_s: float,
        tick_s: float,
    ) -> None:
        self.storage = storage
        self.here = here
        self.counters = counters
        self.log = log
        self.rooms: dict[str, Room] = {}
        self.ticker: Rota[Room] | None = Rota(tick_s, TICK_SLOTS) if tick_s else None
        self.stats: Rota[Room] = Rota(STATS_PERIOD_S, STATS_SLOTS)
        self._nursery = nursery
        self._clock = clock
        self._grace_s = grace_s
        self._graces: deque[Grace] = deque()
        self._grace_added = trio.Event()
        self._pending = 0
        self._idle = trio.Event()

    def now(self) -> float:
        """The session clock, milliseconds since the Unix epoch."""
        return self._clock.at(trio.current_time())

    async def bind(
        self, peer: Peer, command: Bind, fresh_id: str, request_id: str | UnsetType
    ) -> tuple[Room, You] | Refusal:
        """Join or resume ``peer``; on success it is registered in the room and has its snapshot."""
        while True:
            room = self.rooms.get(command.session_id)
            if room is None:
                room = self.rooms[command.session_id] = Room(self, command.session_id)
            outcome = await room.bind(peer, command, fresh_id, request_id)
            if isinstance(outcome, You):
                return room, outcome
            if outcome is not CLOSED:
                return outcome

    def dropped(self, room: Room, peer: Peer, reason: LeaveReason) -> None:
        """A connection is gone: its member's grace starts. Never blocks."""
        room.unregister(peer, peer.member_id)
        self.finish(room.drop, peer.member_id, peer.connection_id, reason)

    def finish(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run ``work`` to its end, outside the task that asks for it."""
        self._pending += 1
        self._nursery.start_soon(self._finish, work, args)

    async def _finish(self, work: Callable[..., Awaitable[None]], args: Iterable[object]) -> None:
        try:
            await work(*args)
        finally:
            self._pending -= 1
            if not self._pending:
                self._idle.set()
                self._idle = trio.Event()

    async def finished(self) -> None:
        """Wait until nothing that was handed to `finish` is under way."""
        while self._pending:
            await self._idle.wait()

    def start_grace(
        self, room: Room, member_id: str, connection_id: str, reason: LeaveReason
    ) -> None:
        """Remove the member after the grace, unless it is bound to another connection by then."""
        deadline = trio.current_time() + self._grace_s
        self._graces.append(Grace(deadline, room, member_id, connection_id, reason))
        self._grace_added.set()

    async def run_graces(self) -> None:
        """Remove members whose grace is over, for ever.

        All graces are equally long, so they end in the order in which they started.
        """
        while True:
            if not self._graces:
                self._grace_added = trio.Event()
                await self._grace_added.wait()
            grace = self._graces[0]
            await trio.sleep_until(grace.deadline)
            self._graces.popleft()
            room = grace.room
            self.finish(room.expire, grace.member_id, grace.connection_id, grace.reason)

    async def run_ticker(self) -> None:
        """Send ticks, for ever."""
        if self.ticker is not None:
            await self.ticker.run(Room.tick)

    async def run_stats(self) -> None:
        """Send room statistics, for ever."""
        await self.stats.run(Room.send_stats)
