"""Bands that behave like bands, against our own servers or given ones; bench.py starts it."""

import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from json import dumps, loads
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from scripts.bench.hosts import Elsewhere, Host, Vitals, hosted, places_of
from scripts.bench.plot import picture
from scripts.bench.processes import ROOT, BenchError, now_s, percentile
from scripts.bench.redis import new_redis
from scripts.bench.report import Show
from scripts.bench.trend import WARM_UP, Row, Series, bottleneck, leaks, left_behind, merged, trend

_MOST_RAMP_S = 30.0
# Together the tenth that says nothing about memory.
_RAMP = 0.05
_FILLING = WARM_UP - _RAMP
# What comes after the last command: everybody is back, is compared, and leaves.
_END_S = 120.0
# Longer than the grace of whoever vanished.
_COME_BACK_S = 45.0
_LOOK_S = 1.0
_STOP_S = 5.0
_TENTH = 0.1


def load(**options: Any) -> dict[str, object]:  # noqa: ANN401  # those of `_perform`
    """Bands that join, play, talk, leave, lose their connections and sleep, for some minutes.

    Everything that a member is told is checked. Progress goes to standard error; Ctrl-C lets
    everybody leave, and the summary follows.
    """
    return _perform("load", **options)


def soak(**options: Any) -> dict[str, object]:  # noqa: ANN401  # those of `_perform`
    """The same: do memory, descriptors and tasks stay flat, and is everything let go at the end?"""
    return _perform("soak", **options)


def _perform(
    bench: str,
    *,
    bands: int,
    minutes: float,
    members: int,
    workers: int,
    servers: str,
    redis: bool,
    seed: int,
    pace: float,
    json: str,
    plot: str,
) -> dict[str, object]:
    seconds = minutes * 60
    given = places_of(servers)
    if bands < 1 or not 1 <= members <= 64 or seconds < 1 or pace <= 0 or workers < 1:
        raise BenchError("there must be at least one band, member, second and worker")
    if given and (workers > 1 or redis):
        raise BenchError("--servers are there already: --workers and --redis are for our own")
    what = {
        "bands": bands,
        "members": members,
        "servers": servers or ("memory" if workers == 1 and not redis else "redis"),
        "workers": None if given else workers,
        "seed": seed,
        "pace": pace,
    }
    with ExitStack() as stack:
        if given:
            places = [(host, port) for _, host, port, _ in given]
            host: Host = stack.enter_context(Elsewhere(places, os.environ.get("ADMIN_TOKEN")))
        else:
            url = stack.enter_context(new_redis()).url() if redis or workers > 1 else None
            # Those that leave and those that come overlap.
            own = hosted(2 * bands * members, members, workers=workers, redis_url=url)
            host = stack.enter_context(own)
            given = places_of(f"127.0.0.1:{own.port}")
        empty = _settled(host)
        before = host.census()
        plan = {
            "name": f"load-{secrets.token_hex(4)}",
            "addresses": given,
            "bands": bands,
            "members": members,
            "seconds": seconds,
            "ramp": min(_RAMP * seconds, _MOST_RAMP_S),
            # What fills up once is no leak: in a soak it does so while that is not looked for.
            "filling": _FILLING * seconds if bench == "soak" else 0.0,
            "seed": seed,
            "pace": pace,
        }
        title = f"{bench}: {bands} bands of {members}"
        show = stack.enter_context(Show(title, seconds))
        gig = Gig(host)
        # To be asked costs them a little: not where latencies are what counts.
        with host.asked() if bench == "soak" else nullcontext():
            end = gig.run(plan, show)
        findings = [f"{name}: {count} times" for name, count in end["findings"].items()]
        result = {"bench": bench, **what, **summary(end, gig)}
        if bench == "soak":
            findings += leaks(gig.body)
            result["before"] = before.there | _used(empty)
            result["after"], left = _let_go(host, before.there | _used(empty))
            findings += left
            result["memoryGrowth"] = _growth(gig.body, WARM_UP)
            # What fills up slowly grows less and less; what leaks does not.
            result["memoryGrowthLastHalf"] = _growth(gig.body, 0.5)
        closed = host.census().closed - before.closed
        result |= {"closedByServers": dict(closed), "findings": findings}
        result["examples"] = end["examples"]
    _write(plot, lambda: picture(gig.body, title.capitalize(), _subtitle(result)))
    _write(json, lambda: _document(result, gig.series.rows))
    return result


