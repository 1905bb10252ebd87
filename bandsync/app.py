"""The server as a whole: built, started and drained in one nursery.

Every task of the server is a child of the nursery in `_serve`; `_start` lists them.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Collection

import trio
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.handoff.peers import HandoffPeers
from bandsync.model.clock import ServerClock
from bandsync.model.exception_leaves import first_leaf
from bandsync.net.drain import drain
from bandsync.net.listener import Acceptor
from bandsync.net.registry import ConnectionRegistry
from bandsync.ops.api import Api
from bandsync.ops.metrics import Metrics
from bandsync.ops.process import is_gone
from bandsync.ops.recorder import Recorder
from bandsync.rooms.failure_detector import FailureDetector
from bandsync.rooms.hub import Hub
from bandsync.rules.server_context import ServerContext
from bandsync.server_state import ServerState
from bandsync.settings import Settings
from bandsync.startup import (
    ListenPlacement,
    StartError,
    open_placement,
    redis_connector,
    server_name,
    tls_context,
    url_of,
    wait_until_settled,
)
from bandsync.storage.health import HealthCheck
from bandsync.storage.manager import StorageManager
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.redis import Keys
from bandsync.storage.redis_connector import RedisConnector, read_timeouts
from bandsync.wire.messages import StorageStatus

_EXPIRY_PERIOD_S = 1.0


class Serving(Struct, frozen=True):
    """A server that accepts connections.

    Attributes:
        url: address to open in a browser.
        port: port that it listens on, also where `PORT` is 0.
        server_id: name of the server.
        stop: begins the drain; `serve` returns when the drain has ended.
        close_shared_port: stops accepting on the port that workers share and receiving handoffs.
    """

    url: str
    port: int
    server_id: str
    stop: Callable[[], None]
    close_shared_port: Callable[[], None]


class _Server(Struct, frozen=True):
    """The parts of a server, wired together.

    Attributes:
        settings: settings of this process.
        log: logger of this process.
        placement: sockets to listen on, and number in the worker group.
        port: port that it listens on, also where `PORT` is 0.
        server_id: name of the server.
        url: address to open in a browser.
        redis: factory of Redis connections; None if Redis is disabled.
        metrics: Prometheus registry.
        recorder: samples of the last ten minutes.
        manager: storage, in Redis or in memory.
        hub: rooms of the hosted sessions.
        connections: open WebSocket connections.
        state: the running server as operators see it.
        handoff: channel to the other workers; None without any, or with TLS.
        acceptor: listener loop.
        accepting: set when connections are about to be accepted.
        stopping: set when the drain begins.
    """

    settings: Settings
    log: FilteringBoundLogger
    placement: ListenPlacement
    port: int
    server_id: str
    url: str
    redis: RedisConnector | None
    metrics: Metrics
    recorder: Recorder
    manager: StorageManager
    hub: Hub
    connections: ConnectionRegistry
    state: ServerState
    handoff: HandoffPeers | None
    acceptor: Acceptor
    accepting: trio.Event
    stopping: trio.Event

    def storage_reason(self) -> str:
        """Why this storage is in use, or the Redis that is."""
        return self.manager.reason or str(self.redis)

    def broadcast_storage_status(self) -> None:
        """Send the storage mode to every connection."""
        manager = self.manager
        loss = manager.history.last_failover if manager.degraded else None
        self.connections.broadcast_storage_status(
            StorageStatus(
                manager.storage_type,
                manager.degraded,
                None if loss is None else loss.reason,
            )
        )

    def close_shared_port(self) -> None:
        """Stop accepting on the port that workers share, and receiving handoffs."""
        for listener in self.placement.shared:
            self.acceptor.leave(listener)
        if self.handoff is not None:
            self.handoff.leave()


async def serve(
    settings: Settings,
    log: FilteringBoundLogger,
    *,
    worker: int = 1,
    group: str | None = None,
    announce: Callable[[str], None] = print,
    signals: Collection[int] = (),
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `Serving.stop` is called, or for ever.

    Args:
        worker: number of this process among the `WORKERS` that share the port, from 1.
        group: random name that only these workers know; None without other workers.
        announce: receives two lines once the listener is open: address, storage in use and why.
        signals: any of these begins the drain, a second one stops at once.

    Raises:
        StartError: the settings cannot be used on this machine.
    """
    placement = await open_placement(settings, worker, group)
    refused: BaseExceptionGroup[StartError] | None = None
    try:
        with contextlib.ExitStack() as stack:
            for listener in placement.shared + placement.own:
                stack.callback(listener.close)
            await _serve(settings, log, placement, announce, signals, task_status)
    except* StartError as group_of_errors:
        refused = group_of_errors
    if refused is not None:
        raise first_leaf(refused)


async def _serve(
    settings: Settings,
    log: FilteringBoundLogger,
    placement: ListenPlacement,
    announce: Callable[[str], None],
    signals: Collection[int],
    task_status: trio.TaskStatus[Serving],
) -> None:
    async with trio.open_nursery() as nursery:
        server = _build(settings, log, placement, nursery)
        await _start(server, nursery, signals)
        announce(f"BandSync listening on {server.url}")
        announce(f"Storage: {server.manager.storage_type} ({server.storage_reason()})")
        log.info(
            "server.started",
            url=server.url,
            server_id=server.server_id,
            boot_id=server.state.boot_id,
        )
        task_status.started(
            Serving(
                server.url,
                server.port,
                server.server_id,
                stop=server.stopping.set,
                close_shared_port=server.close_shared_port,
            )
        )
        await server.stopping.wait()
        await _drain(server)
        nursery.cancel_scope.cancel()


