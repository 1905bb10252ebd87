"""The server as a whole: one nursery, in which everything that runs can be read."""

import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Collection

import trio
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.handoff.peers import HandoffPeers
from bandsync.model.clock import ServerClock
from bandsync.net.drain import drain
from bandsync.net.listener import Acceptor, open_listeners
from bandsync.net.registry import ConnectionRegistry
from bandsync.ops.api import Api
from bandsync.ops.metrics import Metrics
from bandsync.ops.process import is_gone
from bandsync.ops.recorder import Recorder
from bandsync.rooms.failure_detector import FailureDetector
from bandsync.rooms.hub import Hub
from bandsync.rules.draft import ServerContext
from bandsync.server_state import ServerState
from bandsync.settings import Settings
from bandsync.storage.health import HealthCheck
from bandsync.storage.manager import StorageManager
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.redis import Keys
from bandsync.storage.redis_connector import RedisConnector, read_timeouts
from bandsync.wire.messages import StorageStatus

_EXPIRY_PERIOD_S = 1.0


class StartError(Exception):
    """The server cannot start; the message says what to change."""


class Serving(Struct, frozen=True):
    """A server that accepts connections.

    Attributes:
        url: the address to open in a browser.
        stop: begins the drain; `serve` returns when it is done.
        leave: stops listening on a port that others share: before a drain that is not theirs.
    """

    url: str
    port: int
    server_id: str
    stop: Callable[[], None]
    leave: Callable[[], None]


