"""Judges rows over time: is the curve flat, and did it return to its start? No I/O."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, cast

from scripts.bench.documents import LoadRow, figure

WARM_UP = 0.1
MOST_GROWTH = 0.05
# Fewer points show no trend.
_LEAST_POINTS = 10
# Sockets that are being opened or closed are no leak.
_SOME_DESCRIPTORS = 8.0
# Neither are tasks that write to a slow client, or finish the work of a closed connection.
_SOME_TASKS = 8.0
# Beyond these, the figures measure the driver as well.
_BUSY_DRIVER = 0.85
_BUSY_SHARE = 0.05
_LATE_DRIVER_MS = 20.0


class Trend(NamedTuple):
    """A straight line through the values after the warm-up.

    Attributes:
        first: its value at the beginning.
        last: its value at the end.
    """

    first: float
    last: float

    @property
    def growth(self) -> float:
        """Growth as a share of the first value."""
        return (self.last - self.first) / self.first if self.first > 0 else 0.0


def trend(
    times: Sequence[float], values: Sequence[float], warm_up: float = WARM_UP
) -> Trend | None:
    """The least-squares line through ``values`` without the first ``warm_up`` of the time.

    All points count. A short peak, or the moment of the last value, neither makes nor hides a leak.

    Returns:
        None if there are too few points.
    """
    if not times:
        return None
    begin = times[0] + warm_up * (times[-1] - times[0])
    kept = [(time, value) for time, value in zip(times, values, strict=True) if time >= begin]
    if len(kept) < _LEAST_POINTS:
        return None
    middle = fmean(time for time, _ in kept)
    level = fmean(value for _, value in kept)
    width = sum((time - middle) ** 2 for time, _ in kept)
    slope = sum((time - middle) * (value - level) for time, value in kept) / width if width else 0.0
    return Trend(
        level + slope * (kept[0][0] - middle),
        level + slope * (kept[-1][0] - middle),
    )


def leaks(rows: Sequence[LoadRow]) -> list[str]:
    """Everything that kept growing under constant load, as sentences; empty if all was flat."""
    found = []
    measured = [row for row in rows if row["memoryMb"] is not None]
    memory = trend([row["t"] for row in measured], _column(measured, "memoryMb"))
    if memory is None:
        return ["the run was too short to judge memory"]
    if memory.growth > MOST_GROWTH:
        found.append(
            f"memory grew by {memory.growth:.1%} after the first tenth, from {memory.first:.1f} "
            f"to {memory.last:.1f} MB; {MOST_GROWTH:.0%} are allowed"
        )
    connections = fmean(row["connections"] for row in measured)
    surplus = _surplus_growth(measured, "descriptors", 1.0)
    if surplus > max(_SOME_DESCRIPTORS, MOST_GROWTH * connections):
        found.append(f"descriptors beyond those of connections: {surplus:.0f} more")
    with_tasks = [row for row in measured if row.get("tasks") is not None]
    if with_tasks:
        tasks = fmean(_column(with_tasks, "tasks"))
        # Only the server knows its tasks per connection: assume the mean.
        each = tasks / connections if connections else 0.0
        surplus = _surplus_growth(with_tasks, "tasks", each)
        if surplus > max(_SOME_TASKS, MOST_GROWTH * tasks):
            found.append(f"tasks beyond those of connections: {surplus:.0f} more")
    return found


def _surplus_growth(rows: Sequence[LoadRow], column: str, each: float) -> float:
    """Growth of a column beyond the ``each`` of every connection."""
    values = [
        value - each * row["connections"]
        for row, value in zip(rows, _column(rows, column), strict=True)
    ]
    fit = trend([row["t"] for row in rows], values)
    return 0.0 if fit is None else fit.last - fit.first


def _column(rows: Sequence[LoadRow], name: str) -> list[float]:
    """A column of rows that have all measured it."""
    return [value for row in rows if (value := figure(row, name)) is not None]


def left_behind(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Counts that are larger after all clients have left than before the first, as sentences."""
    return [
        f"{after[name] - count:g} {name} were left behind ({count:g} before, {after[name]:g} now)"
        for name, count in before.items()
        if after.get(name, count) > count
    ]


def bottleneck(rows: Sequence[LoadRow]) -> str | None:
    """Why the figures measure the driver or the machine as well; None if they do not."""
    if not rows:
        return None
    busy = sum(row["driverCpu"] > _BUSY_DRIVER for row in rows) / len(rows)
    if busy > _BUSY_SHARE:
        return f"the driver kept its core busy in {busy:.0%} of the seconds"
    late = sum(row["driverLagMs"] > _LATE_DRIVER_MS for row in rows) / len(rows)
    if late > _BUSY_SHARE:
        return (
            f"the driver was late by over {_LATE_DRIVER_MS:g} ms in {late:.0%} of the seconds: "
            "the latencies are those of a machine that is too busy"
        )
    return None


class RowSeries:
    """Rows in the order of time. When there are too many, each two neighbours are merged.

    Args:
        most: number of rows that are kept, however long the load is.

    Attributes:
        rows: the rows so far.
    """

    def __init__(self, most: int = 2000) -> None:
        self.rows: list[LoadRow] = []
        self._most = most
        self._step = 1
        self._open: list[LoadRow] = []

    def add(self, row: LoadRow) -> None:
        """Add the next row."""
        self._open.append(row)
        if len(self._open) == self._step:
            self.rows.append(merged(self._open))
            self._open = []
        if len(self.rows) > self._most:
            self.rows = [merged(self.rows[at : at + 2]) for at in range(0, len(self.rows), 2)]
            self._step *= 2


def merged(rows: Sequence[LoadRow]) -> LoadRow:
    """Several seconds as one: mean rates, the longest latencies and lags, the last texts."""
    last = rows[-1]
    if len(rows) == 1:
        return last
    row: dict[str, object] = {}
    for name, value in last.items():
        values = [each for each in (figure(one, name) for one in rows) if each is not None]
        if isinstance(value, str) or name == "t" or not values:
            row[name] = value
        elif name.endswith("Ms"):
            row[name] = max(values)
        else:
            row[name] = fmean(values)
    return cast("LoadRow", row)
