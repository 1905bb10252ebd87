"""Progress of a load on standard error: a live table in a terminal, otherwise lines."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from scripts.bench.documents import LoadRow, figure

try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError:
    RICH = False
else:
    RICH = True

_LINE_EVERY = 10
_WIDTH = 40
_BARS = "▁▂▃▄▅▆▇█"
# Label, column, unit, digits.
_FIGURES = (
    ("connections", "connections", "", 0),
    ("deliveries", "deliveriesPerS", "/s", 0),
    ("commands", "commandsPerS", "/s", 1),
    ("joins and resumes", "joinsPerS", "/s", 1),
    ("command p50", "commandP50Ms", "ms", 2),
    ("command p99", "commandP99Ms", "ms", 2),
    ("tick p99", "tickP99Ms", "ms", 2),
    ("server CPU", "serverCpu", "cores", 2),
    ("server memory", "memoryMb", "MB", 1),
    ("descriptors", "descriptors", "", 0),
    ("tasks", "tasks", "", 0),
    ("driver CPU", "driverCpu", "cores", 2),
    ("driver late", "driverLagMs", "ms", 1),
)
_COUNTS = ("errors", "closes", "findings")


class ProgressView:
    """Shows the latest row of a load.

    Args:
        title: of the load.
        seconds: planned duration.
    """

    def __init__(self, title: str, seconds: float) -> None:
        self._title = title
        self._seconds = seconds
        self._rows: list[LoadRow] = []
        self._count = 0
        self._live: Live | None = None
        if RICH and sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: LoadRow) -> None:
        """Show the row of another second."""
        self._rows = [*self._rows[1 - _WIDTH :], row]
        if self._live is not None:
            self._live.update(screen(self._title, self._seconds, self._rows), refresh=True)
        else:
            if self._count % _LINE_EVERY == 0:
                print(line(row), file=sys.stderr, flush=True)
            self._count += 1


def line(row: LoadRow) -> str:
    """A row as one line of text."""
    parts = [f"{row['t']:5.0f} s {row['phase']:5}"]
    for name, column, unit, digits in _FIGURES:
        if (value := figure(row, column)) is not None:
            parts.append(f"{name} {value:.{digits}f}{' ' if unit else ''}{unit}")
    parts += [f"{count:.0f} {name}" for name in _COUNTS if (count := figure(row, name))]
    return ", ".join(parts)


def screen(title: str, seconds: float, rows: Sequence[LoadRow]) -> "RenderableType":
    """The latest row as a table, with the previous ones as bars."""
    last = rows[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=18)
    table.add_column(justify="right", min_width=12)
    table.add_column(no_wrap=True)
    for name, column, unit, digits in _FIGURES:
        value = figure(last, column)
        text = "-" if value is None else f"{value:,.{digits}f} {unit}"
        table.add_row(name, text, Text(bars([figure(row, column) for row in rows]), style="cyan"))
    for name in _COUNTS:
        count = figure(last, name) or 0.0
        style = "red" if count and name == "findings" else ""
        table.add_row(name, Text(f"{count:,.0f} ", style=style), "")
    head = Text(f"{title}: {last['phase']}, {last['t']:.0f} of {seconds:.0f} s", style="bold")
    return Group(head, table, Text("Ctrl-C: all members leave, then the summary", style="dim"))


def bars(values: Sequence[float | None]) -> str:
    """Values as bars relative to the largest one; a space where there is none."""
    most = max((value for value in values if value is not None), default=0.0)
    if most <= 0:
        return ""
    top = len(_BARS) - 1
    return "".join(" " if value is None else _BARS[round(value / most * top)] for value in values)
