"""`connect` and what it gives: a band, as a program plays in it."""

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
# trio-websocket's goodbye has its own deadline within this.
_GOODBYE_S = CLOSE_TIMEOUT_S + 1.0


class Band:
    """A place in a session: made by `connect`, which keeps it connected.

    Commands return the version that they made, None if nothing had to change, and by then
    `session` shows the change. They raise `CommandRefused` (nothing has changed), `NotConnected`
    (at once when there is no connection) or `ConnectionLost` (it may or may not have happened).
    To cancel one that is under way does not take it back.
    """

    def __init__(self, membership: Membership, keeper: ReconnectLoop) -> None:
        self._membership = membership
        self._keeper = keeper

    # What is known. All of it stays as it was while the connection is away.

    @property
    def status(self) -> Status:
        """How the connection is; see `StatusChanged`."""
        return self._membership.status

    @property
    def session(self) -> SessionView:
        """The session as it is known now; a new object after every change."""
        view = self._membership.view
        assert view is not None
        return view

    @property
    def you(self) -> You:
        """The answer to the latest join: member id, resume token, whether it was a resume."""
        you = self._membership.you
        assert you is not None
        return you

    @property
    def member_id(self) -> str:
        """Ours. It stays the same unless a connection comes back after the resume grace."""
        return self.you.member_id

    @property
    def resume_token(self) -> str:
        """The latest, a secret: with it another process can take this place, see `connect`."""
        return self.you.resume_token

    @property
    def me(self) -> MemberView | None:
        """Ourselves, as the others see us; None if the session knows us no more."""
        return self.session.members.get(self.member_id)

    @property
    def leader(self) -> MemberView | None:
        """Who leads; None while nobody does."""
        leader_id = self.session.leader_id
        return None if leader_id is None else self.session.members.get(leader_id)

    @property
    def is_leader(self) -> bool:
        """Whether we lead."""
        return self.session.leader_id == self.member_id

    @property
    def stats(self) -> Mapping[str, MemberStats]:
        """How well each member is connected, by id; from the latest `room_stats`."""
        return self._membership.stats

    @property
    def server(self) -> Welcome:
        """What the server said of itself at the latest connection."""
        server = self._membership.server
        assert server is not None
        return server

    @property
    def storage(self) -> StorageStatus | None:
        """Where the server keeps sessions; None until it says that something changed."""
        return self._membership.storage

    @property
    def clock(self) -> SessionClock:
        """The session clock."""
        return self._membership.clock

    # Where the song is.

    def transport_at(self, instant: float | None = None) -> Segment:
        """What is in force at ``instant`` (session clock, milliseconds; now if None)."""
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

        None if the song does not play or the beat is past. `SessionClock.to_local` tells when to
        wake up for it.
        """
        return instant_of_beat(self.session.transport, beat, self._instant(after))

    # What happens.

    def events(self) -> EventStream:
        """What happens from this call on: ``async for event in band.events()``.

        The structs of `bandsync.wire.messages`, each after `session` was updated, and
        `StatusChanged`, `EventsDropped`, `UnknownMessage`. Every call is a stream of its own, with a buffer of its
        own: see `EventStream` for what happens to who is late.
        """
        return self._membership.events.stream()

    async def until_online(self) -> None:
        """Wait for a connection, if there is none.

        Raises:
            NotConnected: the client has ended: there will be none.
        """
        await trio.lowlevel.checkpoint()
        while self._keeper.conversation is None:
            if self._keeper.done.is_set():
                raise NotConnected("the client has ended")
            await self._keeper.next_join()

    # Commands.

    async def command(self, message: ClientMessage) -> int | None:
        """Give any command of `bandsync.wire.commands`; the others are made of this one.

        Raises:
            ValueError: it is longer than the server allows, or its request id is that of another
                that is under way, or it joins or leaves, which is for `connect` and `leave`.
        """
        if isinstance(message, JoinSession | LeaveSession):
            raise ValueError("joining is done by connect, leaving by Band.leave")
        return await self._command(message)

    async def _command(self, message: ClientMessage) -> int | None:
        # Whoever tries again at once must not keep the connection from coming back.
        await trio.lowlevel.checkpoint()
        conversation = self._keeper.conversation
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
        """Start the song, or let it run on.

        Args:
            position_ms: where; None where it is.
            start_in_ms: how long from now; None leaves it to the server, who waits until the
                slowest member has heard of it.
            count_in_beats: so many beats later still.
        """
        return await self.command(
            Play(
                position_ms=_given(position_ms),
                start_in_ms=_given(start_in_ms),
                count_in_beats=count_in_beats,
            )
        )

    async def pause(self) -> int | None:
        """Stand where the song is."""
        return await self.command(Pause())

    async def stop(self) -> int | None:
        """Stand at the start of the song."""
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
        """Tell where the song was here at ``timestamp`` (session clock).

        From the leader it moves everybody; a follower who is off gets a `DriftCorrection`.
        """
        return await self.command(PositionSync(position_ms=position_ms, timestamp=timestamp))

    async def take_lead(self) -> int | None:
        """Lead, if nobody does or the leader is away."""
        return await self.command(SetRole(role="leader"))

    async def step_down(self) -> int | None:
        """Lead no more; somebody else is elected."""
        return await self.command(SetRole(role="follower"))

    async def hand_over(self, member_id: str) -> int | None:
        """Give the lead to another member."""
        return await self.command(SetRole(role="leader", member_id=member_id))

    async def request_leader(self) -> None:
        """Ask the leader for the lead."""
        await self.command(RequestLeader())

    async def deny_leader(self, member_id: str) -> None:
        """Refuse the lead to a member who asked for it."""
        await self.command(DenyLeader(member_id=member_id))

    async def update_message(self, message: str) -> int | None:
        """Set the session's headline."""
        return await self.command(UpdateMessage(message=message))

    async def chat(self, text: str) -> int | None:
        """Say something to everybody."""
        return await self.command(ChatMessage(text=text))

    # The end.

    async def leave(self) -> None:
        """Leave the session for good and close the connection; at the end of the block, too.

        Waits for the server for two seconds at most. Without a connection nobody can be told: the
        others see us leave when the resume grace is over.
        """
        with trio.move_on_after(_LEAVE_TIMEOUT_S):
            # Refused or cut off, there is no place to leave.
            with suppress(ClientError):
                await self._command(LeaveSession())
        self._keeper.withdraw()
        await self.close()

    async def close(self) -> None:
        """Close the connection and keep the place: the resume grace starts."""
        self._keeper.stop()
        with trio.move_on_after(_GOODBYE_S) as patience:
            await self._keeper.done.wait()
        if patience.cancelled_caught:
            self._keeper.abandon()

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
    """Join a session and stay in it for as long as the block runs.

    Entering the block waits until the server has let us in. A connection that is lost or silent is
    replaced by another, with the same place in the session; meanwhile commands raise
    `NotConnected`. Leaving the block leaves the session, also when the block is cancelled or fails,
    and takes no longer than four seconds.

    When only a person can help, the block is cancelled and the reason raised: see `Ended`. An
    exception of the block comes out as it is.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        session_id: 1 to 64 of ``A-Z a-z 0-9 . _ -``; created if there is none.
        display_name: 1 to 64 characters; None for the server's default.
        role: ask for the lead, or not to be told.
        token: the join token, where the server wants one; or a function, async or not, that gets
            a fresh one at every join. If it raises, the attempt has failed and another follows.
        resume_token: of an earlier connection, to take its place.
        ticks: also receive a `ScrollTick` ten times a second. Nobody needs them who can ask
            `Band.position_at`.
        join_within: how long to try to get in, in seconds.
        give_up_after: how long to try to come back, in seconds.
        ssl_context: for ``wss``; None trusts what the system trusts.
        open_stream: connects in place of TCP: for proxies and tunnels.
        tap: called with the arrival (Trio's clock, seconds) and the text of every message before
            anything else is done with it, for recorders. It must not block.

    Raises:
        ValueError: the address or the session id cannot be right.
        JoinRefused: the server does not let us in.
        Superseded: somebody has taken this place with its resume token.
        Unreachable: there was no connection for too long.
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
    keeper = ReconnectLoop(
        address, membership, Patience(join_within, give_up_after), block.cancel, tap
    )
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            band = Band(membership, keeper)
            try:
                with block:
                    await keeper.joined.wait()
                    yield band
            finally:
                try:
                    # Its waits have deadlines of their own.
                    with trio.CancelScope(shield=True):
                        await band.leave()
                finally:
                    # Ctrl-C, which no shield keeps out: the keeper has one, too, and would stay.
                    keeper.abandon()
            if block.cancelled_caught and keeper.error is not None:
                raise keeper.error
    except BaseExceptionGroup as group:
        failure = meant(group, keeper.error)
        if failure is group:
            raise
    if failure is not None:
        raise failure


def _given(value: _T | None) -> _T | UnsetType:
    return UNSET if value is None else value
