"""Graces: how long a member without a connection stays in its session."""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import trio
from msgspec import Struct

from bandsync.model.session import Member, Session, present
from bandsync.wire.messages import LeaveReason


class Finish(Protocol):
    """Runs work in the background, so that no cancelled caller can interrupt it."""

    def __call__(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start ``work`` with ``args`` and return at once."""


class GraceRoom(Protocol):
    """A room, as far as the graces of its members need it."""

    async def expire(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Remove a member whose grace is over, unless it has another connection by then."""


class Grace(Struct, frozen=True):
    """One member without a connection.

    Attributes:
        deadline: when the member is removed, seconds on Trio's clock.
        connection_id: the connection that was lost.
        reason: the reason that ``user_left`` will state.
    """

    deadline: float
    room: GraceRoom
    member_id: str
    connection_id: str
    reason: LeaveReason


class Graces:
    """All graces of a server.

    Every grace lasts equally long, so they end in the order in which they started: one queue and
    one task serve all rooms.

    Args:
        grace_s: how long a member stays without a connection, seconds.
        finish: runs work in the background.
    """

    def __init__(self, grace_s: float, finish: Finish) -> None:
        self._grace_s = grace_s
        self._finish = finish
        self._queue: deque[Grace] = deque()
        # The latest deadline of each connection. Rooms of one session are told apart, because a
        # closed room no longer removes anybody.
        self._deadlines: dict[tuple[GraceRoom, str], float] = {}
        self._added = trio.Event()

    def start(
        self, room: GraceRoom, member_id: str, connection_id: str, reason: LeaveReason
    ) -> None:
        """Call `GraceRoom.expire` after the grace; a grace that is running starts again."""
        deadline = trio.current_time() + self._grace_s
        self._deadlines[room, connection_id] = deadline
        self._queue.append(Grace(deadline, room, member_id, connection_id, reason))
        self._added.set()

    def start_missing(
        self, room: GraceRoom, session: Session, boot_id: str, own: Mapping[str, Member]
    ) -> None:
        """Start the graces of this server's members that have no connection and no grace yet.

        A member in ``own`` is connected: it is about to be reasserted and needs no grace.

        Args:
            boot_id: names this server process.
            own: see `bandsync.rules.reconcile`.
        """
        for member in present(session):
            if member.boot_id != boot_id or member.connected:
                continue
            member_id, connection_id = member.member_id, member.connection_id
            bound = own.get(member_id)
            if bound is not None and bound.connection_id == connection_id:
                continue
            if not self.is_running(room, connection_id):
                self.start(room, member_id, connection_id, "timeout")

    def is_running(self, room: GraceRoom, connection_id: str) -> bool:
        """Whether a grace for this lost connection has started and is not over."""
        return (room, connection_id) in self._deadlines

    async def run(self) -> None:
        """End graces at their deadlines, for ever."""
        while True:
            if not self._queue:
                self._added = trio.Event()
                await self._added.wait()
            await trio.sleep_until(self._queue[0].deadline)
            self._end(self._queue.popleft())

    def _end(self, grace: Grace) -> None:
        """End one grace.

        A function of its own: the frame of `run` would keep the room alive until the next one.
        """
        key = (grace.room, grace.connection_id)
        if self._deadlines.get(key, 0.0) > trio.current_time():
            # The member came back and dropped again: a later grace is running.
            return
        self._deadlines.pop(key, None)
        self._finish(grace.room.expire, grace.member_id, grace.connection_id, grace.reason)
