"""Judging what was measured over time: is it flat, and did it come back? Pure."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

Row = dict[str, Any]

WARM_UP = 0.1
MOST_GROWTH = 0.05
# Fewer points say nothing about a trend.
_LEAST_POINTS = 10
# Sockets that are on their way in or out are no leak.
_SOME_DESCRIPTORS = 8.0
# As are tasks that write to a slow client, or finish what a closed connection began.
_SOME_TASKS = 8.0
# More of either says that the driver was measured as well.
_BUSY_DRIVER = 0.85
_BUSY_SHARE = 0.05
_LATE_DRIVER_MS = 20.0


class Trend(NamedTuple):
    """A straight line through what was measured after the warm-up.

    Attributes:
        first, last: where the line begins and ends.
    """

    first: float
    last: float

    @property
    def growth(self) -> float:
        """By how much it grew, as a share of where it began."""
        return (self.last - self.first) / self.first if self.first > 0 else 0.0


def trend(
    times: Sequence[float], values: Sequence[float], warm_up: float = WARM_UP
) -> Trend | None:
    """The least-squares line through ``values``, but those of the first ``warm_up`` of the time.

    All points count, so that neither a moment's peak nor where the last second happened to fall
    makes a leak, or hides one.

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


def leaks(rows: Sequence[Row]) -> list[str]:
    """What kept growing while the load was the same; empty if all was flat."""
    found = []
    seen = [row for row in rows if row.get("memoryMb") is not None]
    times = [row["t"] for row in seen]
    memory = trend(times, [row["memoryMb"] for row in seen])
    if memory is None:
        return ["the run was too short to tell whether memory is flat"]
    if memory.growth > MOST_GROWTH:
        found.append(
            f"memory grew by {memory.growth:.1%} after the first tenth, from {memory.first:.1f} "
            f"to {memory.last:.1f} MB; {MOST_GROWTH:.0%} are allowed"
        )
    connections = fmean(row["connections"] for row in seen)
    spare = _more(seen, "descriptors", 1.0)
    if spare > max(_SOME_DESCRIPTORS, MOST_GROWTH * connections):
        found.append(f"descriptors that are no connection of ours: {spare:.0f} more")
    telling = [row for row in seen if row.get("tasks") is not None]
    if telling:
        tasks = fmean(row["tasks"] for row in telling)
        # How many tasks a connection has, only the server knows: as many as there were on average.
        each = tasks / connections if connections else 0.0
        spare = _more(telling, "tasks", each)
        if spare > max(_SOME_TASKS, MOST_GROWTH * tasks):
            found.append(f"tasks that no connection of ours needs: {spare:.0f} more")
    return found


def _more(rows: Sequence[Row], column: str, each: float) -> float:
    """How many more of ``column`` there are at the end, but ``each`` of every connection."""
    values = [row[column] - each * row["connections"] for row in rows]
    line = trend([row["t"] for row in rows], values)
    return 0.0 if line is None else line.last - line.first


def left_behind(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What there is more of than before the first client came, now that all have left."""
    return [
        f"{after[name] - count:g} {name} were left behind ({count:g} before, {after[name]:g} now)"
        for name, count in before.items()
        if after.get(name, count) > count
    ]


def bottleneck(rows: Sequence[Row]) -> str | None:
    """Why these figures tell about the driver, or the machine, more than about the server.

    None if they do not.
    """
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


class Series:
    """Rows in the order of time; when they become too many, each two neighbours become one.

    Args:
        most: rows that are kept; a run of days makes a picture all the same.
    """

    def __init__(self, most: int = 2000) -> None:
        self.rows: list[Row] = []
        self._most = most
        self._step = 1
        self._open: list[Row] = []

    def add(self, row: Row) -> None:
        """Take the next one."""
        self._open.append(row)
        if len(self._open) == self._step:
            self.rows.append(merged(self._open))
            self._open = []
        if len(self.rows) > self._most:
            self.rows = [merged(self.rows[at : at + 2]) for at in range(0, len(self.rows), 2)]
            self._step *= 2


def merged(rows: Sequence[Row]) -> Row:
    """Several seconds as one: rates are averages, latencies and lags the worst, texts the last."""
    last = rows[-1]
    if len(rows) == 1:
        return last
    row: Row = {}
    for name, value in last.items():
        values = [each[name] for each in rows if each.get(name) is not None]
        if isinstance(value, str) or name == "t" or not values:
            row[name] = value
        elif name.endswith("Ms"):
            row[name] = max(values)
        else:
            row[name] = fmean(values)
    return row
