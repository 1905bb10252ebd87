"""What operators are told of failovers and recoveries."""

from typing import Literal

from msgspec import Struct

Mode = Literal["redis", "memory", "migrating", "memory (disabled)"]


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
