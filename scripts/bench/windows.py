"""Measures servers beside each other, in windows that alternate."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple, Protocol

from scripts.bench.fleet import Fleet
from scripts.bench.load import SETTLE_S, WARM_UP_S
from scripts.bench.processes import BenchError, now_s

_SLICE_S = 1.0


class Measurable(Protocol):
    """A server, or several that are measured as one."""

    def suspend(self) -> None:
        """Stop its processes while another one is measured."""

    def resume(self) -> None:
        """Continue its processes."""

    def cpu_s(self) -> float:
        """User and system time so far, seconds."""


class MeasuredWindow(NamedTuple):
    """The measurements of some time. Windows can be added.

    Attributes:
        seconds: its duration.
        server_cpu_s: CPU of the server, seconds.
        generator_cpu_s: CPU of this process, seconds.
        kinds: text frames received, as in `Fleet.kinds`.
        payload_bytes: of these.
    """

    seconds: float
    server_cpu_s: float
    generator_cpu_s: float
    kinds: Counter[bytes]
    payload_bytes: int

    def frames(self, without: Iterable[bytes] = ()) -> int:
        """Number of text frames received, without the given kinds."""
        return sum(self.kinds.values()) - sum(self.kinds[kind] for kind in without)


def measure(server: Measurable, fleet: Fleet, seconds: float) -> MeasuredWindow:
    """Receive for ``seconds``, and measure that.

    Raises:
        BenchError: the server closed connections meanwhile.
    """
    gone = fleet.gone
    kinds, payload_bytes = fleet.kinds.copy(), fleet.payload_bytes
    began, server_cpu, generator_cpu = now_s(), server.cpu_s(), time.process_time()
    fleet.run_for(seconds)
    if fleet.gone != gone:
        raise BenchError(f"the server closed {fleet.gone - gone} connections")
    return MeasuredWindow(
        now_s() - began,
        server.cpu_s() - server_cpu,
        time.process_time() - generator_cpu,
        fleet.kinds - kinds,
        fleet.payload_bytes - payload_bytes,
    )


def total(windows: Sequence[MeasuredWindow]) -> MeasuredWindow:
    """The sum of several windows."""
    kinds: Counter[bytes] = Counter()
    for window in windows:
        kinds.update(window.kinds)
    return MeasuredWindow(
        sum(window.seconds for window in windows),
        sum(window.server_cpu_s for window in windows),
        sum(window.generator_cpu_s for window in windows),
        kinds,
        sum(window.payload_bytes for window in windows),
    )


class Contender(NamedTuple):
    """A server that is measured beside others.

    Attributes:
        server: the server.
        fleet: its clients.
        begin_turn: called at the beginning of its turn.
        begin_slice: called after the warm-up, before the measurement.
        end_turn: called at the end of its turn.
    """

    server: Measurable
    fleet: Fleet
    begin_turn: Callable[[], object] = lambda: None
    begin_slice: Callable[[], object] = lambda: None
    end_turn: Callable[[], object] = lambda: None


def alternate(contenders: dict[str, Contender], seconds: float) -> dict[str, list[MeasuredWindow]]:
    """Measure each for ``seconds``, in alternating slices, while the others are suspended."""
    slices = max(2, round(seconds / _SLICE_S))
    windows: dict[str, list[MeasuredWindow]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.server.suspend()
    for turn in range(slices):
        for name, (server, fleet, begin_turn, begin_slice, end_turn) in contenders.items():
            server.resume()
            begin_turn()
            fleet.run_for(WARM_UP_S if turn == 0 else SETTLE_S)
            begin_slice()
            windows[name].append(measure(server, fleet, seconds / slices))
            end_turn()
            server.suspend()
    for contender in contenders.values():
        contender.server.resume()
    return windows


def cpu_us(window: MeasuredWindow, deliveries: int) -> float:
    """CPU of the server per delivery, µs."""
    return window.server_cpu_s / deliveries * 1e6


def median_ratio(
    ours: Sequence[MeasuredWindow],
    theirs: Sequence[MeasuredWindow],
    figure: Callable[[MeasuredWindow], float],
) -> float:
    """The median ratio of ``figure`` in neighbouring slices, which noise affects less."""
    pairs = zip(ours, theirs, strict=True)
    return round(median(figure(own) / figure(yardstick) for own, yardstick in pairs), 2)
