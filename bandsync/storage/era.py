"""An era: one uninterrupted period of using Redis."""

from collections.abc import Callable, Sequence

from msgspec import Struct
from redis.exceptions import RedisError

from bandsync.redis_link.errors import loss_reason
from bandsync.storage.base import Storage
from bandsync.storage.health import NameTakenError
from bandsync.storage.relay import Relay


class Loss(Struct, frozen=True):
    """Why Redis cannot be used any more.

    Attributes:
        reason: one of `bandsync.redis_link.errors.LossReason`, ``name_taken`` or ``closed``.
        detail: the error, for operators.
    """

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def loss_of(errors: Sequence[RedisError]) -> Loss:
    """The loss that some errors mean. The first one with a reason counts."""
    for error in errors:
        if isinstance(error, NameTakenError):
            return Loss("name_taken", str(error))
        reason = loss_reason(error)
        if reason is not None:
            return Loss(reason, str(error))
    # An error reply without a reason of its own: Redis lacks or forbids a command that we need.
    return Loss("unsupported", str(errors[0]))


class Era:
    """One uninterrupted period of using Redis: from the start of the migration to the loss.

    An era has one link, one storage, one relay and one cancel scope. Everything that waits for
    Redis waits in that scope, so the first loss ends all of it at once. A room compares its era
    with the current one to see whether its session is in Redis. An era is never resumed: after a
    loss the next attempt begins a new one.

    Args:
        cancel: cancels the scope.

    Attributes:
        storage: the sessions in Redis.
        relay: receives the commits of other servers; None without other servers.
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
        """Whether it has ended: from then on all sessions are in memory."""
        return self.loss is not None

    def end(self, loss: Loss) -> None:
        """End it. Only the first loss counts."""
        if self.loss is None:
            self.loss = loss
            self._cancel()
