"""One second of the server's life in numbers: what two readings, one after the other, tell."""

from typing import Any, overload

from msgspec import Struct, msgpack
from msgspec.structs import astuple, fields

from bandsync.storage.history import Mode


class Latency(Struct, frozen=True, rename="camel"):
    """How long something took in one second, milliseconds; ``count`` is how often it happened."""

    count: int
    mean_ms: float
    max_ms: float


class Durations:
    """Sums up durations between two looks, for who must not pay for being measured."""

    __slots__ = ("_count", "_longest_s", "_total_s")

    def __init__(self) -> None:
        self._count = 0
        self._total_s = 0.0
        self._longest_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._count += 1
        self._total_s += seconds
        if seconds > self._longest_s:
            self._longest_s = seconds

    def take(self) -> Latency | None:
        """What came since the last look, None if nothing did; begins anew."""
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
    """What only ever grows, at one moment.

    Attributes:
        at_s: the moment, monotonic seconds.
        slow_consumers: connections that were closed because their client was slow.
        cpu_s: time that the process had a processor, seconds.
    """

    at_s: float
    deliveries: int
    received: int
    dropped: int
    slow_consumers: int
    internal_errors: int
    cpu_s: float


class State(Struct, frozen=True):
    """What comes and goes, at one moment; the attributes are those of `Sample`."""

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
    """One second, as ``/api/ops`` shows it; null is what was not measured.

    Attributes:
        at: its end, on the session clock, milliseconds.
        lasted_ms: more than a second when the server itself stood still.
        connections: open WebSocket connections.
        members: those that are connected to this server.
        rooms: sessions with a room on this server.
        sessions: all that it hosts or keeps.
        spread: sessions with a room here that have members on other servers too, as far as this
            one knows: what comes about while Redis is away, it learns afterwards.
        mode: where sessions are kept, and `degraded` whether that is not what was asked for.
        listening: whether changes of other servers are heard as they happen.
        deliveries_per_s: frames of session events, ticks and statistics handed to connections.
        received_per_s: messages that came from clients.
        dropped_per_s: volatile frames that were dropped because their client was slow.
        slow_consumers: connections closed with 1013 because their client was slow.
        internal_errors: commands that the server failed at.
        command: from a message's bytes to its answer.
        commit: what the storage took to keep a change.
        loop_lag_ms: how late timers fired at worst.
        link_queue: commands that wait for Redis.
        round_trip_ms: of the last health check of Redis.
        clock_error_ms: Redis's clock minus the session clock.
        clock_uncertainty_ms: by how much that may be wrong.
        memory_bytes: resident memory of the process.
        cpu: processors that it kept busy: 0.5 is half of one.
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


# The values of a sample without their names, which are the same in all of them.
_ROW: Any = tuple.__class_getitem__(tuple(each.type for each in fields(Sample)))
_rows: msgpack.Decoder[tuple[Any, ...]] = msgpack.Decoder(_ROW)


def packed(each: Sample) -> bytes:
    """``each`` in a third of the memory that it takes as an object, for `unpacked`."""
    return msgpack.encode(astuple(each))


def unpacked(data: bytes) -> Sample:
    """The sample that was `packed`."""
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
    """What happened between two readings.

    Args:
        state: at the second one.
        loop_lag_s: the worst in between, seconds.
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
    """To a thousandth: ten minutes of samples are sent at once."""
    return None if value is None else round(value, 3)
