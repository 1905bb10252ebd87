"""A TCP proxy that injects network faults: delay, black hole, reset, half-close, refusal."""

import random
import socket
import struct
from contextlib import suppress
from typing import Literal, Self

import trio

from scripts.testbed.redis_server import HOST, free_port

Direction = Literal["up", "down"]

_CHUNK_BYTES = 65_536
# Chunks in flight in one direction. Beyond that the kernel's buffers fill: backpressure.
_MAX_IN_FLIGHT = 256
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultProxy:
    """Forwards connections to a port of this machine, with the faults that its methods inject.

    Start it with ``await nursery.start(FaultProxy(port).run)``. Call its methods from tasks of the
    same Trio run. The proxy loses no data that it holds back: `heal` forwards it.

    Args:
        upstream_port: the port that connections are forwarded to.

    Attributes:
        port: the listening port; stays the same after `refuse` and `heal`.
        delay_s: delay of each chunk, in both directions.
        jitter_s: additional delay per direction, drawn uniformly from this range for each chunk.
            Chunks stay in order.
        accepted: number of connections accepted so far.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.jitter_s: dict[Direction, tuple[float, float]] = {"up": (0, 0), "down": (0, 0)}
        self.accepted = 0
        self._upstream_port = upstream_port
        self._listener: trio.socket.SocketType | None = None
        self._connections: set[_ProxiedConnection] = set()
        self._black_holed: set[Direction] = set()
        self._changed = trio.Event()

    @property
    def open(self) -> int:
        """Number of connections that are open now."""
        return len(self._connections)

    async def run(self, *, task_status: trio.TaskStatus[Self]) -> None:
        """Accept and forward connections until cancelled."""
        async with trio.open_nursery() as nursery:
            try:
                self._listen()
                task_status.started(self)
                while True:
                    while self._listener is None:
                        await self._changed.wait()
                    try:
                        sock, _ = await self._listener.accept()
                    except trio.ClosedResourceError:
                        continue
                    self.accepted += 1
                    nursery.start_soon(self._forward, trio.SocketStream(sock))
            finally:
                self.refuse()
                nursery.cancel_scope.cancel()

    def black_hole(self, *directions: Direction) -> None:
        """Accept and keep connections, but forward nothing.

        Args:
            directions: "up" to upstream, "down" to the clients; both when none is named.
        """
        self._black_holed = set(directions or ("up", "down"))
        self._notify()

    def reset(self) -> None:
        """Send RST on all connections, to both ends."""
        for connection in list(self._connections):
            connection.reset()

    def half_close(self) -> None:
        """Send EOF to the clients of all connections. Their data still arrives upstream."""
        for connection in self._connections:
            connection.half_close()

    def refuse(self) -> None:
        """Stop listening. Open connections stay open."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def heal(self) -> None:
        """End all faults: listen again, and forward everything without delay."""
        self.delay_s = 0.0
        self.jitter_s = {"up": (0, 0), "down": (0, 0)}
        self._black_holed = set()
        if self._listener is None:
            self._listen()
        self._notify()

    def _listen(self) -> None:
        # Outside the ephemeral range, so that no outgoing connection takes the port while it is
        # closed.
        self.port = self.port or free_port()
        sock = socket.create_server((HOST, self.port), backlog=128)
        self._listener = trio.socket.from_stdlib_socket(sock)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _forward(self, client: trio.SocketStream) -> None:
        async with client:
            try:
                upstream = await trio.open_tcp_stream(HOST, self._upstream_port)
            except OSError:
                _reset(client)
                return
            connection = _ProxiedConnection(client, upstream)
            self._connections.add(connection)
            try:
                async with upstream, trio.open_nursery() as nursery:
                    nursery.start_soon(self._forward_one_way, connection, "up")
                    nursery.start_soon(self._forward_one_way, connection, "down")
            finally:
                self._connections.discard(connection)

    async def _forward_one_way(
        self, connection: "_ProxiedConnection", direction: Direction
    ) -> None:
        source, sink = connection.client, connection.upstream
        if direction == "down":
            source, sink = sink, source
        sender, receiver = trio.open_memory_channel[_TimedChunk](_MAX_IN_FLIGHT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_chunks, connection, source, direction, sender)
            nursery.start_soon(self._write_chunks, connection, sink, direction, receiver)

    async def _read_chunks(
        self,
        connection: "_ProxiedConnection",
        source: trio.SocketStream,
        direction: Direction,
        sender: trio.MemorySendChannel["_TimedChunk"],
    ) -> None:
        due = 0.0
        data = b"not the end"
        try:
            while data:
                data = await source.receive_some(_CHUNK_BYTES)
                jitter_s = random.uniform(*self.jitter_s[direction])  # noqa: S311  # no secret
                delay = self.delay_s + jitter_s
                due = max(due, trio.current_time() + delay)
                await sender.send((due, data))
        except trio.BrokenResourceError:
            connection.reset()
        except trio.ClosedResourceError:
            pass
        finally:
            sender.close()

    async def _write_chunks(
        self,
        connection: "_ProxiedConnection",
        sink: trio.SocketStream,
        direction: Direction,
        receiver: trio.MemoryReceiveChannel["_TimedChunk"],
    ) -> None:
        try:
            async with receiver:
                async for due, data in receiver:
                    await trio.sleep_until(due)
                    while direction in self._black_holed:
                        await self._changed.wait()
                    if direction == "down" and connection.half_closed:
                        continue
                    if data:
                        await sink.send_all(data)
                    else:
                        await sink.send_eof()
        except trio.BrokenResourceError:
            connection.reset()
        except trio.ClosedResourceError:
            pass


# The time when the chunk is due, and its bytes.
_TimedChunk = tuple[float, bytes]


class _ProxiedConnection:
    """A client's connection and the upstream connection that it is forwarded to."""

    def __init__(self, client: trio.SocketStream, upstream: trio.SocketStream) -> None:
        self.client = client
        self.upstream = upstream
        self.half_closed = False

    def reset(self) -> None:
        _reset(self.client)
        _reset(self.upstream)

    def half_close(self) -> None:
        self.half_closed = True
        with suppress(OSError):
            self.client.socket.shutdown(socket.SHUT_WR)


def _reset(stream: trio.SocketStream) -> None:
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        stream.socket.close()
