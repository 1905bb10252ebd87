"""The rota: every thing once a period, whenever it comes and goes."""

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
    """Add (True) and discard things after waits; when each came and was visited."""
    rota: TimerWheel[str] = TimerWheel(PERIOD, 5)
    came: dict[str, list[float]] = {}
    visits: dict[str, list[float]] = {}
    present: set[str] = set()

    def visit(thing: str) -> None:
        assert thing in present
        visits[thing].append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rota.run, visit)
        for wait, thing, coming in moves:
            if wait:
                await trio.sleep(wait)
            if coming and thing not in present:
                rota.add(thing)
                present.add(thing)
                came[thing] = [trio.current_time()]
                visits[thing] = []
            elif not coming and thing in present:
                rota.discard(thing)
                present.discard(thing)
        await trio.sleep(3.5)
        nursery.cancel_scope.cancel()
    return {thing: (came[thing], visits[thing]) for thing in present}


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
    rota: TimerWheel[str] = TimerWheel(PERIOD, 5)
    seen: list[str] = []
    nursery.start_soon(rota.run, seen.append)
    await trio.sleep(10)
    rota.add("a")
    rota.discard("a")
    await trio.sleep(10)
    assert seen == []
    rota.add("b")
    await trio.sleep(PERIOD)
    assert seen == ["b"]


async def test_missed_visits_are_skipped(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    rota: TimerWheel[str] = TimerWheel(PERIOD, 5)
    seen: list[str] = []
    late: list[float] = []
    rota.add("a")
    nursery.start_soon(rota.run, seen.append, late.append)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(60)
    await trio.testing.wait_all_tasks_blocked()
    assert 1 <= len(seen) <= 2
    assert late[0] > 58


async def test_discarded_item_is_freed(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Also the last that was visited, by the task that waits for the next."""
    visited: list[int] = []
    rota: TimerWheel[trio.Event] = TimerWheel(PERIOD, 5)
    nursery.start_soon(rota.run, lambda thing: visited.append(id(thing)))
    # Any object that can be referred to weakly.
    thing = trio.Event()
    there = weakref.ref(thing)
    rota.add(thing)
    await trio.sleep(1.5 * PERIOD)
    assert visited
    rota.discard(thing)
    del thing
    assert there() is None
