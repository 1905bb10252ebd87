"""Timer wheel: every item is visited once a period, whenever it is added or discarded."""

import weakref
from itertools import pairwise

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from bandsync.rooms.timer_wheel import TimerWheel

PERIOD = 1.0

Moves = list[tuple[float, str, bool]]


async def scenario(
    moves: Moves,
) -> dict[str, tuple[list[float], list[float]]]:
    """Add (True) and discard items after waits; returns when each was added and visited."""
    wheel: TimerWheel[str] = TimerWheel(PERIOD, 5)
    came: dict[str, list[float]] = {}
    visits: dict[str, list[float]] = {}
    present: set[str] = set()

    def visit(item: str) -> None:
        assert item in present
        visits[item].append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wheel.run, visit)
        for wait, item, coming in moves:
            if wait:
                await trio.sleep(wait)
            if coming and item not in present:
                wheel.add(item)
                present.add(item)
                came[item] = [trio.current_time()]
                visits[item] = []
            elif not coming and item in present:
                wheel.discard(item)
                present.discard(item)
        await trio.sleep(3.5)
        nursery.cancel_scope.cancel()
    return {item: (came[item], visits[item]) for item in present}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.7]), st.sampled_from("abcdefgh"), st.booleans()
        ),
        max_size=30,
    )
)
def test_every_item_is_visited_once_a_period(
    moves: Moves,
) -> None:
    clock = MockClock(autojump_threshold=0)
    for came, visits in trio.run(scenario, moves, clock=clock).values():
        times = came + visits
        assert len(visits) >= 3
        gaps = [after - before for before, after in pairwise(times)]
        assert gaps[0] <= PERIOD + 1e-6
        assert all(abs(gap - PERIOD) < 1e-6 for gap in gaps[1:])


async def test_item_discarded_before_its_visit_is_not_visited(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    wheel: TimerWheel[str] = TimerWheel(PERIOD, 5)
    seen: list[str] = []
    nursery.start_soon(wheel.run, seen.append)
    await trio.sleep(10)
    wheel.add("a")
    wheel.discard("a")
    await trio.sleep(10)
    assert seen == []
    wheel.add("b")
    await trio.sleep(PERIOD)
    assert seen == ["b"]


async def test_missed_visits_are_skipped(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    wheel: TimerWheel[str] = TimerWheel(PERIOD, 5)
    seen: list[str] = []
    late: list[float] = []
    wheel.add("a")
    nursery.start_soon(wheel.run, seen.append, late.append)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(60)
    await trio.testing.wait_all_tasks_blocked()
    assert 1 <= len(seen) <= 2
    assert late[0] > 58


async def test_discarded_item_is_freed(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The waiting task must not keep the last visited item alive."""
    visited: list[int] = []
    wheel: TimerWheel[trio.Event] = TimerWheel(PERIOD, 5)
    nursery.start_soon(wheel.run, lambda item: visited.append(id(item)))
    # Any object that supports weak references.
    item = trio.Event()
    there = weakref.ref(item)
    wheel.add(item)
    await trio.sleep(1.5 * PERIOD)
    assert visited
    wheel.discard(item)
    del item
    assert there() is None
