"""What the benchmarks measure with: server processes, a cheap load generator, CPU and memory.

The generator is one epoll loop over plain sockets that reads server frames by their header only,
so that it costs much less per frame than any server does.
"""

import base64
import json
import os
import re
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
WARM_UP_S = 2.0
SETTLE_S = 0.5
TICK = b'{"type":"scroll_tick"'

_CORES = sorted(os.sched_getaffinity(0))
_START_S = 20.0
_STOP_S = 5.0
_SLICE_S = 1.0
_SLOW_LIMIT_S = 60.0
_LEAST_POLL_S = 0.0002
_OPENING = 256
_RECEIVE_BYTES = 65_536
_POLL_EVENTS = 512
_TEXT = 0x81
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A

# Where the value of `type` begins and ends in what servers send: {"type":"scroll_tick",…
_KIND_FROM = len('{"type":"')
_KIND_TO = _KIND_FROM + 4


class BenchError(Exception):
    """A measurement that would mean nothing."""


def now_s() -> float:
    """A clock for durations, seconds."""
    return time.perf_counter()


def wall_ms() -> float:
    """The wall clock, milliseconds since the Unix epoch."""
    return time.time_ns() / 1e6


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of ``values`` do not exceed."""
    if not values:
        raise BenchError("nothing was sampled")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def raise_file_limit(connections: int) -> None:
    """Allow this process and its children that many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise BenchError(f"{wanted} file descriptors are needed: raise ulimit -n ({hard})")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def pin_generator() -> None:
    """Keep this process off the core that the servers run on, if there is another."""
    if len(_CORES) > 1:
        os.sched_setaffinity(0, _CORES[1:])


class Server:
    """A server in a process of its own, on the first core.

    Args:
        command: what to run, without the interpreter; prints a line with `:PORT` when it listens.
    """

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(  # noqa: S603  # our own scripts
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            env=environment,
            # No `.env` there that would change the settings.
            cwd=ROOT / "scripts",
            start_new_session=True,
        )
        self.pid = self._process.pid
        os.sched_setaffinity(self.pid, _CORES[:1])
        try:
            self.port = self._read_port()
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def suspend(self) -> None:
        """Let it use no CPU at all while another is measured."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """User and system time of all its threads so far, seconds."""
        total_ns = 0
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            total_ns += int((thread / "schedstat").read_text().split()[0])
        return total_ns / 1e9

    def rss_kb(self) -> float:
        """Its resident memory, KB (1024 bytes)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    def get(self, path: str) -> str:
        """The body of an HTTP resource."""
        with socket.create_connection((HOST, self.port), timeout=_STOP_S) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while data := sock.recv(_RECEIVE_BYTES):
                received += data
        return received.partition(b"\r\n\r\n")[2].decode()

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(_START_S * 1000):
            raise BenchError("the server did not start")
        line = self._process.stdout.readline().decode()
        found = re.search(r":(\d+)\s*$", line)
        if found is None:
            raise BenchError(f"the server did not say where it listens: {line!r}")
        return int(found[1])


def bandsync(connections: int, members: int, *flags: str) -> Server:
    """A BandSync server that only does what is measured: no Redis, no rate limits, no logs."""
    return Server(
        str(ROOT / "scripts" / "serve.py"),
        *("--host", HOST, "--port", "0", "--redis-enabled", "false", "--log-level", "warning"),
        *("--rate-limit-factor", "0", "--connection-timeout-ms", "600000"),
        *("--max-connections", str(connections + 64), "--max-members", str(members)),
        *flags,
    )


class Client:
    """One connection of a `Fleet`.

    Attributes:
        session: to which it belongs, by number.
        on_text: called with (data, start, end) for every text frame, whose payload is
            ``data[start:end]``; None to count them only.
        close_code: of the close frame that came, if one did.
    """

    __slots__ = ("close_code", "on_text", "rest", "session", "sock", "upgraded")

    def __init__(self, sock: socket.socket, session: int) -> None:
        self.sock = sock
        self.session = session
        self.rest = b""
        self.upgraded = False
        self.on_text: Callable[[bytes, int, int], None] | None = None
        self.close_code: int | None = None

    def send(self, frame: bytes) -> None:
        """Send a frame that `masked` made."""
        if self.sock.send(frame) != len(frame):
            raise BenchError("the server does not read: the load is too high")


