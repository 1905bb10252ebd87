"""An era: one stretch of use of Redis."""

from collections.abc import Callable

from msgspec import Struct

from bandsync.storage.base import Storage
from bandsync.storage.relay import Relay


class Loss(Struct, frozen=True):
    """Why Redis cannot be used any more.

    Attributes:
        reason: one of `bandsync.redis_link.errors.LossReason`.
        detail: what was seen, for operators.
    """

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Era:
    """One stretch of use of Redis, from the decision to migrate to its loss.

    Args:
        cancel: ends all waiting on Redis.

    Attributes:
        relay: hears what others commit; None where there are no others.
        loss: why it ended; None while it lasts.
    """

    __slots__ = ("_cancel", "loss", "relay", "storage")

    def __init__(
        self, storage: Storage, cancel: Callable[[], None], relay: Relay | None = None
    ) -> None:
        self.storage = storage
        self.relay = relay
        self.loss: Loss | None = None
        self._cancel = cancel

    @property
    def over(self) -> bool:
        """Whether it has ended: from then on, at once and everywhere, sessions are in memory."""
        return self.loss is not None

    def end(self, loss: Loss) -> None:
        """End it; only the first loss counts."""
        if self.loss is None:
            self.loss = loss
            self._cancel()
