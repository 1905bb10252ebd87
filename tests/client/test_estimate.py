"""The client's estimate of the session clock, by property and by simulation."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandsync.client.estimate import MAX_AGE_MS, MAX_SAMPLES, ClockEstimate, Exchange

SERVER_START = 1_800_000_000_000.0
BURST = 20
# 500 ppm of slewing and 100 ppm of crystals.
DRIFT = 6e-4


class World:
    """A server's clock that runs at changing rates beside ours, and a network between them."""

    def __init__(self, offset: float = SERVER_START) -> None:
        self.now = 1000.0
        self.offset = offset
        self.rate = 0.0

    def wait(self, ms: float) -> None:
        self.now += ms
        self.offset += ms * self.rate

    def exchange(self, there: float, held: float, back: float) -> Exchange:
        t0 = self.now
        self.wait(there)
        t1 = self.now + self.offset
        self.wait(held)
        t2 = self.now + self.offset
        self.wait(back)
        return Exchange(t0, t1, t2, self.now)


def check_bound(estimate: ClockEstimate, world: World) -> None:
    used, error = estimate.offset_at(world.now), estimate.error_at(world.now)
    assert used is not None
    assert error is not None
    assert abs(used - world.offset) <= error


def instant(estimate: ClockEstimate, world: World) -> tuple[float, float]:
    """Our clock and the session clock, as it is shown."""
    used = estimate.offset_at(world.now)
    assert used is not None
    return world.now, world.now + used


delays = st.floats(0, 300)
rates = st.floats(-DRIFT, DRIFT)
exchanges = st.lists(st.tuples(delays, st.floats(0, 20), delays, st.floats(0, 5000), rates))


@given(exchanges, st.floats(-1e12, 1e12), st.floats(0, 60_000), st.floats(0, 500))
def test_the_error_bound_is_honest(
    plan: list[tuple[float, float, float, float, float]], offset: float, later: float, late: float
) -> None:
    world, estimate = World(offset), ClockEstimate()
    estimate.guess(world.now + world.offset + 123, world.now)
    for number, (there, held, back, pause, rate) in enumerate(plan):
        world.rate = rate
        exchange = world.exchange(there, held, back)
        world.wait(late)
        estimate.observe(exchange, world.now, burst=number < BURST)
        check_bound(estimate, world)
        world.wait(pause)
        check_bound(estimate, world)
    if plan:
        world.wait(later)
        check_bound(estimate, world)


@given(exchanges, st.lists(st.floats(0, 3000), max_size=5), st.lists(st.floats(0, 500)))
def test_instants_never_run_backwards_after_the_first_burst(
    plan: list[tuple[float, float, float, float, float]], looks: list[float], late: list[float]
) -> None:
    world, estimate = World(), ClockEstimate()
    estimate.observe(world.exchange(300, 0, 0), world.now, burst=False)
    shown = []
    for there, held, back, pause, rate in plan:
        world.rate = rate
        exchange = world.exchange(there, held, back)
        # The answer has arrived, and the process has other things to do first: instants are read
        # off meanwhile.
        for wait in late:
            world.wait(wait)
            shown.append(instant(estimate, world))
        # A whole burst of worse ones, as after a reconnect, changes nothing in that.
        estimate.observe(exchange, world.now, burst=there > 150)
        for wait in (0.0, *looks, pause):
            world.wait(wait)
            shown.append(instant(estimate, world))
    for (before, earlier), (after, later) in pairwise(shown):
        # Nor does it leap: it runs at most 2 % off its rate.
        assert 0.98 * (after - before) - 0.001 <= later - earlier <= 1.02 * (after - before) + 0.001


def test_error_is_unknown_before_the_first_exchange() -> None:
    estimate = ClockEstimate()
    assert estimate.offset_at(5.0) is None
    assert estimate.error_at(5.0) is None
    assert estimate.jitter == 0.0
    estimate.guess(1_000_005.0, 5.0)
    assert estimate.offset_at(6.0) == 1_000_000.0
    assert estimate.error_at(6.0) is None
    estimate.guess(0.0, 7.0)
    assert estimate.offset_at(8.0) == 1_000_000.0


