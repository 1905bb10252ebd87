"""One second of the server in numbers, computed from two successive readings."""

from typing import Any, overload

from msgspec import Struct, msgpack
from msgspec.structs import astuple, fields

from bandsync.storage.history import Mode


class Latency(Struct, frozen=True, rename="camel"):
    """Latency of an operation within one second, milliseconds; ``count`` operations."""

    count: int
    mean_ms: float
    max_ms: float


class Durations:
    """Count, sum and maximum of durations; cheap enough for the command path."""

    __slots__ = ("_count", "_longest_s", "_total_s")

    def __init__(self) -> None:
        self._count = 0
        self._total_s = 0.0
        self._longest_s = 0.0

    def add(self, seconds: float) -> None:
        """Add one duration."""
        self._count += 1
        self._total_s += seconds
        if seconds > self._longest_s:
            self._longest_s = seconds

    def take(self) -> Latency | None:
        """Return the latency since the last call and reset; None without durations."""
        if not self._count:
            return None
        latency = Latency(
            self._count,
            _rounded(self._total_s / self._count * 1000),
            _rounded(self._longest_s * 1000),
        )
        self._count = 0
        self._total_s = self._longest_s = 0.0
        return latency


class Totals(Struct, frozen=True):
    """Reading of the counters, which only grow.

    Attributes:
        at_s: instant of the reading, monotonic seconds.
        deliveries: frames handed to connections.
        received: messages from clients.
        dropped: volatile frames dropped for slow consumers.
        slow_consumers: connections closed because their client was slow.
        internal_errors: commands that failed because of a bug.
        cpu_s: CPU time of the process, seconds.
    """

    at_s: float
    deliveries: int
    received: int
    dropped: int
    slow_consumers: int
    internal_errors: int
    cpu_s: float


class State(Struct, frozen=True):
    """Reading of the gauges, which rise and fall; the attributes are those of `Sample`."""

    at: float
    connections: int
    members: int
    rooms: int
    sessions: int
    spread: int
    mode: Mode
    degraded: bool
    listening: bool
    link_queue: int
    round_trip_ms: float | None
    clock_error_ms: float | None
    clock_uncertainty_ms: float | None
    memory_bytes: int | None


class Sample(Struct, frozen=True, rename="camel"):
    """One second, as ``/api/ops`` shows it; null for values that were not measured.

    Attributes:
        at: end of the second, session clock, milliseconds.
        lasted_ms: actual length; more than a second when the event loop was blocked.
        connections: open WebSocket connections.
        members: members connected to this server.
        rooms: sessions with a room on this server.
        sessions: sessions in this server's memory, hosted or kept.
        spread: sessions with a room here and members on other servers. Changes on other servers
            during an outage of Redis count only after the recovery.
        mode: mode of the storage.
        degraded: whether sessions are in memory although Redis is configured.
        listening: whether changes of other servers are received as they happen.
        deliveries_per_s: frames of session events, ticks and statistics handed to connections.
        received_per_s: messages from clients.
        dropped_per_s: volatile frames dropped because their client was slow.
        slow_consumers: connections closed with 1013 because their client was slow.
        internal_errors: commands that failed because of a bug.
        command: latency from a message's bytes to its answer.
        commit: latency of the storage.
        loop_lag_ms: worst delay of a timer.
        link_queue: commands that wait for Redis.
        round_trip_ms: round trip of the latest health check of Redis.
        clock_error_ms: Redis's clock minus the session clock.
        clock_uncertainty_ms: bound on the error of that difference.
        memory_bytes: resident memory of the process.
        cpu: CPU use in processors: 0.5 is half of one.
    """

    at: float
    lasted_ms: float
    connections: int
    members: int
    rooms: int
    sessions: int
    spread: int
    mode: Mode
    degraded: bool
    listening: bool
    deliveries_per_s: float
    received_per_s: float
    dropped_per_s: float
    slow_consumers: int
    internal_errors: int
    command: Latency | None
    commit: Latency | None
    loop_lag_ms: float
    link_queue: int
    round_trip_ms: float | None
    clock_error_ms: float | None
    clock_uncertainty_ms: float | None
    memory_bytes: int | None
    cpu: float


# The values of a sample without their names, which all samples share.
_ROW: Any = tuple.__class_getitem__(tuple(each.type for each in fields(Sample)))
_rows: msgpack.Decoder[tuple[Any, ...]] = msgpack.Decoder(_ROW)


def packed(each: Sample) -> bytes:
    """Encode a sample for `unpacked`, in a third of the memory of the object."""
    return msgpack.encode(astuple(each))


def unpacked(data: bytes) -> Sample:
    """Decode a sample of `packed`."""
    return Sample(*_rows.decode(data))


def sample(
    before: Totals,
    after: Totals,
    state: State,
    *,
    command: Latency | None,
    commit: Latency | None,
    loop_lag_s: float,
) -> Sample:
    """The sample of the time between two readings.

    Args:
        before: counters at the first reading.
        after: counters at the second reading.
        state: gauges at the second reading.
        command: latency of commands in between.
        commit: latency of commits in between.
        loop_lag_s: worst delay of a timer in between, seconds.
    """
    lasted_s = after.at_s - before.at_s
    assert lasted_s > 0

    def per_second(grown: float) -> float:
        return _rounded(grown / lasted_s)

    return Sample(
        at=state.at,
        lasted_ms=_rounded(lasted_s * 1000),
        connections=state.connections,
        members=state.members,
        rooms=state.rooms,
        sessions=state.sessions,
        spread=state.spread,
        mode=state.mode,
        degraded=state.degraded,
        listening=state.listening,
        deliveries_per_s=per_second(after.deliveries - before.deliveries),
        received_per_s=per_second(after.received - before.received),
        dropped_per_s=per_second(after.dropped - before.dropped),
        slow_consumers=after.slow_consumers - before.slow_consumers,
        internal_errors=after.internal_errors - before.internal_errors,
        command=command,
        commit=commit,
        loop_lag_ms=_rounded(loop_lag_s * 1000),
        link_queue=state.link_queue,
        round_trip_ms=_rounded(state.round_trip_ms),
        clock_error_ms=_rounded(state.clock_error_ms),
        clock_uncertainty_ms=_rounded(state.clock_uncertainty_ms),
        memory_bytes=state.memory_bytes,
        cpu=per_second(after.cpu_s - before.cpu_s),
    )


@overload
def _rounded(value: float) -> float: ...
@overload
def _rounded(value: None) -> None: ...
@overload
def _rounded(value: float | None) -> float | None: ...
def _rounded(value: float | None) -> float | None:
    """Round to a thousandth, to keep the document of ten minutes small."""
    return None if value is None else round(value, 3)
