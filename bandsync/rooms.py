"""A room: who of a session is connected here, and the path of a change to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import trio
from msgspec import UNSET, UnsetType

from bandsync.commands import LeaveSession, Play, Refusal
from bandsync.decide import Audit, Bind, Command, Drop, Expire
from bandsync.frames import text_frame
from bandsync.messages import (
    Ack,
    LeaveReason,
    Outgoing,
    RoleChanged,
    ScrollTick,
    Snapshot,
    You,
    encode,
)
from bandsync.mirror import Mirror, Outcome
from bandsync.reconcile import superseded
from bandsync.session import Member, Session, present
from bandsync.storage.era import Era
from bandsync.transport import beat_at, in_force, position_at
from bandsync.views import room_stats, snapshot

if TYPE_CHECKING:
    from bandsync.hub import Hub


class Peer(Protocol):
    """A connection, as a room sees it.

    Attributes:
        member_id: the member it is bound to in its room; empty before it joined.
        latency_ms: its round trip; None before the first pong.
        sync_error_ms: the client's own bound on its clock error, if it told.
    """

    connection_id: str
    member_id: str
    wants_ticks: bool
    latency_ms: float | None
    sync_error_ms: float | None

    @property
    def push(self) -> Callable[[bytes], None]:
        """Hand over frames; never blocks."""

    @property
    def push_volatile(self) -> Callable[[bytes], None]:
        """The same for frames that may be dropped when the peer is slow."""

    def push_snapshot(self, frames: bytes) -> None:
        """The same as ``push`` for frames with a snapshot, which may be large."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection soon; never blocks."""


REPLACED = "the same member resumed on another connection"

# The room was let go of while somebody waited for it; there is another by now.
CLOSED = Refusal("conflict", "The session was closed and opened again; try again.")


