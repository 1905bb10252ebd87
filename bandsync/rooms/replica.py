"""Replica: one session on this server, kept consistent with the other servers that host it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import trio
from msgspec import UNSET, UnsetType

from bandsync.model.session import Session, present
from bandsync.rooms.context import RoomContext
from bandsync.rooms.fanout import Fanout, LocalPeers, Peer, message_frame
from bandsync.rooms.mirror import Applied, Gap, Mirror, Outcome, Resynced
from bandsync.rooms.relay_inbox import RelayInbox
from bandsync.rules.actions import Audit, Command
from bandsync.rules.reconcile import audit
from bandsync.rules.refusals import CONFLICT
from bandsync.storage.base import MAX_ATTEMPTS, Committed, Conflict
from bandsync.storage.channel_messages import (
    DirectMessage,
    write_connection_stats,
    write_direct_message,
)
from bandsync.storage.era import Era
from bandsync.wire.commands import Refusal
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import LeaveReason, encode

# After a conflict, wait for the relay this often, with doubling pauses from this one.
_RELAY_WAITS = 5
_RELAY_WAIT_S = 0.001


class Replica(ABC):
    """One session on this server: its mirror, its lock, and the peers that see it.

    A replica carries out the effects that mirror and relay inbox return. A coroutine holds the
    lock while it changes the session. Between the moment when the mirror has a new state and the
    moment when every peer was sent it there is no ``await``: no connection misses a version or
    sees versions go backwards.

    Attributes:
        lock: held during every change, so that changes of a session are serial on this server.
        mirror: the session as this server holds it.
        local_peers: the members whose connections are here.
    """

    __slots__ = (
        "_catch_up_scheduled",
        "_closed",
        "_context",
        "_fanout",
        "_inbox",
        "_must_reassert",
        "local_peers",
        "lock",
        "mirror",
        "session_id",
    )

    def __init__(self, session_id: str, context: RoomContext) -> None:
        self.session_id = session_id
        self.lock = trio.Lock()
        self.mirror = Mirror(session_id, context)
        self.local_peers = LocalPeers()
        self._context = context
        self._fanout = Fanout(context, self.local_peers)
        self._inbox = RelayInbox(self.mirror)
        self._closed = False
        self._catch_up_scheduled = False
        # Another server removed or disconnected a member that is connected here.
        self._must_reassert = False

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The connections of the members that are here, by member id."""
        return self.local_peers.peers

    @abstractmethod
    async def expire(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """See `bandsync.rooms.graces.GraceRoom`."""

    async def catch_up(self) -> None:
        """Read what others committed, and whether an interrupted commit was carried out."""
        async with Locked(self):
            self._catch_up_scheduled = False
            if not self._closed:
                self._show(await self.mirror.catch_up(self.local_peers.bound))
                self._close_if_empty()

    async def move(self, era: Era) -> bool:
        """Move the session to Redis; False if it stays in memory.

        A room that has no member here is closed afterwards.
        """
        async with Locked(self):
            mirror = self.mirror
            if self._closed or mirror.era is era:
                return True
            try:
                await self._open()
                if mirror.era is not era:
                    self._show(await mirror.move(era, self.local_peers.bound))
                return mirror.era is era
            finally:
                self._close_if_empty()

    async def reassert(self) -> None:
        """Reassert the members connected here, after another server's change contradicted them."""
        async with Locked(self):
            if not self._closed:
                await self._reassert()
                self._close_if_empty()

    def receive(self, payload: bytes) -> None:
        """Handle a relay message, or buffer it while the lock is held. Never blocks."""
        if self.lock.locked():
            if self._inbox.buffer(payload) is not None:
                self._schedule_catch_up()
        else:
            self._handle(payload)

    def handle_buffered(self) -> None:
        """Handle the relay messages that were buffered while the lock was held."""
        if self._inbox.buffered:
            for payload in self._inbox.take_buffered():
                self._handle(payload)

    def handle_interruption(self) -> None:
        """Catch up later: a commit was interrupted and may have been carried out."""
        self.mirror.interrupted = False
        self._schedule_catch_up()

    def tick(self) -> None:
        """Send a ``scroll_tick`` to the peers that want it, while the song plays."""
        session = self.mirror.session
        if session is not None:
            self._fanout.send_tick(session)

    def send_stats(self) -> None:
        """Send ``room_stats`` to the peers, and publish their connection stats."""
        session, local_peers = self.mirror.session, self.local_peers
        if session is None or not local_peers.peers:
            return
        latencies, sync_errors = local_peers.latencies_ms(), local_peers.sync_errors_ms()
        boot_id = self._context.boot_id
        remote = self._inbox.stats_of(
            [member.member_id for member in present(session) if member.boot_id != boot_id]
        )
        if remote and self.mirror.era is not None:
            self._publish(write_connection_stats(latencies, sync_errors))
            latencies = {id_: ms for id_, (ms, _) in remote.items()} | latencies
            sync_errors = {id_: ms for id_, (_, ms) in remote.items()} | sync_errors
        self._fanout.send_stats(session, latencies, sync_errors)

    async def _open(self) -> None:
        """Read the session, and start the graces of members that an earlier room left behind."""
        mirror = self.mirror
        if mirror.opened:
            return
        self._show(await mirror.open(self.local_peers.bound))
        self._schedule_ticks()
        # A joining peer must not be sent what its snapshot contains already.
        self.handle_buffered()
        await self._reassert()

    async def _change(
        self,
        command: Command,
        connection_id: str,
        member_id: str = "",
        fresh_id: str = "",
        latencies_ms: Mapping[str, float] | None = None,
    ) -> Outcome | Refusal:
        """Decide and commit, and decide again after a conflict or a loss of Redis.

        The session of the outcome is the mirrored state when this returns.
        """
        mirror = self.mirror
        if mirror.uncertain:
            self._show(await mirror.catch_up(self.local_peers.bound))
        waits = True
        for _ in range(MAX_ATTEMPTS):
            decision = mirror.decide(command, connection_id, member_id, fresh_id, latencies_ms)
            if isinstance(decision, Refusal):
                return decision
            if not decision.events:
                return Outcome(decision)
            events = [encode(event) for event in decision.events]
            era = mirror.era
            result = await mirror.commit(era, mirror.session, decision.session, events)
            if isinstance(result, Committed):
                self._context.schedule_ticks(self, result.session)
                return Outcome(decision, events)
            if isinstance(result, Conflict) and era is not None:
                # Do not wait again after waiting in vain: every race would be lost to servers that
                # do not wait.
                waits = waits and await self._wait_for_relay(era, result.stored)
                if not waits:
                    self._show(await mirror.reconcile(era, result.stored, self.local_peers.bound))
        return CONFLICT

    async def _wait_for_relay(self, era: Era, stored: Session | None) -> bool:
        """Wait for the relay to bring the change that won; False if it does not come.

        The change was published before our commit was refused, so its message is here or about to
        be. Applied from the relay it reaches the peers as events, otherwise as a snapshot. A stored
        state that is not ahead of the mirror won no race: Redis was set back, and no message comes.
        """
        mirror = self.mirror
        refused = mirror.session
        if era.relay is None or stored is None:
            return False
        for number in range(_RELAY_WAITS):
            self.handle_buffered()
            session = mirror.session
            if session is None or session.epoch != stored.epoch:
                return False
            if session.version >= stored.version:
                return session is not refused
            await trio.sleep(_RELAY_WAIT_S * 2**number)
        return False

    async def _reassert(self) -> None:
        self._must_reassert = False
        mirror = self.mirror
        if mirror.session is None:
            return
        outcome = await self._change(Audit(self.local_peers.bound), "")
        if isinstance(outcome, Outcome):
            self._broadcast(outcome)
        self._start_graces(mirror.session)

    def _handle(self, payload: bytes) -> None:
        """Handle one relay message; the lock is free or about to be released."""
        if self._closed:
            return
        match self._inbox.receive(payload):
            case Applied() as applied:
                self._show_applied(applied)
            case DirectMessage(to=member_id, frame=frame):
                peer = self.peers.get(member_id)
                if peer is not None:
                    peer.push(text_frame(frame))
            case Gap():
                self._schedule_catch_up()

    def _show(self, resynced: Resynced | None) -> None:
        """Carry out what reading the session has led to."""
        if resynced is None:
            return
        self._schedule_ticks()
        if resynced.shown is not None:
            self._fanout.send_resync(resynced.shown, resynced.events)
            self._start_graces(resynced.shown)

    def _show_applied(self, applied: Applied) -> None:
        """Carry out what another server's change has led to."""
        context, session = self._context, applied.session
        context.schedule_ticks(self, session)
        self._fanout.send_applied(applied)
        if not applied.members_changed:
            return
        self._start_graces(session)
        own = self.local_peers.bound
        if audit(session, own, context.connected, context.now()) is not session:
            self._must_reassert = True
            context.finish(self.reassert)
        if applied.membership_changed:
            self.send_stats()

    def _schedule_ticks(self) -> None:
        if self.mirror.session is not None:
            self._context.schedule_ticks(self, self.mirror.session)

    def _start_graces(self, session: Session) -> None:
        context = self._context
        context.graces.start_missing(self, session, context.boot_id, self.local_peers.bound)

    def _broadcast(
        self, outcome: Outcome, caller: Peer | None = None, request_id: str | UnsetType = UNSET
    ) -> None:
        """Send what was committed, here and, for private messages, to other servers."""
        self._fanout.send_outcome(outcome, caller, request_id)
        for member_id, message in outcome.decision.private:
            if member_id in self.peers:
                self.peers[member_id].push(message_frame(message))
            else:
                self._publish(write_direct_message(member_id, encode(message)))

    def _publish(self, message: bytes) -> None:
        """Publish an ephemeral message to the session's other servers (at most once)."""
        era = self.mirror.era
        if era is not None:
            self._context.finish(era.storage.publish, self.session_id, message)

    def _schedule_catch_up(self) -> None:
        """Read the session once, however many messages show that it must be read."""
        if not self._catch_up_scheduled:
            self._catch_up_scheduled = True
            self._context.finish(self.catch_up)

    def _close_if_empty(self) -> None:
        """Close the room after its last local member is gone; the session stays stored."""
        mirror = self.mirror
        if self.peers or mirror.uncertain:
            return
        boot_id = self._context.boot_id
        if mirror.session is not None and any(
            member.boot_id == boot_id for member in present(mirror.session)
        ):
            return
        self._closed = True
        self._context.close(self.session_id, self)


class Locked:
    """Holds a replica's lock: in FIFO order, and without a pass of the scheduler if it is free."""

    __slots__ = ("_replica",)

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def __aenter__(self) -> None:
        lock = self._replica.lock
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        replica = self._replica
        try:
            if replica.mirror.interrupted:
                replica.handle_interruption()
            replica.handle_buffered()
        finally:
            replica.lock.release()
