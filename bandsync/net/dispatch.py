"""Dispatch of one connection's messages: decode, limit the rate, run the command, answer."""

import secrets

import trio
from msgspec import UNSET, UnsetType

from bandsync.net.registry import ConnectionRegistry
from bandsync.rooms.fanout import Peer
from bandsync.rooms.room import Room
from bandsync.rules.admission import JoinContext, admit
from bandsync.rules.refusals import NOT_JOINED
from bandsync.rules.tokens import ResumeToken, parse_resume_token
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.commands import (
    ChatMessage,
    ClientMessage,
    ClockSync,
    Heartbeat,
    JoinSession,
    LatencyProbe,
    LeaveSession,
    Refusal,
    SyncReport,
    Undecodable,
    decode,
    echoed,
    kind_of,
    out_of_range,
)
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import (
    Ack,
    ClockSyncReply,
    Error,
    HeartbeatReply,
    LatencyResponse,
    Outgoing,
    encode,
)
from bandsync.wire.rate_limits import AbuseCounter, RateLimits

MAX_BAD_MESSAGES_PER_MINUTE = 10

_RATE_LIMITED = Refusal("rate_limited", "Slow down: too many messages of this type in a second.")


class Dispatch:
    """Rate limits and membership of one connection, and the dispatch of its messages.

    The connection is an argument of each call and is not stored: a reference back to it would be
    a reference cycle.

    Args:
        registry: the server's connections, rooms, settings and log.
        path_session: the session that the URL names; empty if it names none.

    Attributes:
        room: the room that the connection has joined; None before a join and after a leave.
    """

    __slots__ = ("_abuse", "_limits", "_path_session", "_registry", "_token", "room")

    def __init__(self, registry: ConnectionRegistry, path_session: str) -> None:
        self.room: Room | None = None
        self._registry = registry
        self._path_session = path_session
        self._limits = RateLimits(registry.settings.rate_limit_factor)
        # Created at the first bad message: most connections never send one.
        self._abuse: AbuseCounter | None = None
        self._token: ResumeToken | None = None

    async def message(
        self, peer: Peer, payload: bytes, received_at: float, received_ms: float
    ) -> None:
        """Serve one message. One with a ``requestId`` gets exactly one ``ack`` or ``error``.

        Args:
            received_at: arrival of its bytes, on Trio's clock, seconds.
            received_ms: the same on the session clock, milliseconds.
        """
        registry = self._registry
        registry.hub.counters.received += 1
        message = decode(payload)
        if isinstance(message, Undecodable):
            kind = message.kind
            limited = kind is not None and not self._limits.allow(kind, received_at)
            refusal = _RATE_LIMITED if limited else message.refusal
            self._refuse(peer, refusal, message.request_id, received_at)
            return
        if not self._limits.allow(kind_of(message), received_at):
            self._refuse(peer, _RATE_LIMITED, message.request_id, received_at)
            return
        try:
            refused = await self._serve(peer, message, received_ms)
        except Exception:
            error_id = secrets.token_hex(8)
            registry.log.exception(
                "command.failed",
                error_id=error_id,
                connection_id=peer.connection_id,
                kind=kind_of(message),
            )
            refused = Refusal(
                "internal",
                "The server failed at this; report `context.errorId` to its operator.",
                {"errorId": error_id},
            )
        if refused is not None:
            self._refuse(peer, refused, message.request_id, received_at)
        registry.command_seconds(trio.current_time() - received_at)

    async def _serve(
        self, peer: Peer, message: ClientMessage, received_ms: float
    ) -> Refusal | None:
        hub = self._registry.hub
        match message:
            case JoinSession():
                return await self._join(peer, message)
            case LatencyProbe():
                _answer(peer, LatencyResponse(echoed(message.timestamp), hub.now()), message)
                return None
            case ClockSync():
                # Read the clock last, so that t2 is as close to the send as possible.
                t0 = echoed(message.t0)
                _answer(peer, ClockSyncReply(t0, received_ms, hub.now()), message)
                return None
            case Heartbeat():
                _answer(peer, HeartbeatReply(hub.now()), message)
                return None
        refusal = out_of_range(message, received_ms)
        if refusal is not None:
            return refusal
        if self.room is None:
            return NOT_JOINED
        if isinstance(message, SyncReport):
            peer.sync_error_ms = message.error_ms
        fresh_id = secrets.token_hex(8) if isinstance(message, ChatMessage) else ""
        refusal = await self.room.command(peer, message, fresh_id, message.request_id)
        if refusal is None and isinstance(message, LeaveSession):
            self.room = None
            peer.member_id = ""
            self._token = None
        return refusal

    async def _join(self, peer: Peer, message: JoinSession) -> Refusal | None:
        hub = self._registry.hub
        old_room, old_member = self.room, peer.member_id
        context = JoinContext(
            self._path_session,
            "" if old_room is None else old_room.session_id,
            self._token,
            self._registry.settings.join_secret,
        )
        command = admit(
            message,
            context,
            epoch_id=secrets.token_hex(8),
            secret=secrets.token_urlsafe(24),
            now=hub.now(),
        )
        if isinstance(command, Refusal):
            return command
        wanted_ticks, peer.wants_ticks = peer.wants_ticks, message.ticks
        outcome = await hub.bind(peer, command, secrets.token_hex(8), message.request_id)
        if isinstance(outcome, Refusal):
            peer.wants_ticks = wanted_ticks
            return outcome
        self.room, you = outcome
        self._token = parse_resume_token(you.resume_token)
        if old_room is not None and old_room is not self.room:
            await self._leave(peer, old_room, old_member)
        return None

    async def _leave(self, peer: Peer, room: Room, member_id: str) -> None:
        """Leave the previous session, also when this task is cancelled meanwhile."""
        room.unregister(peer, member_id)
        left = False
        try:
            await room.leave(member_id, peer.connection_id)
            left = True
        finally:
            if not left:
                self._registry.hub.finish(room.leave, member_id, peer.connection_id)

    def _refuse(
        self, peer: Peer, refusal: Refusal, request_id: str | UnsetType, received_at: float
    ) -> None:
        self._registry.hub.counters.errors[refusal.code] += 1
        context = UNSET if refusal.context is None else refusal.context
        error = Error(refusal.code, refusal.message, request_id, context)
        peer.push(text_frame(encode(error)))
        if refusal.code == "bad_message":
            if self._abuse is None:
                self._abuse = AbuseCounter(MAX_BAD_MESSAGES_PER_MINUTE)
            if self._abuse.too_many(received_at):
                peer.close(CloseCode.POLICY_VIOLATION, "protocol abuse: too many invalid messages")


def _answer(peer: Peer, reply: Outgoing, message: ClientMessage) -> None:
    frames = text_frame(encode(reply))
    if message.request_id is not UNSET:
        frames += text_frame(encode(Ack(message.request_id)))
    peer.push(frames)