class Room:
    """One hosted session.

    Attributes:
        mirror: the session as this server knows it.
        peers: the connections of its members, by member id.
    """

    __slots__ = (
        "_bound",
        "_closed",
        "_graces",
        "_hub",
        "_lock",
        "_tick_pushes",
        "mirror",
        "peers",
        "session_id",
    )

    def __init__(self, hub: Hub, session_id: str) -> None:
        self._hub = hub
        self._lock = trio.Lock()
        self._closed = False
        self.session_id = session_id
        self.mirror = Mirror(session_id, hub.house, self, self.catch_up)
        self.peers: dict[str, Peer] = {}
        # The members of ``peers`` as they were bound, for the audit.
        self._bound: dict[str, Member] = {}
        # The connections whose graces run.
        self._graces: set[str] = set()
        # What a tick needs of the peers: each object more that it touched would be a cache miss
        # more per delivery.
        self._tick_pushes: tuple[Callable[[bytes], None], ...] = ()

    async def bind(
        self, peer: Peer, command: Bind, fresh_id: str, request_id: str | UnsetType
    ) -> You | Refusal:
        """Join or resume ``peer``; on success it is registered and has its snapshot.

        Returns:
            Why not; `CLOSED` when another room must be asked.
        """
        async with _Held(self._lock):
            if self._closed:
                return CLOSED
            own = peer.member_id if self.peers.get(peer.member_id) is peer else ""
            settled = False
            try:
                await self._open()
                outcome = await self.mirror.change(command, peer.connection_id, own, fresh_id)
                settled = True
                if isinstance(outcome, Refusal):
                    return outcome
                # No await from the commit to the end: the state that the snapshot shows, and the
                # registration that brings all that comes after it, belong together.
                return self._register(peer, own, outcome, request_id)
            finally:
                if not settled and self.mirror.uncertain:
                    # Whoever was bound by the commit that was interrupted has no connection.
                    for member_id in (fresh_id, *(token.member_id for token in command.resume)):
                        self._hub.finish(self.drop, member_id, peer.connection_id, "timeout")
                self._close_if_empty()

    async def command(
        self, peer: Peer, command: Command, fresh_id: str, request_id: str | UnsetType
    ) -> Refusal | None:
        """Carry out a member's command and tell everybody, or return why not."""
        latencies_ms = self._latencies() if isinstance(command, Play) else None
        member_id = peer.member_id
        async with _Held(self._lock):
            outcome = await self.mirror.change(
                command, peer.connection_id, member_id, fresh_id, latencies_ms
            )
            if isinstance(outcome, Refusal):
                return outcome
            self._tell(outcome, peer, request_id)
            if isinstance(command, LeaveSession):
                self.unregister(peer, member_id)
                self._left(member_id, "left")
            return None

    async def leave(self, member_id: str, connection_id: str) -> None:
        """Remove a member whose connection joined another session."""
        await self._on_behalf(LeaveSession(), member_id, connection_id, "left")

    async def expire(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Remove a member whose grace is over, unless it has come back."""
        self._graces.discard(connection_id)
        await self._on_behalf(Expire(reason), member_id, connection_id, reason)

    async def drop(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Show a member as disconnected and start its grace, if this is its connection."""
        async with _Held(self._lock):
            if self._closed:
                return
            outcome = await self.mirror.change(Drop(), connection_id, member_id)
            if isinstance(outcome, Outcome) and outcome.frames:
                self._tell(outcome)
                self._start_grace(member_id, connection_id, reason)
            self._close_if_empty()

    async def sweep(self, member: Member) -> None:
        """The member's server is gone: disconnect it, and remove it after the grace."""
        if member.connected:
            await self.drop(member.member_id, member.connection_id, "server_lost")
        else:
            self._start_grace(member.member_id, member.connection_id, "server_lost")

    async def catch_up(self) -> None:
        """Take over what others stored, and what became of a commit that was interrupted."""
        async with _Held(self._lock):
            if not self._closed:
                await self.mirror.catch_up()
                self._close_if_empty()

    async def move(self, era: Era) -> bool:
        """Bring the session to Redis; False if it stays in memory.

        A room that only holds what a band has left is closed afterwards.
        """
        async with _Held(self._lock):
            if self._closed or self.mirror.era is era:
                return True
            try:
                await self._open()
                return self.mirror.era is era or await self.mirror.move(era)
            finally:
                self._close_if_empty()

    def own(self) -> Mapping[str, Member]:
        """The members that are bound to connections here, as they were bound."""
        return self._bound

    def changed(self, session: Session) -> None:
        """The session moves or stands still from now on."""
        ticker = self._hub.ticker
        if ticker is not None:
            transport = session.transport.value
            if transport.is_playing or transport.next is not None:
                ticker.add(self)
            else:
                ticker.discard(self)

    def jumped(self, shown: Session, events: Sequence[RoleChanged]) -> None:
        """Show everybody a state that came from outside, then what follows from it.

        Whose member is bound elsewhere by now is closed; whose connection is gone gets its grace.
        """
        for member_id in superseded(shown, self._bound):
            peer = self._seat(member_id, None)
            if peer is not None:
                peer.close(4001, REPLACED)
        frame = _frame(snapshot(shown, self._hub.now()))
        frames = b"".join([_frame(event) for event in events])
        for peer in self.peers.values():
            peer.push_snapshot(frame)
            if frames:
                peer.push(frames)
        self._hub.counters.deliveries += len(self.peers) * (1 + len(events))
        self._start_graces(shown)

    def unregister(self, peer: Peer, member_id: str) -> None:
        """Send nothing more to ``peer`` as this member."""
        if self.peers.get(member_id) is peer:
            self._seat(member_id, None)

    def tick(self) -> None:
        """Tell the position to those who want ticks, while the song plays."""
        session = self.mirror.session
        if session is None:
            return
        now = self._hub.now()
        segment = in_force(session.transport.value, now)
        if not segment.is_playing:
            return
        position = position_at(segment, now)
        beat = beat_at(segment, now)
        frame = _frame(ScrollTick(self.session_id, now, position, beat, segment.tempo_bpm))
        for push_volatile in self._tick_pushes:
            push_volatile(frame)
        self._hub.counters.deliveries += len(self._tick_pushes)

    def send_stats(self) -> None:
        """Tell everybody how well everybody is connected."""
        session = self.mirror.session
        peers = self.peers
        if session is None or not peers:
            return
        latencies = {member_id: peer.latency_ms for member_id, peer in peers.items()}
        sync_errors = {member_id: peer.sync_error_ms for member_id, peer in peers.items()}
        frame = _frame(room_stats(session, self._hub.now(), latencies, sync_errors))
        for peer in peers.values():
            peer.push_volatile(frame)
        self._hub.counters.deliveries += len(peers)

    async def _open(self) -> None:
        """Read the session; members that an earlier room of ours left behind get their graces."""
        mirror = self.mirror
        if mirror.opened:
            return
        await mirror.open()
        if mirror.session is not None:
            outcome = await mirror.change(Audit(self._bound), "")
            if isinstance(outcome, Outcome):
                self._tell(outcome)
            self._start_graces(mirror.session)

    async def _on_behalf(
        self, command: Command, member_id: str, connection_id: str, reason: LeaveReason
    ) -> None:
        """Remove a member that is not there to ask for it."""
        async with _Held(self._lock):
            if self._closed:
                return
            outcome = await self.mirror.change(command, connection_id, member_id)
            if isinstance(outcome, Outcome) and outcome.frames:
                self._tell(outcome)
                self._left(member_id, reason)
            else:
                self._close_if_empty()

    def _start_graces(self, session: Session) -> None:
        """Start the graces of our members without a connection that have none yet."""
        for member in present(session):
            if member.boot_id == self._hub.here.boot_id and not member.connected:
                self._start_grace(member.member_id, member.connection_id, "timeout")

    def _start_grace(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        if connection_id not in self._graces:
            self._graces.add(connection_id)
            self._hub.start_grace(self, member_id, connection_id, reason)

    def _register(self, peer: Peer, own: str, outcome: Outcome, request_id: str | UnsetType) -> You:
        """Put ``peer`` in its member's place, after telling the others."""
        reply = outcome.decision.reply
        assert isinstance(reply, Snapshot)
        assert reply.you is not UNSET
        member_id = reply.you.member_id
        replaced = self._seat(member_id, None)
        self._seat(own, None)
        self._tell(outcome)
        if replaced is not None and replaced is not peer:
            replaced.close(4001, REPLACED)
        self._seat(member_id, peer)
        self._bound[member_id] = outcome.decision.session.members[member_id]
        peer.member_id = member_id
        peer.push_snapshot(_frame(reply) + _ack(request_id, reply.version))
        self._hub.stats.add(self)
        self.send_stats()
        resumed = reply.you.resumed
        self._hub.counters.joins["resumed" if resumed else "joined"] += 1
        self._hub.log.info(
            "member.resumed" if resumed else "member.joined",
            session_id=self.session_id,
            member_id=member_id,
            connection_id=peer.connection_id,
            role=reply.you.role,
        )
        return reply.you

    def _seat(self, member_id: str, peer: Peer | None) -> Peer | None:
        """Put ``peer`` (None for nobody) in a member's place; who had it before."""
        before = self.peers.pop(member_id, None)
        self._bound.pop(member_id, None)
        if peer is not None:
            self.peers[member_id] = peer
        self._tick_pushes = tuple(
            [peer.push_volatile for peer in self.peers.values() if peer.wants_ticks]
        )
        return before

    def _tell(
        self, outcome: Outcome, caller: Peer | None = None, request_id: str | UnsetType = UNSET
    ) -> None:
        """Push what was committed: the events to everybody, the answer to the caller."""
        decision = outcome.decision
        frames = outcome.frames
        answer = b""
        if caller is not None:
            if decision.reply is not None:
                answer = _frame(decision.reply)
            version = decision.session.version if frames else UNSET
            answer += _ack(request_id, version)
        if frames:
            for peer in self.peers.values():
                if peer is not caller:
                    peer.push(frames)
            self._hub.counters.deliveries += len(decision.events) * len(self.peers)
        if caller is not None and isinstance(decision.reply, Snapshot):
            caller.push_snapshot(answer)
        elif caller is not None and (frames or answer):
            caller.push(frames + answer)
        for member_id, message in decision.private:
            if member_id in self.peers:
                self.peers[member_id].push(_frame(message))

    def _left(self, member_id: str, reason: LeaveReason) -> None:
        self._hub.log.info(
            "member.left", session_id=self.session_id, member_id=member_id, reason=reason
        )
        self.send_stats()
        self._close_if_empty()

    def _latencies(self) -> dict[str, float]:
        return {
            member_id: peer.latency_ms
            for member_id, peer in self.peers.items()
            if peer.latency_ms is not None
        }

    def _close_if_empty(self) -> None:
        """Let go of a session whose last member here is gone; the storage still has it."""
        mirror = self.mirror
        if self.peers or mirror.uncertain:
            return
        boot_id = self._hub.here.boot_id
        if mirror.session is not None and any(
            member.boot_id == boot_id for member in present(mirror.session)
        ):
            return
        self._closed = True
        if self._hub.rooms.get(self.session_id) is self:
            del self._hub.rooms[self.session_id]
        self._hub.stats.discard(self)
        if self._hub.ticker is not None:
            self._hub.ticker.discard(self)


class _Held:
    """Holds a lock, without a pass of the scheduler when it is free. FIFO like the lock."""

    __slots__ = ("_lock",)

    def __init__(self, lock: trio.Lock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def _frame(message: Outgoing) -> bytes:
    return text_frame(encode(message))


def _ack(request_id: str | UnsetType, version: int | UnsetType) -> bytes:
    if request_id is UNSET:
        return b""
    return _frame(Ack(request_id, version))