class Tally(NamedTuple):
    """What the servers had used when a phase began and ended."""

    first: Vitals
    last: Vitals


class Gig:
    """Runs the driver, and watches the servers meanwhile.

    Attributes:
        series: all that was measured, bounded.
        tallies: by phase.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.series = Series()
        self.tallies: dict[str, Tally] = {}
        self._previous: Vitals | None = host.vitals()

    @property
    def body(self) -> list[Row]:
        """The time in which the bands came and played."""
        return [row for row in self.series.rows if row["phase"] in {"join", "play"}]

    def run(self, plan: dict[str, Any], show: Show) -> dict[str, Any]:
        """All of it; what the driver says at the end.

        Raises:
            BenchError: it ended without a word, or does not end.
        """
        deadline = now_s() + plan["seconds"] + _END_S
        with _driver(plan) as driver, _interruptible() as interrupted:
            assert driver.stdout is not None
            assert driver.stdin is not None
            stopping = False
            for text in _lines(driver.stdout.fileno(), interrupted):
                if interrupted and not stopping:
                    stopping = True
                    driver.stdin.close()
                    deadline = min(deadline, now_s() + _END_S)
                if now_s() > deadline or len(interrupted) > 1:
                    raise BenchError("the driver was ended before it was through")
                if not text:
                    continue
                said = loads(text)
                row = self._row(said["row"])
                self.series.add(row)
                show.tell(row)
                if "end" in said:
                    end: dict[str, Any] = said["end"]
                    return end
        raise BenchError("the driver failed")

    def _row(self, told: dict[str, Any]) -> Row:
        """What the driver told of a second, and what the servers used in it."""
        vitals = self._host.vitals()
        seconds, counts, latency = told["seconds"], told["counts"], told["latencyMs"]
        command, tick = latency["command"] or {}, latency["tick"] or {}
        row: Row = {
            "t": told["t"],
            "phase": told["phase"],
            "connections": told["connections"],
            "deliveriesPerS": told["deliveries"] / seconds,
            "ticksPerS": told["ticks"] / seconds,
            "commandsPerS": counts.get("commands", 0) / seconds,
            "joinsPerS": (counts.get("joins", 0) + counts.get("resumes", 0)) / seconds,
            "commandP50Ms": command.get("p50"),
            "commandP99Ms": command.get("p99"),
            "tickP50Ms": tick.get("p50"),
            "tickP99Ms": tick.get("p99"),
            "driverCpu": told["driverCpu"],
            "driverWaited": told["driverWaited"],
            "driverLagMs": told["driverLagMs"],
            "errors": told["errors"],
            "closes": told["closes"],
            "findings": told["findings"],
            "serverCpu": None,
            "serverWaited": None,
            "memoryMb": None,
            "descriptors": None,
            "tasks": None,
        }
        if vitals is not None:
            before = self._previous or vitals
            row["serverCpu"] = max(0.0, vitals.cpu_s - before.cpu_s) / seconds
            if vitals.waited_s is not None and before.waited_s is not None:
                row["serverWaited"] = max(0.0, vitals.waited_s - before.waited_s) / seconds
            row["memoryMb"] = vitals.memory_mb
            row["descriptors"] = vitals.descriptors
            row["tasks"] = vitals.tasks
            tally = self.tallies.get(told["phase"], Tally(before, vitals))
            self.tallies[told["phase"]] = Tally(tally.first, vitals)
        self._previous = vitals
        return {
            name: round(each, 4) if isinstance(each, float) else each for name, each in row.items()
        }


def summary(end: dict[str, Any], gig: Gig) -> dict[str, object]:
    """What came of it, in figures."""
    body = gig.body
    playing = [row for row in body if row["phase"] == "play"]
    phases = end["phases"]
    for name, tally in gig.tallies.items():
        cpu_s = tally.last.cpu_s - tally.first.cpu_s
        if name in phases:
            phases[name]["serverCpuSeconds"] = round(cpu_s, 3)
    play = phases["play"]
    cost = None
    if play["deliveries"] and "serverCpuSeconds" in play:
        cost = round(play["serverCpuSeconds"] / play["deliveries"] * 1e6, 2)
    return {
        "stopped": end["stopped"],
        "seconds": round(sum(each["seconds"] for each in phases.values()), 1),
        "phases": phases,
        "deliveries": end["deliveries"],
        "deliveriesPerSecond": play["deliveriesPerSecond"],
        "cpuUsPerDelivery": cost,
        # Ticks, events, commands, joins and resumes together, for one second of one member.
        "latencyMs": play["latencyMs"],
        "beat": end["beat"],
        "counts": end["counts"],
        "errors": end["errors"],
        "closes": end["closes"],
        "memoryMb": _course(body, "memoryMb"),
        "tasks": _course(body, "tasks"),
        "driver": {
            "cpu": play["driverCpu"],
            "waitedForACore": play["driverWaited"],
            "lateMs": _late(playing),
            "bottleneck": bottleneck(playing),
        },
        "serverWaitedForACore": _mean(playing, "serverWaited"),
    }


def _course(rows: list[Row], column: str) -> dict[str, float] | None:
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return None
    tenth = max(1, int(len(values) * _TENTH))
    return {
        "firstTenth": round(fmean(values[:tenth]), 2),
        "lastTenth": round(fmean(values[-tenth:]), 2),
        "most": round(max(values), 2),
    }


def _late(rows: list[Row]) -> dict[str, float] | None:
    late = [row["driverLagMs"] for row in rows]
    return {"median": percentile(late, 0.5), "max": max(late)} if late else None


def _mean(rows: list[Row], column: str) -> float | None:
    values = [row[column] for row in rows if row[column] is not None]
    return round(fmean(values), 3) if values else None


def _used(vitals: Vitals | None) -> dict[str, float]:
    """What must come back to what it was."""
    if vitals is None:
        return {}
    used: dict[str, float] = {"descriptors": vitals.descriptors}
    if vitals.threads is not None:
        used["threads"] = vitals.threads
    return used


def _settled(host: Host) -> Vitals | None:
    """What the servers use with nobody there, once that stays the same."""
    last = host.vitals()
    for _ in range(10):
        time.sleep(_LOOK_S)
        vitals = host.vitals()
        if vitals is not None and last is not None and _used(vitals) == _used(last):
            break
        last = vitals
    return host.vitals()


def _growth(rows: list[Row], warm_up: float) -> float | None:
    seen = [row for row in rows if row["memoryMb"] is not None]
    memory = trend([row["t"] for row in seen], [row["memoryMb"] for row in seen], warm_up)
    return None if memory is None else round(memory.growth, 4)


def _let_go(host: Host, before: dict[str, float]) -> tuple[dict[str, float], list[str]]:
    """Wait until everything is as ``before``; what it is, and what is not, in sentences."""
    deadline = now_s() + _COME_BACK_S
    while True:
        after = host.census().there | _used(host.vitals())
        left = left_behind(before, after)
        if not left or now_s() > deadline:
            return after, left
        time.sleep(_LOOK_S)


@contextmanager
def _driver(plan: dict[str, Any]) -> Iterator["subprocess.Popen[bytes]"]:
    """The driver's process; it does not outlive this, nor us."""
    process = subprocess.Popen(  # noqa: S603  # our own script
        [sys.executable, str(ROOT / "scripts" / "benchdriver.py"), dumps(plan)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
    """Signals that would end this, in the order in which they come."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda number, frame: came.append(number)) for each in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _lines(fd: int, interrupted: list[int]) -> Iterator[bytes]:
    """The lines that come; an empty one at least twice a second, so that deadlines are seen."""
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


def _subtitle(result: dict[str, Any]) -> str:
    where = result["servers"] if result["workers"] is None else f"{result['workers']} process(es)"
    cost = result["cpuUsPerDelivery"]
    return (
        f"{where}, {result['deliveriesPerSecond']:,.0f} deliveries/s, "
        f"{'-' if cost is None else cost} µs of CPU each, {len(result['findings'])} findings"
    )


def _document(result: dict[str, object], rows: list[Row]) -> str:
    return dumps(result | {"rows": [merged([row]) for row in rows]}, indent=1) + "\n"


def _write(path: str, text: Callable[[], str]) -> None:
    if path:
        Path(path).write_text(text(), encoding="utf-8")
