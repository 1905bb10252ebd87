"""Measuring servers beside each other, in windows that take turns."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple, Protocol

from scripts.bench.fleet import Fleet
from scripts.bench.load import SETTLE_S, WARM_UP_S
from scripts.bench.processes import BenchError, now_s

_SLICE_S = 1.0


class Measured(Protocol):
    """A server, or several that work together."""

    def suspend(self) -> None:
        """Let it use no CPU at all while another is measured."""

    def resume(self) -> None:
        """Let it go on."""

    def cpu_s(self) -> float:
        """User and system time so far, seconds."""


class Window(NamedTuple):
    """What happened in some time; windows add up.

    Attributes:
        seconds: how long it was.
        server_cpu_s: of what is measured, seconds.
        generator_cpu_s: of this process, seconds.
        kinds: text frames received, as in `Fleet.kinds`.
        payload_bytes: of these.
    """

    seconds: float
    server_cpu_s: float
    generator_cpu_s: float
    kinds: Counter[bytes]
    payload_bytes: int

    def frames(self, without: Iterable[bytes] = ()) -> int:
        """Text frames received, but not those of the kinds ``without``."""
        return sum(self.kinds.values()) - sum(self.kinds[kind] for kind in without)


def measure(server: Measured, fleet: Fleet, seconds: float) -> Window:
    """Receive for ``seconds``.

    Raises:
        BenchError: the server closed connections meanwhile.
    """
    gone = fleet.gone
    kinds, payload_bytes = fleet.kinds.copy(), fleet.payload_bytes
    began, server_cpu, generator_cpu = now_s(), server.cpu_s(), time.process_time()
    fleet.run_for(seconds)
    if fleet.gone != gone:
        raise BenchError(f"the server closed {fleet.gone - gone} connections")
    return Window(
        now_s() - began,
        server.cpu_s() - server_cpu,
        time.process_time() - generator_cpu,
        fleet.kinds - kinds,
        fleet.payload_bytes - payload_bytes,
    )


def total(windows: Sequence[Window]) -> Window:
    """All windows as one."""
    kinds: Counter[bytes] = Counter()
    for window in windows:
        kinds.update(window.kinds)
    return Window(
        sum(window.seconds for window in windows),
        sum(window.server_cpu_s for window in windows),
        sum(window.generator_cpu_s for window in windows),
        kinds,
        sum(window.payload_bytes for window in windows),
    )


class Contender(NamedTuple):
    """A server that is measured beside others.

    Attributes:
        wake: called when its turn begins.
        start: called when it is warm, before the measuring.
        rest: called at the end of its turn.
    """

    server: Measured
    fleet: Fleet
    wake: Callable[[], object] = lambda: None
    start: Callable[[], object] = lambda: None
    rest: Callable[[], object] = lambda: None


def alternate(contenders: dict[str, Contender], seconds: float) -> dict[str, list[Window]]:
    """Measure each for ``seconds``, in slices that take turns, while the others are suspended."""
    slices = max(2, round(seconds / _SLICE_S))
    windows: dict[str, list[Window]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.server.suspend()
    for turn in range(slices):
        for name, (server, fleet, wake, start, rest) in contenders.items():
            server.resume()
            wake()
            fleet.run_for(WARM_UP_S if turn == 0 else SETTLE_S)
            start()
            windows[name].append(measure(server, fleet, seconds / slices))
            rest()
            server.suspend()
    for contender in contenders.values():
        contender.server.resume()
    return windows


def cpu_us(window: Window, deliveries: int) -> float:
    """Server CPU per delivery, µs."""
    return window.server_cpu_s / deliveries * 1e6


def median_ratio(
    mine: Sequence[Window], other: Sequence[Window], figure: Callable[[Window], float]
) -> float:
    """The median of the ratios of ``figure`` in neighbouring slices: less moved by noise."""
    pairs = zip(mine, other, strict=True)
    return round(median(figure(own) / figure(yardstick) for own, yardstick in pairs), 2)
