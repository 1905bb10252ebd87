"""The session clock and its discipline."""

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandsync.model.clock import ServerClock

WALL_MS = 1_790_000_000_000.0  # In 2026.
START_S = 654_321.0  # Trio's clock starts anywhere up to a million.
CHECK_S = 0.5
SLEW = 500e-6
FLOAT_MS = 2**-12  # The step of a float at WALL_MS.


class Redis:
    """A reference, and the way to it."""

    def __init__(self, ahead_ms: float = 0.0, ppm: float = 0.0) -> None:
        self.ahead_ms = ahead_ms
        self.ppm = ppm

    def time(self, monotonic_s: float) -> float:
        elapsed_s = monotonic_s - START_S
        return WALL_MS + self.ahead_ms + elapsed_s * 1000 * (1 + self.ppm / 1e6)

    def ask(
        self,
        clock: ServerClock,
        sent_s: float,
        *,
        there_s: float = 0.0001,
        back_s: float = 0.0001,
        serving: bool = True,
    ) -> None:
        whole_microseconds = int(self.time(sent_s + there_s) * 1000)
        clock.observe(sent_s, sent_s + there_s + back_s, whole_microseconds / 1000, serving=serving)


def new_clock() -> ServerClock:
    return ServerClock(wall_ms=WALL_MS, monotonic_s=START_S)


def checks(seconds: float, start_s: float = START_S) -> Iterator[float]:
    """When a health check is sent."""
    for index in range(1, int(seconds / CHECK_S) + 1):
        yield start_s + index * CHECK_S


def test_clock_without_reference_follows_the_monotonic_clock() -> None:
    clock = new_clock()
    assert clock.at(START_S) == WALL_MS
    assert clock.at(START_S + 1.5) == WALL_MS + 1500
    assert clock.at(START_S - 1.5) == WALL_MS - 1500
    assert (clock.offset_ms, clock.error_ms, clock.uncertainty_ms) == (0, None, None)


@pytest.mark.parametrize("ahead_ms", [-120_000.0, -3.0, 3.0, 120_000.0])
def test_clock_steps_both_ways_before_serving(ahead_ms: float) -> None:
    clock, redis = new_clock(), Redis(ahead_ms)
    now = START_S + 1
    clock.at(now + 0.0002)
    redis.ask(clock, now, serving=False)
    assert clock.at(now + 1) == pytest.approx(redis.time(now + 1), abs=0.002)
    assert clock.offset_ms == pytest.approx(ahead_ms, abs=0.002)
    assert clock.error_ms == pytest.approx(0, abs=0.002)
    assert clock.uncertainty_ms == pytest.approx(0.1 + 0.1, abs=0.001)


def test_clock_steps_to_better_samples_only_before_serving() -> None:
    clock, redis = new_clock(), Redis(-5000)
    redis.ask(clock, START_S, there_s=0.4, serving=False)
    assert clock.offset_ms == pytest.approx(-4800, abs=0.1)
    redis.ask(clock, START_S + 1, serving=False)
    assert clock.offset_ms == pytest.approx(-5000, abs=0.01)
    redis.ask(clock, START_S + 2)
    clock.reset_filter()
    Redis(+5000).ask(clock, START_S + 3, serving=False)  # A client saw a time before: no step back.
    assert clock.offset_ms == pytest.approx(-5000, abs=0.01)


@pytest.mark.parametrize("ahead_ms", [5000, -5000])
def test_clock_never_steps_while_serving(ahead_ms: float) -> None:
    clock, redis = new_clock(), Redis(ahead_ms)
    for sent in checks(10):
        redis.ask(clock, sent)
    assert 0 < abs(clock.offset_ms) <= 10 * SLEW * 1000
    assert clock.error_ms == pytest.approx(ahead_ms - clock.offset_ms, abs=0.002)


def test_clock_ahead_of_the_reference_is_slewed() -> None:
    clock, redis = new_clock(), Redis(-5)
    told = clock.at(START_S + 1.0002)
    redis.ask(clock, START_S + 1)
    assert clock.at(START_S + 1.0002) == told
    assert clock.error_ms == pytest.approx(-5, abs=0.002)
    assert clock.at(START_S + 2.0002) - told == pytest.approx(999.5, abs=0.001)