async def serve(
    settings: Settings,
    log: FilteringBoundLogger,
    *,
    worker: int = 1,
    crew: str | None = None,
    announce: Callable[[str], None] = print,
    signals: Collection[int] = (),
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `Serving.stop` is called, or for ever.

    Args:
        worker: which of the processes that share the port this is: `WORKERS`, from 1.
        crew: a name that these processes share with nobody else; None if there are no others.
        announce: told the address, and the storage in use and why, once the listener is open.
        signals: any of these begins the drain, a second one stops at once.

    Raises:
        StartError: the settings cannot be used on this machine.
    """
    shared, own = await _open_listeners(settings, worker)
    refused: BaseExceptionGroup[StartError] | None = None
    try:
        with contextlib.ExitStack() as stack:
            for listener in shared + own:
                stack.callback(listener.close)
            place = _Place(worker, crew, shared, own)
            await _serve(settings, log, place, announce, signals, task_status)
    except* StartError as group:
        refused = group
    if refused is not None:
        raise refused.exceptions[0]


async def _serve(
    settings: Settings,
    log: FilteringBoundLogger,
    place: "_Place",
    announce: Callable[[str], None],
    signals: Collection[int],
    task_status: trio.TaskStatus[Serving],
) -> None:
    tls = _tls_context(settings)
    port: int = place.shared[0].getsockname()[1]
    server_id = server_name(settings, port)
    boot_id = secrets.token_hex(8)
    started = trio.current_time()
    clock = ServerClock(wall_ms=_wall_ms(), monotonic_s=started)
    counters = Counters()
    metrics = Metrics()
    recorder = Recorder(counters)
    access = _access(settings, server_id)
    stopping = trio.Event()
    serving = trio.Event()

    def now() -> float:
        return clock.at(trio.current_time())

    async with trio.open_nursery() as nursery:
        manager = StorageManager(
            settings,
            access,
            memory=MemoryStorage(boot_id, "memory of a server"),
            health=HealthCheck(
                timeouts=read_timeouts(settings),
                clock=clock,
                presence_key=Keys(settings.redis_key_prefix).server(server_id),
                presence=lambda: state.presence(),
                is_gone=lambda entry: is_gone(entry.machine, entry.pid),
                # Of nobody there, nobody is confused by a clock that is set.
                serving=lambda: serving.is_set() and bool(state.connections() or state.sessions()),
            ),
            server_id=server_id,
            boot_id=boot_id,
            now=now,
            counters=counters,
            recovery_seconds=metrics.recovery_seconds.observe,
            log=log,
        )
        hub = Hub(
            nursery,
            stores=manager,
            clock=clock,
            here=ServerContext(server_id, boot_id, settings.max_members, settings.leadership),
            counters=counters,
            log=log,
            grace_s=settings.resume_grace_ms / 1000,
            tick_s=settings.tick_interval_ms / 1000,
            commit_seconds=_both(metrics.commit_seconds.observe, recorder.commits.add),
        )
        command_seconds = _both(metrics.command_seconds.observe, recorder.commands.add)
        connections = ConnectionRegistry(hub, settings, log, command_seconds)
        state = ServerState(hub, connections, manager, clock, stopping, url_of(settings, port))
        metrics.identify(server_id, place.worker)
        metrics.watch(counters, state)
        api = Api(state, manager, metrics, recorder, admin_token=settings.admin_token)
        neighbours: HandoffPeers | None = None
        if place.crew is not None and tls is None:
            neighbours = HandoffPeers(
                place.crew, place.worker, settings.workers, lambda: hub.rooms, log
            )
        acceptor = Acceptor(connections, api.answer, tls=tls, neighbours=neighbours, log=log)

        def tell_storage() -> None:
            loss = manager.history.last_failover if manager.degraded else None
            connections.tell_storage(
                StorageStatus(
                    manager.storage_type,
                    manager.degraded,
                    None if loss is None else loss.reason,
                )
            )

        nursery.start_soon(manager.run, hub, tell_storage)
        await _settled(manager, settings, server_id)
        nursery.start_soon(hub.run_ticker)
        nursery.start_soon(hub.run_stats)
        nursery.start_soon(hub.run_graces)
        loop_lag_seconds = _both(metrics.loop_lag_seconds.observe, recorder.lag)
        nursery.start_soon(connections.run_pings, loop_lag_seconds)
        nursery.start_soon(recorder.run, state)
        nursery.start_soon(hub.run_comparisons)
        nursery.start_soon(FailureDetector(hub).run)
        nursery.start_soon(_run_expiry, manager.memory, hub, settings, log)
        if signals:
            nursery.start_soon(_run_signals, signals, stopping, nursery.cancel_scope)
        serving.set()
        await nursery.start(acceptor.run, place.shared, place.own)

        def leave() -> None:
            for listener in place.shared:
                acceptor.leave(listener)
            if neighbours is not None:
                neighbours.leave()

        url = url_of(settings, port)
        announce(f"BandSync listening on {url}")
        announce(f"Storage: {manager.storage_type} ({manager.reason or access})")
        log.info("server.started", url=url, server_id=server_id, boot_id=boot_id)
        task_status.started(Serving(url, port, server_id, stopping.set, leave))

        await stopping.wait()
        log.info("server.draining", connections=len(connections.open))
        if neighbours is not None:
            neighbours.leave()
        with trio.move_on_after(settings.drain_timeout_ms / 1000):
            await drain(connections, settings.drain_timeout_ms / 1000)
            await manager.hand_over()
        log.info("server.stopped", connections=len(connections.open))
        nursery.cancel_scope.cancel()


class _Place(Struct, frozen=True):
    """Which of the processes that share a port this is, and where it listens.

    Attributes:
        shared: where the others listen too.
        own: where they do not.
    """

    worker: int
    crew: str | None
    shared: list[socket.socket]
    own: list[socket.socket]


def _both(
    first: Callable[[float], object], second: Callable[[float], object]
) -> Callable[[float], None]:
    """Tells a number to two who want it."""

    def tell(number: float) -> None:
        first(number)
        second(number)

    return tell


def _access(settings: Settings, server_id: str) -> RedisConnector | None:
    if not settings.redis_enabled:
        return None
    try:
        return RedisConnector(settings, server_id)
    except ValueError as error:
        raise StartError(f"REDIS_URL=(not shown): {error}") from error


async def _settled(manager: StorageManager, settings: Settings, server_id: str) -> None:
    """Wait for Redis, a little: a server that starts without it is of use too.

    Raises:
        StartError: it is required and cannot be used, or another server has our name.
    """
    patience_ms = settings.redis_health_timeout_ms
    # Workers that each kept sessions of their own would split every band.
    required = settings.redis_required or settings.workers > 1
    if required:
        patience_ms += settings.redis_connect_timeout
    while True:
        with trio.move_on_after(patience_ms / 1000):
            await manager.settled.wait()
        # Whether an entry of our name is that of an earlier life takes longer to see.
        if not manager.claiming:
            break
    if manager.name_taken is not None:
        raise StartError(
            f"SERVER_ID={server_id!r}: {manager.name_taken}; give each server a name of its own"
        )
    if required and manager.storage_type != "redis":
        asked, instead = "REDIS_REQUIRED=true", "REDIS_REQUIRED=false"
        if settings.workers > 1:
            asked, instead = f"WORKERS={settings.workers} share their sessions", "WORKERS=1"
        raise StartError(
            f"{asked}: Redis cannot be used: {manager.reason}. "
            f"Start Redis, correct the REDIS_ settings, or set {instead}"
        )


async def _run_expiry(
    storage: MemoryStorage, hub: Hub, settings: Settings, log: FilteringBoundLogger
) -> None:
    """Forget sessions that nobody has been in for long, for ever."""
    while True:
        await trio.sleep(_EXPIRY_PERIOD_S)
        expired = storage.expire(
            hub.now(), settings.redis_ttl * 1000, hub.rooms, settings.max_idle_sessions
        )
        for session_id in expired:
            log.info("session.expired", session_id=session_id)


async def _run_signals(
    signals: Collection[int], stopping: trio.Event, everything: trio.CancelScope
) -> None:
    """Turn signals into a drain, and a second one into an end, for ever."""
    signalled = False
    with trio.open_signal_receiver(*signals) as received:
        async for _ in received:
            # A drain may also have begun otherwise: that of a worker, by its supervisor.
            if signalled:
                everything.cancel()
            signalled = True
            stopping.set()


async def _open_listeners(
    settings: Settings, worker: int
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Those of the port, which workers share, and those of this worker alone."""
    shared = await listen(settings, "PORT", settings.port, shared=settings.workers > 1)
    if settings.worker_ports is None:
        return shared, []
    try:
        return shared, await listen(settings, "WORKER_PORTS", settings.worker_ports + worker - 1)
    except BaseException:
        for listener in shared:
            listener.close()
        raise


async def listen(
    settings: Settings, name: str, port: int, *, shared: bool = False
) -> list[socket.socket]:
    """Sockets that listen on ``port``.

    Args:
        name: of the setting that asks for it.
        shared: see `open_listeners`.

    Raises:
        StartError: they cannot.
    """
    try:
        return await open_listeners(settings.host, port, shared=shared)
    except OSError as error:
        raise StartError(
            f"HOST={settings.host!r} {name}={port}: cannot listen there: {error}"
        ) from error


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            f"TLS_CERT={settings.tls_cert!r} TLS_KEY={settings.tls_key!r}: "
            f"must be a PEM certificate chain and its key: {error}"
        ) from error
    return context


def server_name(settings: Settings, port: int) -> str:
    """What this server calls itself, on this port."""
    return settings.server_id or f"{socket.gethostname()}-{port}"


def url_of(settings: Settings, port: int) -> str:
    """The address to open in a browser."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"


def _wall_ms() -> float:
    return time.time_ns() / 1e6
