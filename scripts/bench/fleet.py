"""The load generator: many cheap WebSocket clients in one epoll loop.

It parses only the headers of server frames, and so costs much less per frame than any server.
"""

import base64
import json
import secrets
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from scripts.bench.processes import HOST, BenchError, now_s

# The kind of an acknowledgement in `Fleet.kinds`.
ACK = b'ack"'

_START_S = 20.0
_OPENING = 256
_RECEIVE_BYTES = 65_536
_POLL_EVENTS = 512
_TEXT = 0x81
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A


class FleetClient:
    """One connection of a `Fleet`.

    Attributes:
        sock: its socket.
        session: number of its session.
        server: index of its server among the ports of the fleet.
        greeting: frame to send after the handshake.
        rest: received bytes of an incomplete frame.
        upgraded: whether the handshake is complete.
        on_text: called with (data, start, end) for each text frame ``data[start:end]``; None to
            only count them.
        on_end: called when the server closes the connection; None for no call.
        close_code: from the server's close frame; None before.
    """

    __slots__ = (
        "close_code",
        "greeting",
        "on_end",
        "on_text",
        "rest",
        "server",
        "session",
        "sock",
        "upgraded",
    )

    def __init__(self, sock: socket.socket, session: int, server: int, greeting: bytes) -> None:
        self.sock = sock
        self.session = session
        self.server = server
        self.greeting = greeting
        self.rest = b""
        self.upgraded = False
        self.on_text: Callable[[bytes, int, int], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self.close_code: int | None = None

    def send(self, frame: bytes) -> None:
        """Send a frame made by `masked`."""
        if self.sock.send(frame) != len(frame):
            raise BenchError("the server does not read: the load is too high")


class Fleet:
    """Many connections to one or several servers, in one epoll loop.

    Args:
        ports: of the servers on this machine.
        open_on: `open` uses only this many of the servers; None for all.

    Attributes:
        target: path of the handshake; ``{}`` stands for the number of the session.
        kind_at: offset of the kind in a text frame.
        clients: all connections, in the order of opening.
        kinds: text frames received, by kind; for BandSync the first four letters of ``type``.
        payload_bytes: payload of all text frames received.
        gone: connections that the server closed.
        on_connect: called with each client before it receives anything; None for no call.
    """

    target = "/ws/bench-{}"
    kind_at = len('{"type":"')

    def __init__(self, *ports: int, open_on: int | None = None) -> None:
        self.clients: list[FleetClient] = []
        self.kinds: Counter[bytes] = Counter()
        self.payload_bytes = 0
        self.gone = 0
        self._upgraded = 0
        self.on_connect: Callable[[FleetClient], None] | None = None
        self._ports = ports
        self._open_on = open_on or len(ports)
        self._epoll = select.epoll()
        self._by_fd: dict[int, FleetClient] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all connections."""
        for client in self.clients:
            client.sock.close()
        self._epoll.close()

    def open(
        self,
        sessions: Iterable[int],
        greeting: bytes = b"",
        *,
        place: int = 0,
        receive_buffer: int | None = None,
    ) -> list[FleetClient]:
        """Open a connection for each of ``sessions`` and complete the handshakes.

        Args:
            sessions: numbers of the sessions.
            greeting: frame to send after the handshake.
            place: of these members within their sessions. The members of a session take turns on
                the servers, and sessions begin on different ones.
            receive_buffer: of the kernel, bytes; None for its default.
        """
        opened: list[FleetClient] = []
        before = self._upgraded
        for session in sessions:
            while len(opened) - (self._upgraded - before) >= _OPENING:
                self._poll(1.0)
            server = (session + place) % self._open_on
            opened.append(self.connect(session, greeting, server, receive_buffer))
        deadline = now_s() + _START_S
        while self._upgraded - before < len(opened):
            self._poll(1.0)
            if now_s() > deadline:
                raise BenchError("the handshakes take too long")
        return opened

    def connect(
        self, session: int, greeting: bytes, server: int, receive_buffer: int | None = None
    ) -> FleetClient:
        """Start to open one connection."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect_ex((HOST, self._ports[server]))
        client = FleetClient(sock, session, server, greeting)
        if self.on_connect is not None:
            self.on_connect(client)
        self.clients.append(client)
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock, select.EPOLLOUT)
        return client

    def run_for(self, seconds: float) -> None:
        """Receive for this time."""
        deadline = now_s() + seconds
        while (left := deadline - now_s()) > 0:
            self._poll(left)

    def run_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Receive until ``condition``.

        Raises:
            BenchError: not within ``seconds``.
        """
        deadline = now_s() + seconds
        while not condition():
            if now_s() > deadline:
                raise BenchError(f"the awaited messages did not arrive: {dict(self.kinds)}")
            self._poll(0.05)

    def stop_reading(self, client: FleetClient) -> None:
        """Leave data for ``client`` in the kernel from now on."""
        self._epoll.unregister(client.sock)

    def read_again(self, client: FleetClient) -> None:
        """Undo `stop_reading`."""
        self._epoll.register(client.sock, select.EPOLLIN)

    def frames(self) -> int:
        """Number of text frames received."""
        return sum(self.kinds.values())

    def _poll(self, timeout_s: float) -> None:
        for fd, event in self._epoll.poll(timeout_s, _POLL_EVENTS):
            client = self._by_fd[fd]
            if event & select.EPOLLOUT and not event & select.EPOLLERR:
                client.send(upgrade(self.target.format(client.session)))
                self._epoll.modify(fd, select.EPOLLIN)
            elif client.upgraded:
                self._receive(client)
            else:
                self._shake_hands(client)

    def _shake_hands(self, client: FleetClient) -> None:
        data = client.rest + _received(client.sock)
        head, end, client.rest = data.partition(b"\r\n\r\n")
        if not end:
            client.rest = data
        if not data or (end and b" 101 " not in head[:16]):
            raise BenchError(f"the server refused the handshake: {head!r}")
        if end:
            client.upgraded = True
            self._upgraded += 1
            if client.greeting:
                client.send(client.greeting)
            self._parse(client, client.rest)

    def _receive(self, client: FleetClient) -> None:
        data = _received(client.sock)
        if data:
            self._parse(client, client.rest + data if client.rest else data)
        else:
            self.gone += 1
            self._epoll.unregister(client.sock)
            client.sock.close()
            if client.on_end is not None:
                client.on_end()

    def _parse(self, client: FleetClient, data: bytes) -> None:
        """Walk from header to header; one function, because it takes most of the time."""
        size = len(data)
        position = 0
        kind_from = self.kind_at
        kind_to = kind_from + 4
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
                raise BenchError("a frame of 64 KiB or more")
            end = start + length
            if end > size:
                break
            if first == _TEXT:
                self.kinds[data[start + kind_from : start + kind_to]] += 1
                self.payload_bytes += length
                if client.on_text is not None:
                    client.on_text(data, start, end)
            elif first == _PING:
                client.send(_client_frame(_PONG, data[start:end]))
            elif first == _CLOSE:
                client.close_code = int.from_bytes(data[start : start + 2], "big")
            position = end
        client.rest = data[position:]


def masked(message: dict[str, object]) -> bytes:
    """A client's text frame with a JSON message."""
    return _client_frame(_TEXT, json.dumps(message, ensure_ascii=False).encode())


def masked_text(text: bytes) -> bytes:
    """A client's text frame with an encoded payload."""
    return _client_frame(_TEXT, text)


def _client_frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    mask = secrets.token_bytes(4)
    if length < 126:
        header = struct.pack("!BB", first, 0x80 | length)
    else:
        header = struct.pack("!BBH", first, 0x80 | 126, length)
    key = (mask * (length // 4 + 1))[:length]
    body = int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")
    return header + mask + body.to_bytes(length, "little")


def upgrade(target: str, host: str = HOST) -> bytes:
    """The request of a handshake: RFC 6455, section 4.1."""
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    return (
        f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_RECEIVE_BYTES)
    except ConnectionError:
        return b""
