"""The HTTP interface: `bandsync/wire/PROTOCOL.md`, section *HTTP*."""

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct

from bandsync import __version__
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session
from bandsync.model.transport import in_force
from bandsync.ops.auth import is_admitted, unauthorized
from bandsync.ops.metrics import Metrics
from bandsync.ops.overview import BadQueryError, Overview, StorageOverview, event, since_of
from bandsync.ops.pages import Pages
from bandsync.ops.recorder import KEPT, PERIOD_S, Recorder
from bandsync.ops.verdict import RECENT_MS, Facts, Verdict, judge
from bandsync.storage.base import StorageHealth
from bandsync.storage.manager import StorageManager
from bandsync.wire.http_messages import HttpRequest, HttpResponse, json_response, problem
from bandsync.wire.snapshots import member_count

# The document changes every second: caches must not store it.
_NOT_STORED = (("Cache-Control", "no-store"),)


class Server(Protocol):
    """The server state that the interface shows."""

    @property
    def server_id(self) -> str:
        """Name of the server."""

    @property
    def boot_id(self) -> str:
        """Id of this process of the server."""

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down."""

    @property
    def max_connections(self) -> int:
        """Limit of WebSocket connections."""

    @property
    def clock(self) -> ServerClock:
        """The session clock."""

    def now(self) -> float:
        """Session clock, milliseconds since the Unix epoch."""

    def uptime_ms(self) -> float:
        """Time since the start, milliseconds."""

    def connections(self) -> int:
        """Open WebSocket connections."""

    def rooms(self) -> int:
        """Sessions with a room on this server."""

    def sessions(self) -> int:
        """Sessions in this server's memory, hosted or kept."""

    def hosted(self) -> Iterable[Session]:
        """The sessions with a room on this server."""


class Health(StorageHealth, frozen=True, rename="camel"):
    """``/api/health``: state of the storage and of the server."""

    server_id: str
    version: str
    uptime_ms: float
    connections: int
    rooms: int
    draining: bool


class SessionSummary(Struct, frozen=True, rename="camel"):
    """One session in ``/api/sessions``."""

    session_id: str
    member_count: int
    connected_count: int
    is_playing: bool


class Api:
    """Answers HTTP requests.

    Args:
        admin_token: token for ``/api/sessions``; if set, for the other operators' pages too.
    """

    def __init__(
        self,
        server: Server,
        storage: StorageManager,
        metrics: Metrics,
        recorder: Recorder,
        *,
        admin_token: str | None,
    ) -> None:
        self._server = server
        self._storage = storage
        self._metrics = metrics
        self._recorder = recorder
        self._admin_token = admin_token
        self._pages = Pages()

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Answer a request that is not a WebSocket handshake."""
        if request.method in {"GET", "HEAD"}:
            match request.path:
                case "/api/health":
                    return self._health()
                case "/api/storage/status":
                    return self._storage_status()
                case "/api/sessions":
                    return await self._sessions(request)
                case "/api/ops":
                    return self._overview(request)
                case "/ops":
                    return self._screen(request)
                case "/metrics":
                    return self._exposition(request)
            page = self._pages.answer(request)
            if page is not None:
                return page
        return problem(
            404,
            "not_found",
            "There are /, /ops, /api/health, /api/storage/status, /api/sessions, /api/ops, "
            "/metrics and /ws.",
        )

    def _health(self) -> HttpResponse:
        storage = self._storage.report()
        server = self._server
        health = Health(
            healthy=not server.draining,
            storage_type=storage.storage_type,
            initialized=self._storage.settled.is_set(),
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
        return json_response(200, self._status())

    def _status(self) -> StorageOverview:
        storage = self._storage.report()
        clock = self._server.clock
        return StorageOverview(
            mode=storage.mode,
            storage_type=storage.storage_type,
            since=storage.since,
            degraded=storage.degraded,
            reason=storage.reason,
            total_sessions=self._server.sessions(),
            kept_in_memory=storage.kept_in_memory,
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

    async def _sessions(self, request: HttpRequest) -> HttpResponse:
        if self._admin_token is None:
            return problem(403, "no_admin_token", "Set ADMIN_TOKEN to use this.")
        if not is_admitted(request, self._admin_token):
            return unauthorized(ask=False)
        now = self._server.now()
        found = {each.session_id: each for each in await self._storage.list_sessions()}
        # Prefer the state of hosted sessions here: in memory mode it exists nowhere else.
        found.update((session.session_id, session) for session in self._server.hosted())
        sessions = [found[session_id] for session_id in sorted(found)]
        return json_response(200, {"sessions": [_summary(session, now) for session in sessions]})

    def _exposition(self, request: HttpRequest) -> HttpResponse:
        if not self._may_look(request):
            return unauthorized(ask=False)
        body, content_type = self._metrics.exposition()
        return HttpResponse(200, body, content_type)

    def _screen(self, request: HttpRequest) -> HttpResponse:
        if not self._may_look(request):
            return unauthorized(ask=True)
        return self._pages.page(request, "ops.html")

    def _overview(self, request: HttpRequest) -> HttpResponse:
        if not self._may_look(request):
            return unauthorized(ask=True)
        try:
            since = since_of(request.query)
        except BadQueryError as error:
            return problem(400, "bad_query", str(error))
        server = self._server
        overview = Overview(
            server_id=server.server_id,
            boot_id=server.boot_id,
            version=__version__,
            now=server.now(),
            uptime_ms=server.uptime_ms(),
            draining=server.draining,
            max_connections=server.max_connections,
            verdict=self._verdict(),
            storage=self._status(),
            events=[event(change) for change in self._storage.history.changes],
            period_ms=PERIOD_S * 1000,
            kept_ms=KEPT * PERIOD_S * 1000,
            samples=self._recorder.since(since),
        )
        return json_response(200, overview, _NOT_STORED)

    def _verdict(self) -> Verdict:
        server, storage = self._server, self._storage.report()
        return judge(
            Facts(
                now=server.now(),
                awaited=storage.awaited,
                degraded=storage.degraded,
                connected=storage.redis_status.connected,
                gave_up=storage.gave_up,
                loss=storage.loss,
                kept_in_memory=storage.kept_in_memory,
                listening=storage.listening,
                migration=storage.migration,
                changes=self._storage.history.changes,
                draining=server.draining,
                full=server.connections() >= server.max_connections,
                samples=self._recorder.since(server.now() - RECENT_MS),
            )
        )

    def _may_look(self, request: HttpRequest) -> bool:
        return self._admin_token is None or is_admitted(request, self._admin_token)


def _summary(session: Session, now: float) -> SessionSummary:
    return SessionSummary(
        session_id=session.session_id,
        member_count=member_count(session),
        connected_count=sum(member.connected for member in session.members.values()),
        is_playing=in_force(session.transport.value, now).is_playing,
    )