@pytest.mark.parametrize("ahead_ms", [-20.0, -1.0, 1.0, 20.0])
def test_clock_converges_and_stays(ahead_ms: float) -> None:
    clock = new_clock()
    Redis().ask(clock, START_S)
    redis = Redis(ahead_ms)
    clock.reset_filter()
    for sent in checks(abs(ahead_ms) / SLEW / 1000 + 1):
        redis.ask(clock, sent)
    offset = clock.offset_ms
    assert offset == pytest.approx(ahead_ms, abs=0.102)
    for sent in checks(100, START_S + 100):
        redis.ask(clock, sent)
        assert clock.offset_ms == pytest.approx(offset, abs=FLOAT_MS)
    assert clock.error_ms is not None
    assert clock.uncertainty_ms is not None
    assert abs(clock.error_ms) <= clock.uncertainty_ms + 0.002


def test_error_below_the_uncertainty_is_not_corrected() -> None:
    clock, redis = new_clock(), Redis(3)
    for sent in checks(100):
        redis.ask(clock, sent, there_s=0.005, back_s=0.005)
    assert clock.offset_ms == 0
    assert clock.error_ms == pytest.approx(3, abs=0.002)
    assert clock.uncertainty_ms == pytest.approx(5)


def test_jitter_does_not_move_the_clock() -> None:
    clock, redis, rng = new_clock(), Redis(0.05), random.Random(1)
    for sent in checks(1000):
        redis.ask(clock, sent, there_s=rng.expovariate(2000), back_s=rng.expovariate(2000))
        assert -0.001 <= clock.offset_ms <= 0.051


@pytest.mark.parametrize("first", [0.0, 0.7])
def test_slow_replies_are_ignored(first: float) -> None:
    """Redis is stopped and continued, again and again, so that its answers come late."""
    clock, redis, rng = new_clock(), Redis(), random.Random(2)
    redis.ask(clock, START_S, there_s=first)
    for index, sent in enumerate(checks(600)):
        if index % 100 == 50:  # It looked dead: a new connection, and a slow first answer.
            clock.reset_filter()
        slow = index % 20 >= 5
        there_s = rng.uniform(0.2, 0.9) if slow and index % 2 else 0.0001
        back_s = rng.uniform(0.2, 0.9) if slow and not index % 2 else 0.0001
        redis.ask(clock, sent, there_s=there_s, back_s=back_s)
        assert abs(clock.offset_ms) < 0.01


def test_slow_reply_among_fast_ones_keeps_the_error_known() -> None:
    clock, redis = new_clock(), Redis(-120_000)
    redis.ask(clock, START_S)
    redis.ask(clock, START_S + 1, there_s=0.9)
    assert clock.error_ms is not None
    assert clock.error_ms + clock.offset_ms == pytest.approx(-120_000, abs=0.01)
    assert clock.uncertainty_ms == pytest.approx(0.1 + 0.1 * 1.9, abs=0.001)


def test_old_samples_are_discarded() -> None:
    """However slow the only new answers are: its clock may have been set."""
    clock, redis = new_clock(), Redis()
    redis.ask(clock, START_S)
    redis.ahead_ms = 60_000
    redis.ask(clock, START_S + 20, there_s=0.5, back_s=0.5)
    assert clock.error_ms == pytest.approx(0, abs=0.01)
    redis.ask(clock, START_S + 40, there_s=0.5, back_s=0.5)
    assert clock.error_ms == pytest.approx(60_000, abs=0.1)


def test_uncertainty_grows_with_the_age_of_a_sample() -> None:
    clock = new_clock()
    Redis().ask(clock, START_S)
    for sent, half_s in ((29.0, 0.005), (30.5, 0.4)):
        Redis(5.1).ask(clock, START_S + sent, there_s=half_s, back_s=half_s)
    assert clock.uncertainty_ms == pytest.approx(5 + 0.1 * (30.5 + 0.8 - 29.01))
    clock.at(START_S + 60)
    assert clock.offset_ms == 0