def _build(
    settings: Settings,
    log: FilteringBoundLogger,
    placement: ListenPlacement,
    nursery: trio.Nursery,
) -> _Server:
    """Wire the parts of the server together; nothing runs yet.

    Args:
        nursery: rooms start their tasks in it.

    Raises:
        StartError: the settings cannot be used on this machine.
    """
    tls = tls_context(settings)
    port: int = placement.shared[0].getsockname()[1]
    url = url_of(settings, port)
    server_id = server_name(settings, port)
    boot_id = secrets.token_hex(8)
    clock = ServerClock(wall_ms=wall_ms(), monotonic_s=trio.current_time())
    counters = Counters()
    metrics = Metrics()
    recorder = Recorder(counters)
    redis = redis_connector(settings, server_id)
    accepting = trio.Event()
    stopping = trio.Event()
    manager = StorageManager(
        settings,
        redis,
        memory=MemoryStorage(boot_id, "memory of a server"),
        health=HealthCheck(
            timeouts=read_timeouts(settings),
            clock=clock,
            presence_key=Keys(settings.redis_key_prefix).server(server_id),
            presence=lambda: state.presence(),
            is_gone=lambda entry: is_gone(entry.machine, entry.pid),
            # Step the clock only while no client has seen a timestamp; afterwards slew it.
            serving=lambda: accepting.is_set() and bool(state.connections() or state.sessions()),
        ),
        server_id=server_id,
        boot_id=boot_id,
        now=lambda: clock.at(trio.current_time()),
        counters=counters,
        recovery_seconds=metrics.recovery_seconds.observe,
        log=log,
    )
    hub = Hub(
        nursery,
        stores=manager,
        clock=clock,
        server_context=ServerContext(server_id, boot_id, settings.max_members, settings.leadership),
        counters=counters,
        log=log,
        grace_s=settings.resume_grace_ms / 1000,
        tick_s=settings.tick_interval_ms / 1000,
        commit_seconds=_both(metrics.commit_seconds.observe, recorder.commits.add),
    )
    command_seconds = _both(metrics.command_seconds.observe, recorder.commands.add)
    connections = ConnectionRegistry(hub, settings, log, command_seconds)
    state = ServerState(hub, connections, manager, clock, stopping, url)
    metrics.identify(server_id, placement.worker)
    metrics.watch(counters, state)
    api = Api(state, manager, metrics, recorder, admin_token=settings.admin_token)
    handoff: HandoffPeers | None = None
    # A TLS connection has state in this process that cannot be handed off with its socket.
    if placement.group is not None and tls is None:
        handoff = HandoffPeers(
            placement.group, placement.worker, settings.workers, lambda: hub.rooms, log
        )
    acceptor = Acceptor(connections, api.answer, tls=tls, peers=handoff, log=log)
    return _Server(
        settings=settings,
        log=log,
        placement=placement,
        port=port,
        server_id=server_id,
        url=url,
        redis=redis,
        metrics=metrics,
        recorder=recorder,
        manager=manager,
        hub=hub,
        connections=connections,
        state=state,
        handoff=handoff,
        acceptor=acceptor,
        accepting=accepting,
        stopping=stopping,
    )


async def _start(server: _Server, nursery: trio.Nursery, signals: Collection[int]) -> None:
    """Start every task of the server; returns when it accepts connections.

    Raises:
        StartError: Redis is required and cannot be used, or another server has the same name.
    """
    hub = server.hub
    nursery.start_soon(server.manager.run, hub, server.broadcast_storage_status)
    await wait_until_settled(server.manager, server.settings, server.server_id)
    nursery.start_soon(hub.run_ticker)
    nursery.start_soon(hub.run_stats)
    nursery.start_soon(hub.run_graces)
    loop_lag_seconds = _both(server.metrics.loop_lag_seconds.observe, server.recorder.lag)
    nursery.start_soon(server.connections.run_pings, loop_lag_seconds)
    nursery.start_soon(server.recorder.run, server.state)
    nursery.start_soon(hub.anti_entropy.run)
    nursery.start_soon(FailureDetector(hub).run)
    nursery.start_soon(_run_expiry, server.manager.memory, hub, server.settings, server.log)
    if signals:
        nursery.start_soon(_run_signals, signals, server.stopping, nursery.cancel_scope)
    server.accepting.set()
    await nursery.start(server.acceptor.run, server.placement.shared, server.placement.own)


async def _drain(server: _Server) -> None:
    """Close all connections gracefully and migrate sessions, within `DRAIN_TIMEOUT_MS`."""
    timeout_s = server.settings.drain_timeout_ms / 1000
    server.log.info("server.draining", connections=len(server.connections.open))
    if server.handoff is not None:
        server.handoff.leave()
    with trio.move_on_after(timeout_s):
        await drain(server.connections, timeout_s)
        await server.manager.hand_over()
    server.log.info("server.stopped", connections=len(server.connections.open))


async def _run_expiry(
    storage: MemoryStorage, hub: Hub, settings: Settings, log: FilteringBoundLogger
) -> None:
    """Delete idle sessions from memory after `REDIS_TTL`, or over `MAX_IDLE_SESSIONS`; for ever."""
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
    """Begin the drain at the first signal, cancel everything at the second; for ever."""
    signalled = False
    with trio.open_signal_receiver(*signals) as received:
        async for _ in received:
            # Count signals, not drains: a worker's drain is also begun by its supervisor.
            if signalled:
                everything.cancel()
            signalled = True
            stopping.set()


def _both(
    first: Callable[[float], object], second: Callable[[float], object]
) -> Callable[[float], None]:
    """Return a callback that feeds both observers."""

    def observe(value: float) -> None:
        first(value)
        second(value)

    return observe


def wall_ms() -> float:
    """The wall clock of this machine, milliseconds since the epoch; read once, at the start."""
    return time.time_ns() / 1e6
