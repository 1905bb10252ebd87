"""WebSocket connections that come and go, and timers, in one epoll loop: the driver's transport.

Connections of a `Fleet` stay open. These may be refused, reset, closed and slow. Both parse only
the header and a few letters of a frame, so that the driver costs less per frame than any server.
"""

import heapq
import itertools
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from scripts.bench.fleet import upgrade
from scripts.bench.processes import BenchError, now_s

TICK = b"scro"

_KIND_AT = len('{"type":"')
_KIND_TO = _KIND_AT + 4
_RECEIVE_BYTES = 65_536
_POLL_EVENTS = 512
# Timers per turn. Beyond that, sockets are polled first.
_TIMERS_PER_TURN = 64
_HEAD_BYTES = 16_384
_FRAME_BYTES = 4 * 1024 * 1024
_TEXT = 0x81
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A


class TargetAddress(NamedTuple):
    """The address of a server.

    Attributes:
        family: of the socket.
        place: host and port, for the socket.
        host: as named in requests.
    """

    family: int
    place: tuple[str, int]
    host: str


class ConnectionOwner(Protocol):
    """Receives the events of a connection."""

    def opened(self) -> None:
        """The handshake is complete."""

    def received(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        """Receive a text frame ``data[start:end]`` whose ``type`` begins with ``kind``."""

    def ended(self, reason: str) -> None:
        """The connection ended, but not by `EpollConnection.cut`; by a close code or reason."""


class EpollConnection:
    """One connection.

    Attributes:
        owner: receives its events.
        report_ticks: whether `ConnectionOwner.received` receives ticks, too.
        open: whether it was opened and has not ended.
        close_code: from the server's close frame; None before.
        sock: its socket.
    """

    __slots__ = (
        "_address",
        "_buffer",
        "_loop",
        "_paused",
        "_target",
        "_upgraded",
        "close_code",
        "open",
        "owner",
        "report_ticks",
        "sock",
    )

    def __init__(
        self,
        loop: "EpollLoop",
        address: TargetAddress,
        target: str,
        owner: ConnectionOwner,
        *,
        receive_buffer: int | None = None,
    ) -> None:
        self._loop = loop
        self._address = address
        self._target = target
        self._buffer = b""
        self._upgraded = False
        self._paused = False
        self.owner = owner
        self.report_ticks = False
        self.open = True
        self.close_code: int | None = None
        self.sock = socket.socket(address.family)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect_ex(address.place)
        loop.register(self, select.EPOLLOUT)

    def send(self, frame: bytes) -> None:
        """Send a frame. A connection whose socket buffer is full ends."""
        if not self.open:
            return
        try:
            sent = self.sock.send(frame)
        except OSError:
            sent = 0
        if sent != len(frame):
            self._end("stuck")

    def close(self) -> None:
        """Send a close frame; the server closes the connection."""
        self.send(_control(_CLOSE, struct.pack("!H", 1000)))

    def cut(self) -> None:
        """Reset the connection, as a network failure does. The owner receives no event."""
        if self.open:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._forget()

    def pause(self) -> None:
        """Stop reading: received data stay in the kernel."""
        if self.open and not self._paused:
            # Unregistered, because epoll would report a hang-up without end.
            self._loop.unregister(self)
            self._paused = True

    def resume(self) -> None:
        """Undo `pause`."""
        if self.open and self._paused:
            self._paused = False
            self._loop.register(self, select.EPOLLIN)

    def ready(self, event: int) -> None:
        """Handle an event of the socket: readable, connected or failed."""
        if not self._upgraded:
            self._shake_hands(event)
            return
        data = _receive(self.sock)
        if data:
            self._parse(self._buffer + data if self._buffer else data)
        else:
            self._end("eof" if self.close_code is None else str(self.close_code))

    def _shake_hands(self, event: int) -> None:
        if event & select.EPOLLOUT and not event & (select.EPOLLERR | select.EPOLLHUP):
            self._loop.modify(self, select.EPOLLIN)
            self.send(upgrade(self._target, self._address.host))
            return
        data = _receive(self.sock)
        head, end, remaining = (self._buffer + data).partition(b"\r\n\r\n")
        if not end:
            self._buffer = head
            if not data or len(head) > _HEAD_BYTES:
                self._end("refused")
            return
        status = head[9:12].decode("latin-1")
        if status != "101":
            self._end(f"http {status}")
            return
        self._upgraded = True
        self._buffer = b""
        self.owner.opened()
        self._parse(remaining)

    def _parse(self, data: bytes) -> None:
        """Walk from header to header; one function, because it takes most of the time."""
        size = len(data)
        position = 0
        kinds = self._loop.kinds
        while size - position >= 2:
            first = data[position]
            length = data[position + 1]
            start = position + 2
            if length == 126:
                if size < start + 2:
                    break
                length = data[start] << 8 | data[start + 1]
                start += 2
            elif length == 127:
                if size < start + 8:
                    break
                length = int.from_bytes(data[start : start + 8], "big")
                start += 8
                if length > _FRAME_BYTES:
                    raise BenchError(f"a frame of {length} bytes")
            end = start + length
            if end > size:
                break
            if first == _TEXT:
                kind = data[start + _KIND_AT : start + _KIND_TO]
                kinds[kind] += 1
                if kind != TICK or self.report_ticks:
                    self.owner.received(kind, data, start, end)
                    if not self.open:
                        return
            elif first == _PING:
                self.send(_control(_PONG, data[start:end]))
            elif first == _CLOSE:
                self.close_code = int.from_bytes(data[start : start + 2], "big")
                self.send(_control(_CLOSE, data[start : start + 2]))
            position = end
        self._buffer = data[position:]

    def _end(self, reason: str) -> None:
        if self.open:
            self._forget()
            self.owner.ended(reason)

    def _forget(self) -> None:
        self.open = False
        if not self._paused:
            self._loop.unregister(self)
        self._loop.forget(self)
        self.sock.close()


class EpollLoop:
    """Polls connections and timers.

    Only timers open connections. Otherwise, within one batch of events, a new socket could have the
    descriptor of a closed one.

    Attributes:
        kinds: text frames received, by the first four letters of their ``type``.
        lag_s: longest delay of a timer; readers may reset it to 0.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, EpollConnection] = {}
        self._open: set[EpollConnection] = set()
        self._readers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.kinds: Counter[bytes] = Counter()
        self.lag_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Reset all open connections."""
        for connection in list(self._open):
            connection.cut()
        self._epoll.close()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, after this time."""
        heapq.heappush(self._timers, (now_s() + seconds, next(self._count), action))

    def read(self, fd: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` whenever another file descriptor is readable."""
        self._readers[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def stop_reading(self, fd: int) -> None:
        """Undo `read`."""
        del self._readers[fd]
        self._epoll.unregister(fd)

    def register(self, connection: EpollConnection, events: int) -> None:
        """Report these epoll events to ``connection``."""
        fd = connection.sock.fileno()
        self._connections[fd] = connection
        self._open.add(connection)
        self._epoll.register(fd, events)

    def modify(self, connection: EpollConnection, events: int) -> None:
        """Report other epoll events to ``connection``."""
        self._epoll.modify(connection.sock.fileno(), events)

    def unregister(self, connection: EpollConnection) -> None:
        """Report no more events to ``connection``."""
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._epoll.unregister(fd)

    def forget(self, connection: EpollConnection) -> None:
        """Drop an ended connection."""
        self._open.discard(connection)

    def run_until(self, ended: Callable[[], bool], seconds: float) -> bool:
        """Run until ``ended``, or for ``seconds``; return whether it ended."""
        deadline = now_s() + seconds
        while not ended():
            now = now_s()
            if now >= deadline:
                return False
            due = min(self._timers[0][0] if self._timers else deadline, deadline)
            events = self._epoll.poll(min(max(due - now, 0.0), 0.1), _POLL_EVENTS)
            for fd, event in events:
                # An earlier event of the same batch may have closed it.
                connection = self._connections.get(fd)
                if connection is not None:
                    connection.ready(event)
                elif fd in self._readers:
                    self._readers[fd]()
            self._fire()
        return True

    def _fire(self) -> None:
        now = now_s()
        for _ in range(_TIMERS_PER_TURN):
            if not self._timers or self._timers[0][0] > now:
                return
            due, _, action = heapq.heappop(self._timers)
            self.lag_s = max(self.lag_s, now - due)
            action()


def _control(first: int, payload: bytes) -> bytes:
    """A client's control frame. The mask is zero, which leaves the payload as it is."""
    return bytes((first, 0x80 | len(payload), 0, 0, 0, 0)) + payload


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_RECEIVE_BYTES)
    except OSError:
        return b""
