"""A rota: visits each of many things once a period, evenly spread, from one task."""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class TimerWheel(Generic[T]):
    """Spreads things over a period, so that no moment has to bear them all.

    Moments are the multiples of a step of Trio's clock, and slot ``m % slots`` is due at moment
    ``m``. So rotas whose steps are multiples of each other wake the server up together: on an
    idle core that is most of what a tick costs.

    Args:
        period_s: how often each thing is visited, seconds.
        slots: into how many moments the period is divided.
    """

    def __init__(self, period_s: float, slots: int) -> None:
        self._step = period_s / slots
        self._slots: list[dict[T, None]] = [{} for _ in range(slots)]
        self._where: dict[T, dict[T, None]] = {}
        self._moment = 0
        self._target = math.inf
        self._look_again = trio.Event()

    def add(self, thing: T) -> None:
        """Visit ``thing`` from now on; nothing happens if it is visited already."""
        if thing in self._where:
            return
        # The emptiest slot, of several the one that is due first.
        now = self._now()
        count = len(self._slots)
        moment = min(
            range(now + 1, now + 1 + count), key=lambda moment: len(self._slots[moment % count])
        )
        slot = self._slots[moment % count]
        slot[thing] = None
        self._where[thing] = slot
        if moment < self._target:
            self._look_again.set()

    def discard(self, thing: T) -> None:
        """Visit ``thing`` no more."""
        slot = self._where.pop(thing, None)
        if slot is not None:
            del slot[thing]

    async def run(
        self, visit: Callable[[T], None], lag: Callable[[float], None] | None = None
    ) -> None:
        """Visit for ever.

        Args:
            visit: called with each thing. May add and discard.
            lag: called with how late each moment was, seconds.
        """
        count = len(self._slots)
        self._moment = self._now()
        while True:
            self._target = self._next_moment()
            self._look_again = trio.Event()
            with trio.move_on_at(self._target * self._step) as due:
                await self._look_again.wait()
            if not due.cancelled_caught:
                self._moment = max(self._moment, self._now())
                continue
            if lag is not None:
                lag(trio.current_time() - self._target * self._step)
            # What was missed by more than a period is missed: no burst to catch up.
            self._moment = max(int(self._target), self._now() - count)
            self._visit_all(visit)

    def _visit_all(self, visit: Callable[[T], None]) -> None:
        """Visit those of this moment. By itself, so that who waits for the next holds no thing."""
        for thing in list(self._slots[self._moment % len(self._slots)]):
            visit(thing)

    def _now(self) -> int:
        return math.floor(trio.current_time() / self._step)

    def _next_moment(self) -> float:
        """The next moment with anything to visit: an empty slot is not worth waking up for."""
        count = len(self._slots)
        return next(
            (
                moment
                for moment in range(self._moment + 1, self._moment + 1 + count)
                if self._slots[moment % count]
            ),
            math.inf,
        )
