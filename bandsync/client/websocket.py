"""One WebSocket connection, from TCP to its end: moves text, knows nothing of sessions."""

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
# A peer that takes nothing for so long takes nothing any more.
SEND_TIMEOUT_S = 10.0
ABNORMAL = 1006

_MAX_TO_SEND = 64
_INBOX = 64
_RECEIVE_BYTES = 65_536
# A snapshot has up to fifty chat messages of a thousand characters, each of which JSON may write
# as six.
_MAX_MESSAGE = 4 * 1024 * 1024

_STATUS = re.compile(rb"HTTP/1\.[01] ([2-5]\d\d)[ \r\n]")
_STATUS_BYTES = len(b"HTTP/1.1 403 ")

# A message, or what makes it at the moment when it is sent.
TextMessage = str | Callable[[], str]


class LineEnd(Struct, frozen=True):
    """How a connection ended, or why there was none.

    Attributes:
        code: the close code, 1006 without one.
        reason: of the close, or what happened, in words.
        http_status: what the handshake was answered with, if not with a connection.
        error: what made it impossible to connect.
    """

    code: int = ABNORMAL
    reason: str = ""
    http_status: int | None = None
    error: BaseException | None = None


class ClientWebSocket:
    """A connection that is open.

    Attributes:
        end: how it ended, once it has.
    """

    def __init__(self, websocket: WebSocketConnection, stream: "_WatchedStream") -> None:
        self._websocket = websocket
        self._stream = stream
        self._to_send, self._sending = trio.open_memory_channel[TextMessage](_MAX_TO_SEND)
        self._written = trio.Event()
        self.end = LineEnd()

    @property
    def heard_s(self) -> float:
        """When bytes last arrived, of whatever kind, on Trio's clock."""
        return self._stream.heard_s

    async def send(self, text: TextMessage) -> None:
        """Queue a message; waits while too many are queued.

        Cancelling it never cuts a frame in two: writing is for a task of its own.

        Raises:
            trio.BrokenResourceError: the connection is over; it was not sent.
        """
        try:
            await self._to_send.send(text)
        except trio.ClosedResourceError:
            raise trio.BrokenResourceError from None

    def send_nowait(self, text: TextMessage) -> bool:
        """The same for a message that can as well be left out: False if it was."""
        try:
            self._to_send.send_nowait(text)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def receive(self) -> tuple[float, str] | None:
        """The next message, and when it arrived (Trio's clock, never too early).

        None when the connection has ended.
        """
        while True:
            try:
                text = await self._websocket.get_message()
            except ConnectionClosed as closed:
                if closed.reason is not None and not self._stream.abandoned:
                    self.end = LineEnd(int(closed.reason.code), closed.reason.reason or "")
                return None
            if isinstance(text, str):
                # When the latest bytes came, which may be those of a later message: not when this
                # task had its turn.
                return self._stream.heard_s, text

    def abandon(self, why: str) -> None:
        """Hang up without a word: the other side does not listen."""
        self.end = LineEnd(reason=why)
        self._stream.abandoned = True

    async def write(self) -> None:
        """Send what is queued, until cancelled or the connection is over."""
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
                        # The reader knows, or will in a moment.
                        return
                if patience.cancelled_caught:
                    # In the middle of a frame, perhaps: nothing more can be sent.
                    self.abandon("it takes nothing any more")
                    await trio.aclose_forcefully(self._stream)
                    return

    async def close(self) -> None:
        """Send what is queued and say goodbye, but do not wait long for an answer."""
        self._to_send.close()
        if not self._stream.abandoned:
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                await self._written.wait()
                await self._websocket.aclose()


async def converse(
    address: ServerAddress, talk: Callable[[ClientWebSocket], Awaitable[None]]
) -> LineEnd:
    """Connect, ``talk``, and close when that returns, or is cancelled.

    ``talk`` is to return when `ClientWebSocket.receive` has come to its end.
    """
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as patience:
        try:
            stream = _WatchedStream(await address.open_stream())
        except (OSError, trio.BrokenResourceError, ssl.CertificateError) as error:
            return LineEnd(reason="cannot connect", error=error)
    if patience.cancelled_caught:
        return LineEnd(reason="the connection took too long")
    end = LineEnd(reason="the handshake failed")
    try:
        async with trio.open_nursery() as nursery:
            line = await _shake_hands(nursery, address, stream)
            if line is None and stream.status is not None:
                end = _refused(stream.status)
            if line is not None:
                nursery.start_soon(line.write)
                try:
                    await talk(line)
                finally:
                    end = line.end
                    # Under a deadline, so this may be shielded: a peer that is told does not have
                    # to find out.
                    with trio.CancelScope(shield=True):
                        await line.close()
            nursery.cancel_scope.cancel()
    except* ConnectionRejected as refused:
        end = _refused(first_leaf(refused).status_code)
    except* (LocalProtocolError, h11.ProtocolError):
        # What trio-websocket lets escape: an answer to the handshake that is no HTTP; later, a
        # ping that arrives between our close and its answer.
        pass
    finally:
        await trio.aclose_forcefully(stream)
    return end


def _refused(status: int) -> LineEnd:
    return LineEnd(reason=f"the handshake was answered with {status}", http_status=status)


async def _shake_hands(
    nursery: trio.Nursery, address: ServerAddress, stream: "_WatchedStream"
) -> ClientWebSocket | None:
    """None when the stream ended first, which trio-websocket would wait for in vain."""
    connected: WebSocketConnection | None = None
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as patience:
        stream.on_end = patience.cancel
        connected = await wrap_client_stream(
            nursery,
            # Any stream will do, as its documentation says; its types are narrower.
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
    """A stream that knows when bytes last arrived and how HTTP began, and tells when it ends."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.heard_s = trio.current_time()
        self.abandoned = False
        self.on_end: Callable[[], None] | None = None
        self._beginning = b""

    @property
    def status(self) -> int | None:
        """What the handshake was answered with.

        trio-websocket tells only if the answer has an end of its own, and waits in vain for one
        that ends with the connection.
        """
        found = _STATUS.match(self._beginning)
        return None if found is None else int(found[1])

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._ended()
            raise
        if data:
            self.heard_s = trio.current_time()
            if len(self._beginning) < _STATUS_BYTES:
                self._beginning += data[:_STATUS_BYTES]
        else:
            self._ended()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._ended()
        await self._stream.aclose()

    def _ended(self) -> None:
        if self.on_end is not None:
            self.on_end()
