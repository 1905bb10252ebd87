"""The stream that trio-websocket sees: the two handshakes, opening and close."""

from collections.abc import Callable

import trio
from trio_websocket import WebSocketConnection
from wsproto.connection import ConnectionState

from bandsync.net.outbox import Outbox

# As a client sends it, with a mask of zeros and no code.
_CLOSE_FRAME = bytes((0x88, 0x80, 0, 0, 0, 0))


class Wire(trio.abc.Stream):
    """Stands between trio-websocket and a connection that is read elsewhere.

    Args:
        head: the bytes of the HTTP head, given back for trio-websocket to answer.
        outbox: takes what trio-websocket sends: the answers of the two handshakes.
        on_closed: called when trio-websocket is done with the connection.
    """

    def __init__(self, head: bytes, outbox: Outbox, on_closed: Callable[[], None]) -> None:
        self._incoming = head
        self._arrived: trio.Event | None = None
        self._outbox = outbox
        self._on_closed = on_closed
        self._closed = False

    def deliver(self, frame: bytes) -> None:
        """Give trio-websocket a close frame."""
        self._incoming += frame
        self._wake()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for the head or a close frame; no bytes once closed."""
        while not self._incoming and not self._closed:
            self._arrived = trio.Event()
            await self._arrived.wait()
        data, self._incoming = self._incoming, b""
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand ``data``, whole frames, to the outbox."""
        await trio.lowlevel.checkpoint()
        self._outbox.push_last(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: the outbox never blocks."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """End the connection, once."""
        await trio.lowlevel.checkpoint()
        if not self._closed:
            self._closed = True
            self._wake()
            self._on_closed()

    def release(self) -> None:
        """Tell nobody that it was closed."""
        self._on_closed = _nobody

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None


def end_parser(websocket: WebSocketConnection) -> None:
    """Let the frame parser of a connection that is over come to its end.

    While it waits for a close frame, wsproto's parser and its generator hold on to each other, and
    only the garbage collector could free them: minutes later, if ever.
    """
    parser = websocket._wsproto  # noqa: SLF001  # nothing public leads there
    if parser.state in {ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING}:
        parser.receive_data(_CLOSE_FRAME)
    for _ in parser.events():
        pass


def _nobody() -> None:
    """Nobody wants to know."""
