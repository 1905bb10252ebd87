"""When Redis is tried again, and when it counts as stable: tables without a clock."""

import pytest
from msgspec.structs import replace

from bandsync.settings import Settings
from bandsync.storage.recovery_policy import (
    FLAPPING_S,
    MAX_RETRY_DELAY_S,
    MAX_STABLE_S,
    STABLE_CHECKS,
    RecoveryPolicy,
)

SETTINGS = Settings(
    redis_auto_recover=True,
    redis_required=False,
    redis_max_retries=3,
    redis_retry_delay_on_failure=100,
    redis_health_interval_ms=1000,
)
# All that fits into MAX_STABLE_S.
MOST_CHECKS = round(MAX_STABLE_S)


def policy(**changes: object) -> RecoveryPolicy:
    return RecoveryPolicy(replace(SETTINGS, **changes))


def checks(policy: RecoveryPolicy) -> int:
    return policy.required_checks(sessions_in_memory=True)


@pytest.mark.parametrize(("sessions_in_memory", "wanted"), [(False, 1), (True, STABLE_CHECKS)])
def test_first_connect_needs_stability_only_for_sessions_in_memory(
    sessions_in_memory: bool, wanted: int
) -> None:
    assert policy().required_checks(sessions_in_memory=sessions_in_memory) == wanted


def test_reconnect_needs_stability_without_sessions_too() -> None:
    made = policy()
    made.lost(10, migrating=False)
    assert made.required_checks(sessions_in_memory=False) == STABLE_CHECKS


@pytest.mark.parametrize(
    ("uses_s", "wanted"),
    [
        # The first loss is no flapping, however soon it comes.
        ([1], STABLE_CHECKS),
        ([1, 1], 2 * STABLE_CHECKS),
        ([1, 1, 1], 4 * STABLE_CHECKS),
        ([FLAPPING_S, FLAPPING_S - 1], 2 * STABLE_CHECKS),
        ([1, FLAPPING_S], STABLE_CHECKS),
        ([1, 1, 1, FLAPPING_S], STABLE_CHECKS),
        ([1, 1, 1, FLAPPING_S, 1], 2 * STABLE_CHECKS),
        ([1] * 6, MOST_CHECKS),
        ([1] * 100, MOST_CHECKS),
    ],
)
def test_flapping_doubles_the_required_stability(uses_s: list[float], wanted: int) -> None:
    made, now_s = policy(), 0.0
    for use_s in uses_s:
        made.recovered(now_s)
        now_s += use_s
        made.lost(now_s, migrating=False)
        now_s += 5
    assert checks(made) == wanted


@pytest.mark.parametrize(
    ("interval_ms", "wanted"), [(100, 300), (1000, 30), (10_000, 3), (60_000, STABLE_CHECKS)]
)
def test_required_stability_is_bounded_in_seconds(interval_ms: int, wanted: int) -> None:
    made = policy(redis_health_interval_ms=interval_ms)
    for number in range(20):
        made.recovered(number)
        made.lost(number, migrating=False)
    assert checks(made) == wanted


def test_loss_while_migrating_is_flapping_and_continues_the_outage() -> None:
    made = policy()
    assert made.recovered(0) is None
    assert made.lost(100, migrating=False) == 100
    assert checks(made) == STABLE_CHECKS
    assert made.lost(120, migrating=True) == 120
    assert checks(made) == 2 * STABLE_CHECKS
    assert made.recovered(130) == 30


def test_outage_begins_at_the_last_loss_in_use() -> None:
    made = policy()
    made.lost(10, migrating=True)
    assert made.recovered(20) == 10
    made.lost(500, migrating=False)
    assert made.recovered(503) == 3


@pytest.mark.parametrize(
    ("failures", "least_s", "most_s"),
    [
        (1, 0.1, 0.2),
        (2, 0.2, 0.4),
        (3, 0.4, 0.8),
        (4, MAX_RETRY_DELAY_S, MAX_RETRY_DELAY_S),
        (5000, MAX_RETRY_DELAY_S, MAX_RETRY_DELAY_S),
    ],
)
def test_delay_grows_with_the_failures_in_a_row(
    failures: int, least_s: float, most_s: float
) -> None:
    made = policy()
    for _ in range(failures):
        made.attempt_ended(used=False)
    assert least_s <= made.delay_s <= most_s


def test_delay_is_short_again_after_a_use() -> None:
    made = policy()
    for _ in range(10):
        made.attempt_ended(used=False)
    made.attempt_ended(used=True)
    assert made.delay_s <= 0.1


@pytest.mark.parametrize(
    ("required", "failures", "may_start"),
    [(False, 0, False), (False, 1, True), (True, 1, False), (True, 3, False), (True, 4, True)],
)
def test_start_without_redis(required: bool, failures: int, may_start: bool) -> None:
    made = policy(redis_required=required)
    for _ in range(failures):
        made.attempt_ended(used=False)
    assert made.may_start_without is may_start


@pytest.mark.parametrize(
    ("auto_recover", "attempts", "gives_up"),
    [
        (True, [False] * 9, False),
        (True, [True], False),
        (False, [False] * 3, False),
        (False, [False] * 4, True),
        (False, [True], True),
    ],
)
def test_giving_up(auto_recover: bool, attempts: list[bool], gives_up: bool) -> None:
    made = policy(redis_auto_recover=auto_recover)
    for used in attempts:
        made.attempt_ended(used=used)
    assert made.gives_up is gives_up
