"""`connect` and `Band`: membership in a session, for programs."""

import math
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import trio
from msgspec import UNSET, UnsetType

from bandsync.client.conversation import Tap
from bandsync.client.events import EventStream, Status
from bandsync.client.exception_groups import meant
from bandsync.client.exceptions import ClientError, NotConnected
from bandsync.client.membership import Membership, Token
from bandsync.client.reconnect import Patience, ReconnectLoop
from bandsync.client.server_address import OpenStream, address_of
from bandsync.client.session_clock import SessionClock
from bandsync.client.view import SessionView, instant_of_beat
from bandsync.client.websocket import CLOSE_TIMEOUT_S
from bandsync.model import transport as arithmetic
from bandsync.model.session import Role
from bandsync.model.transport import At, Segment
from bandsync.wire.commands import (
    ChatMessage,
    ClientMessage,
    DenyLeader,
    JoinSession,
    LeaveSession,
    Pause,
    Play,
    PositionSync,
    RequestLeader,
    Seek,
    SetRole,
    SetTempo,
    Stop,
    UpdateMessage,
)
from bandsync.wire.messages import MemberStats, MemberView, StorageStatus, Welcome, You

_T = TypeVar("_T")

_LEAVE_TIMEOUT_S = 2.0
# Longer than the closing handshake's own deadline.
_CLOSE_WAIT_S = CLOSE_TIMEOUT_S + 1.0


