"""One load: starts the driver, and measures the servers each second while it runs."""

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import msgspec

from scripts.bench.documents import DriverEnd, DriverLine, DriverRow, LoadPlan, LoadRow
from scripts.bench.hosts import LoadTarget, ResourceUsage
from scripts.bench.processes import ROOT, BenchError, now_s
from scripts.bench.report import ProgressView
from scripts.bench.trend import RowSeries

# Time for the phases after the last command: return, comparison, leave.
_END_S = 120.0
_STOP_S = 5.0


class PhaseUsage(NamedTuple):
    """The servers' resources at the beginning and the end of a phase."""

    first: ResourceUsage
    last: ResourceUsage


class LoadRun:
    """Runs the driver, and measures the servers meanwhile.

    Attributes:
        series: rows of all seconds, bounded in number.
        tallies: resources used, by phase.
    """

    def __init__(self, target: LoadTarget) -> None:
        self._target = target
        self.series = RowSeries()
        self.tallies: dict[str, PhaseUsage] = {}
        self._previous: ResourceUsage | None = target.usage()

    @property
    def load_rows(self) -> list[LoadRow]:
        """The rows of the phases join and play."""
        return [row for row in self.series.rows if row["phase"] in {"join", "play"}]

    def run(self, plan: LoadPlan, progress: ProgressView) -> DriverEnd:
        """Run the whole plan; return the driver's summary.

        Raises:
            BenchError: the driver failed, or took too long.
        """
        deadline = now_s() + plan.seconds + _END_S
        with _driver(plan) as driver, _interruptible() as interrupted:
            assert driver.stdout is not None
            assert driver.stdin is not None
            stopping = False
            for text in _read_lines(driver.stdout.fileno(), interrupted):
                if interrupted and not stopping:
                    stopping = True
                    driver.stdin.close()
                    deadline = min(deadline, now_s() + _END_S)
                if now_s() > deadline or len(interrupted) > 1:
                    raise BenchError("the driver was ended early")
                if not text:
                    continue
                line = msgspec.json.decode(text, type=DriverLine)
                row = self._row(line["row"])
                self.series.add(row)
                progress.show(row)
                if "end" in line:
                    return line["end"]
        raise BenchError("the driver failed")

    def _row(self, second: DriverRow) -> LoadRow:
        """A row of the driver's report and the servers' resources."""
        usage = self._target.usage()
        seconds, counts, latency = second["seconds"], second["counts"], second["latencyMs"]
        command, tick = latency["command"] or {}, latency["tick"] or {}
        row: LoadRow = {
            "t": second["t"],
            "phase": second["phase"],
            "connections": second["connections"],
            "deliveriesPerS": second["deliveries"] / seconds,
            "ticksPerS": second["ticks"] / seconds,
            "commandsPerS": counts.get("commands", 0) / seconds,
            "joinsPerS": (counts.get("joins", 0) + counts.get("resumes", 0)) / seconds,
            "commandP50Ms": command.get("p50"),
            "commandP99Ms": command.get("p99"),
            "tickP50Ms": tick.get("p50"),
            "tickP99Ms": tick.get("p99"),
            "driverCpu": second["driverCpu"],
            "driverWaited": second["driverWaited"],
            "driverLagMs": second["driverLagMs"],
            "errors": second["errors"],
            "closes": second["closes"],
            "findings": second["findings"],
            "serverCpu": None,
            "serverWaited": None,
            "memoryMb": None,
            "descriptors": None,
            "tasks": None,
        }
        if usage is not None:
            before = self._previous or usage
            row["serverCpu"] = max(0.0, usage.cpu_s - before.cpu_s) / seconds
            if usage.waited_s is not None and before.waited_s is not None:
                row["serverWaited"] = max(0.0, usage.waited_s - before.waited_s) / seconds
            row["memoryMb"] = usage.memory_mb
            row["descriptors"] = usage.descriptors
            row["tasks"] = usage.tasks
            tally = self.tallies.get(second["phase"], PhaseUsage(before, usage))
            self.tallies[second["phase"]] = PhaseUsage(tally.first, usage)
        self._previous = usage
        rounded = {
            name: round(each, 4) if isinstance(each, float) else each for name, each in row.items()
        }
        return cast("LoadRow", rounded)


@contextmanager
def _driver(plan: LoadPlan) -> Iterator["subprocess.Popen[bytes]"]:
    """The driver's process; it ends with this block."""
    process = subprocess.Popen(  # noqa: S603  # our own module
        [sys.executable, "-m", "scripts.bench.driver", msgspec.json.encode(plan).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin, process.stdout:
            yield process
            process.stdin.close()
            process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        raise BenchError("the driver does not end") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM instead of ending; yields their numbers."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda number, frame: came.append(number)) for each in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _read_lines(fd: int, interrupted: list[int]) -> Iterator[bytes]:
    """Lines as they arrive; an empty one at least twice a second, for deadlines."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if not selector.select(0.1 if interrupted else 0.5):
                yield b""
                continue
            data = os.read(fd, 65_536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
