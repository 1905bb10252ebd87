"""The history of the storage mode: failovers and recoveries, for operators."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

Mode = Literal["redis", "memory", "migrating", "memory (disabled)"]

# Number of mode changes that are kept.
HISTORY = 100


class Failover(Struct, frozen=True, rename="camel"):
    """One loss of Redis.

    Attributes:
        at: session clock, milliseconds.
        reason: one of `bandsync.redis_link.errors.LossReason`, ``name_taken`` or ``closed``.
        detail: the error.
    """

    at: float
    reason: str
    detail: str


class Recovery(Struct, frozen=True, rename="camel"):
    """One recovery of Redis.

    Attributes:
        at: session clock, milliseconds.
        outage_ms: time since the loss; None at the first connect.
        migration_ms: duration of the migration to Redis.
        sessions: number of migrated sessions.
    """

    at: float
    outage_ms: float | None
    migration_ms: float
    sessions: int


class Migration(Struct, rename="camel"):
    """Progress of the current migration to Redis, in sessions."""

    total: int
    moved: int = 0


class ModeChange(Struct, frozen=True, rename="camel"):
    """The beginning of a period in one mode, which lasts until the next change.

    Attributes:
        at: session clock, milliseconds.
        failover: the loss that began the period; None if it was no loss.
        recovery: the recovery that began the period; None if it was no recovery.
    """

    at: float
    mode: Mode
    failover: Failover | None = None
    recovery: Recovery | None = None


class History:
    """The last `HISTORY` changes of the storage mode.

    Args:
        at: when the first mode began; session clock, milliseconds.

    Attributes:
        last_failover: the latest loss, even if `changes` has dropped it; None if there was none.
        last_recovery: the latest recovery, likewise.
    """

    __slots__ = ("_changes", "last_failover", "last_recovery")

    def __init__(self, mode: Mode, at: float) -> None:
        self._changes: deque[ModeChange] = deque([ModeChange(at, mode)], maxlen=HISTORY)
        self.last_failover: Failover | None = None
        self.last_recovery: Recovery | None = None

    @property
    def changes(self) -> Sequence[ModeChange]:
        """The changes that are kept, oldest first. The last one began the current period."""
        return tuple(self._changes)

    @property
    def mode(self) -> Mode:
        """The current mode."""
        return self._changes[-1].mode

    @property
    def since(self) -> float:
        """When the current mode began; session clock, milliseconds."""
        return self._changes[-1].at

    def enter(self, mode: Mode, at: float) -> None:
        """Begin a period."""
        self._changes.append(ModeChange(at, mode))

    def fail_over(self, failover: Failover) -> None:
        """Begin a period in memory after a loss."""
        self.last_failover = failover
        self._changes.append(ModeChange(failover.at, "memory", failover=failover))

    def recover(self, recovery: Recovery) -> None:
        """Begin a period on Redis after a recovery."""
        self.last_recovery = recovery
        self._changes.append(ModeChange(recovery.at, "redis", recovery=recovery))
