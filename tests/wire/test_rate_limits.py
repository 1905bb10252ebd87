"""Token buckets."""

from hypothesis import given
from hypothesis import strategies as st

from bandsync.wire.rate_limits import AbuseCounter, RateLimits

RATES = {"position_sync": 50, "set_tempo": 10, "join_session": 2, "chat_message": 10, "play": 20}


class Bucket:
    """A plain token bucket, as the reference."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.tokens = rate
        self.time = 0.0

    def allow(self, now: float) -> bool:
        self.tokens = min(self.rate, self.tokens + (now - self.time) * self.rate)
        self.time = now
        if self.tokens < 1 - 1e-6:
            return False
        self.tokens -= 1
        return True


def test_each_type_has_its_own_bucket_of_one_second() -> None:
    limits = RateLimits(1)
    for kind, rate in RATES.items():
        assert [limits.allow(kind, 100.0) for _ in range(rate + 2)] == [True] * rate + [False] * 2
    assert all(limits.allow(kind, 101.0) for kind, rate in RATES.items() for _ in range(rate))


# Multiples of 1/64 s: exact in a float, so that both sides round the same way.
@given(st.lists(st.integers(0, 64).map(lambda ticks: ticks / 64), max_size=150))
def test_limit_equals_a_token_bucket(waits: list[float]) -> None:
    limits = RateLimits(1)
    bucket = Bucket(10)
    now = 1000.0
    for wait in waits:
        now += wait
        assert limits.allow("chat_message", now) == bucket.allow(now)


def test_factor_scales_the_rates_and_zero_lifts_them() -> None:
    double = RateLimits(2)
    assert [double.allow("join_session", 0.0) for _ in range(5)] == [True] * 4 + [False]
    none = RateLimits(0)
    assert all(none.allow("join_session", 0.0) for _ in range(1000))
    slow = RateLimits(0.1)  # One join in five seconds, not none at all.
    assert [slow.allow("join_session", time) for time in (0.0, 4.9, 5.0)] == [True, False, True]


def test_tenth_event_within_a_minute_is_abuse() -> None:
    counter = AbuseCounter(10)
    assert [counter.too_many(second * 7.0) for second in range(30)] == [False] * 30
    assert [counter.too_many(1000 + second) for second in range(10)] == [False] * 9 + [True]
