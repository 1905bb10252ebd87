"""What `GET /api/ops` tells: the verdict, the storage's history, and the last ten minutes."""

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

# Python's float() reads more than that: 1_0, spaces, and the digits of every script.
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class BadQueryError(Exception):
    """The query is none; the message says what one looks like."""


class StorageOverview(Struct, frozen=True, rename="camel"):
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


class TimelineEvent(Struct, frozen=True, rename="camel"):
    """A change of the storage's mode; what does not belong to its kind is null.

    Attributes:
        at: session clock, milliseconds.
        kind: ``start`` of the server, ``failover`` from Redis to memory, ``migration`` (Redis can
            be used again, sessions are on their way), ``recovery`` (the last one is there).
        mode: in which storage is from then on.
        reason: of a failover, as in ``/api/storage/status``.
        in_words: the same for people, as the second half of a sentence about Redis.
        detail: what was seen.
        outage_ms: of a recovery: since Redis was lost; null if it was only not there yet.
        migration_ms: of a recovery: how long the move took.
        sessions: of a recovery: how many moved.
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
        boot_id: names the process: another one has another past.
        now: session clock, milliseconds.
        max_connections: how many are taken.
        period_ms: from one sample to the next.
        kept_ms: how far samples go back.
        events: the changes of the storage's mode that are remembered, the oldest first.
        samples: the oldest first.
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
    """A change of mode as operators see it."""
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
    """The ``since`` of a query; None if there is none.

    Raises:
        BadQueryError: it is no number, or there are several.
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