def test_first_exchange_steps_and_later_ones_slew() -> None:
    world, estimate = World(), ClockEstimate()
    estimate.observe(world.exchange(100, 0, 0), world.now, burst=True)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset + 50, abs=0.01)
    estimate.observe(world.exchange(10, 0, 0), world.now, burst=True)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset + 5, abs=0.01)
    # Ten milliseconds better known: half a second at 2 %.
    world, estimate = World(), ClockEstimate()
    estimate.observe(world.exchange(20, 0, 0), world.now, burst=False)
    estimate.observe(world.exchange(0, 0, 0), world.now, burst=False)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset + 10, abs=0.1)
    world.wait(250)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset + 5, abs=0.1)
    world.wait(10_000)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset, abs=0.1)


def test_step_of_the_session_clock_discards_older_exchanges() -> None:
    world, estimate = World(), ClockEstimate()
    for _ in range(30):
        estimate.observe(world.exchange(5, 0, 5), world.now, burst=False)
        world.wait(100)
    assert estimate.samples == 30
    world.offset += 3_600_000
    estimate.observe(world.exchange(5, 0, 5), world.now, burst=False)
    assert estimate.samples == 1
    check_bound(estimate, world)
    assert estimate.offset_at(world.now) == pytest.approx(world.offset, abs=0.1)


def test_new_server_keeps_the_offset_and_discards_exchanges() -> None:
    world, estimate = World(), ClockEstimate()
    for _ in range(30):
        estimate.observe(world.exchange(2, 0, 2), world.now, burst=False)
    estimate.forget_exchanges()
    assert estimate.error_at(world.now) is None
    # Its clock is 1.5 ms off the first one's: exchanges with the first would rule that out.
    world.offset += 1.5
    for number in range(BURST):
        # The first answers are slow one way; following them would be a detour of 60 ms.
        back = 120 if number < 5 else 1
        estimate.observe(world.exchange(1, 0, back), world.now, burst=True)
        check_bound(estimate, world)
        used = estimate.offset_at(world.now)
        assert used == pytest.approx(world.offset, abs=2)
        world.wait(80)


def test_exchanges_are_bounded() -> None:
    world, estimate = World(), ClockEstimate()
    for _ in range(3 * MAX_SAMPLES):
        estimate.observe(world.exchange(1, 0, 1), world.now, burst=False)
    assert estimate.samples == MAX_SAMPLES
    world.wait(MAX_AGE_MS)
    estimate.observe(world.exchange(1, 0, 1), world.now, burst=False)
    assert estimate.samples == 1


def errors(seed: int, delay: float, jitter: float) -> tuple[float, float]:
    """How far off it is after ten seconds, and how far the one best round trip would be."""
    draw = random.Random(seed)
    world, estimate = World(), ClockEstimate()
    world.rate = draw.uniform(-1e-4, 1e-4)
    seen = []
    for number in range(60):
        there, back = (delay / 2 + draw.uniform(0, jitter) for _ in range(2))
        seen.append(world.exchange(there, 0, back))
        estimate.observe(seen[-1], world.now, burst=number < BURST)
        world.wait(80 if number < BURST else 200)
    used = estimate.offset_at(world.now)
    assert used is not None
    best = min(seen, key=lambda each: (each.t3 - each.t0) - (each.t2 - each.t1))
    naive = ((best.t1 - best.t0) + (best.t2 - best.t3)) / 2
    return abs(used - world.offset), abs(naive - world.offset)


def test_estimate_is_better_than_the_best_round_trip() -> None:
    ours, naive = zip(*(errors(seed, delay=80, jitter=60) for seed in range(100)), strict=True)
    assert sorted(ours)[98] < sorted(naive)[98] / 2
