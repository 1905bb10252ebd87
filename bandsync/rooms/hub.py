"""Hub: all rooms of this server."""

from collections.abc import Awaitable, Callable, Iterable
from operator import methodcaller

import trio
from msgspec import UnsetType
from msgspec.structs import replace
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.rooms.anti_entropy import AntiEntropy
from bandsync.rooms.context import RoomContext, Stores, TimedRoom
from bandsync.rooms.fanout import Peer
from bandsync.rooms.graces import Graces
from bandsync.rooms.room import CLOSED, Room
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.rules.actions import Bind
from bandsync.rules.server_context import ServerContext
from bandsync.storage.era import Era
from bandsync.wire.commands import Refusal
from bandsync.wire.messages import LeaveReason, You

STATS_PERIOD_S = 5.0
# Rooms that migrate at the same time: enough to fill the round trips, few enough that commands
# are served in between.
_MIGRATIONS_AT_ONCE = 8

# Each slot costs a wake-up, and delays everybody else for its share of the work: a quarter of a
# thousand ticks take about three milliseconds.
TICK_SLOTS = 4
STATS_SLOTS = 20


class Hub:
    """All rooms of this server, by session id, and the work that is due in them periodically.

    Args:
        nursery: the parent of background work, which outlives the connection that caused it.
        clock: the session clock.
        server_context: this server, as the rules see it.
        grace_s: how long a member stays without a connection, seconds.
        tick_s: how often playing rooms send a ``scroll_tick``, seconds; 0 disables ticks.
        commit_seconds: observes the duration of every commit.

    Attributes:
        anti_entropy: compares hosted sessions with the stored ones.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        stores: Stores,
        clock: ServerClock,
        server_context: ServerContext,
        counters: Counters,
        log: FilteringBoundLogger,
        grace_s: float,
        tick_s: float,
        commit_seconds: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.stores = stores
        self.server_context = server_context
        self.counters = counters
        self.log = log
        self.rooms: dict[str, Room] = {}
        self.anti_entropy = AntiEntropy(self.rooms, stores, self._move)
        self._nursery = nursery
        self._clock = clock
        self._graces = Graces(grace_s, self.finish)
        self._ticks: TimerWheel[TimedRoom] | None = (
            TimerWheel(tick_s, TICK_SLOTS) if tick_s else None
        )
        self._stats: TimerWheel[TimedRoom] = TimerWheel(STATS_PERIOD_S, STATS_SLOTS)
        self._context = RoomContext(
            stores=stores,
            isolated=replace(server_context, isolated=True, awaited=stores.awaited),
            connected=replace(server_context, isolated=False),
            now=self.now,
            timer=trio.current_time,
            finish=self.finish,
            graces=self._graces,
            ticks=self._ticks,
            stats=self._stats,
            close=self._close,
            unreadable={},
            counters=counters,
            commit_seconds=commit_seconds,
            log=log,
        )
        # Background work that has not ended.
        self._pending = 0
        self._idle = trio.Event()

    def now(self) -> float:
        """The session clock, milliseconds since the Unix epoch."""
        return self._clock.at(trio.current_time())

    async def bind(
        self, peer: Peer, command: Bind, fresh_id: str, request_id: str | UnsetType
    ) -> tuple[Room, You] | Refusal:
        """Join or resume; on success ``peer`` is registered in the room and has its snapshot."""
        while True:
            room = self.rooms.get(command.session_id) or self._open(command.session_id)
            outcome = await room.bind(peer, command, fresh_id, request_id)
            if isinstance(outcome, You):
                return room, outcome
            if outcome is not CLOSED:
                return outcome

    def dropped(self, room: Room, peer: Peer, reason: LeaveReason) -> None:
        """Handle the end of a connection: the grace of its member starts. Never blocks."""
        room.unregister(peer, peer.member_id)
        self.finish(room.drop, peer.member_id, peer.connection_id, reason)

    def receive(self, session_id: str, payload: bytes) -> None:
        """Give a relay message to its room. Never blocks."""
        room = self.rooms.get(session_id)
        if room is not None:
            room.receive(payload)

    async def compare(self, era: Era) -> None:
        """Reconcile every hosted session that differs from the stored one."""
        await self.anti_entropy.compare(era)

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        """Move every session that is hosted or kept here to Redis, until ``era`` is over.

        Args:
            moved: called after each session, whether it moved or has to stay in memory.
        """
        # Hosted sessions come first: somebody plays in them.
        waiting = iter(dict.fromkeys([*self.rooms, *self.stores.memory.ids()]))

        async def move_some() -> None:
            for session_id in waiting:
                if era.over:
                    return
                await self._move(session_id, era)
                moved()

        async with trio.open_nursery() as nursery:
            for _ in range(_MIGRATIONS_AT_ONCE):
                nursery.start_soon(move_some)

    def finish(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run ``work`` to its end in the background, even if the calling task is cancelled."""
        self._pending += 1
        self._nursery.start_soon(self._finish, work, args)

    async def finished(self) -> None:
        """Wait until all background work has ended."""
        while self._pending:
            await self._idle.wait()

    async def run_graces(self) -> None:
        """Remove members whose grace is over, for ever."""
        await self._graces.run()

    async def run_ticker(self) -> None:
        """Send ticks, for ever."""
        if self._ticks is not None:
            await self._ticks.run(methodcaller("tick"))

    async def run_stats(self) -> None:
        """Send room statistics, for ever."""
        await self._stats.run(methodcaller("send_stats"))

    def _open(self, session_id: str) -> Room:
        room = self.rooms[session_id] = Room(session_id, self._context)
        return room

    def _close(self, session_id: str, room: TimedRoom) -> None:
        """Forget a closed room. There may be a new one of the same session."""
        if self.rooms.get(session_id) is room:
            del self.rooms[session_id]
        era = self.stores.era
        if era is not None and era.relay is not None:
            # It may be subscribed even if the session stayed in memory or was never read.
            self.finish(era.relay.unsubscribe, session_id)
        self._stats.discard(room)
        if self._ticks is not None:
            self._ticks.discard(room)

    async def _move(self, session_id: str, era: Era) -> None:
        """Move one session to Redis, in a room of its own if it has none."""
        room = self.rooms.get(session_id)
        if room is None:
            if self.stores.memory.find(session_id) is None:
                return
            room = self._open(session_id)
        await room.move(era)

    async def _finish(self, work: Callable[..., Awaitable[None]], args: Iterable[object]) -> None:
        try:
            await work(*args)
        finally:
            self._pending -= 1
            if not self._pending:
                self._idle.set()
                self._idle = trio.Event()