class Fleet:
    """Many connections to one server, in one epoll loop.

    Args:
        port: of the server on this machine.

    Attributes:
        clients: all that were opened, in order.
        kinds: text frames received, by the first four letters of their ``type``.
        payload_bytes: of all text frames received.
        gone: connections that the server ended.
    """

    def __init__(self, port: int) -> None:
        self.clients: list[Client] = []
        self.kinds: Counter[bytes] = Counter()
        self.payload_bytes = 0
        self.gone = 0
        self._upgraded = 0
        self._port = port
        self._epoll = select.epoll()
        self._by_fd: dict[int, Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything at once."""
        for client in self.clients:
            client.sock.close()
        self._epoll.close()

    def open(
        self, sessions: Iterable[int], greeting: bytes = b"", *, receive_buffer: int | None = None
    ) -> list[Client]:
        """Open a connection for each of ``sessions`` and shake hands, many at a time.

        Args:
            greeting: sent as soon as the handshake is done.
            receive_buffer: of the kernel, bytes; None for its default.
        """
        opened: list[Client] = []
        before = self._upgraded
        for session in sessions:
            while len(opened) - (self._upgraded - before) >= _OPENING:
                self._poll(1.0, greeting)
            opened.append(self._connect(session, receive_buffer))
        deadline = now_s() + _START_S
        while self._upgraded - before < len(opened):
            self._poll(1.0, greeting)
            if now_s() > deadline:
                raise BenchError("the handshakes do not come to an end")
        return opened

    def run_for(self, seconds: float) -> None:
        """Receive for so long."""
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
                raise BenchError(f"what was waited for did not come: {dict(self.kinds)}")
            self._poll(0.05)

    def stop_reading(self, client: Client) -> None:
        """Leave what comes for ``client`` in the kernel from now on."""
        self._epoll.unregister(client.sock)

    def read_again(self, client: Client) -> None:
        """Take `stop_reading` back."""
        self._epoll.register(client.sock, select.EPOLLIN)

    def frames(self) -> int:
        """All text frames received."""
        return sum(self.kinds.values())

    def _connect(self, session: int, receive_buffer: int | None) -> Client:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect_ex((HOST, self._port))
        client = Client(sock, session)
        self.clients.append(client)
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock, select.EPOLLOUT)
        return client

    def _poll(self, timeout_s: float, greeting: bytes = b"") -> None:
        for fd, event in self._epoll.poll(timeout_s, _POLL_EVENTS):
            client = self._by_fd[fd]
            if event & select.EPOLLOUT and not event & select.EPOLLERR:
                client.send(_upgrade(client.session))
                self._epoll.modify(fd, select.EPOLLIN)
            elif client.upgraded:
                self._receive(client)
            else:
                self._shake_hands(client, greeting)

    def _shake_hands(self, client: Client, greeting: bytes) -> None:
        data = client.rest + _received(client.sock)
        head, end, client.rest = data.partition(b"\r\n\r\n")
        if not end:
            client.rest = data
        if not data or (end and b" 101 " not in head[:16]):
            raise BenchError(f"the server refused the handshake: {head!r}")
        if end:
            client.upgraded = True
            self._upgraded += 1
            if greeting:
                client.send(greeting)
            self._parse(client, client.rest)

    def _receive(self, client: Client) -> None:
        data = _received(client.sock)
        if data:
            self._parse(client, client.rest + data if client.rest else data)
        else:
            self.gone += 1
            self._epoll.unregister(client.sock)

    def _parse(self, client: Client, data: bytes) -> None:
        """Walk from header to header; one function, because this is what the generator does."""
        size = len(data)
        position = 0
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
                self.kinds[data[start + _KIND_FROM : start + _KIND_TO]] += 1
                self.payload_bytes += length
                if client.on_text is not None:
                    client.on_text(data, start, end)
            elif first == _PING:
                client.send(_client_frame(_PONG, data[start:end]))
            elif first == _CLOSE:
                client.close_code = int.from_bytes(data[start : start + 2], "big")
            position = end
        client.rest = data[position:]


class Window(NamedTuple):
    """What happened in some time; windows add up.

    Attributes:
        seconds: how long it was.
        server_cpu_s: of the server process, seconds.
        generator_cpu_s: of this process, seconds.
        kinds: text frames received, as in `Fleet.kinds`.
        payload_bytes: of these.
    """

    seconds: float
    server_cpu_s: float
    generator_cpu_s: float
    kinds: Counter[bytes]
    payload_bytes: int

    def frames(self, without: Iterable[bytes] = ()) -> int:
        """Text frames received, but not those of the kinds ``without``."""
        return sum(self.kinds.values()) - sum(self.kinds[kind] for kind in without)


def measure(server: Server, fleet: Fleet, seconds: float) -> Window:
    """Receive for ``seconds``.

    Raises:
        BenchError: the server closed connections meanwhile.
    """
    gone = fleet.gone
    kinds, payload_bytes = fleet.kinds.copy(), fleet.payload_bytes
    began, server_cpu, generator_cpu = now_s(), server.cpu_s(), time.process_time()
    fleet.run_for(seconds)
    if fleet.gone != gone:
        raise BenchError(f"the server closed {fleet.gone - gone} connections")
    return Window(
        now_s() - began,
        server.cpu_s() - server_cpu,
        time.process_time() - generator_cpu,
        fleet.kinds - kinds,
        fleet.payload_bytes - payload_bytes,
    )


def total(windows: Sequence[Window]) -> Window:
    """All windows as one."""
    kinds: Counter[bytes] = Counter()
    for window in windows:
        kinds.update(window.kinds)
    return Window(
        sum(window.seconds for window in windows),
        sum(window.server_cpu_s for window in windows),
        sum(window.generator_cpu_s for window in windows),
        kinds,
        sum(window.payload_bytes for window in windows),
    )


def masked(message: dict[str, object]) -> bytes:
    """A client's text frame."""
    return _client_frame(_TEXT, json.dumps(message, ensure_ascii=False).encode())


def masked_text(text: bytes) -> bytes:
    """A client's text frame with a payload that is encoded already."""
    return _client_frame(_TEXT, text)


class Latencies:
    """Ages of the ticks that some clients receive, milliseconds."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def watch(self, clients: Iterable[Client]) -> None:
        """Note the ages of all ticks of ``clients`` from now on."""
        for client in clients:
            client.on_text = self._note

    def take(self) -> list[float]:
        """Those noted since the last time."""
        taken, self.values = self.values, []
        return taken

    def _note(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(TICK, start):
            at = data.index(b'"serverTime":', start, end) + 13
            self.values.append(wall_ms() - float(data[at : data.index(b",", at, end)]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """The percentiles of latencies, milliseconds."""
    return {
        "p50": round(percentile(values, 0.5), 2),
        "p99": round(percentile(values, 0.99), 2),
        "max": round(max(values), 2),
    }


class Contender(NamedTuple):
    """A server that is measured beside others.

    Attributes:
        wake: called when its turn begins.
        start: called when it is warm, before the measuring.
        rest: called at the end of its turn.
    """

    server: Server
    fleet: Fleet
    wake: Callable[[], object] = lambda: None
    start: Callable[[], object] = lambda: None
    rest: Callable[[], object] = lambda: None


def alternate(contenders: dict[str, Contender], seconds: float) -> dict[str, list[Window]]:
    """Measure each for ``seconds``, in slices that take turns, while the others are suspended."""
    slices = max(2, round(seconds / _SLICE_S))
    windows: dict[str, list[Window]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.server.suspend()
    for turn in range(slices):
        for name, (server, fleet, wake, start, rest) in contenders.items():
            server.resume()
            wake()
            fleet.run_for(WARM_UP_S if turn == 0 else SETTLE_S)
            start()
            windows[name].append(measure(server, fleet, seconds / slices))
            rest()
            server.suspend()
    for contender in contenders.values():
        contender.server.resume()
    return windows


class ClosedLoop:
    """Keeps two commands of every leader outstanding.

    Args:
        frames: what the leaders send, in turn.
        answered: which of them a received frame ``data[start:end]`` answers, None for none; -1
            for whichever was sent first.
    """

    def __init__(
        self, frames: Sequence[bytes], answered: Callable[[bytes, int, int], int | None]
    ) -> None:
        self._frames = frames
        self._answered = answered
        self._running = False
        self._loops: list[Callable[[], None]] = []
        self.outstanding = 0
        self.answers = 0

    def add(self, leader: Client) -> None:
        """Let ``leader`` take part."""
        waiting: list[int] = []
        following = 0

        def send() -> None:
            nonlocal following
            waiting.append(following)
            leader.send(self._frames[following])
            following = (following + 1) % len(self._frames)
            self.outstanding += 1

        def receive(data: bytes, start: int, end: int) -> None:
            answered = self._answered(data, start, end)
            if answered is None:
                return
            waiting.remove(waiting[0] if answered < 0 else answered)
            self.outstanding -= 1
            self.answers += 1
            if self._running:
                send()

        leader.on_text = receive
        self._loops.append(send)

    def start(self) -> None:
        """Send the first commands."""
        self._running = True
        for send in self._loops:
            send()
            send()

    def stop(self, fleet: Fleet) -> None:
        """Send no more, and wait for the answers to what was sent."""
        self._running = False
        fleet.run_until(lambda: self.outstanding == 0)


class Chatter:
    """Lets every leader send long chat messages at an even pace.

    Args:
        per_second: messages of each leader.
    """

    def __init__(self, fleet: Fleet, leaders: Sequence[Client], per_second: float) -> None:
        # Four bytes a character: the longest chat message there is.
        self.frame = masked({"type": "chat_message", "text": "\N{GUITAR}" * 1000})
        self._fleet = fleet
        self._leaders = cycle(leaders)
        self._interval_s = 1 / (per_second * len(leaders))

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Send and receive until then."""
        due = began = now_s()
        for leader in self._leaders:
            if ended():
                return
            if due - began > _SLOW_LIMIT_S:
                raise BenchError("nobody was too slow: send more")
            leader.send(self.frame)
            due += self._interval_s
            # Late or not, what came is received.
            self._fleet.run_for(max(due - now_s(), _LEAST_POLL_S))


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since this call."""
    end = now_s() + seconds
    return lambda: now_s() >= end


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


def _upgrade(session: int) -> bytes:
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    return (
        f"GET /ws/bench-{session} HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_RECEIVE_BYTES)
    except ConnectionError:
        return b""
