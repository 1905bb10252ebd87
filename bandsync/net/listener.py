"""The accept loop, and what becomes of each connection: a WebSocket or an HTTP exchange."""

import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from urllib.parse import unquote

import h11
import trio
from structlog.typing import FilteringBoundLogger
from trio_websocket import ConnectionClosed

from bandsync.handoff.peers import HandoffPeers
from bandsync.net.connection import Connection
from bandsync.net.http_head import BadHeadError, Head, next_exchange, read_head, response_bytes
from bandsync.net.registry import ConnectionRegistry
from bandsync.net.stream import SEND_BUFFER_BYTES, TcpStream
from bandsync.wire.http_messages import (
    HttpRequest,
    HttpResponse,
    is_upgrade,
    origin_allowed,
    problem,
)

HEAD_TIMEOUT_S = 10.0
RESPONSE_TIMEOUT_S = 10.0
BACKLOG = 1024

# Reading on after a refusal, so that it arrives: see `TcpStream.linger`.
_LINGER_S = 2.0
_LINGER_BYTES = 4 * 1024 * 1024
# Sockets beyond MAX_CONNECTIONS: for health checks, and for telling others to come back later.
_HEADROOM = 128
_BATCH = 64
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_RETRY_S = 0.1
# Headers that the handshake reads as text.
_HANDSHAKE_HEADERS = ("connection", "host", "origin", "upgrade")

HttpResponder = Callable[[HttpRequest], Awaitable[HttpResponse]]
# What becomes of an accepted socket; and of one whose head names a session, or of any when there
# is no place here.
_Begin = Callable[[socket.socket], None]
_PassOn = Callable[[socket.socket, Head], Awaitable[bool]]