class Band:
    """A membership in a session, created and kept connected by `connect`.

    Commands return the version of their change, or None if nothing changed; by then `session` shows
    it. They raise `CommandRefused` (nothing has changed), `NotConnected` (at once, without a
    connection) or `ConnectionLost` (it may or may not have been applied). Cancelling a command in
    flight does not undo it.
    """

    def __init__(self, membership: Membership, loop: ReconnectLoop) -> None:
        self._membership = membership
        self._loop = loop

    # State. It stays unchanged while there is no connection.

    @property
    def status(self) -> Status:
        """State of the connection; see `StatusChanged`."""
        return self._membership.status

    @property
    def session(self) -> SessionView:
        """The current view of the session; a new object after every change."""
        view = self._membership.view
        assert view is not None
        return view

    @property
    def you(self) -> You:
        """The reply to the latest join: member id, resume token, whether it was a resume."""
        you = self._membership.you
        assert you is not None
        return you

    @property
    def member_id(self) -> str:
        """This member's id. It changes only when a reconnect comes after the resume grace."""
        return self.you.member_id

    @property
    def resume_token(self) -> str:
        """The latest one, a secret; another process can resume with it: see `connect`."""
        return self.you.resume_token

    @property
    def me(self) -> MemberView | None:
        """This member in the session; None if the session no longer has it."""
        return self.session.members.get(self.member_id)

    @property
    def leader(self) -> MemberView | None:
        """The leader; None if there is none."""
        leader_id = self.session.leader_id
        return None if leader_id is None else self.session.members.get(leader_id)

    @property
    def is_leader(self) -> bool:
        """Whether this member leads."""
        return self.session.leader_id == self.member_id

    @property
    def stats(self) -> Mapping[str, MemberStats]:
        """Connection statistics by member id, from the latest ``room_stats``."""
        return self._membership.stats

    @property
    def server(self) -> Welcome:
        """The ``welcome`` of the latest connection."""
        server = self._membership.server
        assert server is not None
        return server

    @property
    def storage(self) -> StorageStatus | None:
        """The latest ``storage_status``; None before the first one."""
        return self._membership.storage

    @property
    def clock(self) -> SessionClock:
        """The session clock."""
        return self._membership.clock

    # Position and beat.

    def transport_at(self, instant: float | None = None) -> Segment:
        """The segment in force at ``instant`` (session clock, milliseconds; now if None)."""
        return arithmetic.in_force(self.session.transport, self._instant(instant))

    def position_at(self, instant: float | None = None) -> float:
        """The position at ``instant`` (now if None), in milliseconds from the song's start."""
        instant = self._instant(instant)
        return arithmetic.position_at(self.transport_at(instant), instant)

    def beat_at(self, instant: float | None = None) -> float:
        """The beat at ``instant`` (now if None), counted from the start of the song."""
        instant = self._instant(instant)
        return arithmetic.beat_at(self.transport_at(instant), instant)

    def instant_of_beat(self, beat: float, after: float | None = None) -> float | None:
        """When ``beat`` is reached, at ``after`` (now if None) or later.

        None if the song does not play or the beat is past. `SessionClock.to_local` converts the
        result to Trio's clock.
        """
        return instant_of_beat(self.session.transport, beat, self._instant(after))

    # Events.

    def events(self) -> EventStream:
        """A stream of events from this call on: ``async for event in band.events()``.

        It yields the structs of `bandsync.wire.messages`, each after `session` was updated, and
        `StatusChanged`, `EventsDropped`, `UnknownMessage`. Every call returns a separate stream
        with its own buffer; see `EventStream` about slow consumers.
        """
        return self._membership.events.stream()

    async def until_online(self) -> None:
        """Wait until there is a connection.

        Raises:
            NotConnected: the client has ended.
        """
        await trio.lowlevel.checkpoint()
        while self._loop.conversation is None:
            if self._loop.done.is_set():
                raise NotConnected("the client has ended")
            await self._loop.next_join()

    # Commands.

    async def command(self, message: ClientMessage) -> int | None:
        """Send any command of `bandsync.wire.commands`; the other methods use this one.

        Raises:
            ValueError: the message is too long, its request id is in use, or it joins or leaves:
                use `connect` and `leave`.
        """
        if isinstance(message, JoinSession | LeaveSession):
            raise ValueError("use connect to join and Band.leave to leave")
        return await self._command(message)

    async def _command(self, message: ClientMessage) -> int | None:
        # A caller that retries in a loop must not starve the reconnect.
        await trio.lowlevel.checkpoint()
        conversation = self._loop.conversation
        if conversation is None:
            raise NotConnected
        return await conversation.command(message)

    async def play(
        self,
        *,
        position_ms: float | None = None,
        start_in_ms: float | None = None,
        count_in_beats: int = 0,
    ) -> int | None:
        """Start the song; one that plays runs on.

        Args:
            position_ms: start position; None for the current one.
            start_in_ms: lead; None lets the server choose one that covers the slowest member.
            count_in_beats: beats of count-in after the lead.
        """
        return await self.command(
            Play(
                position_ms=_given(position_ms),
                start_in_ms=_given(start_in_ms),
                count_in_beats=count_in_beats,
            )
        )

    async def pause(self) -> int | None:
        """Pause at the current position."""
        return await self.command(Pause())

    async def stop(self) -> int | None:
        """Stop, and return to the start of the song."""
        return await self.command(Stop())

    async def seek(self, position_ms: float, *, at: At = "now") -> int | None:
        """Move to ``position_ms``, now or on the next beat or bar."""
        return await self.command(Seek(position_ms=position_ms, at=at))

    async def set_tempo(
        self, tempo_bpm: float, *, beats_per_bar: int | None = None, at: At = "now"
    ) -> int | None:
        """Change the tempo, and the beats per bar unless None, now or on the next beat or bar."""
        bar: int | UnsetType = UNSET if beats_per_bar is None else beats_per_bar
        return await self.command(SetTempo(tempo_bpm=tempo_bpm, beats_per_bar=bar, at=at))

    async def position_sync(self, position_ms: float, timestamp: float) -> int | None:
        """Report the local position at ``timestamp`` (session clock, milliseconds).

        From the leader it re-anchors the transport; a follower that is off gets a
        `DriftCorrection`.
        """
        return await self.command(PositionSync(position_ms=position_ms, timestamp=timestamp))

    async def take_lead(self) -> int | None:
        """Claim the lead, if there is no leader or it is disconnected."""
        return await self.command(SetRole(role="leader"))

    async def step_down(self) -> int | None:
        """Give the lead up; another member is elected."""
        return await self.command(SetRole(role="follower"))

    async def hand_over(self, member_id: str) -> int | None:
        """Hand the lead over to another member."""
        return await self.command(SetRole(role="leader", member_id=member_id))

    async def request_leader(self) -> None:
        """Ask the leader for the lead."""
        await self.command(RequestLeader())

    async def deny_leader(self, member_id: str) -> None:
        """Deny the lead to a member that requested it."""
        await self.command(DenyLeader(member_id=member_id))

    async def update_message(self, message: str) -> int | None:
        """Set the session's headline."""
        return await self.command(UpdateMessage(message=message))

    async def chat(self, text: str) -> int | None:
        """Send a chat message to everybody."""
        return await self.command(ChatMessage(text=text))

    # End.

    async def leave(self) -> None:
        """Leave the session and close the connection, as at the end of the block.

        Waits for the server for at most two seconds. Without a connection the server is not
        notified: the member leaves when its resume grace ends.
        """
        with trio.move_on_after(_LEAVE_TIMEOUT_S):
            # After a refusal or a lost connection there is nothing to leave.
            with suppress(ClientError):
                await self._command(LeaveSession())
        self._loop.withdraw()
        await self.close()

    async def close(self) -> None:
        """Close the connection without leaving: the resume grace starts."""
        self._loop.stop()
        with trio.move_on_after(_CLOSE_WAIT_S) as patience:
            await self._loop.done.wait()
        if patience.cancelled_caught:
            self._loop.abandon()

    def _instant(self, instant: float | None) -> float:
        return self.clock.now() if instant is None else instant


