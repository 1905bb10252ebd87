"""The hub: all rooms of this server, and what is due in them by the clock."""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import trio
from msgspec import Struct, UnsetType
from msgspec.structs import replace
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Tip
from bandsync.rooms.context import RoomContext, Stores
from bandsync.rooms.fanout import Peer
from bandsync.rooms.room import CLOSED, Room
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.rules.actions import Bind
from bandsync.rules.server_context import ServerContext
from bandsync.storage.base import Lost
from bandsync.storage.era import Era
from bandsync.wire.commands import Refusal
from bandsync.wire.messages import LeaveReason, You

STATS_PERIOD_S = 5.0
# Anti-entropy: how often the tips of all hosted sessions are compared with what is stored.
COMPARE_PERIOD_S = 5.0
_COMPARED_AT_ONCE = 100
_ON_ITS_WAY_S = 0.1
# Rooms that migrate at the same time: enough to fill the round trips, few enough that commands
# get their turn in between.
_MOVERS = 8

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
        commit_seconds: told how long each commit took.
        grace_s: how long a member is kept without a connection, seconds.
        tick_s: how often playing rooms send a ``scroll_tick``, seconds; 0 for never.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        stores: Stores,
        clock: ServerClock,
        here: ServerContext,
        counters: Counters,
        log: FilteringBoundLogger,
        grace_s: float,
        tick_s: float,
        commit_seconds: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.stores = stores
        self.here = here
        self.house = RoomContext(
            stores=stores,
            isolated=replace(here, isolated=True, awaited=stores.awaited),
            connected=replace(here, isolated=False),
            now=self.now,
            timer=trio.current_time,
            finish=self.finish,
            unreadable={},
            counters=counters,
            commit_seconds=commit_seconds,
            log=log,
        )
        self.counters = counters
        self.log = log
        self.rooms: dict[str, Room] = {}
        self.ticker: TimerWheel[Room] | None = TimerWheel(tick_s, TICK_SLOTS) if tick_s else None
        self.stats: TimerWheel[Room] = TimerWheel(STATS_PERIOD_S, STATS_SLOTS)
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

    def hear(self, session_id: str, payload: bytes) -> None:
        """Pass on what the relay brings. Never blocks."""
        room = self.rooms.get(session_id)
        if room is not None:
            room.hear(payload)

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        """Bring every session that is hosted or kept here to Redis, until ``era`` is over.

        Args:
            moved: told of each one that is done with, whether it moved or has to stay.
        """
        # Those that are played now come first.
        waiting = iter(dict.fromkeys([*self.rooms, *self.stores.memory.ids()]))

        async def move_some() -> None:
            for session_id in waiting:
                if era.over:
                    return
                await self._move(session_id, era)
                moved()

        async with trio.open_nursery() as nursery:
            for _ in range(_MOVERS):
                nursery.start_soon(move_some)

    async def run_comparisons(self) -> None:
        """Compare what is hosted with what is stored, and put it off expiry, for ever."""
        while True:
            await trio.sleep(COMPARE_PERIOD_S)
            era = self.stores.era
            if era is not None:
                await self.compare(era)

    async def compare(self, era: Era) -> None:
        """Catch up with whatever was written, or lost, behind our back."""
        suspects: dict[str, Tip | None] = {}
        session_ids = list(self.rooms)
        for start in range(0, len(session_ids), _COMPARED_AT_ONCE):
            batch = session_ids[start : start + _COMPARED_AT_ONCE]
            stored = await era.storage.touch(batch)
            if isinstance(stored, Lost):
                return
            for session_id in batch:
                room = self.rooms.get(session_id)
                if room is None:
                    continue
                if room.mirror.era is not era:
                    # It stayed in memory when the others moved.
                    await room.move(era)
                elif room.mirror.tip != stored[session_id]:
                    suspects[session_id] = room.mirror.tip
        for session_id in self.stores.memory.ids():
            # It could not be read when the others moved, and nobody is in it.
            if session_id not in self.rooms:
                await self._move(session_id, era)
        if suspects:
            # What is on its way over the relay will have come by then, and moved the mirror.
            await trio.sleep(_ON_ITS_WAY_S)
        for session_id, seen in suspects.items():
            room = self.rooms.get(session_id)
            if room is not None and room.mirror.tip == seen:
                await room.catch_up()

    async def _move(self, session_id: str, era: Era) -> None:
        room = self.rooms.get(session_id)
        if room is None:
            if self.stores.memory.find(session_id) is None:
                return
            room = self.rooms[session_id] = Room(self, session_id)
        await room.move(era)

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
    ) -> float:
        """Remove the member after the grace, unless it is bound to another connection by then.

        Returns:
            When that will be, on Trio's clock.
        """
        deadline = trio.current_time() + self._grace_s
        self._graces.append(Grace(deadline, room, member_id, connection_id, reason))
        self._grace_added.set()
        return deadline

    async def run_graces(self) -> None:
        """Remove members whose grace is over, for ever.

        All graces are equally long, so they end in the order in which they started.
        """
        while True:
            if not self._graces:
                self._grace_added = trio.Event()
                await self._grace_added.wait()
            await trio.sleep_until(self._graces[0].deadline)
            self._expire(self._graces.popleft())

    def _expire(self, grace: Grace) -> None:
        """Remove its member. By itself, so that who waits for the next one holds no room."""
        self.finish(grace.room.expire, grace.member_id, grace.connection_id, grace.reason)

    async def run_ticker(self) -> None:
        """Send ticks, for ever."""
        if self.ticker is not None:
            await self.ticker.run(Room.tick)

    async def run_stats(self) -> None:
        """Send room statistics, for ever."""
        await self.stats.run(Room.send_stats)
