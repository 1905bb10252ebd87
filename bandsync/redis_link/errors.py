"""What goes wrong between us and Redis, and which of it means that Redis cannot be used.

redis-py's public exceptions, and two of our own where those do not tell enough:

    redis.exceptions.RedisError
    ├─ ConnectionError
    │  ├─ LinkLostError     refused, unreachable, reset, tls, overloaded
    │  ├─ AuthenticationError
    │  └─ BusyLoadingError
    ├─ TimeoutError
    ├─ InvalidResponse
    └─ ResponseError
       ├─ UnusableError     misconf, readonly, overloaded
       ├─ ReadOnlyError, OutOfMemoryError, MasterDownError, NoPermissionError
       ├─ ClusterDownError, TryAgainError
       ├─ AskError
       │  └─ MovedError
       └─ NoScriptError
"""

import copy
import functools
import re
from collections.abc import Callable
from typing import Literal, TypeVar

from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
    TryAgainError,
)

LossReason = Literal[
    "refused",
    "unreachable",
    "reset",
    "timed_out",
    "tls",
    "auth",
    "readonly",
    "loading",
    "masterdown",
    "clusterdown",
    "no_master",
    "demoted",
    "oom",
    "misconf",
    "overloaded",
    "unsupported",
    "protocol",
]

E = TypeVar("E", bound=RedisError)


class LinkLostError(ConnectionError):
    """There is no connection, or no longer."""

    def __init__(self, message: str, reason: LossReason = "reset") -> None:
        super().__init__(message)
        self.reason: LossReason = reason


class UnusableError(ResponseError):
    """Redis answers that it will not do its work now."""

    def __init__(self, message: str, reason: LossReason = "misconf") -> None:
        super().__init__(message)
        self.reason: LossReason = reason


_REASONS: tuple[tuple[type[RedisError], LossReason], ...] = (
    (AuthenticationError, "auth"),
    (AuthorizationError, "auth"),
    (NoPermissionError, "auth"),
    (BusyLoadingError, "loading"),
    (MasterDownError, "masterdown"),
    (ClusterDownError, "clusterdown"),
    (ReadOnlyError, "readonly"),
    (OutOfMemoryError, "oom"),
    (TimeoutError, "timed_out"),
    (InvalidResponse, "protocol"),
    # Last: some of the above derive from it.
    (ConnectionError, "reset"),
)


def _misconf(message: str) -> RedisError:
    return UnusableError(message, "misconf")


def _too_few_replicas(message: str) -> RedisError:
    return UnusableError(message, "readonly")


def _busy(message: str) -> RedisError:
    return UnusableError(message, "overloaded")


class _NotHereError(MovedError):
    """Seen by whoever does not follow it: whoever takes a Cluster for a single Redis."""

    def __str__(self) -> str:
        return f"MOVED {self.message}: this Redis is a node of a Cluster; is REDIS_CLUSTER not set?"


def _redirect(kind: type[AskError], message: str) -> RedisError:
    try:
        error = kind(message.partition(" ")[2])
    except ValueError:
        # It names no slot and no node.
        return ResponseError(message)
    known = 0 <= error.slot_id < REDIS_CLUSTER_HASH_SLOTS and 0 < error.port < 65_536
    return error if known else ResponseError(message)


_BY_CODE: dict[str, Callable[[str], RedisError]] = {
    "NOSCRIPT": NoScriptError,
    "READONLY": ReadOnlyError,
    "LOADING": BusyLoadingError,
    "MASTERDOWN": MasterDownError,
    "CLUSTERDOWN": ClusterDownError,
    "TRYAGAIN": TryAgainError,
    "MOVED": functools.partial(_redirect, _NotHereError),
    "ASK": functools.partial(_redirect, AskError),
    "OOM": OutOfMemoryError,
    "MISCONF": _misconf,
    # Set min-replicas-to-write, and this is how an isolated primary refuses.
    "NOREPLICAS": _too_few_replicas,
    # A script of somebody's runs for seconds: nothing else is done meanwhile.
    "BUSY": _busy,
    "NOAUTH": AuthenticationError,
    "WRONGPASS": AuthenticationError,
    "DENIED": AuthenticationError,
    "NOPERM": NoPermissionError,
}

# Up to Redis 6 an error within a script is wrapped: "ERR Error running script (call to f_…):
# @user_script:1: @user_script: 1: -OOM command not allowed …". Since 7 its code comes first.
# A right that the user lacks has no code there until Redis 7.2.
_FORBIDDEN_IN_SCRIPT = "The user executing the script can't"
_IN_SCRIPT = re.compile(r"^ERR Error running script .*?: -([A-Z]+) ")


def reply_error(message: str) -> RedisError:
    """The exception for an error reply, by the code that it begins with."""
    code = message.partition(" ")[0]
    if code == "ERR":
        if "max number of clients" in message:
            return LinkLostError(message, "refused")
        if _FORBIDDEN_IN_SCRIPT in message:
            return NoPermissionError(message)
        wrapped = _IN_SCRIPT.match(message)
        if wrapped is not None:
            code = wrapped[1]
    return _BY_CODE.get(code, ResponseError)(message)


def loss_reason(error: BaseException) -> LossReason | None:
    """Why Redis cannot be used or written to; None if the error does not say that.

    An ordinary error reply, such as WRONGTYPE, says nothing about the link.
    """
    if isinstance(error, LinkLostError | UnusableError):
        return error.reason
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), None)


def again(error: E) -> E:
    """The same error to be raised once more: one for each task, so their tracebacks do not mix."""
    return copy.copy(error)
