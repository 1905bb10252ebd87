"""The recovery policy: when to try Redis again, and when it counts as stable.

Pure: it reads no clock. Times are seconds on one monotonic clock, given as arguments.
"""

from bandsync.redis_link.backoff import Backoff
from bandsync.settings import Settings

# Redis is used again after so many health checks in a row, each with a write.
STABLE_CHECKS = 3
# Flapping: a loss so soon after a recovery doubles the required stability, up to MAX_STABLE_S.
FLAPPING_S = 60.0
MAX_STABLE_S = 30.0
MAX_RETRY_DELAY_S = 5.0

_MAX_DOUBLINGS = 16


class RecoveryPolicy:
    """Counts attempts and losses, and decides what follows from them."""

    __slots__ = (
        "_backoff",
        "_failures",
        "_flaps",
        "_last_attempt_used",
        "_lost_at",
        "_recovered_at",
        "_settings",
    )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._backoff = Backoff(MAX_RETRY_DELAY_S, settings.redis_retry_delay_on_failure / 1000)
        # Attempts in a row that did not get as far as using Redis.
        self._failures = 0
        # Whether the last attempt did.
        self._last_attempt_used = False
        # Losses in a row that count as flapping.
        self._flaps = 0
        # When the current or the last outage began; None if Redis was never lost.
        self._lost_at: float | None = None
        # When the last recovery was complete; None if there was none.
        self._recovered_at: float | None = None

    def attempt_ended(self, *, used: bool) -> None:
        """Count an attempt.

        Args:
            used: whether Redis was in use before it was lost, perhaps only for a migration.
        """
        self._last_attempt_used = used
        self._failures = 0 if used else self._failures + 1

    @property
    def may_start_without(self) -> bool:
        """Whether the failures so far suffice to start the server without Redis."""
        retries = self._settings.redis_max_retries if self._settings.redis_required else 0
        return self._failures > retries

    @property
    def gives_up(self) -> bool:
        """Whether the last attempt was the last one."""
        return not self._settings.redis_auto_recover and (
            self._last_attempt_used or self._exhausted
        )

    @property
    def delay_s(self) -> float:
        """Time until the next attempt: jittered exponential backoff, then the longest delay."""
        return MAX_RETRY_DELAY_S if self._exhausted else self._backoff.compute(self._failures)

    def required_checks(self, *, sessions_in_memory: bool) -> int:
        """Number of health checks in a row, each with a write, before Redis is used.

        One suffices at the start, while no session depends on it.
        """
        if self._lost_at is None and not sessions_in_memory:
            return 1
        checks = STABLE_CHECKS << min(self._flaps, _MAX_DOUBLINGS)
        most = round(MAX_STABLE_S / (self._settings.redis_health_interval_ms / 1000))
        return max(STABLE_CHECKS, min(checks, most))

    def recovered(self, now_s: float) -> float | None:
        """All sessions are in Redis.

        Returns:
            Duration of the outage, seconds; None at the first connect.
        """
        self._recovered_at = now_s
        return None if self._lost_at is None else now_s - self._lost_at

    def lost(self, now_s: float, *, migrating: bool) -> float | None:
        """Redis was in use and is lost.

        Args:
            migrating: whether sessions were still migrating to it; then the outage goes on.

        Returns:
            Time since the last recovery, seconds; None if there was none.
        """
        lasted_s = None if self._recovered_at is None else now_s - self._recovered_at
        flapping = migrating or (lasted_s is not None and lasted_s < FLAPPING_S)
        # The first loss of a server is no flapping: nothing was lost before.
        self._flaps = self._flaps + 1 if flapping and self._lost_at is not None else 0
        if self._lost_at is None or not migrating:
            self._lost_at = now_s
        return lasted_s

    @property
    def _exhausted(self) -> bool:
        return self._failures > self._settings.redis_max_retries
