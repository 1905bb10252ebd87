"""The errors of Redis, and the reason for a loss that each of them means.

redis-py's public exceptions, and two of our own where those lack a reason:

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
    ConnectionError,  # noqa: A004 -- the name redis-py gives it
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004 -- the name redis-py gives it
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
    """The connection failed or was lost."""

    def __init__(self, message: str, reason: LossReason = "reset") -> None:
        super().__init__(message)
        self.reason: LossReason = reason


class UnusableError(ResponseError):
    """Redis answers, but rejects commands or writes in its present state."""

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
    # Last: some of the above are subclasses.
    (ConnectionError, "reset"),
)


def _misconf(message: str) -> RedisError:
    return UnusableError(message, "misconf")


def _too_few_replicas(message: str) -> RedisError:
    return UnusableError(message, "readonly")


def _busy(message: str) -> RedisError:
    return UnusableError(message, "overloaded")


class _NotHereError(MovedError):
    """MOVED with a hint: shown when a plain link reaches a node of a Cluster."""

    def __str__(self) -> str:
        return f"MOVED {self.message}: this Redis is a node of a Cluster; is REDIS_CLUSTER not set?"


def _redirect(kind: type[AskError], message: str) -> RedisError:
    try:
        error = kind(message.partition(" ")[2])
    except ValueError:
        # A text without slot and node.
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
    # With min-replicas-to-write set, an isolated primary refuses writes so.
    "NOREPLICAS": _too_few_replicas,
    # A script runs for seconds and blocks all other commands.
    "BUSY": _busy,
    "NOAUTH": AuthenticationError,
    "WRONGPASS": AuthenticationError,
    "DENIED": AuthenticationError,
    "NOPERM": NoPermissionError,
}

# Up to Redis 6 an error within a script is wrapped: "ERR Error running script (call to f_…):
# @user_script:1: @user_script: 1: -OOM command not allowed …". Since 7 its code comes first.
# Until Redis 7.2 a missing right has no code within a script.
_FORBIDDEN_IN_SCRIPT = "The user executing the script can't"
_IN_SCRIPT = re.compile(r"^ERR Error running script .*?: -([A-Z]+) ")


def reply_error(message: str) -> RedisError:
    """The exception for an error reply, by the error code at its beginning."""
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
    """Why Redis cannot be used or written to; None if the error means no such thing.

    An ordinary error reply, such as WRONGTYPE, concerns its command only.
    """
    if isinstance(error, LinkLostError | UnusableError):
        return error.reason
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), None)


def again(error: E) -> E:
    """A copy of an error, to be raised in another task: their tracebacks must not mix."""
    return copy.copy(error)
