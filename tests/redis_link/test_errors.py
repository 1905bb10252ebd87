"""Error replies, and the reason for a loss that each means."""

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from bandsync.redis_link.errors import LinkLostError, UnusableError, loss_reason, reply_error


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        ("WRONGTYPE Operation against a key", ResponseError, None),
        ("ERR unknown command", ResponseError, None),
        ("NOSCRIPT No matching script.", NoScriptError, None),
        ("READONLY You can't write", ReadOnlyError, "readonly"),
        ("LOADING Redis is loading", BusyLoadingError, "loading"),
        ("MASTERDOWN Link with MASTER is down", ResponseError, "masterdown"),
        ("OOM command not allowed", OutOfMemoryError, "oom"),
        ("MISCONF Redis is configured to", UnusableError, "misconf"),
        ("NOREPLICAS Not enough good replicas", UnusableError, "readonly"),
        ("BUSY Redis is busy running a script", UnusableError, "overloaded"),
        ("NOAUTH Authentication required.", AuthenticationError, "auth"),
        ("WRONGPASS invalid username", AuthenticationError, "auth"),
        ("DENIED Redis is running in protected mode", AuthenticationError, "auth"),
        ("NOPERM this user", NoPermissionError, "auth"),
        ("ERR max number of clients reached", LinkLostError, "refused"),
        (
            "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: "
            "-OOM command not allowed when used memory > 'maxmemory'.",
            OutOfMemoryError,
            "oom",
        ),
        (
            "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: "
            "-READONLY You can't write against a read only replica.",
            ReadOnlyError,
            "readonly",
        ),
        (
            "ERR Error running script (call to f_ab): @user_script:1: user said -OOM ",
            ResponseError,
            None,
        ),
    ],
)
def test_error_replies_map_to_loss_reasons(
    reply: str, kind: type[RedisError], reason: str | None
) -> None:
    error = reply_error(reply)
    assert isinstance(error, kind)
    assert str(error) == reply
    assert loss_reason(error) == reason


def test_other_errors_are_not_a_loss() -> None:
    assert loss_reason(ValueError()) is None
    assert loss_reason(KeyboardInterrupt()) is None
