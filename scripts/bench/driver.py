#!/usr/bin/env python3
"""The bands of a load, in a process of their own, so that nothing else takes their time.

`bench.py load` starts it with a `Plan`, JSON, as its argument. It prints one JSON line per second,
and at the end one with everything. It ends early, but properly, when its standard input ends.
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

import msgspec

from scripts.bench.band import Band
from scripts.bench.epoll_ws import TICK, Address, Loop
from scripts.bench.processes import BenchError, now_s, raise_file_limit
from scripts.bench.score import Pulse, Score, deliveries, waited_s

PHASES = ("join", "play", "check", "leave")

_PERIOD_S = 1.0
# Whoever was just cut, and whoever sleeps, is back by then.
_CALM_S = 25.0
_LOOK_S = 10.0
_LOOKS = 6
# Longer than the grace of those who vanished instead of leaving.
_STILL_S = 2.5
_LEAVE_S = 10.0


class Plan(msgspec.Struct):
    """What to do.

    Attributes:
        name: sessions begin with it.
        addresses: of the servers: family, host, port, and the host as it is named in requests.
        seconds: from the first join to the last command.
        ramp: how much of that the members take to come.
        filling: how much more of it they take to fill what the servers remember; 0 for no haste.
    """

    name: str
    addresses: list[tuple[int, str, int, str]]
    bands: int
    members: int
    seconds: float
    ramp: float
    filling: float
    seed: int
    pace: float


class Driver:
    """Lets the bands of ``plan`` come, play and leave."""

    def __init__(self, plan: Plan, loop: Loop) -> None:
        servers = [
            Address(family, (host, port), named) for family, host, port, named in plan.addresses
        ]
        self._plan = plan
        self._loop = loop
        self._score = Score()
        self._pulse = Pulse(loop, self._score)
        self._phase = PHASES[0]
        self._stopped = False
        self._totals: dict[str, dict[str, object]] = {}
        self._bands = [
            Band(
                loop,
                self._score,
                f"{plan.name}-{number}",
                number,
                plan.members,
                servers,
                chance=random.Random(f"{plan.seed}/{number}"),  # noqa: S311  # no secret
                pace=plan.pace,
            )
            for number in range(plan.bands)
        ]

    def stop(self) -> None:
        """Come to an end."""
        self._stopped = True

    def run(self) -> None:
        """All of it."""
        plan, bands = self._plan, self._bands
        self._loop.after(_PERIOD_S, self._beat)
        with self._during("join"):
            for band in bands:
                wait_s = band.chance.uniform(0, plan.ramp / 2)
                self._loop.after(wait_s, lambda band=band: band.gather(plan.ramp / 2))
            self._wait(lambda: self._stopped, plan.ramp)
        with self._during("play"):
            for band in bands:
                band.begin(plan.filling)
            self._wait(lambda: self._stopped, plan.seconds - plan.ramp)
        with self._during("check"):
            self._check()
        with self._during("leave"):
            for band in bands:
                band.leave()
            if not self._wait(lambda: all(band.gone() for band in bands), _LEAVE_S):
                self._score.counts["cutOff"] += 1
            for band in bands:
                band.cut_off()
        self._say({"row": self._row(), "end": self._end()})

    def _check(self) -> None:
        """Let everybody come back, and compare what they are shown."""
        bands = self._bands
        for band in bands:
            band.calm()
        if not self._wait(lambda: all(band.complete() for band in bands), _CALM_S):
            missing = sum(not (each.here or each.away) for band in bands for each in band.phones)
            self._score.find("missing", f"{missing} members did not come back")
        for _ in range(_LOOKS):
            for band in bands:
                band.look()
            self._wait(lambda: all(band.looked() for band in bands), _LOOK_S)
            if all(band.truth.settled() for band in bands):
                break
            self._wait(lambda: False, _STILL_S)
        for band in bands:
            band.truth.judge()

    def _wait(self, ended: Callable[[], bool], seconds: float) -> bool:
        return self._loop.run_until(ended, seconds)

    def _beat(self) -> None:
        self._loop.after(_PERIOD_S, self._beat)
        now = now_s()
        for band in self._bands:
            band.sweep(now)
        self._say({"row": self._row()})

    def _row(self) -> dict[str, object]:
        here = sum(phone.here for band in self._bands for phone in band.phones)
        return {"phase": self._phase, "connections": here, **self._pulse.row()}

    def _end(self) -> dict[str, object]:
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

    def _say(self, document: dict[str, object]) -> None:
        print(json.dumps(document), flush=True)

    @contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """Count what happens meanwhile."""
        self._phase = phase
        began, cpu, waited = now_s(), time.process_time(), waited_s()
        kinds_before, counts_before = self._loop.kinds.copy(), self._score.counts.copy()
        yield
        seconds = now_s() - began
        kinds = self._loop.kinds - kinds_before
        counts = self._score.counts - counts_before
        handed = deliveries(kinds)
        self._totals[phase] = {
            "seconds": round(seconds, 2),
            "deliveries": handed,
            "deliveriesPerSecond": round(handed / seconds, 1),
            "ticksPerSecond": round(kinds[TICK] / seconds, 1),
            "perSecond": {name: round(count / seconds, 3) for name, count in counts.items()},
            "driverCpu": round((time.process_time() - cpu) / seconds, 3),
            "driverWaited": round((waited_s() - waited) / seconds, 3),
            "latencyMs": self._score.all_in_all(),
        }


def main() -> int:
    """Run a plan."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    raise_file_limit(2 * plan.bands * plan.members)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with Loop() as loop:
        driver = Driver(plan, loop)
        # A Ctrl-C is for who started this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: driver.stop())
        loop.read(sys.stdin.fileno(), lambda: _at_end(loop, driver))
        driver.run()
    return 0


def _at_end(loop: Loop, driver: Driver) -> None:
    if not os.read(sys.stdin.fileno(), 1024):
        loop.read_no_more(sys.stdin.fileno())
        driver.stop()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(1)
