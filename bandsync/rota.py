"""A rota: visits each of many things once a period, evenly spread, from one task."""

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Rota(Generic[T]):
    """Spreads things over a period, so that no moment has to bear them all.

    Args:
        period_s: how often each thing is visited, seconds.
        slots: into how many moments the period is divided.
    """

    def __init__(self, period_s: float, slots: int) -> None:
        self._step = period_s / slots
        self._slots: list[dict[T, None]] = [{} for _ in range(slots)]
        self._where: dict[T, dict[T, None]] = {}
        self._next = 0
        self._filled = trio.Event()

    def add(self, thing: T) -> None:
        """Visit ``thing`` from now on; nothing happens if it is visited already."""
        if thing not in self._where:
            slot = min(self._slots[self._next :] + self._slots[: self._next], key=len)
            slot[thing] = None
            self._where[thing] = slot
            self._filled.set()

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
        due = self._grid(trio.current_time())
        while True:
            if not self._where:
                self._filled = trio.Event()
                await self._filled.wait()
                due = self._grid(trio.current_time())
            # An empty slot is not worth waking up for.
            steps = next(
                steps
                for steps in range(1, len(self._slots) + 1)
                if self._slots[(self._next + steps) % len(self._slots)]
            )
            due += self._step * steps
            await trio.sleep_until(due)
            now = trio.current_time()
            if lag is not None:
                lag(now - due)
            if now - due > self._step * len(self._slots):
                due = self._grid(now)  # What was missed is missed: no burst to catch up.
            self._next = (self._next + steps) % len(self._slots)
            for thing in list(self._slots[self._next]):
                visit(thing)

    def _grid(self, now: float) -> float:
        """The last moment on this rota's grid.

        All grids begin at 0, so that rotas whose steps are multiples of each other wake the
        server up together: on an idle core that is most of what a tick costs.
        """
        return now - now % self._step
