"""The HTTP interface: protocol.md section 7."""

import hmac
from collections.abc import Iterable
from importlib import resources
from typing import Protocol

from msgspec import Struct

from bandsync import __version__
from bandsync.clock import SessionClock
from bandsync.http import HttpRequest, HttpResponse, json_response, problem
from bandsync.ops.metrics import Metrics
from bandsync.session import Session
from bandsync.storage.base import RedisStatus, StorageHealth
from bandsync.storage.manager import StorageManager
from bandsync.storage.status import Failover, Migration, Mode, Recovery
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

    @property
    def clock(self) -> SessionClock:
        """The session clock."""

    def now(self) -> float:
        """What it shows, milliseconds since the Unix epoch."""

    def uptime_ms(self) -> float:
        """Since it started."""

    def connections(self) -> int:
        """Open WebSocket connections."""

    def rooms(self) -> int:
        """Sessions with a room on this server."""

    def sessions(self) -> int:
        """Sessions that this server hosts or keeps."""

    def hosted(self) -> Iterable[Session]:
        """The sessions with a room on this server."""


class Health(StorageHealth, frozen=True, rename="camel"):
    """``/api/health``: the seed's document, and more."""

    server_id: str
    version: str
    uptime_ms: float
    connections: int
    rooms: int
    draining: bool


class StorageStatus(Struct, frozen=True, rename="camel"):
    """``/api/storage/status``; what never happened is null.

    Attributes:
        since: when ``mode`` began, session clock.
        kept_in_memory: sessions that are not in Redis, or not yet.
        listening: whether changes of other servers are heard as they happen.
        clock_offset_ms: the session clock minus this machine's wall clock.
        clock_error_ms: Redis's clock as best known minus the session clock.
        clock_uncertainty_ms: by how much that may be wrong.
    """

    mode: Mode
    storage_type: str
    since: float
    degraded: bool
    reason: str | None
    total_sessions: int
    kept_in_memory: int
    redis_status: RedisStatus
    last_failover: Failover | None
    last_recovery: Recovery | None
    migration: Migration | None
    clock_offset_ms: float
    clock_error_ms: float | None
    clock_uncertainty_ms: float | None
    link_round_trip_ms: float | None
    listening: bool


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
    """

    def __init__(
        self,
        server: Server,
        storage: StorageManager,
        metrics: Metrics,
        *,
        admin_token: str | None,
    ) -> None:
        self._server = server
        self._storage = storage
        self._metrics = metrics
        self._admin_token = admin_token
        self._pages = {path: _page(path) for path in _PAGE}

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """The answer to a request that asks for no WebSocket."""
        if request.method in {"GET", "HEAD"}:
            match request.path:
                case "/api/health":
                    return self._health()
                case "/api/storage/status":
                    return self._storage_status()
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

    def _health(self) -> HttpResponse:
        storage = self._storage
        server = self._server
        health = Health(
            healthy=not server.draining,
            storage_type=storage.storage_type,
            initialized=storage.settled.is_set(),
            fallback_reason=storage.reason,
            total_sessions=server.sessions(),
            redis_status=storage.redis_status,
            server_id=server.server_id,
            version=__version__,
            uptime_ms=server.uptime_ms(),
            connections=server.connections(),
            rooms=server.rooms(),
            draining=server.draining,
        )
        return json_response(503 if server.draining else 200, health)

    def _storage_status(self) -> HttpResponse:
        storage = self._storage
        clock = self._server.clock
        status = StorageStatus(
            mode=storage.mode,
            storage_type=storage.storage_type,
            since=storage.since,
            degraded=storage.degraded,
            reason=storage.reason,
            total_sessions=self._server.sessions(),
            kept_in_memory=len(storage.memory),
            redis_status=storage.redis_status,
            last_failover=storage.last_failover,
            last_recovery=storage.last_recovery,
            migration=storage.migration,
            clock_offset_ms=clock.offset_ms,
            clock_error_ms=clock.error_ms,
            clock_uncertainty_ms=clock.uncertainty_ms,
            link_round_trip_ms=storage.round_trip_ms,
            listening=storage.listening,
        )
        return json_response(200, status)

    async def _sessions(self, request: HttpRequest) -> HttpResponse:
        if self._admin_token is None:
            return problem(403, "no_admin_token", "Set ADMIN_TOKEN to use this.")
        if not self._admitted(request):
            return _unauthorized()
        now = self._server.now()
        found = {each.session_id: each for each in await self._storage.list_sessions()}
        # What this server hosts, it knows best; in memory mode most of it stands nowhere else.
        found.update((session.session_id, session) for session in self._server.hosted())
        sessions = [found[session_id] for session_id in sorted(found)]
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
