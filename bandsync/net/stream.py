"""A TCP stream with a send that never waits."""

import contextlib
import socket

import trio

# Kernel send buffer of one connection. A larger one would only deliver older frames.
SEND_BUFFER_BYTES = 65_536


class TcpStream(trio.abc.Stream):
    """A connected, non-blocking socket as a Trio stream.

    `trio.SocketStream` has no send that returns instead of waiting. One task needs it to deliver
    to a whole session.

    Attributes:
        send_nowait: ``send`` of the socket: returns how many bytes the kernel has taken.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.send_nowait = sock.send

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for bytes and return at most ``max_bytes`` of them; none at the end of the stream.

        Waits for the socket before it reads. Under load that is the checkpoint that lets other
        connections run; otherwise it saves a read that finds nothing.

        Raises:
            trio.BrokenResourceError: the connection was reset.
            trio.ClosedResourceError: the stream was closed on this side.
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

        After a cancellation, an unknown part of it has been sent.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: the stream was closed on this side.
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
            trio.ClosedResourceError: the stream was closed on this side.
        """
        self._check_open()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except OSError as error:
            raise _translated(self._socket, error) from None

    def _check_open(self) -> None:
        # Trio would register descriptor -1, and report the next closed socket as busy.
        if self._socket.fileno() == -1:
            raise trio.ClosedResourceError("this stream is closed")

    async def aclose(self) -> None:
        """Close at once; the kernel still sends what it has."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once, without a checkpoint."""
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def linger(self, max_bytes: int) -> None:
        """Shut down our side, and read the peer's until its end or ``max_bytes``.

        A close with unread bytes resets the connection, and the peer may lose the answer.
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
