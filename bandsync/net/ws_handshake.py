"""The stream that trio-websocket runs the two handshakes on, opening and closing."""

from typing import Protocol

import trio

from bandsync.net.outbox import Outbox

# A client's close frame: masked with zeros, without a close code.
_CLOSE_FRAME = bytes((0x88, 0x80, 0, 0, 0, 0))


class HandshakeOwner(Protocol):
    """The connection that a `HandshakeStream` belongs to."""

    def on_handshake_over(self) -> None:
        """Called once, when trio-websocket has closed its stream."""


class HandshakeStream(trio.abc.Stream):
    """Stands between trio-websocket and a socket that the connection reads by itself.

    trio-websocket receives the HTTP head and the peer's close frame, and nothing else. It sends
    its two answers through the outbox, like every other frame.

    Args:
        head: the bytes of the HTTP head: `bandsync.net.http_head.Head.handshake`.

    Attributes:
        closed: whether trio-websocket has closed the stream.
        ended: whether `end` was called.
    """

    def __init__(self, head: bytes, outbox: Outbox, owner: HandshakeOwner) -> None:
        self.closed = False
        self.ended = False
        self._incoming = head
        self._arrived: trio.Event | None = None
        self._outbox = outbox
        self._owner: HandshakeOwner | None = owner

    def deliver(self, close_frame: bytes) -> None:
        """Deliver the peer's close frame to trio-websocket."""
        self._incoming += close_frame
        self._wake()

    def end(self) -> None:
        """Make trio-websocket finish and close the stream within a few passes of the scheduler.

        wsproto's frame parser and its generator refer to each other. The generator returns after
        a close frame only; without one, the cyclic garbage collector would have to free the two,
        minutes later. So deliver a close frame, and discard the answer. Until the owner's
        `on_handshake_over`, trio-websocket's reader task must not be cancelled.
        """
        self.ended = True
        self.deliver(_CLOSE_FRAME)

    def release(self) -> None:
        """Drop the reference to the owner: it is half of a reference cycle."""
        self._owner = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for the head or a close frame; no bytes once closed."""
        while not self._incoming and not self.closed:
            self._arrived = trio.Event()
            await self._arrived.wait()
        data, self._incoming = self._incoming, b""
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Push ``data``, whole frames, to the outbox; discard it after `end`."""
        await trio.lowlevel.checkpoint()
        if not self.ended:
            self._outbox.push_last(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: the outbox never blocks."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Notify the owner, once.

        The owner may cancel the reader task in reply. No checkpoint follows, so that the reader
        still lets its parser return: see `end`.
        """
        await trio.lowlevel.cancel_shielded_checkpoint()
        if not self.closed:
            self.closed = True
            self._wake()
            if self._owner is not None:
                self._owner.on_handshake_over()

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None
