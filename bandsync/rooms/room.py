"""A room: who of a session is connected here, and the path of a change to all of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from bandsync.model.session import Member, Session, present
from bandsync.model.transport import beat_at, in_force, position_at
from bandsync.rooms.fanout import LocalPeers, Peer
from bandsync.rooms.mirror import Mirror, Outcome
from bandsync.rules.actions import Audit, Bind, Command, Drop, Expire
from bandsync.rules.reconcile import audit, superseded
from bandsync.storage.channel_messages import (
    read_change,
    read_report,
    read_whisper,
    write_report,
    write_whisper,
)
from bandsync.storage.era import Era
from bandsync.wire.commands import LeaveSession, Play, Refusal
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import (
    Ack,
    LeaveReason,
    Outgoing,
    RoleChanged,
    ScrollTick,
    Snapshot,
    You,
    encode,
)
from bandsync.wire.snapshots import room_stats, snapshot

if TYPE_CHECKING:
    from bandsync.rooms.hub import Hub


# More than a room is behind in any lock's life: rather read it whole.
MAX_HEARD = 256
REPLACED = "the same member resumed on another connection"

# The room was let go of while somebody waited for it; there is another by now.
CLOSED = Refusal("conflict", "The session was closed and opened again; try again.")


class Room:
    """One hosted session.

    Attributes:
        lock: held while the session is changed: its changes on this server are serial.
        mirror: the session as this server knows it.
        seats: the members whose connections are here.
    """

    __slots__ = (
        "__weakref__",
        "_catching_up",
        "_closed",
        "_contradicted",
        "_elsewhere",
        "_graces",
        "_heard",
        "_hub",
        "lock",
        "mirror",
        "seats",
        "session_id",
    )

    def __init__(self, hub: Hub, session_id: str) -> None:
        self._hub = hub
        self.lock = trio.Lock()
        self._closed = False
        self.session_id = session_id
        # What holds on to itself would stay, with the whole session, until the garbage collector
        # looks at old objects: a room that nobody is in any more is to be gone.
        self.mirror = Mirror(session_id, hub.house, weakref.proxy(self))
        self.seats = LocalPeers()
        # Until when, on Trio's clock, the graces last that run, by connection id.
        self._graces: dict[str, float] = {}
        # How well members on other servers are connected, as those report it.
        self._elsewhere: dict[str, tuple[float | None, float | None]] = {}
        # What the relay brought while the lock was held.
        self._heard: list[bytes] = []
        self._catching_up = False
        # Others say of our members what is not so, and are not contradicted yet.
        self._contradicted = False

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The connections of the members that are here, by member id."""
        return self.seats.peers

    async def bind(
        self, peer: Peer, command: Bind, fresh_id: str, request_id: str | UnsetType
    ) -> You | Refusal:
        """Join or resume ``peer``; on success it is registered and has its snapshot.

        Returns:
            Why not; `CLOSED` when another room must be asked.
        """
        async with _Held(self):
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
        async with _Held(self):
            if self._contradicted:
                # Whose connection is here is a member, whatever others made of it.
                await self._audit()
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
        if self._graces.get(connection_id, 0.0) > trio.current_time():
            # It came back, and dropped again: that is another grace.
            return
        self._graces.pop(connection_id, None)
        if self._is_here(member_id, connection_id):
            return
        await self._on_behalf(Expire(reason), member_id, connection_id, reason)

    async def drop(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Show a member as disconnected and start its grace, if this is its connection."""
        async with _Held(self):
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
        elif member.connection_id not in self._graces:
            self._start_grace(member.member_id, member.connection_id, "server_lost")

    async def catch_up(self) -> None:
        """Take over what others stored, and what became of a commit that was interrupted."""
        async with _Held(self):
            self._catching_up = False
            if not self._closed:
                await self.mirror.catch_up()
                self._close_if_empty()

    async def move(self, era: Era) -> bool:
        """Bring the session to Redis; False if it stays in memory.

        A room that only holds what a band has left is closed afterwards.
        """
        async with _Held(self):
            if self._closed or self.mirror.era is era:
                return True
            try:
                await self._open()
                return self.mirror.era is era or await self.mirror.move(era)
            finally:
                self._close_if_empty()

    def hear(self, payload: bytes) -> None:
        """Take what the relay brings: now, or when the lock is free. Never blocks."""
        if self.lock.locked():
            self._heard.append(payload)
            if len(self._heard) > MAX_HEARD:
                self._heard.clear()
                self._must_catch_up()
        else:
            self._hear(payload)

    def listen(self) -> None:
        """Take what was heard while the lock was held."""
        if self._heard:
            heard, self._heard = self._heard, []
            for payload in heard:
                self._hear(payload)

    async def audit(self) -> None:
        """Assert what is known here of our own members, after a change from outside."""
        async with _Held(self):
            if not self._closed:
                await self._audit()
                self._close_if_empty()

    def own(self) -> Mapping[str, Member]:
        """The members that are bound to connections here, as they were bound."""
        return self.seats.bound

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
        self._let_go(shown)
        frames = b"".join([_frame(event) for event in events])
        self.seats.push_snapshot(_frame(snapshot(shown, self._hub.now())), frames)
        self._hub.counters.deliveries += len(self.peers) * (1 + len(events))
        self._start_graces(shown)

    def unregister(self, peer: Peer, member_id: str) -> None:
        """Send nothing more to ``peer`` as this member."""
        if self.peers.get(member_id) is peer:
            self.seats.clear(member_id)

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
        self._hub.counters.deliveries += self.seats.tick(frame)

    def send_stats(self) -> None:
        """Tell everybody how well everybody is connected."""
        session = self.mirror.session
        seats = self.seats
        if session is None or not seats.peers:
            return
        latencies, sync_errors = seats.latencies_ms(), seats.sync_errors_ms()
        others = self._others(session)
        if others and self.mirror.era is not None:
            report = write_report(latencies, sync_errors)
            self._hub.finish(self.mirror.era.storage.publish, self.session_id, report)
            latencies = {id_: ms for id_, (ms, _) in others.items()} | latencies
            sync_errors = {id_: ms for id_, (_, ms) in others.items()} | sync_errors
        seats.push_volatile(_frame(room_stats(session, self._hub.now(), latencies, sync_errors)))
        self._hub.counters.deliveries += len(seats.peers)

    async def _open(self) -> None:
        """Read the session; members that an earlier room of ours left behind get their graces."""
        mirror = self.mirror
        if mirror.opened:
            return
        await mirror.open()
        # Those who join see only what came before.
        self.listen()
        await self._audit()

    async def _audit(self) -> None:
        self._contradicted = False
        mirror = self.mirror
        if mirror.session is None:
            return
        outcome = await mirror.change(Audit(self.seats.bound), "")
        if isinstance(outcome, Outcome):
            self._tell(outcome)
        self._start_graces(mirror.session)

    def _hear(self, payload: bytes) -> None:
        """Take one message of the relay; the lock is free, or about to be."""
        if self._closed:
            return
        whisper = read_whisper(payload)
        if whisper is not None:
            peer = self.peers.get(whisper.to)
            if peer is not None:
                peer.push(text_frame(whisper.frame))
            return
        report = read_report(payload)
        if report is not None:
            self._elsewhere |= report.stats
            return
        change = read_change(payload)
        known = self.mirror.session
        hearing = "gap" if change is None else self.mirror.hear(change)
        if hearing == "gap":
            self._must_catch_up()
        if hearing != "news":
            return
        session = self.mirror.session
        assert change is not None
        assert session is not None
        touched = known is None or known.members is not session.members
        if touched:
            self._let_go(session)
        events = b"".join([text_frame(frame) for frame in change.frames])
        jumped = session.version - len(change.frames)
        if known is not None and jumped == known.version:
            self.seats.push(events)
        else:
            # A merge: it is shown whole, its events follow.
            shown = replace(session, version=jumped)
            self.seats.push_snapshot(_frame(snapshot(shown, self._hub.now())), events)
        self._hub.counters.deliveries += len(self.peers) * len(change.frames)
        self._hub.counters.relayed += 1
        if not touched:
            return
        self._start_graces(session)
        if audit(session, self.seats.bound, self._hub.here, self._hub.now()) is not session:
            self._contradicted = True
            self._hub.finish(self.audit)
        # Who left is still in `members`, as a tombstone.
        if known is None or _ids(known) != _ids(session):
            self.send_stats()

    def _must_catch_up(self) -> None:
        """Read the session once, however many messages show that it must be read."""
        if not self._catching_up:
            self._catching_up = True
            self._hub.finish(self.catch_up)

    def _let_go(self, session: Session) -> None:
        """Close the connections of members that are bound elsewhere by now."""
        for member_id in superseded(session, self.seats.bound):
            peer = self.seats.clear(member_id)
            if peer is not None:
                peer.close(4001, REPLACED)

    async def _on_behalf(
        self, command: Command, member_id: str, connection_id: str, reason: LeaveReason
    ) -> None:
        """Remove a member that is not there to ask for it."""
        async with _Held(self):
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
            if member.boot_id != self._hub.here.boot_id or member.connected:
                continue
            # Whose connection is here is about to be asserted again.
            here = self._is_here(member.member_id, member.connection_id)
            if not here and member.connection_id not in self._graces:
                self._start_grace(member.member_id, member.connection_id, "timeout")

    def _is_here(self, member_id: str, connection_id: str) -> bool:
        """Whether this connection of the member has its seat."""
        bound = self.seats.bound.get(member_id)
        return bound is not None and bound.connection_id == connection_id

    def _start_grace(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        deadline = self._hub.start_grace(self, member_id, connection_id, reason)
        self._graces[connection_id] = deadline

    def _register(self, peer: Peer, own: str, outcome: Outcome, request_id: str | UnsetType) -> You:
        """Put ``peer`` in its member's place, after telling the others."""
        reply = outcome.decision.reply
        assert isinstance(reply, Snapshot)
        assert reply.you is not UNSET
        member_id = reply.you.member_id
        replaced = self.seats.clear(member_id)
        self.seats.clear(own)
        self._tell(outcome)
        if replaced is not None and replaced is not peer:
            replaced.close(4001, REPLACED)
        self.seats.put(outcome.decision.session.members[member_id], peer)
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
            self.seats.push(frames, without=caller)
            self._hub.counters.deliveries += len(decision.events) * len(self.peers)
        if caller is not None and isinstance(decision.reply, Snapshot):
            caller.push_snapshot(answer)
        elif caller is not None and (frames or answer):
            caller.push(frames + answer)
        for member_id, message in decision.private:
            if member_id in self.peers:
                self.peers[member_id].push(_frame(message))
            elif self.mirror.era is not None:
                whisper = write_whisper(member_id, encode(message))
                self._hub.finish(self.mirror.era.storage.publish, self.session_id, whisper)

    def _left(self, member_id: str, reason: LeaveReason) -> None:
        self._hub.log.info(
            "member.left", session_id=self.session_id, member_id=member_id, reason=reason
        )
        self.send_stats()
        self._close_if_empty()

    def _latencies(self) -> dict[str, float]:
        elsewhere = {member_id: ms for member_id, (ms, _) in self._elsewhere.items()}
        known = elsewhere | self.seats.latencies_ms()
        return {member_id: ms for member_id, ms in known.items() if ms is not None}

    def _others(self, session: Session) -> dict[str, tuple[float | None, float | None]]:
        """What is known of the members on other servers; of those who left, nothing is kept."""
        here = self._hub.here.boot_id
        elsewhere = [member.member_id for member in present(session) if member.boot_id != here]
        self._elsewhere = {id_: self._elsewhere.get(id_, (None, None)) for id_ in elsewhere}
        return self._elsewhere

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
        era = self._hub.stores.era
        if era is not None and era.relay is not None:
            # Also when the session stayed in memory, or was never read.
            self._hub.finish(era.relay.unsubscribe, self.session_id)
        self._hub.stats.discard(self)
        if self._hub.ticker is not None:
            self._hub.ticker.discard(self)


class _Held:
    """Holds a room's lock, without a pass of the scheduler when it is free. FIFO like the lock."""

    __slots__ = ("_room",)

    def __init__(self, room: Room) -> None:
        self._room = room

    async def __aenter__(self) -> None:
        lock = self._room.lock
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        try:
            self._room.listen()
        finally:
            self._room.lock.release()


def _frame(message: Outgoing) -> bytes:
    return text_frame(encode(message))


def _ack(request_id: str | UnsetType, version: int | UnsetType) -> bytes:
    if request_id is UNSET:
        return b""
    return _frame(Ack(request_id, version))


def _ids(session: Session) -> set[str]:
    return {member.member_id for member in present(session)}
