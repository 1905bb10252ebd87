"""One WebSocket connection: its socket from the upgrade to the close."""

import secrets
from collections.abc import Callable

import trio
from trio_websocket import WebSocketConnection, wrap_server_stream

from bandsync.net.dispatch import Dispatch
from bandsync.net.http_head import Head
from bandsync.net.keepalive import Keepalive
from bandsync.net.outbox import Outbox
from bandsync.net.registry import ConnectionRegistry
from bandsync.net.ws_handshake import HandshakeStream
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.frames import FrameReader, Opcode, ProtocolError, pong_frame, text_frame
from bandsync.wire.messages import LeaveReason, ServerDraining, encode

HANDSHAKE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0

# Longer than a few passes of an overloaded event loop: see `Connection._end`.
_END_TIMEOUT_S = 10.0
_RECEIVE_BYTES = 16_384
# Yield to other connections after this many frames of one read.
_FRAMES_PER_TURN = 16


class Connection:
    """A `bandsync.rooms.fanout.Peer` with a socket.

    Args:
        registry: the server's connections, and what they share.
        nursery: parent of all tasks of this connection.
        stream: the accepted stream, whose HTTP head has been read.
        send_nowait: sends what the kernel takes at once; None when the stream cannot (TLS).
        head: the upgrade request.
        path_session: the session that the URL names; empty if it names none.

    Attributes:
        connection_id: random, of this connection only.
        member_id: the member that it is bound to; empty before a join.
        wants_ticks: whether it receives ``scroll_tick``.
        latency_ms: smoothed round trip of its pings; None before the first pong.
        sync_error_ms: the client's own bound on its clock error; None before its first report.
        outbox: its send queue.
        push: `Outbox.push`, bound once, so that a delivery costs one call.
        push_snapshot: `Outbox.push_snapshot`, bound likewise.
        push_volatile: `Outbox.push_volatile`, bound likewise.
    """

    __slots__ = (
        "_closing",
        "_dispatch",
        "_early",
        "_frames",
        "_handshake",
        "_keepalive",
        "_leave_reason",
        "_nursery",
        "_registry",
        "_stream",
        "_unreadable",
        "_websocket",
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
        registry: ConnectionRegistry,
        nursery: trio.Nursery,
        stream: trio.abc.Stream,
        send_nowait: Callable[[bytes], int] | None,
        head: Head,
        path_session: str,
    ) -> None:
        self.connection_id = secrets.token_hex(8)
        self.member_id = ""
        self.wants_ticks = True
        self.latency_ms: float | None = None
        self.sync_error_ms: float | None = None
        self.outbox = Outbox(
            stream, send_nowait, policy=registry.policy, nursery=nursery, owner=self
        )
        self.push = self.outbox.push
        self.push_snapshot = self.outbox.push_snapshot
        self.push_volatile = self.outbox.push_volatile
        self._registry = registry
        self._nursery = nursery
        self._stream = stream
        self._handshake = HandshakeStream(head.handshake, self.outbox, self)
        self._websocket: WebSocketConnection | None = None
        self._early = head.rest
        self._frames = FrameReader(registry.settings.max_message_bytes)
        self._keepalive = Keepalive(registry.timeout_s, trio.current_time())
        self._dispatch = Dispatch(registry, path_session)
        self._leave_reason: LeaveReason = "timeout"
        self._closing = False
        self._unreadable = False

    async def run(self) -> None:
        """Accept the WebSocket and serve it until the connection has ended.

        Raises:
            trio.TooSlowError: the opening handshake took longer than `HANDSHAKE_TIMEOUT_S`.
        """
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                request = await wrap_server_stream(self._nursery, self._handshake, 1)
                self._websocket = await request.accept()
            if self._closing:
                self._end()  # The socket broke during the handshake.
            elif (rejection := self._registry.add(self)) is not None:
                self.close(*rejection)
            else:
                welcome = text_frame(encode(self._registry.welcome(self.connection_id)))
                self.push(welcome + self._keepalive.ping(trio.current_time()))
            await self._read()
        finally:
            self._registry.discard(self)
            if (room := self._dispatch.room) is not None:
                self._registry.hub.dropped(room, self, self._leave_reason)
        self._end()

    def release(self) -> None:
        """Break the reference cycles, once all tasks of the connection have ended.

        The connection is then freed by its reference count, and not minutes later by the cyclic
        garbage collector.
        """
        self.outbox.release()
        self._handshake.release()

    def close(self, code: int, reason: str) -> None:
        """Close with a close frame, after `CLOSE_TIMEOUT_S` by force; never blocks."""
        if self._closing:
            return
        self._closing = True
        self._registry.hub.counters.closed[str(int(code))] += 1
        self._registry.log.debug(
            "connection.closing", connection_id=self.connection_id, code=int(code), reason=reason
        )
        self._frames.discard()
        self._nursery.start_soon(self._close, int(code), reason)

    def announce_drain(self, reconnect_in_ms: int) -> None:
        """Send ``server_draining``."""
        self.push(text_frame(encode(ServerDraining(reconnect_in_ms))))

    def ping(self) -> None:
        """Ping the client, or close the connection if the client has timed out."""
        now = trio.current_time()
        if self._keepalive.timed_out(now):
            self.close(CloseCode.CONNECTION_TIMEOUT, "connection timeout")
        else:
            self.push_volatile(self._keepalive.ping(now))

    def on_slow_consumer(self) -> None:
        """Close a client that reads too slowly: see `bandsync.net.outbox`."""
        if not self._closing:
            self._registry.hub.counters.slow_consumers += 1
        self._leave_reason = "slow_consumer"
        self._registry.log.info(
            "connection.slow", connection_id=self.connection_id, member_id=self.member_id
        )
        self.close(CloseCode.TRY_AGAIN_LATER, "slow consumer: send queue limit exceeded")

    def on_broken(self) -> None:
        """End the connection: a send has failed."""
        self._closing = True
        if self._websocket is not None:
            self._end()

    def on_handshake_over(self) -> None:
        """Flush the last frame of trio-websocket, then end all tasks."""
        if self._handshake.ended:
            self._nursery.cancel_scope.cancel()
        else:
            self._nursery.start_soon(self._flush_and_end)

    async def _close(self, code: int, reason: str) -> None:
        """Run the closing handshake: `on_handshake_over` ends the connection, or the timeout."""
        if self._websocket is not None:
            self.outbox.stop()
            self._nursery.start_soon(self._websocket.aclose, code, reason)
            await trio.sleep(CLOSE_TIMEOUT_S)
        self._end()

    async def _flush_and_end(self) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            await self.outbox.flush()
        self._end()

    def _end(self) -> None:
        """End all tasks of the connection, trio-websocket's reader first; never blocks.

        `HandshakeStream.end` says why the reader goes first. Its reply takes no I/O; the deadline
        is there in case that another version of trio-websocket does not reply.
        """
        self._closing = True
        if self._websocket is None or self._handshake.closed:
            self._nursery.cancel_scope.cancel()
        elif not self._handshake.ended:
            self._nursery.cancel_scope.deadline = trio.current_time() + _END_TIMEOUT_S
            self._handshake.end()

    async def _read(self) -> None:
        """Read and serve until the stream ends."""
        early, self._early = self._early, b""
        if early:
            await self._receive(early)
        del early
        while True:
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            await self._receive(bytes(data))
            # Keep no reference to the last message while the client is silent.
            del data

    async def _receive(self, data: bytes) -> None:
        """Serve the frames that ``data`` completes."""
        received_at = self._keepalive.received_at = trio.current_time()
        received_ms = self._registry.hub.now()
        if self._unreadable:
            return
        try:
            for number, frame in enumerate(self._frames.feed(data), 1):
                if self.outbox.behind:
                    # Backpressure: serve no further requests of a client before it has drained
                    # its send queue.
                    await self.outbox.caught_up()
                elif number % _FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if frame.opcode is Opcode.TEXT or frame.opcode is Opcode.BINARY:
                    if not self._closing:
                        # A binary message is an invalid one, like an empty text.
                        text = frame.payload if frame.opcode is Opcode.TEXT else b""
                        await self._dispatch.message(self, text, received_at, received_ms)
                elif frame.opcode is Opcode.PONG:
                    self.latency_ms = self._keepalive.pong(frame.payload)
                elif frame.opcode is Opcode.PING:
                    self.push_volatile(pong_frame(frame.payload))
                else:
                    self._frames.discard()
                    self._handshake.deliver(frame.payload)
        except ProtocolError as error:
            self._unreadable = error.code == CloseCode.PROTOCOL_ERROR
            self.close(error.code, error.reason)
