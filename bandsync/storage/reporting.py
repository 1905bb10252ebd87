"""The storage as operators see it: its state, its history and its log events."""

from collections.abc import Callable

from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.storage.base import RedisStatus, StorageType
from bandsync.storage.era import Loss
from bandsync.storage.history import Failover, History, Migration, Mode, Recovery


class StorageReport(Struct, frozen=True):
    """The storage at one instant, as ``/api/health`` and ``/api/storage/status`` show it.

    Attributes:
        mode: state of the `bandsync.storage.manager.StorageManager`.
        since: when the mode began; session clock, milliseconds.
        storage_type: where sessions are kept; memory until the last one is in Redis.
        awaited: whether Redis is enabled, and to be used sooner or later.
        degraded: whether sessions are in memory although Redis is enabled.
        reason: why sessions are in memory; None while they are in Redis.
        loss: why the latest attempt to use Redis ended; None if none has ended.
        gave_up: whether Redis is not tried again (REDIS_AUTO_RECOVER=false).
        redis_status: the link.
        listening: whether commits of other servers are received as they happen.
        round_trip_ms: of the last health check; None without a link.
        kept_in_memory: number of sessions that are not in Redis, or not yet.
        migration: progress of the migration to Redis; None if there is none.
        last_failover: the latest loss of a Redis in use; None if there was none.
        last_recovery: the latest recovery; None if there was none.
    """

    mode: Mode
    since: float
    storage_type: StorageType
    awaited: bool
    degraded: bool
    reason: str | None
    loss: Loss | None
    gave_up: bool
    redis_status: RedisStatus
    listening: bool
    round_trip_ms: float | None
    kept_in_memory: int
    migration: Migration | None
    last_failover: Failover | None
    last_recovery: Recovery | None


class StorageReporter:
    """Keeps the history of the storage, counts its losses and logs its transitions.

    Args:
        address: the address of Redis without secrets; None if Redis is disabled.
        auto_recover: whether Redis is tried again after a loss.
        now: the session clock.
        recovery_seconds: receives the duration of each migration.

    Attributes:
        history: the modes so far.
        attempts: connection attempts since Redis was last in use.
        loss: why the latest attempt to use Redis ended; None if none has ended.
        migration: progress of the current migration; None if there is none.
        stopped_trying: whether Redis is not tried again, for any cause.
    """

    def __init__(
        self,
        address: Callable[[], str | None],
        *,
        auto_recover: bool,
        now: Callable[[], float],
        counters: Counters,
        recovery_seconds: Callable[[float], None],
        log: FilteringBoundLogger,
    ) -> None:
        first_mode: Mode = "memory (disabled)" if address() is None else "memory"
        self.history = History(first_mode, now())
        self.attempts = 0
        self.loss: Loss | None = None
        self.migration: Migration | None = None
        self._address = address
        self._auto_recover = auto_recover
        self.stopped_trying = False
        self._now = now
        self._counters = counters
        self._recovery_seconds = recovery_seconds
        self._log = log

    @property
    def gave_up(self) -> bool:
        """Whether Redis is not tried again because of the settings."""
        return self.stopped_trying and not self._auto_recover

    def reason(self, storage_type: StorageType) -> str | None:
        """Why sessions are in memory; None while they are in Redis."""
        address = self._address()
        if address is None:
            return "REDIS_ENABLED=false"
        if storage_type == "redis":
            return None
        if self.history.mode == "migrating":
            return "sessions are on their way back to Redis"
        if self.loss is None:
            return f"not connected to {address} yet"
        if self.gave_up:
            return f"{self.loss}; REDIS_AUTO_RECOVER=false: restart to use Redis again"
        return str(self.loss)

    def migrating(self, sessions: int) -> Migration:
        """The migration of so many sessions begins."""
        self.migration = Migration(sessions)
        self._log.info("storage.migrating", sessions=sessions)
        return self.migration

    def era_began(self) -> None:
        """New sessions are opened in Redis; those in memory are about to migrate."""
        self.attempts = 0
        self.history.enter("migrating", self._now())

    def recovered(self, *, migrated: int, migration_s: float, outage_s: float | None) -> None:
        """All sessions are in Redis.

        Args:
            migrated: number of sessions that migrated.
            migration_s: duration of the migration.
            outage_s: duration of the outage; None at the first connect.
        """
        self.history.recover(
            Recovery(
                at=self._now(),
                outage_ms=None if outage_s is None else outage_s * 1000,
                migration_ms=migration_s * 1000,
                sessions=migrated,
            )
        )
        self.migration = None
        self._recovery_seconds(migration_s)
        self._log.info(
            "storage.recovered" if outage_s is not None else "storage.connected",
            address=self._address(),
            sessions=migrated,
            outage_s=None if outage_s is None else round(outage_s, 3),
            migration_s=round(migration_s, 3),
        )

    def unreachable(self, loss: Loss) -> None:
        """An attempt failed before Redis was used. Logged when the reason is another one."""
        if self.loss is None or self.loss.reason != loss.reason or self.attempts == 1:
            self._log.warning(
                "storage.unreachable",
                address=self._address(),
                reason=loss.reason,
                detail=loss.detail,
                attempts=self.attempts,
            )
        self.loss = loss

    def failed_over(self, loss: Loss, lasted_s: float | None) -> None:
        """Redis was in use and is lost; sessions are in memory.

        Args:
            lasted_s: time since the last recovery; None if there was none.
        """
        self.loss = loss
        self.migration = None
        self._counters.failovers[loss.reason] += 1
        self.history.fail_over(Failover(self._now(), loss.reason, loss.detail))
        self._log.warning(
            "storage.failover",
            address=self._address(),
            reason=loss.reason,
            detail=loss.detail,
            lasted_s=None if lasted_s is None else round(lasted_s, 3),
        )
