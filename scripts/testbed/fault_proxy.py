"""A TCP proxy that does to a connection what networks do."""

import random
import socket
import struct
from contextlib import suppress
from typing import Literal, Self

import trio

from scripts.testbed.redis_server import HOST, free_port

Direction = Literal["up", "down"]

_CHUNK_BYTES = 65_536
# Chunks on their way in one direction; more wait in the kernel, and then at the sender.
_ON_THE_WAY = 256
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultProxy:
    """Forwards connections to a port of this machine until told otherwise.

    Start it with ``await nursery.start(FaultProxy(port).run)``; its methods are for tasks of the
    same Trio run. Nothing that it holds back is lost: it comes when the proxy has healed.

    Args:
        upstream_port: where connections go.

    Attributes:
        port: where it listens, also after `refuse` and `heal`.
        delay_s: how long each chunk is on its way, in both directions.
        jitter_s: how much longer, in each direction: drawn evenly between these for each chunk.
            None overtakes another.
        accepted: connections so far.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.jitter_s: dict[Direction, tuple[float, float]] = {"up": (0, 0), "down": (0, 0)}
        self.accepted = 0
        self._upstream_port = upstream_port
        self._listener: trio.socket.SocketType | None = None
        self._pairs: set[_Pair] = set()
        self._silent: set[Direction] = set()
        self._changed = trio.Event()

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    async def run(self, *, task_status: trio.TaskStatus[Self]) -> None:
        """Forward until cancelled."""
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
        """Accept and keep connections, and forward nothing to upstream (up) or clients (down).

        Args:
            directions: both when none is named.
        """
        self._silent = set(directions or ("up", "down"))
        self._tell()

    def reset(self) -> None:
        """RST on all connections, to both ends."""
        for pair in list(self._pairs):
            pair.reset()

    def half_close(self) -> None:
        """EOF for the clients of all connections; what they send still arrives."""
        for pair in self._pairs:
            pair.half_close()

    def refuse(self) -> None:
        """Stop listening; connections that are open go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def heal(self) -> None:
        """Listen, and forward everything at once."""
        self.delay_s = 0.0
        self.jitter_s = {"up": (0, 0), "down": (0, 0)}
        self._silent = set()
        if self._listener is None:
            self._listen()
        self._tell()

    def _listen(self) -> None:
        # A port that no outgoing connection gets while it refuses.
        self.port = self.port or free_port()
        sock = socket.create_server((HOST, self.port), backlog=128)
        self._listener = trio.socket.from_stdlib_socket(sock)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _forward(self, client: trio.SocketStream) -> None:
        async with client:
            try:
                upstream = await trio.open_tcp_stream(HOST, self._upstream_port)
            except OSError:
                _reset(client)
                return
            pair = _Pair(client, upstream)
            self._pairs.add(pair)
            try:
                async with upstream, trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, pair, "up")
                    nursery.start_soon(self._pump, pair, "down")
            finally:
                self._pairs.discard(pair)

    async def _pump(self, pair: "_Pair", direction: Direction) -> None:
        source, sink = pair.client, pair.upstream
        if direction == "down":
            source, sink = sink, source
        sender, receiver = trio.open_memory_channel[_Chunk](_ON_THE_WAY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take, pair, source, direction, sender)
            nursery.start_soon(self._bring, pair, sink, direction, receiver)

    async def _take(
        self,
        pair: "_Pair",
        source: trio.SocketStream,
        direction: Direction,
        sender: trio.MemorySendChannel["_Chunk"],
    ) -> None:
        due = 0.0
        data = b"something"
        try:
            while data:
                data = await source.receive_some(_CHUNK_BYTES)
                delay = self.delay_s + random.uniform(*self.jitter_s[direction])
                due = max(due, trio.current_time() + delay)
                await sender.send((due, data))
        except trio.BrokenResourceError:
            pair.reset()
        except trio.ClosedResourceError:
            pass
        finally:
            sender.close()

    async def _bring(
        self,
        pair: "_Pair",
        sink: trio.SocketStream,
        direction: Direction,
        receiver: trio.MemoryReceiveChannel["_Chunk"],
    ) -> None:
        try:
            async with receiver:
                async for due, data in receiver:
                    await trio.sleep_until(due)
                    while direction in self._silent:
                        await self._changed.wait()
                    if direction == "down" and pair.half_closed:
                        continue
                    if data:
                        await sink.send_all(data)
                    else:
                        await sink.send_eof()
        except trio.BrokenResourceError:
            pair.reset()
        except trio.ClosedResourceError:
            pass


# When it is due, and what it is.
_Chunk = tuple[float, bytes]


class _Pair:
    """A connection of a client, and the one that it is forwarded to."""

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