def test_resolution_of_the_reference_does_not_move_the_clock() -> None:
    clock, redis, rng = new_clock(), Redis(0.0005), random.Random(6)
    for sent in checks(100):
        redis.ask(clock, sent + rng.random() / 10, there_s=0, back_s=0)
    assert clock.offset_ms == 0


@pytest.mark.parametrize("ppm", [-50.0, 50.0])
def test_clock_follows_a_drift(ppm: float) -> None:
    """An hour's drift is 180 ms."""
    clock, redis, rng = new_clock(), Redis(ppm=ppm), random.Random(3)
    for sent in checks(3600):
        there_s, back_s = rng.uniform(0.0001, 0.0005), rng.uniform(0.0001, 0.0005)
        redis.ask(clock, sent, there_s=there_s, back_s=back_s)
        assert clock.at(sent + 0.4) == pytest.approx(redis.time(sent + 0.4), abs=0.8)
    assert abs(clock.offset_ms) > 179


def test_servers_with_one_redis_agree_on_the_time() -> None:
    redis, rng = Redis(), random.Random(4)
    clocks = [ServerClock(WALL_MS + wrong_ms, START_S) for wrong_ms in (-7000, -3, 0, 3, 7000)]
    for clock in clocks:
        redis.ask(clock, START_S, serving=False)
    for sent in checks(60):
        for clock in clocks:
            redis.ask(clock, sent, there_s=rng.uniform(0, 0.001), back_s=rng.uniform(0, 0.001))
        instants = [clock.at(sent + 0.1) for clock in clocks]
        assert max(instants) - min(instants) < 0.5


@pytest.mark.parametrize("ahead_ms", [-180_000.0, 180_000.0])
@pytest.mark.parametrize("reconnect", [False, True])
def test_another_redis_minutes_away_causes_no_step(ahead_ms: float, reconnect: bool) -> None:
    clock = new_clock()
    for sent in checks(10):
        Redis().ask(clock, sent)
    other = Redis(ahead_ms)
    if reconnect:
        clock.reset_filter()
        assert clock.error_ms == pytest.approx(0, abs=0.002)
    before_s, before_ms = START_S + 11, clock.at(START_S + 11)
    for sent in checks(100, before_s):
        other.ask(clock, sent)
        now_s = sent + 0.3
        now_ms = clock.at(now_s)
        passed_ms = (now_s - before_s) * 1000
        assert abs(now_ms - before_ms - passed_ms) <= passed_ms * SLEW + 0.001
        before_s, before_ms = now_s, now_ms
    assert abs(clock.offset_ms) == pytest.approx(100 * SLEW * 1000, abs=5)
    assert clock.error_ms == pytest.approx(ahead_ms - clock.offset_ms, abs=0.002)


def test_reset_discards_better_samples() -> None:
    clock = new_clock()
    Redis().ask(clock, START_S)
    clock.reset_filter()
    Redis(1000).ask(clock, START_S + 1, there_s=0.01, back_s=0.01)
    assert clock.error_ms == pytest.approx(1000, abs=0.01)
    assert clock.uncertainty_ms == pytest.approx(10)


def test_slew_ends_at_the_latest_reference() -> None:
    """Although the clock is right on its way to where it is not."""
    clock = new_clock()
    Redis(-1000).ask(clock, START_S)
    clock.reset_filter()
    Redis().ask(clock, START_S + 0.1)
    clock.at(START_S + 3600)
    assert abs(clock.offset_ms) < 0.102


def test_reset_keeps_a_slew_in_progress() -> None:
    clock = new_clock()
    Redis(-5).ask(clock, START_S)
    clock.reset_filter()
    clock.at(START_S + 60)
    assert clock.offset_ms == pytest.approx(-5, abs=0.102)
    # Without samples the uncertainty grows.
    assert clock.uncertainty_ms == pytest.approx(0.1 + 60 * 0.1, abs=0.001)


def test_times_seen_before_a_late_reply_stay_valid() -> None:
    """The answer came at 0.2 ms, but the task that reads it was late."""
    clock, redis = new_clock(), Redis(-1000)
    told = clock.at(START_S + 0.01)
    redis.ask(clock, START_S)
    assert clock.at(START_S + 0.01) == told
    assert clock.at(START_S + 0.010_001) > told


