"""A TCP stream that can also be written to without waiting."""

import contextlib
import socket

import trio

# What the kernel may hold back for one connection. More would only be older when it arrives.
SEND_BUFFER_BYTES = 65_536


class TcpStream(trio.abc.Stream):
    """A connected, non-blocking socket as a Trio stream.

    Trio's own `trio.SocketStream` has no send that gives up instead of waiting, which is what
    lets one task serve a whole band.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.send_nowait = sock.send

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for bytes and return at most ``max_bytes`` of them; none at the end of the stream.

        Always waits for the socket first: under load that is the checkpoint at which other
        connections get their turn, and otherwise it saves a receive that finds nothing.

        Raises:
            trio.BrokenResourceError: the connection was reset.
            trio.ClosedResourceError: it was closed on this side.
        """
        while True:
            self._check_open()
            try:
                await trio.lowlevel.wait_readable(self._socket)
                return self._socket.recv(max_bytes or 16_384)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _translated(self._socket, error) from None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Wait until the kernel has taken all of ``data``.

        When cancelled, a part of it has been sent.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: it was closed on this side.
        """
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await self.wait_send_all_might_not_block()
            except OSError as error:
                raise _translated(self._socket, error) from None

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel takes more bytes.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: it was closed on this side.
        """
        self._check_open()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except OSError as error:
            raise _translated(self._socket, error) from None

    def _check_open(self) -> None:
        # Trio would remember the descriptor of a closed socket, and call the next one busy.
        if self._socket.fileno() == -1:
            raise trio.ClosedResourceError("this stream is closed")

    async def aclose(self) -> None:
        """Close at once: what the kernel has, it sends."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once, without a checkpoint."""
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def linger(self, max_bytes: int) -> None:
        """End our side and read the peer's to its end, or ``max_bytes`` of it.

        Closing with bytes unread would reset the connection and take back the answer.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(trio.BrokenResourceError):
            while max_bytes > 0:
                data = await self.receive_some(65_536)
                if not data:
                    return
                max_bytes -= len(data)


def _translated(
    sock: socket.socket, error: OSError
) -> trio.BrokenResourceError | trio.ClosedResourceError:
    if sock.fileno() == -1:
        return trio.ClosedResourceError("this stream is closed")
    return trio.BrokenResourceError(str(error))
