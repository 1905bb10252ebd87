"""The accept loop. Each connection becomes HTTP exchanges, a WebSocket, or a handoff."""

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

# How long and how much to read after a refusal, so that the answer arrives: `TcpStream.linger`.
_LINGER_S = 2.0
_LINGER_BYTES = 4 * 1024 * 1024
# Sockets beyond MAX_CONNECTIONS, for health checks and for refusals.
_HEADROOM = 128
# Connections that are accepted before other tasks get their turn.
_ACCEPT_BATCH = 64
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_RETRY_S = 0.1
# Headers that trio-websocket decodes as text.
_HANDSHAKE_HEADERS = ("connection", "host", "origin", "upgrade")

HttpResponder = Callable[[HttpRequest], Awaitable[HttpResponse]]
# Starts to serve an accepted socket.
_StartServing = Callable[[socket.socket], None]
# Hands an upgrade request off to another worker, if there is a better one; whether it did.
_HandOff = Callable[[socket.socket, Head], Awaitable[bool]]


async def open_listeners(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Bound sockets for every address of ``host``, all on one port.

    Args:
        shared: with SO_REUSEPORT, so that other processes may listen there too. Such a socket
            listens only once an `Acceptor` has it: connections that the kernel queues at one
            process are lost to the others.

    Raises:
        OSError: the address is in use, is not local, or cannot be resolved.
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
            # Accepted sockets inherit these options.
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
    """Accepts connections, and serves each in a task of its own.

    Args:
        registry: the WebSocket connections.
        answer: answers plain HTTP requests.
        tls: serve TLS with this context; None for plain TCP.
        peers: the other workers, for handoffs. None without other workers, and with TLS, because
            the state of a TLS connection belongs to one process.
    """

    def __init__(
        self,
        registry: ConnectionRegistry,
        answer: HttpResponder,
        *,
        tls: ssl.SSLContext | None,
        peers: HandoffPeers | None,
        log: FilteringBoundLogger,
    ) -> None:
        settings = registry.settings
        self._registry = registry
        self._counters = registry.hub.counters
        self._answer = answer
        self._tls = tls
        self._peers = peers
        self._log = log
        self._origins = frozenset(
            origin.strip().rstrip("/").lower() for origin in settings.allowed_origins.split(",")
        )
        self._max_connections = settings.max_connections
        self._sockets = 0  # accepted and not closed, WebSockets or not
        self._accepting: dict[socket.socket, trio.CancelScope] = {}  # by listener, until `leave`

    async def run(
        self,
        shared: Sequence[socket.socket],
        own: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept for ever. Closes the listeners at the end.

        Args:
            shared: listeners on the port of all workers; their connections may be handed off.
            own: listeners on the port of this worker alone.
        """
        try:
            async with trio.open_nursery() as handlers, trio.open_nursery() as accepting:
                serve = partial(self._start_serving, handlers)
                serve_shared = serve
                if self._peers is not None:
                    serve_received = partial(serve, hand_off=self._hand_back)
                    await accepting.start(self._peers.run, serve_received, self._has_room)
                    serve_shared = partial(serve, hand_off=self._hand_off)
                for listener in [*shared, *own]:
                    listener.listen(BACKLOG)
                for listener in shared:
                    accepting.start_soon(self._keep_accepting, listener, serve_shared)
                for listener in own:
                    accepting.start_soon(self._keep_accepting, listener, serve)
                task_status.started()
        finally:
            for listener in [*shared, *own]:
                listener.close()

    def leave(self, listener: socket.socket) -> None:
        """Stop listening there: new connections go to the other workers of the port."""
        if (scope := self._accepting.pop(listener, None)) is not None:
            scope.cancel()

    async def _keep_accepting(self, listener: socket.socket, start_serving: _StartServing) -> None:
        with listener:
            with trio.CancelScope() as scope:
                self._accepting[listener] = scope
                await self._accept(listener, start_serving)
            # With SO_REUSEPORT a queued connection belongs to this socket only, so drain the
            # accept queue before closing it.
            self._accept_queued(listener, start_serving)

    async def _accept(self, listener: socket.socket, start_serving: _StartServing) -> None:
        exhausted = False  # no file descriptors or memory: log it once, not ten times a second
        while True:
            await trio.lowlevel.wait_readable(listener)
            error = self._accept_queued(listener, start_serving)
            if error is not None:
                if not exhausted:
                    self._log.error("accept.failed", error=str(error))
                await trio.sleep(_RETRY_S)
            exhausted = error is not None

    def _accept_queued(
        self, listener: socket.socket, start_serving: _StartServing
    ) -> OSError | None:
        """Accept queued connections, a batch at most; the error if the machine is exhausted."""
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    return error
                if error.errno in {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}:
                    raise
                continue  # The client closed before the accept: accept(2).
            start_serving(sock)
        return None

    def _start_serving(
        self,
        handlers: trio.Nursery,
        sock: socket.socket,
        received: bytes = b"",
        *,
        hand_off: _HandOff | None = None,
    ) -> None:
        """Start the task of one connection, from which ``received`` has been read already."""
        if self._sockets >= self._max_connections + _HEADROOM:
            self._counters.handshakes_refused["full"] += 1
            sock.close()
            return
        sock.setblocking(False)
        self._sockets += 1
        self._counters.accepted += 1
        handlers.start_soon(self._handle, sock, received, hand_off)

    def _has_room(self) -> bool:
        """Whether this worker accepts handoffs that another worker could serve as well."""
        return self._sockets < self._max_connections

    async def _handle(
        self, sock: socket.socket, received: bytes, hand_off: _HandOff | None
    ) -> None:
        """Serve one connection. No exception but a cancellation leaves this task."""
        tcp = TcpStream(sock)
        try:
            if self._tls is None:
                head = await self._serve_http(
                    tcp, tcp, received, None if hand_off is None else partial(hand_off, sock)
                )
                if head is not None:
                    await self._upgrade(tcp, tcp.send_nowait, head)
            else:
                stream = trio.SSLStream(tcp, self._tls, server_side=True, https_compatible=True)
                head = await self._serve_http(stream, tcp)
                if head is not None:
                    await self._upgrade(stream, None, head)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed):
            pass  # The client has disconnected: nothing is left to do.
        except* trio.TooSlowError:
            self._counters.handshakes_refused["timeout"] += 1
        except* Exception:
            self._counters.handshakes_refused["error"] += 1
            self._log.exception("connection.failed")
        finally:
            tcp.close()
            self._sockets -= 1

    async def _serve_http(
        self,
        stream: trio.abc.Stream,
        tcp: TcpStream,
        received: bytes = b"",
        hand_off: Callable[[Head], Awaitable[bool]] | None = None,
    ) -> Head | None:
        """Answer HTTP requests until an upgrade that this worker serves.

        Args:
            hand_off: hands the connection off to another worker; whether it did.

        Returns:
            The upgrade; None if the connection ends without one or was handed off.
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
                await self._send_response(stream, http, bad.response)
                break
            if deadline.cancelled_caught and head is None:
                self._counters.handshakes_refused["timeout"] += 1
            if deadline.cancelled_caught or head is None:
                # This also closes an idle keep-alive connection: the client can open another.
                return None
            request = head.request
            if is_upgrade(request):
                refusal = self._upgrade_refusal(request)
                if refusal is None and hand_off is not None and await hand_off(head):
                    return None
                # Refuse after the handoff: a worker that does not drain could have accepted it.
                if refusal is None and self._registry.draining:
                    refusal = problem(
                        503, "draining", "This server is about to restart; try again."
                    )
                if refusal is None:
                    return head
                self._counters.handshakes_refused[str(refusal.status)] += 1
                response = refusal
            else:
                response = await self._response(request)
            with_body = request.method != "HEAD"
            await self._send_response(stream, http, response, with_body=with_body)
            if not next_exchange(http):
                break
        with trio.move_on_after(_LINGER_S):
            await tcp.linger(_LINGER_BYTES)
        return None

    async def _response(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._answer(request)
        except Exception:
            self._log.exception("request.failed", path=request.path)
            return problem(500, "internal", "The server failed at this; its log says how.")

    async def _send_response(
        self,
        stream: trio.abc.Stream,
        http: h11.Connection,
        response: HttpResponse,
        *,
        with_body: bool = True,
    ) -> None:
        with trio.fail_after(RESPONSE_TIMEOUT_S):
            await stream.send_all(response_bytes(http, response, with_body=with_body))

    async def _hand_off(self, sock: socket.socket, head: Head) -> bool:
        """Hand an accepted connection off to the worker of its session; whether it was."""
        session_id = _path_session(head)
        # `_sockets` includes this connection.
        full = self._registry.draining or self._sockets > self._max_connections
        if self._peers is None or not (session_id or full):
            return False
        if not await self._peers.hand_off(session_id, sock, head.received, full=full):
            return False
        self._counters.passed_on += 1
        return True

    async def _hand_back(self, sock: socket.socket, head: Head) -> bool:
        """Hand a received connection off to the worker that still has its session."""
        if self._peers is None:
            return False
        if not await self._peers.hand_back(_path_session(head), sock, head.received):
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
        connection: Connection | None = None
        try:
            async with trio.open_nursery() as nursery:
                connection = Connection(
                    self._registry, nursery, stream, send_nowait, head, _path_session(head)
                )
                await connection.run()
        finally:
            if connection is not None:
                connection.release()


def _path_session(head: Head) -> str:
    """The session that the URL names; empty if it names none."""
    return unquote(head.request.path[len("/ws/") :])
