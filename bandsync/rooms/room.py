"""Room: the members of one hosted session, and the commands that they send."""

from msgspec import UNSET, UnsetType

from bandsync.model.session import Member
from bandsync.rooms.fanout import REPLACED, Peer, ack_frame, message_frame
from bandsync.rooms.mirror import Outcome
from bandsync.rooms.replica import Locked, Replica
from bandsync.rules.actions import Bind, Command, Drop, Expire
from bandsync.wire.commands import LeaveSession, Play, Refusal
from bandsync.wire.messages import LeaveReason, Snapshot, You

# The room closed while a join waited for its lock. The hub has another room by now.
CLOSED = Refusal("conflict", "The session was closed and opened again; try again.")


class Room(Replica):
    """One hosted session: who is here, and what they may do.

    The base class keeps the session consistent with the other servers.
    """

    __slots__ = ()

    async def bind(
        self, peer: Peer, command: Bind, fresh_id: str, request_id: str | UnsetType
    ) -> You | Refusal:
        """Join or resume; on success ``peer`` is registered and has its snapshot.

        Returns:
            The refusal; `CLOSED` if another room must be used.
        """
        async with Locked(self):
            if self._closed:
                return CLOSED
            own = peer.member_id if self.peers.get(peer.member_id) is peer else ""
            settled = False
            try:
                await self._open()
                outcome = await self._change(command, peer.connection_id, own, fresh_id)
                settled = True
                if isinstance(outcome, Refusal):
                    return outcome
                # No await from the commit to the end: the peer must be registered for everything
                # that follows the state in its snapshot.
                return self._register(peer, own, outcome, request_id)
            finally:
                if not settled and self.mirror.uncertain:
                    # The interrupted commit may have bound a member that has no connection now.
                    for member_id in (fresh_id, *(token.member_id for token in command.resume)):
                        self._context.finish(self.drop, member_id, peer.connection_id, "timeout")
                self._close_if_empty()

    async def command(
        self, peer: Peer, command: Command, fresh_id: str, request_id: str | UnsetType
    ) -> Refusal | None:
        """Carry out a member's command and broadcast its events, or return the refusal."""
        latencies_ms = self._latencies_ms() if isinstance(command, Play) else None
        member_id = peer.member_id
        async with Locked(self):
            if self._must_reassert:
                # A locally connected member may have been removed remotely: reassert it before
                # its command is decided.
                await self._reassert()
            outcome = await self._change(
                command, peer.connection_id, member_id, fresh_id, latencies_ms
            )
            if isinstance(outcome, Refusal):
                return outcome
            self._broadcast(outcome, peer, request_id)
            if isinstance(command, LeaveSession):
                self.unregister(peer, member_id)
                self._finish_leave(member_id, "left")
            return None

    async def leave(self, member_id: str, connection_id: str) -> None:
        """Remove a member whose connection joined another session."""
        await self._remove(LeaveSession(), member_id, connection_id, "left")

    async def expire(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Remove a member whose grace is over, unless it has a connection here."""
        if not self.local_peers.has(member_id, connection_id):
            await self._remove(Expire(reason), member_id, connection_id, reason)

    async def drop(self, member_id: str, connection_id: str, reason: LeaveReason) -> None:
        """Mark a member as disconnected and start its grace, if this is its connection."""
        async with Locked(self):
            if self._closed:
                return
            outcome = await self._change(Drop(), connection_id, member_id)
            if isinstance(outcome, Outcome) and outcome.events:
                self._broadcast(outcome)
                self._context.graces.start(self, member_id, connection_id, reason)
            self._close_if_empty()

    async def drop_lost(self, member: Member) -> None:
        """Disconnect a member whose server failed, and remove it after the grace."""
        if member.connected:
            await self.drop(member.member_id, member.connection_id, "server_lost")
        elif not self._context.graces.is_running(self, member.connection_id):
            self._context.graces.start(self, member.member_id, member.connection_id, "server_lost")

    def unregister(self, peer: Peer, member_id: str) -> None:
        """Send nothing more to ``peer`` as this member."""
        if self.peers.get(member_id) is peer:
            self.local_peers.remove(member_id)

    async def _remove(
        self, command: Command, member_id: str, connection_id: str, reason: LeaveReason
    ) -> None:
        """Remove a member that did not send the command itself."""
        async with Locked(self):
            if self._closed:
                return
            outcome = await self._change(command, connection_id, member_id)
            if isinstance(outcome, Outcome) and outcome.events:
                self._broadcast(outcome)
                self._finish_leave(member_id, reason)
            else:
                self._close_if_empty()

    def _register(self, peer: Peer, own: str, outcome: Outcome, request_id: str | UnsetType) -> You:
        """Send the join to the others, then register ``peer`` and send it its snapshot."""
        context = self._context
        reply = outcome.decision.reply
        assert isinstance(reply, Snapshot)
        assert reply.you is not UNSET
        member_id = reply.you.member_id
        replaced = self.local_peers.remove(member_id)
        self.local_peers.remove(own)
        self._broadcast(outcome)
        if replaced is not None and replaced is not peer:
            replaced.close(4001, REPLACED)
        self.local_peers.add(outcome.decision.session.members[member_id], peer)
        peer.member_id = member_id
        peer.push_snapshot(message_frame(reply) + ack_frame(request_id, reply.version))
        context.stats.add(self)
        self.send_stats()
        resumed = reply.you.resumed
        context.counters.joins["resumed" if resumed else "joined"] += 1
        context.log.info(
            "member.resumed" if resumed else "member.joined",
            session_id=self.session_id,
            member_id=member_id,
            connection_id=peer.connection_id,
            role=reply.you.role,
        )
        return reply.you

    def _finish_leave(self, member_id: str, reason: LeaveReason) -> None:
        self._context.log.info(
            "member.left", session_id=self.session_id, member_id=member_id, reason=reason
        )
        self.send_stats()
        self._close_if_empty()

    def _latencies_ms(self) -> dict[str, float]:
        """The known round trips of all members, by member id."""
        known = self._inbox.latencies_ms() | self.local_peers.latencies_ms()
        return {member_id: ms for member_id, ms in known.items() if ms is not None}