async def open_listeners(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Listening sockets for every address of ``host``, all on one port.

    Args:
        shared: other processes may listen there too. These sockets listen as soon as an `Acceptor`
            has them, not before: what waits for one of them is lost to the others.

    Raises:
        OSError: the address is in use, is not ours, or has no meaning.
    """
    found = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            listeners.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # What is accepted inherits these.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            if not shared:
                sock.listen(BACKLOG)
    except BaseException:
        for sock in listeners:
            sock.close()
        raise
    return listeners


class Acceptor:
    """Accepts connections and serves each in a task of its own.

    Args:
        answer: answers plain HTTP requests.
        tls: serve TLS with this context; None for plain TCP.
        neighbours: to whom connections may be passed on; None if there are none, or TLS, whose
            state belongs to one process.
    """

    def __init__(
        self,
        connections: ConnectionRegistry,
        answer: HttpResponder,
        *,
        tls: ssl.SSLContext | None,
        neighbours: HandoffPeers | None,
        log: FilteringBoundLogger,
    ) -> None:
        settings = connections.settings
        self._connections = connections
        self._counters = connections.hub.counters
        self._answer = answer
        self._tls = tls
        self._neighbours = neighbours
        self._log = log
        self._origins = frozenset(
            origin.strip().rstrip("/").lower() for origin in settings.allowed_origins.split(",")
        )
        self._max_connections = settings.max_connections
        self._sockets = 0
        self._accepting: dict[socket.socket, trio.CancelScope] = {}

    async def run(
        self,
        shared: Sequence[socket.socket],
        own: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept for ever; closes the listeners at the end.

        Args:
            shared: listeners whose connections may be passed on.
            own: listeners whose connections are for this process.
        """
        try:
            async with trio.open_nursery() as handlers, trio.open_nursery() as accepting:
                begin = partial(self._begin, handlers)
                begin_shared = begin
                if self._neighbours is not None:
                    begin_passed = partial(begin, pass_on=self._pass_back)
                    await accepting.start(self._neighbours.run, begin_passed, self._has_room)
                    begin_shared = partial(begin, pass_on=self._pass_on)
                for listener in [*shared, *own]:
                    listener.listen(BACKLOG)
                for listener in shared:
                    accepting.start_soon(self._keep_accepting, listener, begin_shared)
                for listener in own:
                    accepting.start_soon(self._keep_accepting, listener, begin)
                task_status.started()
        finally:
            for listener in [*shared, *own]:
                listener.close()

    def leave(self, listener: socket.socket) -> None:
        """Stop listening there: who comes now is for the other processes that share the port."""
        if (scope := self._accepting.pop(listener, None)) is not None:
            scope.cancel()

    async def _keep_accepting(self, listener: socket.socket, begin: _Begin) -> None:
        with listener:
            with trio.CancelScope() as scope:
                self._accepting[listener] = scope
                await self._accept(listener, begin)
            # Whom the kernel has given to this process, no other can accept.
            self._take(listener, begin)

    async def _accept(self, listener: socket.socket, begin: _Begin) -> None:
        short = False  # Of file descriptors or memory: said once, not ten times a second.
        while True:
            await trio.lowlevel.wait_readable(listener)
            shortage = self._take(listener, begin)
            if shortage is not None:
                if not short:
                    self._log.error("accept.failed", error=str(shortage))
                await trio.sleep(_RETRY_S)
            short = shortage is not None

    def _take(self, listener: socket.socket, begin: _Begin) -> OSError | None:
        """Accept who waits, but not too many at a time; what stopped it, if the machine did."""
        for _ in range(_BATCH):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    return error
                if error.errno in {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}:
                    raise
                continue  # This one went away before it was accepted: accept(2).
            begin(sock)
        return None

    def _begin(
        self,
        handlers: trio.Nursery,
        sock: socket.socket,
        received: bytes = b"",
        *,
        pass_on: _PassOn | None = None,
    ) -> None:
        """Serve one connection soon, of which ``received`` has been read."""
        if self._sockets >= self._max_connections + _HEADROOM:
            self._counters.handshakes_refused["full"] += 1
            sock.close()
            return
        sock.setblocking(False)
        self._sockets += 1
        self._counters.accepted += 1
        handlers.start_soon(self._handle, sock, received, pass_on)

    def _has_room(self) -> bool:
        """Whether a connection that others would serve as well should rather come here."""
        return self._sockets < self._max_connections

    async def _handle(self, sock: socket.socket, received: bytes, pass_on: _PassOn | None) -> None:
        """Serve one connection; nothing but cancellation leaves here."""
        tcp = TcpStream(sock)
        try:
            if self._tls is None:
                head = await self._converse(
                    tcp, tcp, received, None if pass_on is None else partial(pass_on, sock)
                )
                if head is not None:
                    await self._upgrade(tcp, tcp.send_nowait, head)
            else:
                stream = trio.SSLStream(tcp, self._tls, server_side=True, https_compatible=True)
                head = await self._converse(stream, tcp)
                if head is not None:
                    await self._upgrade(stream, None, head)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed):
            pass  # The peer is gone, in whatever state: nothing is left to be done for it.
        except* trio.TooSlowError:
            self._counters.handshakes_refused["timeout"] += 1
        except* Exception:
            self._counters.handshakes_refused["error"] += 1
            self._log.exception("connection.failed")
        finally:
            tcp.close()
            self._sockets -= 1

    async def _converse(
        self,
        stream: trio.abc.Stream,
        tcp: TcpStream,
        received: bytes = b"",
        pass_on: Callable[[Head], Awaitable[bool]] | None = None,
    ) -> Head | None:
        """Answer HTTP requests until one is to become a WebSocket here; None if none is.

        Args:
            pass_on: whether another worker has this connection now.
        """
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=16_384)
        if received:
            http.receive_data(received)
        head: Head | None = None
        while True:
            try:
                with trio.move_on_after(HEAD_TIMEOUT_S) as deadline:
                    head = await read_head(stream, http)
            except BadHeadError as bad:
                self._counters.handshakes_refused[str(bad.response.status)] += 1
                await self._respond(stream, http, bad.response)
                break
            if deadline.cancelled_caught and head is None:
                self._counters.handshakes_refused["timeout"] += 1
            if deadline.cancelled_caught or head is None:
                # Also a client that keeps its connection for later: it can make another.
                return None
            request = head.request
            if is_upgrade(request):
                refusal = self._upgrade_refusal(request)
                if refusal is None and pass_on is not None and await pass_on(head):
                    return None
                # Only now: who is not about to restart could have it.
                if refusal is None and self._connections.draining:
                    refusal = problem(
                        503, "draining", "This server is about to restart; try again."
                    )
                if refusal is None:
                    return head
                self._counters.handshakes_refused[str(refusal.status)] += 1
                response = refusal
            else:
                response = await self._answered(request)
            await self._respond(stream, http, response, with_body=request.method != "HEAD")
            if not next_exchange(http):
                break
        with trio.move_on_after(_LINGER_S):
            await tcp.linger(_LINGER_BYTES)
        return None

    async def _answered(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._answer(request)
        except Exception:
            self._log.exception("request.failed", path=request.path)
            return problem(500, "internal", "The server failed at this; its log says how.")

    async def _respond(
        self,
        stream: trio.abc.Stream,
        http: h11.Connection,
        response: HttpResponse,
        *,
        with_body: bool = True,
    ) -> None:
        with trio.fail_after(RESPONSE_TIMEOUT_S):
            await stream.send_all(response_bytes(http, response, with_body=with_body))

    async def _pass_on(self, sock: socket.socket, head: Head) -> bool:
        """Whether another worker has this connection now."""
        session_id = _path_session(head)
        # This one is counted already.
        full = self._connections.draining or self._sockets > self._max_connections
        if self._neighbours is None or not (session_id or full):
            return False
        if not await self._neighbours.pass_on(session_id, sock, head.received, full=full):
            return False
        self._counters.passed_on += 1
        return True

    async def _pass_back(self, sock: socket.socket, head: Head) -> bool:
        """The same for a connection that was passed on to here."""
        if self._neighbours is None:
            return False
        if not await self._neighbours.pass_back(_path_session(head), sock, head.received):
            return False
        self._counters.passed_on += 1
        return True

    def _upgrade_refusal(self, request: HttpRequest) -> HttpResponse | None:
        if request.path != "/ws" and not request.path.startswith("/ws/"):
            return problem(404, "not_found", "WebSockets are at /ws and /ws/{sessionId}.")
        if any(not request.headers.get(name, "").isascii() for name in _HANDSHAKE_HEADERS) or any(
            name.startswith("sec-websocket-") and not value.isascii()
            for name, value in request.headers.items()
        ):
            return problem(400, "bad_request", "The headers of the handshake are ASCII.")
        if not origin_allowed(request, self._origins):
            return problem(403, "origin_not_allowed", "Pages of this origin may not connect.")
        return None

    async def _upgrade(
        self, stream: trio.abc.Stream, send_nowait: Callable[[bytes], int] | None, head: Head
    ) -> None:
        path_session = _path_session(head)
        connection: Connection | None = None
        try:
            async with trio.open_nursery() as nursery:
                connection = Connection(
                    self._connections, nursery, stream, send_nowait, head, path_session
                )
                await connection.run()
        finally:
            if connection is not None:
                connection.release()


def _path_session(head: Head) -> str:
    return unquote(head.request.path[len("/ws/") :])