@asynccontextmanager
async def connect(
    url: str,
    session_id: str,
    *,
    display_name: str | None = None,
    role: Role | None = None,
    token: Token | None = None,
    resume_token: str | None = None,
    ticks: bool = False,
    join_within: float = 20.0,
    give_up_after: float = math.inf,
    ssl_context: ssl.SSLContext | None = None,
    open_stream: OpenStream | None = None,
    tap: Tap | None = None,
) -> AsyncIterator[Band]:
    """Join a session and stay in it while the block runs.

    The block is entered after the join. A lost or silent connection is replaced, and the member
    resumed; meanwhile commands raise `NotConnected`. Leaving the block leaves the session, also
    when the block is cancelled or fails, and takes at most four seconds.

    When only a person can help, the block is cancelled and the reason raised: see `Ended`. An
    exception of the block propagates unchanged.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        session_id: 1 to 64 of ``A-Z a-z 0-9 . _ -``; created if it does not exist.
        display_name: 1 to 64 characters; None for the server's default.
        role: ``leader`` claims a vacant lead; None for the server's default.
        token: the join token, if the server needs one; or a function, async or not, that returns
            a fresh one for every join. If it raises, the attempt has failed and is retried.
        resume_token: of an earlier connection, to resume its member.
        ticks: also receive a `ScrollTick` ten times a second. `Band.position_at` makes them
            unnecessary.
        join_within: time limit for the first join, seconds.
        give_up_after: time limit for a reconnect, seconds.
        ssl_context: for ``wss``; None for the system's certificate authorities.
        open_stream: connects instead of TCP, for proxies and tunnels.
        tap: called first with the arrival (Trio's clock, seconds) and the text of every message,
            for recorders. It must not block.

    Raises:
        ValueError: the address or the session id is invalid.
        JoinRefused: the server refused the join.
        Superseded: the member was resumed elsewhere with its resume token.
        Unreachable: there was no connection within the time limit.
    """
    address = address_of(url, session_id, ssl_context, open_stream)
    join = JoinSession(
        session_id=session_id,
        display_name=_given(display_name),
        role=_given(role),
        ticks=ticks,
    )
    membership = Membership(join, token, resume_token)
    block = trio.CancelScope()
    loop = ReconnectLoop(
        address, membership, Patience(join_within, give_up_after), block.cancel, tap
    )
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            band = Band(membership, loop)
            try:
                with block:
                    await loop.joined.wait()
                    yield band
            finally:
                try:
                    # Its waits have deadlines.
                    with trio.CancelScope(shield=True):
                        await band.leave()
                finally:
                    # Ctrl-C ends the wait above, but not the loop, which is shielded.
                    loop.abandon()
            if block.cancelled_caught and loop.error is not None:
                raise loop.error
    except BaseExceptionGroup as group:
        failure = meant(group, loop.error)
        if failure is group:
            raise
    if failure is not None:
        raise failure


def _given(value: _T | None) -> _T | UnsetType:
    return UNSET if value is None else value
