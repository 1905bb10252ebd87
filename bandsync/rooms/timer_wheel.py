"""Timer wheel: visits each of many items once a period, evenly spread, from one task."""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class TimerWheel(Generic[T]):
    """Spreads the visits of many items over a period, so that no moment has to do all the work.

    Moments are the multiples of a step on Trio's clock, and slot ``m % slots`` is due at moment
    ``m``. Wheels whose steps are multiples of each other therefore wake the server up together: on
    an idle core that is most of the cost of a tick.

    Args:
        period_s: how often each item is visited, seconds.
        slots: the number of moments in a period.
    """

    def __init__(self, period_s: float, slots: int) -> None:
        self._step = period_s / slots
        self._slots: list[dict[T, None]] = [{} for _ in range(slots)]
        self._slot_of: dict[T, dict[T, None]] = {}
        self._moment = 0
        # The moment that `run` sleeps until.
        self._target = math.inf
        self._earlier = trio.Event()

    def add(self, item: T) -> None:
        """Visit ``item`` from now on. Does nothing if it is visited already."""
        if item in self._slot_of:
            return
        # Use the emptiest slot; of several, the one that is due first.
        now = self._now()
        count = len(self._slots)
        moment = min(
            range(now + 1, now + 1 + count), key=lambda moment: len(self._slots[moment % count])
        )
        slot = self._slots[moment % count]
        slot[item] = None
        self._slot_of[item] = slot
        if moment < self._target:
            self._earlier.set()

    def discard(self, item: T) -> None:
        """Stop visiting ``item``. Does nothing if it is not visited."""
        slot = self._slot_of.pop(item, None)
        if slot is not None:
            del slot[item]

    async def run(
        self, visit: Callable[[T], object], lag: Callable[[float], None] | None = None
    ) -> None:
        """Visit, for ever.

        Args:
            visit: called with each item; may add and discard items.
            lag: observes the delay of each moment, seconds.
        """
        count = len(self._slots)
        self._moment = self._now()
        while True:
            self._target = self._next_moment()
            self._earlier = trio.Event()
            with trio.move_on_at(self._target * self._step) as due:
                await self._earlier.wait()
            if not due.cancelled_caught:
                self._moment = max(self._moment, self._now())
                continue
            if lag is not None:
                lag(trio.current_time() - self._target * self._step)
            # Skip visits that are late by more than a period: no burst to catch up.
            self._moment = max(int(self._target), self._now() - count)
            self._visit_slot(visit)

    def _visit_slot(self, visit: Callable[[T], object]) -> None:
        """Visit the items of this moment.

        A function of its own: the frame of `run` would keep the last item alive until the next.
        """
        for item in list(self._slots[self._moment % len(self._slots)]):
            visit(item)

    def _now(self) -> int:
        return math.floor(trio.current_time() / self._step)

    def _next_moment(self) -> float:
        """The next moment whose slot is not empty: no wake-up is spent on an empty one."""
        count = len(self._slots)
        return next(
            (
                moment
                for moment in range(self._moment + 1, self._moment + 1 + count)
                if self._slots[moment % count]
            ),
            math.inf,
        )
