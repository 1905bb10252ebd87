"""The HTTP interface: protocol.md section 7."""

import hmac
from importlib import resources
from typing import Protocol

from msgspec import Struct

from bandsync import __version__
from bandsync.http import HttpRequest, HttpResponse, json_response, problem
from bandsync.ops.metrics import Metrics
from bandsync.session import Session
from bandsync.storage.base import RedisStatus, Storage, StorageHealth
from bandsync.transport import in_force
from bandsync.views import member_count

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = (
    ("Content-Security-Policy", _CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
)
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/demo.js": ("demo.js", "text/javascript; charset=utf-8"),
    "/demo.css": ("demo.css", "text/css; charset=utf-8"),
}


class Server(Protocol):
    """What the interface tells of the server."""

    @property
    def server_id(self) -> str:
        """Its name."""

    @property
    def draining(self) -> bool:
        """Whether it is about to stop."""

    def now(self) -> float:
        """The session clock, milliseconds since the Unix epoch."""

    def uptime_ms(self) -> float:
        """Since it started."""

    def connections(self) -> int:
        """Open WebSocket connections."""

    def rooms(self) -> int:
        """Sessions with a room on this server."""


class Health(StorageHealth, frozen=True, rename="camel"):
    """``/api/health``: the seed's document, and more."""

    server_id: str
    version: str
    uptime_ms: float
    connections: int
    rooms: int
    draining: bool


class StorageStatus(Struct, frozen=True, rename="camel"):
    """``/api/storage/status``; what never happened is null."""

    mode: str
    storage_type: str
    since: float
    degraded: bool
    reason: str | None
    total_sessions: int
    redis_status: RedisStatus
    last_failover: None = None
    last_recovery: None = None
    migration: None = None
    clock_offset_ms: float = 0.0
    link_round_trip_ms: float | None = None


class SessionSummary(Struct, frozen=True, rename="camel"):
    """One session in ``/api/sessions``."""

    session_id: str
    member_count: int
    connected_count: int
    is_playing: bool


class Api:
    """Answers HTTP requests.

    Args:
        admin_token: what ``/api/sessions`` and ``/metrics`` need; None when none is configured.
        degraded: whether this storage is not the one that was asked for.
    """

    def __init__(
        self,
        server: Server,
        storage: Storage,
        metrics: Metrics,
        *,
        admin_token: str | None,
        degraded: bool,
    ) -> None:
        self._server = server
        self._storage = storage
        self._metrics = metrics
        self._admin_token = admin_token
        self._degraded = degraded
        self._started_at = server.now()
        self._pages = {path: _page(path) for path in _PAGE}

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """The answer to a request that asks for no WebSocket."""
        if request.method in {"GET", "HEAD"}:
            match request.path:
                case "/api/health":
                    return await self._health()
                case "/api/storage/status":
                    return await self._storage_status()
                case "/api/sessions":
                    return await self._sessions(request)
                case "/metrics":
                    return self._exposition(request)
                case path if path in self._pages:
                    return self._pages[path]
        return problem(
            404,
            "not_found",
            "There are /, /api/health, /api/storage/status, /api/sessions, /metrics and /ws.",
        )

    async def _health(self) -> HttpResponse:
        storage = await self._storage.health_check()
        server = self._server
        health = Health(
            storage.healthy and not server.draining,
            storage.storage_type,
            storage.initialized,
            storage.fallback_reason,
            storage.total_sessions,
            storage.redis_status,
            server.server_id,
            __version__,
            server.uptime_ms(),
            server.connections(),
            server.rooms(),
            server.draining,
        )
        return json_response(503 if server.draining else 200, health)

    async def _storage_status(self) -> HttpResponse:
        storage = await self._storage.health_check()
        status = StorageStatus(
            mode=storage.storage_type,
            storage_type=storage.storage_type,
            since=self._started_at,
            degraded=self._degraded,
            reason=storage.fallback_reason,
            total_sessions=storage.total_sessions,
            redis_status=storage.redis_status,
        )
        return json_response(200, status)

    async def _sessions(self, request: HttpRequest) -> HttpResponse:
        if self._admin_token is None:
            return problem(403, "no_admin_token", "Set ADMIN_TOKEN to use this.")
        if not self._admitted(request):
            return _unauthorized()
        now = self._server.now()
        sessions = await self._storage.list_sessions()
        return json_response(200, {"sessions": [_summary(session, now) for session in sessions]})

    def _exposition(self, request: HttpRequest) -> HttpResponse:
        if self._admin_token is not None and not self._admitted(request):
            return _unauthorized()
        body, content_type = self._metrics.exposition()
        return HttpResponse(200, body, content_type)

    def _admitted(self, request: HttpRequest) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        expected = self._admin_token or ""
        return scheme.lower() == "bearer" and hmac.compare_digest(
            token.strip().encode("latin-1"), expected.encode()
        )


def _unauthorized() -> HttpResponse:
    answer = problem(401, "unauthorized", "Send `Authorization: Bearer` with the ADMIN_TOKEN.")
    return HttpResponse(
        answer.status, answer.body, answer.content_type, (("WWW-Authenticate", "Bearer"),)
    )


def _summary(session: Session, now: float) -> SessionSummary:
    return SessionSummary(
        session_id=session.session_id,
        member_count=member_count(session),
        connected_count=sum(member.connected for member in session.members.values()),
        is_playing=in_force(session.transport.value, now).is_playing,
    )


def _page(path: str) -> HttpResponse:
    name, content_type = _PAGE[path]
    body = resources.files("bandsync").joinpath("web", name).read_bytes()
    return HttpResponse(200, body, content_type, _PAGE_HEADERS)
