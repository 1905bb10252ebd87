"""One WebSocket connection: frames to commands, commands to its room, answers to its outbox."""

import secrets
import struct
from collections.abc import Callable

import trio
from msgspec import UNSET, UnsetType
from trio_websocket import WebSocketConnection, wrap_server_stream

from bandsync.net.http_head import Head
from bandsync.net.outbox import Outbox
from bandsync.net.registry import ConnectionRegistry
from bandsync.net.ws_handshake import Wire, end_parser
from bandsync.rooms.room import Room
from bandsync.rules.admission import JoinContext, admit
from bandsync.rules.refusals import NOT_JOINED
from bandsync.rules.tokens import ResumeToken, parse_resume_token
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
from bandsync.wire.frames import (
    FrameReader,
    Opcode,
    ProtocolError,
    ping_frame,
    pong_frame,
    text_frame,
)
from bandsync.wire.messages import (
    Ack,
    ClockSyncReply,
    Error,
    HeartbeatReply,
    LatencyResponse,
    LeaveReason,
    Outgoing,
    ServerDraining,
    encode,
)
from bandsync.wire.rate_limits import AbuseCounter, RateLimits

HANDSHAKE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
MAX_BAD_MESSAGES = 10
RESTARTS = "the server restarts: reconnect"

_RECEIVE_BYTES = 16_384
# After so many frames out of one read, others get their turn.
_TURN = 16
# RFC 6298 section 2: one wild round trip must not decide how long a band waits for a start.
_SMOOTHING = 1 / 8

_RATE_LIMITED = Refusal("rate_limited", "Slow down: too many messages of this type in a second.")


