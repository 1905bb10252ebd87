"""What operators are told of failovers and recoveries."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

Mode = Literal["redis", "memory", "migrating", "memory (disabled)"]

# How many changes of mode are remembered.
HISTORY = 100


class Failover(Struct, frozen=True, rename="camel"):
    """How Redis was lost; ``at`` on the session clock, milliseconds."""

    at: float
    reason: str
    detail: str


class Recovery(Struct, frozen=True, rename="camel"):
    """How it came back.

    Attributes:
        at: on the session clock, milliseconds.
        outage_ms: since the loss; None if Redis was never lost, just absent.
        migration_ms: how long the move to Redis took.
        sessions: how many moved.
    """

    at: float
    outage_ms: float | None
    migration_ms: float
    sessions: int


class Migration(Struct, rename="camel"):
    """The move to Redis that is under way."""

    total: int
    moved: int = 0


class ModeChange(Struct, frozen=True, rename="camel"):
    """The beginning of a stretch in one mode, which lasts until the next change.

    Attributes:
        at: on the session clock, milliseconds.
        failover: how Redis was lost, if that is what began the stretch.
        recovery: how it came back, if that is what began it.
    """

    at: float
    mode: Mode
    failover: Failover | None = None
    recovery: Recovery | None = None


class History:
    """The modes that storage was in, the last `HISTORY` changes of them.

    Args:
        at: when the first mode began, session clock, milliseconds.

    Attributes:
        last_failover: also when its change is no longer among `changes`; None if there was none.
        last_recovery: likewise.
    """

    __slots__ = ("_changes", "last_failover", "last_recovery")

    def __init__(self, mode: Mode, at: float) -> None:
        self._changes: deque[ModeChange] = deque([ModeChange(at, mode)], maxlen=HISTORY)
        self.last_failover: Failover | None = None
        self.last_recovery: Recovery | None = None

    @property
    def changes(self) -> Sequence[ModeChange]:
        """What is remembered, the oldest first; the last began the stretch that lasts."""
        return tuple(self._changes)

    @property
    def mode(self) -> Mode:
        """What storage is in now."""
        return self._changes[-1].mode

    @property
    def since(self) -> float:
        """When that began."""
        return self._changes[-1].at

    def enter(self, mode: Mode, at: float) -> None:
        """Begin a stretch."""
        self._changes.append(ModeChange(at, mode))

    def fail_over(self, failover: Failover) -> None:
        """Begin a stretch in memory, because Redis was lost."""
        self.last_failover = failover
        self._changes.append(ModeChange(failover.at, "memory", failover=failover))

    def recover(self, recovery: Recovery) -> None:
        """Begin a stretch on Redis, because it can be used again."""
        self.last_recovery = recovery
        self._changes.append(ModeChange(recovery.at, "redis", recovery=recovery))
