"""One WebSocket connection, from TCP to its end. It transports text and knows no sessions."""

import re
import ssl
from collections.abc import Awaitable, Callable
from typing import cast

import h11
import trio
from msgspec import Struct
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
)
from wsproto.utilities import LocalProtocolError

from bandsync.client.server_address import ServerAddress
from bandsync.model.exception_leaves import first_leaf

HANDSHAKE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
# A write without progress for this long: the peer is gone.
SEND_TIMEOUT_S = 10.0
ABNORMAL = 1006

_MAX_TO_SEND = 64
_INBOX = 64
_RECEIVE_BYTES = 65_536
# A snapshot has up to fifty chat messages of a thousand characters, each up to six bytes in JSON.
_MAX_MESSAGE = 4 * 1024 * 1024

_STATUS = re.compile(rb"HTTP/1\.[01] ([2-5]\d\d)[ \r\n]")
_STATUS_BYTES = len(b"HTTP/1.1 403 ")

# A message, or a function that encodes it at the moment of the send.
TextMessage = str | Callable[[], str]


class ConnectionEnd(Struct, frozen=True):
    """How a connection ended, or why it could not be opened.

    Attributes:
        code: the close code; 1006 without one.
        reason: the close reason, or a description of the failure.
        http_status: HTTP status of a refused handshake; None otherwise.
        error: the exception of a failed connect; None otherwise.
    """

    code: int = ABNORMAL
    reason: str = ""
    http_status: int | None = None
    error: BaseException | None = None


class ClientWebSocket:
    """An open connection.

    Attributes:
        end: how it ended; meaningful once it has.
    """

    def __init__(self, websocket: WebSocketConnection, stream: "_WatchedStream") -> None:
        self._websocket = websocket
        self._stream = stream
        self._to_send, self._sending = trio.open_memory_channel[TextMessage](_MAX_TO_SEND)
        self._written = trio.Event()
        self.end = ConnectionEnd()

    @property
    def received_s(self) -> float:
        """When bytes last arrived, Trio's clock, seconds."""
        return self._stream.received_s

    async def send(self, text: TextMessage) -> None:
        """Queue a message; waits while the queue is full (backpressure).

        Cancelling it never truncates a frame: a separate task writes.

        Raises:
            trio.BrokenResourceError: the connection is closed; the message was not sent.
        """
        try:
            await self._to_send.send(text)
        except trio.ClosedResourceError:
            raise trio.BrokenResourceError from None

    def send_nowait(self, text: TextMessage) -> bool:
        """Queue a message that may be dropped; False if it was dropped."""
        try:
            self._to_send.send_nowait(text)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def receive(self) -> tuple[float, str] | None:
        """The next message and its arrival time (Trio's clock, seconds, never too early).

        None when the connection has ended.
        """
        while True:
            try:
                text = await self._websocket.get_message()
            except ConnectionClosed as closed:
                if closed.reason is not None and not self._stream.abandoned:
                    self.end = ConnectionEnd(int(closed.reason.code), closed.reason.reason or "")
                return None
            if isinstance(text, str):
                # The arrival of the latest bytes, possibly of a later message: closer to the truth
                # than the time at which this task is scheduled.
                return self._stream.received_s, text

    def abandon(self, why: str) -> None:
        """Record the end; `close` then sends no close frame to an unresponsive peer."""
        self.end = ConnectionEnd(reason=why)
        self._stream.abandoned = True

    async def write(self) -> None:
        """Send queued messages until cancelled or the connection is closed."""
        try:
            await self._write()
        finally:
            self._written.set()

    async def _write(self) -> None:
        with self._sending:
            async for text in self._sending:
                with trio.move_on_after(SEND_TIMEOUT_S) as patience:
                    try:
                        await self._websocket.send_message(
                            text if isinstance(text, str) else text()
                        )
                    except (ConnectionClosed, LocalProtocolError):
                        # The reader notices it as well.
                        return
                if patience.cancelled_caught:
                    # A frame may be truncated: nothing more can be sent.
                    self.abandon("write timeout")
                    await trio.aclose_forcefully(self._stream)
                    return

    async def close(self) -> None:
        """Send queued messages and a close frame; wait at most `CLOSE_TIMEOUT_S`."""
        self._to_send.close()
        if not self._stream.abandoned:
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                await self._written.wait()
                await self._websocket.aclose()