@given(
    start=st.floats(0, 2e6),
    ahead_ms=st.floats(-1e6, 1e6),
    rtt_s=st.floats(0, 1),
    waits=st.lists(st.floats(1e-6, 1e6), max_size=20),
)
def test_precision_is_that_of_a_float(
    start: float, ahead_ms: float, rtt_s: float, waits: list[float]
) -> None:
    """Neither slews nor weeks add up to rounding errors."""
    clock = ServerClock(WALL_MS, start)
    now = start
    for wait in waits:
        clock.observe(now, now + rtt_s, WALL_MS + (now + rtt_s / 2 - start) * 1000 + ahead_ms)
        now += rtt_s + wait
        clock.at(now)
    clock.at(now + 3e6)  # Any slew has ended.
    if waits:
        assert clock.offset_ms == pytest.approx(ahead_ms, abs=rtt_s * 500 + 0.003)


class Asked:
    """One exchange of a random history."""

    def __init__(self, rtt_s: float, reference_ms: float, reset: bool, late: bool) -> None:
        self.rtt_s = rtt_s
        self.reference_ms = reference_ms
        self.reset = reset
        self.late = late

    def __repr__(self) -> str:
        return f"Asked({self.rtt_s}, {self.reference_ms}, {self.reset}, {self.late})"


ASKED = st.builds(
    Asked,
    st.floats(0, 2),
    # Up to 2036: the floats of a far future are coarser.
    st.floats(-1e9, 1e9).map(WALL_MS.__add__) | st.floats(0, 2.1e12),
    st.booleans(),
    st.booleans(),
)
WAIT_S = st.floats(1e-6, 1e-5) | st.floats(1e-6, 5) | st.floats(1e-6, 1e5)


@given(start_s=st.floats(0, 2e6), history=st.lists(st.tuples(WAIT_S, ASKED | st.none())))
def test_clock_is_monotone_and_within_its_slew_rate(
    start_s: float, history: list[tuple[float, Asked | None]]
) -> None:
    clock = ServerClock(WALL_MS, start_s)
    before_s, before_ms = start_s, clock.at(start_s)
    disciplined = False
    for wait_s, asked in history:
        now_s = before_s + wait_s
        if asked is not None:
            if asked.reset:
                clock.reset_filter()
            # A late reply: read after a client saw the instant `before_s`, although it came before.
            received_s = before_s - wait_s if asked.late else now_s
            clock.observe(received_s - asked.rtt_s, received_s, asked.reference_ms)
            disciplined = True
        now_ms = clock.at(now_s)
        passed_ms = (now_s - before_s) * 1000
        assert now_ms > before_ms
        assert now_ms - before_ms >= passed_ms * (1 - SLEW) - 2 * FLOAT_MS
        assert now_ms - before_ms <= passed_ms * (1 + SLEW) + 2 * FLOAT_MS
        before_s, before_ms = now_s, now_ms
        error_ms, uncertainty_ms = clock.error_ms, clock.uncertainty_ms
        assert (error_ms is None) == (uncertainty_ms is None) == (not disciplined)


def test_clock_is_monotone_between_neighbouring_floats() -> None:
    rng = random.Random(5)
    for _ in range(1000):
        start_s = rng.uniform(0, 1e6)
        clock, undisciplined = ServerClock(WALL_MS, start_s), ServerClock(WALL_MS, start_s)
        clock.observe(start_s, start_s, WALL_MS)
        clock.reset_filter()
        sent_s, received_s = start_s + 1, start_s + 1 + rng.uniform(0, 0.001)
        offset_ms = rng.choice((-1, 1)) * rng.randrange(5000, 50_000) * FLOAT_MS
        reference_ms = undisciplined.at((sent_s + received_s) / 2) + offset_ms
        clock.observe(sent_s, received_s, reference_ms)
        distance_ms = abs(offset_ms) - ((received_s - sent_s) * 500 + 0.001)
        slewed_s = received_s + distance_ms / 0.5
        for moment_s in (received_s, (received_s + slewed_s) / 2, slewed_s):
            times = [moment_s + tick * math.ulp(moment_s) for tick in range(-10, 11)]
            instants = [clock.at(time) for time in times]
            assert instants == sorted(instants)
