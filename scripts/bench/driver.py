"""The driver of a load: runs its bands in a process of its own, so that nothing delays them.

`python -m scripts.bench load` starts it with a `LoadPlan` (JSON) as its argument. It prints one
JSON line per second, and a last one with the summary. The end of its standard input ends it early,
with all phases that follow the play.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import msgspec

from scripts.bench.band import LoadBand
from scripts.bench.documents import DriverEnd, DriverLine, DriverRow, LoadPlan, PhaseReport
from scripts.bench.epoll_ws import TICK, EpollLoop, TargetAddress
from scripts.bench.processes import BenchError, now_s, raise_file_limit
from scripts.bench.score import LoadScore, SecondRecorder, core_wait_s, deliveries

PHASES = ("join", "play", "check", "leave")

_PERIOD_S = 1.0
# Long enough for disconnected and paused members to return.
_SETTLE_S = 25.0
_SNAPSHOT_S = 10.0
_COMPARISONS = 6
# Pause between two comparisons, when events were still in flight at the first.
_RETRY_S = 2.5
_LEAVE_S = 10.0


class LoadDriver:
    """Runs the phases of a load: join, play, check, leave."""

    def __init__(self, plan: LoadPlan, loop: EpollLoop) -> None:
        servers = [
            TargetAddress(family, (host, port), named)
            for family, host, port, named in plan.addresses
        ]
        self._plan = plan
        self._loop = loop
        self._score = LoadScore()
        self._pulse = SecondRecorder(loop, self._score)
        self._phase = PHASES[0]
        self._stopped = False
        self._totals: dict[str, PhaseReport] = {}
        self._bands = [
            LoadBand(
                loop,
                self._score,
                f"{plan.name}-{number}",
                number,
                plan.members,
                servers,
                chance=random.Random(f"{plan.seed}/{number}"),  # noqa: S311  # a seed to repeat a run
                pace=plan.pace,
            )
            for number in range(plan.bands)
        ]

    def stop(self) -> None:
        """End the current phase, and skip the play."""
        self._stopped = True

    def run(self) -> None:
        """Run all phases, and print the summary."""
        plan, bands = self._plan, self._bands
        self._loop.after(_PERIOD_S, self._report_second)
        with self._during("join"):
            for band in bands:
                wait_s = band.chance.uniform(0, plan.ramp / 2)
                self._loop.after(wait_s, partial(band.gather, plan.ramp / 2))
            self._wait(lambda: self._stopped, plan.ramp)
        with self._during("play"):
            for band in bands:
                band.play(plan.filling)
            self._wait(lambda: self._stopped, plan.seconds - plan.ramp)
        with self._during("check"):
            self._check()
        with self._during("leave"):
            for band in bands:
                band.leave()
            if not self._wait(lambda: all(band.all_closed() for band in bands), _LEAVE_S):
                self._score.counts["cutOff"] += 1
            for band in bands:
                band.cut_all()
        self._print({"row": self._row(), "end": self._end()})

    def _check(self) -> None:
        """Wait for all members to return, and compare their snapshots."""
        bands = self._bands
        for band in bands:
            band.settle()
        if not self._wait(lambda: all(band.complete() for band in bands), _SETTLE_S):
            missing = sum(not (each.joined or each.away) for band in bands for each in band.members)
            self._score.add_finding("missing", f"{missing} members did not come back")
        for _ in range(_COMPARISONS):
            for band in bands:
                band.request_snapshots()
            self._wait(lambda: all(band.has_all_snapshots() for band in bands), _SNAPSHOT_S)
            if all(band.oracle.versions_agree() for band in bands):
                break
            self._wait(lambda: False, _RETRY_S)
        for band in bands:
            band.oracle.judge()

    def _wait(self, ended: Callable[[], bool], seconds: float) -> bool:
        return self._loop.run_until(ended, seconds)

    def _report_second(self) -> None:
        self._loop.after(_PERIOD_S, self._report_second)
        now = now_s()
        for band in self._bands:
            band.check_deadlines(now)
        self._print({"row": self._row()})

    def _row(self) -> DriverRow:
        joined = sum(member.joined for band in self._bands for member in band.members)
        return {"phase": self._phase, "connections": joined, **self._pulse.row()}

    def _end(self) -> DriverEnd:
        score = self._score
        return {
            "stopped": self._stopped,
            "phases": self._totals,
            "deliveries": deliveries(self._loop.kinds),
            "counts": dict(score.counts),
            "beat": {
                "anchorDisagreementMs": round(score.anchor_error_ms, 6),
                "tickOffAnchorMs": round(score.tick_error_ms, 6),
            },
            "errors": dict(score.errors),
            "closes": dict(score.closes),
            "findings": dict(score.findings),
            "examples": [text[:500] for text in score.examples],
        }

    def _print(self, line: DriverLine) -> None:
        print(json.dumps(line), flush=True)

    @contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """Measure the time of the block as one phase."""
        self._phase = phase
        began, cpu, core_wait = now_s(), time.process_time(), core_wait_s()
        kinds_before, counts_before = self._loop.kinds.copy(), self._score.counts.copy()
        yield
        seconds = now_s() - began
        kinds = self._loop.kinds - kinds_before
        counts = self._score.counts - counts_before
        delivered = deliveries(kinds)
        self._totals[phase] = {
            "seconds": round(seconds, 2),
            "deliveries": delivered,
            "deliveriesPerSecond": round(delivered / seconds, 1),
            "ticksPerSecond": round(kinds[TICK] / seconds, 1),
            "perSecond": {name: round(count / seconds, 3) for name, count in counts.items()},
            "driverCpu": round((time.process_time() - cpu) / seconds, 3),
            "driverWaited": round((core_wait_s() - core_wait) / seconds, 3),
            "latencyMs": self._score.take_all(),
        }


def main() -> int:
    """Run the plan of the command line."""
    plan = msgspec.json.decode(sys.argv[1], type=LoadPlan)
    raise_file_limit(2 * plan.bands * plan.members)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with EpollLoop() as loop:
        driver = LoadDriver(plan, loop)
        # A Ctrl-C is for the parent process, which then ends this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: driver.stop())
        loop.read(sys.stdin.fileno(), lambda: _stop_at_end_of_input(loop, driver))
        driver.run()
    return 0


def _stop_at_end_of_input(loop: EpollLoop, driver: LoadDriver) -> None:
    if not os.read(sys.stdin.fileno(), 1024):
        loop.stop_reading(sys.stdin.fileno())
        driver.stop()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"python -m scripts.bench: {error}", file=sys.stderr)
        sys.exit(1)
