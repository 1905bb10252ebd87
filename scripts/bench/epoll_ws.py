"""Connections that come and go, and timers, in one epoll loop: what a load is driven with.

Unlike a `benchfleet.Fleet`, whose connections stay, these may be refused, cut, closed and slow.
Like there, frames are read by their header and a few letters only, so that the driver costs less
per frame than any server.
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
# Sockets are looked at so often, however many timers are due.
_TIMERS_PER_TURN = 64
_HEAD_BYTES = 16_384
_FRAME_BYTES = 4 * 1024 * 1024
_TEXT = 0x81
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A


class Address(NamedTuple):
    """Where a server listens.

    Attributes:
        family, place: for a socket.
        host: as it is named in a request.
    """

    family: int
    place: tuple[str, int]
    host: str


class Owner(Protocol):
    """Who has a line."""

    def opened(self) -> None:
        """The handshake is done."""

    def heard(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        """A text came, ``data[start:end]``, whose ``type`` begins with ``kind``."""

    def ended(self, how: str) -> None:
        """The line is gone, and not because of `Line.cut`: a close code, or a word."""


class Line:
    """One connection.

    Attributes:
        all_ticks: whether `Owner.heard` is told of ticks, too.
        open: whether it was opened and has not ended.
    """

    __slots__ = (
        "_address",
        "_loop",
        "_paused",
        "_rest",
        "_target",
        "_upgraded",
        "all_ticks",
        "close_code",
        "open",
        "owner",
        "sock",
    )

    def __init__(
        self,
        loop: "Loop",
        address: Address,
        target: str,
        owner: Owner,
        *,
        receive_buffer: int | None = None,
    ) -> None:
        self._loop = loop
        self._address = address
        self._target = target
        self._rest = b""
        self._upgraded = False
        self._paused = False
        self.owner = owner
        self.all_ticks = False
        self.open = True
        self.close_code: int | None = None
        self.sock = socket.socket(address.family)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect_ex(address.place)
        loop.watch(self, select.EPOLLOUT)

    def send(self, frame: bytes) -> None:
        """Send a frame; a line that does not take it whole, because nobody reads, ends."""
        if not self.open:
            return
        try:
            sent = self.sock.send(frame)
        except OSError:
            sent = 0
        if sent != len(frame):
            self._end("stuck")

    def close(self) -> None:
        """Say goodbye; the server closes."""
        self.send(_control(_CLOSE, struct.pack("!H", 1000)))

    def cut(self) -> None:
        """End it with a reset, as a network does; the owner is not told."""
        if self.open:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._forget()

    def pause(self) -> None:
        """Leave what comes in the kernel."""
        if self.open and not self._paused:
            # Not watched at all: a hang-up would be told without end.
            self._loop.unwatch(self)
            self._paused = True

    def go_on(self) -> None:
        """Take `pause` back."""
        if self.open and self._paused:
            self._paused = False
            self._loop.watch(self, select.EPOLLIN)

    def ready(self, event: int) -> None:
        """The socket can be read, or is connected, or has failed."""
        if not self._upgraded:
            self._shake_hands(event)
            return
        data = _received(self.sock)
        if data:
            self._parse(self._rest + data if self._rest else data)
        else:
            self._end("eof" if self.close_code is None else str(self.close_code))

    def _shake_hands(self, event: int) -> None:
        if event & select.EPOLLOUT and not event & (select.EPOLLERR | select.EPOLLHUP):
            self._loop.rewatch(self, select.EPOLLIN)
            self.send(upgrade(self._target, self._address.host))
            return
        data = _received(self.sock)
        head, end, rest = (self._rest + data).partition(b"\r\n\r\n")
        if not end:
            self._rest = head
            if not data or len(head) > _HEAD_BYTES:
                self._end("refused")
            return
        status = head[9:12].decode("latin-1")
        if status != "101":
            self._end(f"http {status}")
            return
        self._upgraded = True
        self._rest = b""
        self.owner.opened()
        self._parse(rest)

    def _parse(self, data: bytes) -> None:
        """Walk from header to header; one function, because this is what the driver does."""
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
                if kind != TICK or self.all_ticks:
                    self.owner.heard(kind, data, start, end)
                    if not self.open:
                        return
            elif first == _PING:
                self.send(_control(_PONG, data[start:end]))
            elif first == _CLOSE:
                self.close_code = int.from_bytes(data[start : start + 2], "big")
                self.send(_control(_CLOSE, data[start : start + 2]))
            position = end
        self._rest = data[position:]

    def _end(self, how: str) -> None:
        if self.open:
            self._forget()
            self.owner.ended(how)

    def _forget(self) -> None:
        self.open = False
        if not self._paused:
            self._loop.unwatch(self)
        self._loop.forget(self)
        self.sock.close()


class Loop:
    """Watches lines and timers.

    Lines are opened by timers only: within one batch of events, the number of a socket that was
    closed must not come to be that of another one.

    Attributes:
        kinds: texts received, by the first four letters of their ``type``.
        lag_s: how late a timer fired at worst; whoever reads it may set it to 0.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._open: set[Line] = set()
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
        """Cut what is still open."""
        for line in list(self._open):
            line.cut()
        self._epoll.close()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, so much later."""
        heapq.heappush(self._timers, (now_s() + seconds, next(self._count), action))

    def read(self, fd: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` when something that is no line can be read."""
        self._readers[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def read_no_more(self, fd: int) -> None:
        """Take `read` back."""
        del self._readers[fd]
        self._epoll.unregister(fd)

    def watch(self, line: Line, events: int) -> None:
        """Tell ``line`` when something happens to it."""
        fd = line.sock.fileno()
        self._lines[fd] = line
        self._open.add(line)
        self._epoll.register(fd, events)

    def rewatch(self, line: Line, events: int) -> None:
        """Tell ``line`` of other things."""
        self._epoll.modify(line.sock.fileno(), events)

    def unwatch(self, line: Line) -> None:
        """Tell ``line`` nothing any more."""
        fd = line.sock.fileno()
        del self._lines[fd]
        self._epoll.unregister(fd)

    def forget(self, line: Line) -> None:
        """It has ended."""
        self._open.discard(line)

    def run_until(self, ended: Callable[[], bool], seconds: float) -> bool:
        """Go on until ``ended``, or for ``seconds``; whether it ended."""
        deadline = now_s() + seconds
        while not ended():
            now = now_s()
            if now >= deadline:
                return False
            due = min(self._timers[0][0] if self._timers else deadline, deadline)
            events = self._epoll.poll(min(max(due - now, 0.0), 0.1), _POLL_EVENTS)
            for fd, event in events:
                # An earlier one of the same batch may have ended it.
                line = self._lines.get(fd)
                if line is not None:
                    line.ready(event)
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
    """A control frame of a client; the mask may be any, so it is the one that changes nothing."""
    return bytes((first, 0x80 | len(payload), 0, 0, 0, 0)) + payload


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_RECEIVE_BYTES)
    except OSError:
        return b""
