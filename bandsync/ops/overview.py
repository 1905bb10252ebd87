"""The document of `GET /api/ops`: verdict, storage history, samples of ten minutes."""

import math
import re
from typing import Literal
from urllib.parse import parse_qs

from msgspec import Struct

from bandsync.ops.loss_reasons import in_words
from bandsync.ops.samples import Sample
from bandsync.ops.verdict import Verdict
from bandsync.storage.base import RedisStatus
from bandsync.storage.history import Failover, Migration, Mode, ModeChange, Recovery

# Python's float() accepts more: 1_0, spaces, and the digits of every script.
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class BadQueryError(Exception):
    """The query is malformed; the message has an example of a correct one."""


class StorageOverview(Struct, frozen=True, rename="camel"):
    """``/api/storage/status``; events that never happened are null.

    Attributes:
        mode: mode of the storage.
        storage_type: storage in use, ``redis`` or ``memory``.
        since: start of ``mode``, session clock, milliseconds.
        degraded: whether sessions are in memory although Redis is configured.
        reason: why memory is in use; null with Redis.
        total_sessions: sessions in this server's memory, hosted or kept.
        kept_in_memory: sessions that are not in Redis, or not yet.
        redis_status: state of the connection to Redis.
        last_failover: latest loss of Redis.
        last_recovery: latest return to Redis.
        migration: move of sessions to Redis that is in progress.
        clock_offset_ms: session clock minus this machine's wall clock.
        clock_error_ms: best estimate of Redis's clock minus the session clock.
        clock_uncertainty_ms: bound on the error of that estimate.
        link_round_trip_ms: round trip of the latest health check.
        listening: whether changes of other servers are received as they happen.
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


class TimelineEvent(Struct, frozen=True, rename="camel"):
    """A change of the storage mode; attributes of other kinds are null.

    Attributes:
        at: session clock, milliseconds.
        kind: ``start`` of the server, ``failover`` from Redis to memory, ``migration`` (Redis is
            usable again, sessions move to it), ``recovery`` (the last session has moved).
        mode: mode of the storage from then on.
        reason: loss reason of a failover, as in ``/api/storage/status``.
        in_words: loss reason in words, as the second half of a sentence about Redis.
        detail: error of a failover.
        outage_ms: duration of the outage before a recovery; null at the first use of Redis.
        migration_ms: duration of the move to Redis.
        sessions: number of sessions that moved.
    """

    at: float
    kind: Literal["start", "failover", "migration", "recovery"]
    mode: Mode
    reason: str | None = None
    in_words: str | None = None
    detail: str | None = None
    outage_ms: float | None = None
    migration_ms: float | None = None
    sessions: int | None = None


class Overview(Struct, frozen=True, rename="camel"):
    """``/api/ops``.

    Attributes:
        server_id: name of the server.
        boot_id: id of the process; samples of another one are not continued.
        version: version of BandSync.
        now: session clock, milliseconds.
        uptime_ms: time since the start of the server.
        draining: whether the server is shutting down.
        max_connections: limit of connections.
        verdict: state of the server in one sentence.
        storage: ``/api/storage/status``.
        period_ms: time from one sample to the next.
        kept_ms: time that samples are kept.
        events: remembered changes of the storage mode, the oldest first.
        samples: samples, the oldest first.
    """

    server_id: str
    boot_id: str
    version: str
    now: float
    uptime_ms: float
    draining: bool
    max_connections: int
    verdict: Verdict
    storage: StorageOverview
    events: list[TimelineEvent]
    period_ms: float
    kept_ms: float
    samples: list[Sample]


def event(change: ModeChange) -> TimelineEvent:
    """The timeline entry of a mode change."""
    if change.failover is not None:
        reason = change.failover.reason
        return TimelineEvent(
            change.at, "failover", change.mode, reason, in_words(reason), change.failover.detail
        )
    if change.recovery is not None:
        recovery = change.recovery
        return TimelineEvent(
            change.at,
            "recovery",
            change.mode,
            outage_ms=recovery.outage_ms,
            migration_ms=recovery.migration_ms,
            sessions=recovery.sessions,
        )
    return TimelineEvent(
        change.at, "migration" if change.mode == "migrating" else "start", change.mode
    )


def since_of(query: str) -> float | None:
    """Parse the ``since`` of a query; None if it is missing.

    Raises:
        BadQueryError: ``since`` is not a number, or is given twice.
    """
    values = parse_qs(query, keep_blank_values=True).get("since", [])
    if not values:
        return None
    at = float(values[0]) if _NUMBER.fullmatch(values[0]) else math.nan
    if len(values) > 1 or not math.isfinite(at):
        raise BadQueryError(
            "`since` is one instant on the session clock, in milliseconds, "
            "such as the `at` of the last sample of an earlier answer."
        )
    return at
