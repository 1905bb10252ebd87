"""Prometheus metrics: numbers for alerts, and numbers that explain them."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from bandsync import __version__
from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.storage.manager import StorageManager

_COMMAND_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
_COMMIT_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
_RECOVERY_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Gauges(Protocol):
    """Values that are read at the moment of a scrape."""

    def connections(self) -> int:
        """Open WebSocket connections."""

    def rooms(self) -> int:
        """Sessions with a room on this server."""

    def members(self) -> int:
        """Members connected to this server."""

    def tasks(self) -> int:
        """Trio tasks that have not ended."""

    @property
    def storage(self) -> StorageManager:
        """The storage of sessions."""

    @property
    def clock(self) -> ServerClock:
        """The session clock."""


class Metrics:
    """The metrics of one server; each has a registry, for several servers in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.command_seconds = Histogram(
            "bandsync_command_seconds",
            "Time from a message's bytes to its answer.",
            buckets=_COMMAND_BUCKETS_S,
            registry=self.registry,
        )
        self.loop_lag_seconds = Histogram(
            "bandsync_loop_lag_seconds",
            "Delay of the server's timers; every message is delayed at least as much.",
            buckets=_LAG_BUCKETS_S,
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "bandsync_commit_seconds",
            "Time that the storage takes to commit a change.",
            buckets=_COMMIT_BUCKETS_S,
            registry=self.registry,
        )
        self.recovery_seconds = Histogram(
            "bandsync_storage_recovery_seconds",
            "Time from the start of the migration to Redis until the last session has moved.",
            buckets=_RECOVERY_BUCKETS_S,
            registry=self.registry,
        )
        ProcessCollector(namespace="bandsync", registry=self.registry)

    def identify(self, server_id: str, worker: int) -> None:
        """Add the server's name to the metrics: on a shared port any worker may answer."""
        info = Info(
            "bandsync",
            "Name, version and worker number of the server that answers.",
            registry=self.registry,
        )
        info.info({"server_id": server_id, "version": __version__, "worker": str(worker)})

    def watch(self, counters: Counters, gauges: Gauges) -> None:
        """Export ``counters`` and ``gauges`` from now on."""
        self.registry.register(_ServerCollector(counters, gauges))

    def exposition(self) -> tuple[bytes, str]:
        """The metrics in the text format of Prometheus, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _ServerCollector:
    """Converts the server's plain numbers into metrics at a scrape."""

    def __init__(self, counters: Counters, gauges: Gauges) -> None:
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        counters = self._counters
        gauges = self._gauges
        yield _gauge(
            "bandsync_connections", "Open WebSocket connections.", float(gauges.connections())
        )
        yield _gauge(
            "bandsync_rooms", "Sessions with a member on this server.", float(gauges.rooms())
        )
        yield _gauge(
            "bandsync_members", "Members connected to this server.", float(gauges.members())
        )
        yield _gauge("bandsync_tasks", "Trio tasks that have not ended.", float(gauges.tasks()))
        storage = GaugeMetricFamily(
            "bandsync_storage_mode", "1 for the storage in use.", labels=["mode"]
        )
        mode = gauges.storage.mode.partition(" ")[0]
        for name in ("redis", "memory", "migrating"):
            storage.add_metric([name], float(name == mode))
        yield storage
        yield from self._storage()
        yield _counter(
            "bandsync_accepted",
            "TCP connections accepted, or received from another worker by handoff.",
            counters.accepted,
        )
        yield _counter(
            "bandsync_passed_on",
            "Connections handed off to the worker that hosts their session.",
            counters.passed_on,
        )
        yield _counter("bandsync_received", "Messages received from clients.", counters.received)
        yield _counter(
            "bandsync_deliveries",
            "Session events, ticks and statistics handed to a connection.",
            counters.deliveries,
        )
        yield _counter(
            "bandsync_dropped_frames",
            "Ticks and statistics dropped because their client was slow.",
            counters.dropped,
        )
        yield _counter(
            "bandsync_slow_consumers",
            "Connections closed with 1013 because their client was slow.",
            counters.slow_consumers,
        )
        yield _labelled("bandsync_joins", "Members that joined or resumed.", "how", counters.joins)
        yield _labelled(
            "bandsync_errors", "Errors sent to clients, by code.", "code", counters.errors
        )
        yield _labelled(
            "bandsync_closed",
            "WebSocket connections closed by the server, by close code.",
            "code",
            counters.closed,
        )
        yield _labelled(
            "bandsync_handshakes_refused",
            "Connections refused before the WebSocket was open, by HTTP status or reason.",
            "reason",
            counters.handshakes_refused,
        )

    def _storage(self) -> Iterable[Metric]:
        counters = self._counters
        storage = self._gauges.storage.report()
        clock = self._gauges.clock
        status = storage.redis_status
        yield _gauge(
            "bandsync_storage_degraded",
            "1 while sessions are in memory although Redis is configured.",
            float(storage.degraded),
        )
        yield _gauge(
            "bandsync_sessions_in_memory",
            "Sessions that are not in Redis, or not yet.",
            float(storage.kept_in_memory),
        )
        yield _gauge(
            "bandsync_redis_connected", "1 while the link is open.", float(status.connected)
        )
        yield _gauge(
            "bandsync_link_queue", "Commands that wait for Redis.", float(status.outstanding)
        )
        if storage.round_trip_ms is not None:
            yield _gauge(
                "bandsync_link_round_trip_seconds",
                "Round trip of the last health check.",
                storage.round_trip_ms / 1000,
            )
        yield _gauge(
            "bandsync_clock_offset_seconds",
            "The session clock minus this machine's wall clock.",
            clock.offset_ms / 1000,
        )
        if clock.uncertainty_ms is not None:
            yield _gauge(
                "bandsync_clock_uncertainty_seconds",
                "Bound on the error of bandsync_clock_error_seconds.",
                clock.uncertainty_ms / 1000,
            )
        if clock.error_ms is not None:
            yield _gauge(
                "bandsync_clock_error_seconds",
                "Redis's clock minus the session clock.",
                clock.error_ms / 1000,
            )
        yield _labelled(
            "bandsync_storage_failovers",
            "Losses of Redis while in use, by reason.",
            "reason",
            counters.failovers,
        )
        yield _gauge(
            "bandsync_relay_listening",
            "1 while changes of other servers are received as they happen.",
            float(storage.listening),
        )
        yield _counter(
            "bandsync_relay_losses",
            "Subscriptions lost while Redis was in use.",
            counters.relay_losses,
        )
        yield _counter(
            "bandsync_relayed", "Changes of other servers sent to members here.", counters.relayed
        )
        yield _counter(
            "bandsync_conflicts", "Commits refused by compare-and-set.", counters.conflicts
        )
        yield _counter(
            "bandsync_reconciled", "Merges that were written back to Redis.", counters.reconciled
        )
        yield _counter(
            "bandsync_unreadable_sessions",
            "Stored sessions that could not be decoded; their rooms stay in memory.",
            counters.unreadable,
        )


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)


def _counter(name: str, meaning: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(name, meaning, value=value)


def _labelled(
    name: str, meaning: str, label: str, values: Mapping[str, int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, meaning, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family