class Connection:
    """A `bandsync.rooms.room.Peer` with a socket.

    Args:
        connections: all of them, and what this one shares with the others.
        stream: the accepted stream, whose HTTP head has been read.
        send_nowait: sends at once what the kernel takes; None when the stream cannot (TLS).
        head: the upgrade request.
    """

    __slots__ = (
        "_abuse",
        "_closing",
        "_connections",
        "_early",
        "_frames",
        "_heard",
        "_hub",
        "_leave_reason",
        "_limits",
        "_nursery",
        "_path_session",
        "_pinged",
        "_received_at",
        "_room",
        "_stream",
        "_token",
        "_unreadable",
        "_websocket",
        "_wire",
        "connection_id",
        "latency_ms",
        "member_id",
        "outbox",
        "push",
        "push_snapshot",
        "push_volatile",
        "sync_error_ms",
        "wants_ticks",
    )

    def __init__(
        self,
        connections: ConnectionRegistry,
        nursery: trio.Nursery,
        stream: trio.abc.Stream,
        send_nowait: Callable[[bytes], int] | None,
        head: Head,
        path_session: str,
    ) -> None:
        settings = connections.settings
        self.connection_id = secrets.token_hex(8)
        self.member_id = ""
        self.wants_ticks = True
        self.latency_ms: float | None = None
        self.sync_error_ms: float | None = None
        self.outbox = Outbox(
            stream,
            send_nowait,
            policy=connections.policy,
            nursery=nursery,
            on_slow=self._slow,
            on_broken=self._broken,
        )
        self.push = self.outbox.push
        self.push_snapshot = self.outbox.push_snapshot
        self.push_volatile = self.outbox.push_volatile
        self._connections = connections
        self._hub = connections.hub
        self._nursery = nursery
        self._stream = stream
        self._wire = Wire(head.normal, self.outbox, self._peer_closed)
        self._websocket: WebSocketConnection | None = None
        self._early = head.rest
        self._path_session = path_session
        self._frames = FrameReader(settings.max_message_bytes)
        self._limits = RateLimits(settings.rate_limit_factor)
        self._abuse: AbuseCounter | None = None
        self._room: Room | None = None
        self._token: ResumeToken | None = None
        self._heard = trio.current_time()
        self._pinged = self._heard
        self._received_at = 0.0
        self._leave_reason: LeaveReason = "timeout"
        self._closing = False
        self._unreadable = False

    async def run(self) -> None:
        """Shake hands and serve until the connection is gone; at once if there is no place."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                request = await wrap_server_stream(self._nursery, self._wire, 1)
                self._websocket = await request.accept()
            # Counted and looked at in one step: any number of handshakes may be under way.
            full = len(self._connections.open) >= self._connections.settings.max_connections
            self._connections.add(self)
            if self._connections.draining:
                self.close(1012, RESTARTS)
            elif full:
                self.close(1013, "the server is full, try again later")
            else:
                welcome = text_frame(encode(self._connections.welcome(self.connection_id)))
                self.push(welcome + self._ping())
            await self._read()
        finally:
            self._connections.discard(self)
            if self._room is not None:
                self._hub.dropped(self._room, self, self._leave_reason)
        self._nursery.cancel_scope.cancel()

    def release(self) -> None:
        """Hold on to nothing that holds on to this: memory is free at once.

        Otherwise it would be when the garbage collector looks at old objects, minutes later. Call
        it when all tasks of the connection have ended.
        """
        self.outbox.release()
        self._wire.release()
        if self._websocket is not None:
            end_parser(self._websocket)

    def close(self, code: int, reason: str) -> None:
        """Close with a close frame, after `CLOSE_TIMEOUT_S` by force; never blocks."""
        if self._closing:
            return
        self._closing = True
        self._hub.counters.closed[str(code)] += 1
        self._connections.log.debug(
            "connection.closing", connection_id=self.connection_id, code=code, reason=reason
        )
        self._frames.discard()
        self._nursery.start_soon(self._close, code, reason)

    def drain(self, reconnect_in_ms: int) -> None:
        """Tell the client that the server is about to restart."""
        self._send(ServerDraining(reconnect_in_ms))

    def ping(self) -> None:
        """Ping the client, or close if it has been silent for too long, our last ping included."""
        silence = trio.current_time() - self._heard
        if silence > self._connections.timeout_s and self._heard < self._pinged:
            self.close(4000, "connection timeout")
        else:
            self.push_volatile(self._ping())

    async def _close(self, code: int, reason: str) -> None:
        if self._websocket is not None:
            self.outbox.stop()
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                await self._websocket.aclose(code, reason)
                await self.outbox.flush()
        self._nursery.cancel_scope.cancel()

    def _peer_closed(self) -> None:
        """trio-websocket is done: let its last frame out, then end."""
        self._nursery.start_soon(self._flush_and_end)

    async def _flush_and_end(self) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            await self.outbox.flush()
        self._nursery.cancel_scope.cancel()

    def _slow(self) -> None:
        if not self._closing:
            self._hub.counters.slow_consumers += 1
        self._leave_reason = "slow_consumer"
        self._connections.log.info(
            "connection.slow", connection_id=self.connection_id, member_id=self.member_id
        )
        self.close(1013, "too slow: frames wait for you that others have had long ago")

    def _broken(self) -> None:
        self._nursery.cancel_scope.cancel()

    async def _read(self) -> None:
        """Read and serve until the stream ends."""
        early, self._early = self._early, b""
        if early:
            await self._received(early)
        del early
        while True:
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            await self._received(bytes(data))
            # While the client is silent, nothing is kept of what it said.
            del data

    async def _received(self, data: bytes) -> None:
        self._heard = trio.current_time()
        self._received_at = self._hub.now()
        if self._unreadable:
            return
        try:
            for number, frame in enumerate(self._frames.feed(data), 1):
                if self.outbox.behind:
                    # Who does not take what it asked for asks for no more.
                    await self.outbox.caught_up()
                elif number % _TURN == 0:
                    await trio.lowlevel.checkpoint()
                if frame.opcode is Opcode.TEXT:
                    await self._on_text(frame.payload)
                elif frame.opcode is Opcode.PONG:
                    self.heard_pong(frame.payload)
                elif frame.opcode is Opcode.PING:
                    self.push_volatile(pong_frame(frame.payload))
                elif frame.opcode is Opcode.BINARY:
                    await self._on_text(b"")
                else:
                    self._frames.discard()
                    self._wire.deliver(frame.payload)
        except ProtocolError as error:
            self._unreadable = error.code == 1002
            self.close(error.code, error.reason)

    def heard_pong(self, payload: bytes) -> None:
        """Take the round trip of a pong into `latency_ms`; one that is not ours says nothing."""
        if len(payload) != _PING.size:
            return
        (sent,) = _PING.unpack(payload)
        round_trip = (self._heard - sent) * 1000
        if not 0 <= round_trip <= self._connections.timeout_s * 1000:
            return
        if self.latency_ms is None:
            self.latency_ms = round_trip
        else:
            self.latency_ms += (round_trip - self.latency_ms) * _SMOOTHING

    async def _on_text(self, payload: bytes) -> None:
        """Serve one message: exactly one ``ack`` or ``error`` answers it, if it asks for one."""
        if self._closing:
            return
        self._hub.counters.received += 1
        message = decode(payload)
        if isinstance(message, Undecodable):
            kind = message.kind
            limited = kind is not None and not self._limits.allow(kind, self._heard)
            self._refuse(_RATE_LIMITED if limited else message.refusal, message.request_id)
            return
        if not self._limits.allow(kind_of(message), self._heard):
            self._refuse(_RATE_LIMITED, message.request_id)
            return
        try:
            refusal = await self._serve(message)
        except Exception:
            error_id = secrets.token_hex(8)
            self._connections.log.exception(
                "command.failed",
                error_id=error_id,
                connection_id=self.connection_id,
                kind=kind_of(message),
            )
            refusal = Refusal(
                "internal",
                "The server failed at this; report `context.errorId` to its operator.",
                {"errorId": error_id},
            )
        if refusal is not None:
            self._refuse(refusal, message.request_id)
        self._connections.command_seconds(trio.current_time() - self._heard)

    async def _serve(self, message: ClientMessage) -> Refusal | None:
        match message:
            case JoinSession():
                return await self._join(message)
            case LatencyProbe():
                timestamp = echoed(message.timestamp)
                self._answer(LatencyResponse(timestamp, self._hub.now()), message)
                return None
            case ClockSync():
                # Encoded last, so that t2 is as close to the send as it can be.
                t0 = echoed(message.t0)
                reply = ClockSyncReply(t0, self._received_at, self._hub.now())
                self._answer(reply, message)
                return None
            case Heartbeat():
                self._answer(HeartbeatReply(self._hub.now()), message)
                return None
        refusal = out_of_range(message, self._received_at)
        if refusal is not None:
            return refusal
        if self._room is None:
            return NOT_JOINED
        if isinstance(message, SyncReport):
            self.sync_error_ms = message.error_ms
        fresh_id = secrets.token_hex(8) if isinstance(message, ChatMessage) else ""
        refusal = await self._room.command(self, message, fresh_id, message.request_id)
        if refusal is None and isinstance(message, LeaveSession):
            self._room = None
            self.member_id = ""
            self._token = None
        return refusal

    async def _join(self, message: JoinSession) -> Refusal | None:
        old_room, old_member = self._room, self.member_id
        doorway = JoinContext(
            self._path_session,
            "" if old_room is None else old_room.session_id,
            self._token,
            self._connections.settings.join_secret,
        )
        command = admit(
            message,
            doorway,
            epoch_id=secrets.token_hex(8),
            secret=secrets.token_urlsafe(24),
            now=self._hub.now(),
        )
        if isinstance(command, Refusal):
            return command
        wanted_ticks, self.wants_ticks = self.wants_ticks, message.ticks
        outcome = await self._hub.bind(self, command, secrets.token_hex(8), message.request_id)
        if isinstance(outcome, Refusal):
            self.wants_ticks = wanted_ticks
            return outcome
        self._room, you = outcome
        self._token = parse_resume_token(you.resume_token)
        if old_room is not None and old_room is not self._room:
            await self._leave(old_room, old_member)
        return None

    async def _leave(self, room: Room, member_id: str) -> None:
        """Leave the session that this connection was in before, whatever happens to it now."""
        room.unregister(self, member_id)
        left = False
        try:
            await room.leave(member_id, self.connection_id)
            left = True
        finally:
            if not left:
                self._hub.finish(room.leave, member_id, self.connection_id)

    def _refuse(self, refusal: Refusal, request_id: str | UnsetType) -> None:
        self._hub.counters.errors[refusal.code] += 1
        context = UNSET if refusal.context is None else refusal.context
        self._send(Error(refusal.code, refusal.message, request_id, context))
        if refusal.code == "bad_message":
            if self._abuse is None:
                self._abuse = AbuseCounter(MAX_BAD_MESSAGES)
            if self._abuse.too_many(self._heard):
                self.close(1008, "too many messages that are none")

    def _answer(self, reply: Outgoing, message: ClientMessage) -> None:
        frames = text_frame(encode(reply))
        if message.request_id is not UNSET:
            frames += text_frame(encode(Ack(message.request_id)))
        self.push(frames)

    def _send(self, message: Outgoing) -> None:
        self.push(text_frame(encode(message)))

    def _ping(self) -> bytes:
        self._pinged = trio.current_time()
        return ping_frame(_PING.pack(self._pinged))


# A ping carries the moment it was sent, so that whichever pong comes tells its round trip.
_PING = struct.Struct("!d")