async def run_connection(
    address: ServerAddress, use: Callable[[ClientWebSocket], Awaitable[None]]
) -> ConnectionEnd:
    """Connect, run ``use`` on the connection, and close when it returns or is cancelled.

    Args:
        address: the server's address.
        use: must return when `ClientWebSocket.receive` returns None.
    """
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as patience:
        try:
            stream = _WatchedStream(await address.open_stream())
        except (OSError, trio.BrokenResourceError, ssl.CertificateError) as error:
            return ConnectionEnd(reason="cannot connect", error=error)
    if patience.cancelled_caught:
        return ConnectionEnd(reason="connect timeout")
    end = ConnectionEnd(reason="the handshake failed")
    try:
        async with trio.open_nursery() as nursery:
            connection = await _handshake(nursery, address, stream)
            if connection is None and stream.status is not None:
                end = _refused(stream.status)
            if connection is not None:
                nursery.start_soon(connection.write)
                try:
                    await use(connection)
                finally:
                    end = connection.end
                    # Shielded, with a deadline: the peer gets a close frame and need not detect the
                    # loss.
                    with trio.CancelScope(shield=True):
                        await connection.close()
            nursery.cancel_scope.cancel()
    except* ConnectionRejected as refused:
        end = _refused(first_leaf(refused).status_code)
    except* (LocalProtocolError, h11.ProtocolError):
        # trio-websocket lets these escape: a handshake reply that is not HTTP, or a ping that
        # arrives between our close frame and the peer's.
        pass
    finally:
        await trio.aclose_forcefully(stream)
    return end


def _refused(status: int) -> ConnectionEnd:
    return ConnectionEnd(reason=f"the handshake was refused with {status}", http_status=status)


async def _handshake(
    nursery: trio.Nursery, address: ServerAddress, stream: "_WatchedStream"
) -> ClientWebSocket | None:
    """Perform the opening handshake; None when the stream ended first.

    trio-websocket would wait for ever in that case.
    """
    connected: WebSocketConnection | None = None
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as patience:
        stream.on_end = patience.cancel
        connected = await wrap_client_stream(
            nursery,
            # Any stream works, as its documentation says; its type hints are narrower.
            cast("trio.SocketStream", stream),
            address.host,
            address.path,
            message_queue_size=_INBOX,
            max_message_size=_MAX_MESSAGE,
            receive_buffer_size=_RECEIVE_BYTES,
        )
    stream.on_end = None
    return None if connected is None else ClientWebSocket(connected, stream)


class _WatchedStream(trio.abc.Stream):
    """A stream that records the last arrival and the HTTP status, and reports its end."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.received_s = trio.current_time()
        self.abandoned = False
        self.on_end: Callable[[], None] | None = None
        self._first_bytes = b""

    @property
    def status(self) -> int | None:
        """HTTP status of the handshake reply; None before it.

        trio-websocket reports it only for a reply with a length, and waits for ever for one that
        ends with the connection.
        """
        found = _STATUS.match(self._first_bytes)
        return None if found is None else int(found[1])

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._report_end()
            raise
        if data:
            self.received_s = trio.current_time()
            if len(self._first_bytes) < _STATUS_BYTES:
                self._first_bytes += data[:_STATUS_BYTES]
        else:
            self._report_end()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._report_end()
        await self._stream.aclose()

    def _report_end(self) -> None:
        if self.on_end is not None:
            self.on_end()
