"""Benchmarks `load` and `soak`: bands that behave like bands in concerts (gigs)."""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from json import dumps
from pathlib import Path
from statistics import fmean
from typing import Unpack

from scripts.bench.documents import (
    DriverEnd,
    LoadOptions,
    LoadPlan,
    LoadRow,
    PhaseReport,
    figure,
)
from scripts.bench.hosts import (
    LoadTarget,
    RemoteTarget,
    ResourceUsage,
    addresses_of,
    start_target,
)
from scripts.bench.load_run import LoadRun
from scripts.bench.plot import picture
from scripts.bench.processes import BenchError, now_s, percentile
from scripts.bench.redis import new_redis
from scripts.bench.report import ProgressView
from scripts.bench.trend import WARM_UP, bottleneck, leaks, left_behind, merged, trend

_LONGEST_RAMP_S = 30.0
# Ramp and filling together are the tenth that is ignored in the trend of memory.
_RAMP = 0.05
_FILLING = WARM_UP - _RAMP
# Longer than the resume grace.
_RELEASE_S = 45.0
_POLL_S = 1.0
_TENTH = 0.1


def load(**options: Unpack[LoadOptions]) -> dict[str, object]:
    """Bands that join, play, chat, leave, disconnect and pause for some minutes.

    Every message is checked. Progress goes to standard error. Ctrl-C ends the play early.
    """
    return _run("load", **options)


def soak(**options: Unpack[LoadOptions]) -> dict[str, object]:
    """The same: does memory stay flat, and is everything released at the end?"""
    return _run("soak", **options)


def _run(
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
    remote = addresses_of(servers)
    if bands < 1 or not 1 <= members <= 64 or seconds < 1 or pace <= 0 or workers < 1:
        raise BenchError("there must be at least one band, member, second and worker")
    if remote and (workers > 1 or redis):
        raise BenchError("--workers and --redis cannot be used with --servers")
    what = {
        "bands": bands,
        "members": members,
        "servers": servers or ("memory" if workers == 1 and not redis else "redis"),
        "workers": None if remote else workers,
        "seed": seed,
        "pace": pace,
    }
    with ExitStack() as stack:
        if remote:
            addresses = [(host, port) for _, host, port, _ in remote]
            token = os.environ.get("ADMIN_TOKEN")
            target: LoadTarget = stack.enter_context(RemoteTarget(addresses, token))
        else:
            url = stack.enter_context(new_redis()).url() if redis or workers > 1 else None
            # Members that leave and members that join overlap.
            own = start_target(2 * bands * members, members, workers=workers, redis_url=url)
            target = stack.enter_context(own)
            remote = addresses_of(f"127.0.0.1:{own.port}")
        # Fails at once if a server does not answer.
        target.live_counts()
        empty = _idle_usage(target)
        before = target.live_counts()
        plan = LoadPlan(
            name=f"load-{secrets.token_hex(4)}",
            addresses=remote,
            bands=bands,
            members=members,
            seconds=seconds,
            ramp=min(_RAMP * seconds, _LONGEST_RAMP_S),
            # Filling a buffer once is no leak: a soak does so before it looks for leaks.
            filling=_FILLING * seconds if bench == "soak" else 0.0,
            seed=seed,
            pace=pace,
        )
        title = f"{bench}: {bands} bands of {members}"
        progress = stack.enter_context(ProgressView(title, seconds))
        run = LoadRun(target)
        # Polling costs the servers a little. A load measures latencies, so it does not poll.
        with target.poll_metrics() if bench == "soak" else nullcontext():
            end = run.run(plan, progress)
        findings = [f"{name}: {count} times" for name, count in end["findings"].items()]
        result = {"bench": bench, **what, **summary(end, run)}
        if bench == "soak":
            findings += leaks(run.load_rows)
            result["before"] = before.current | _must_return(empty)
            result["after"], left = _wait_for_release(target, before.current | _must_return(empty))
            findings += left
            result["memoryGrowth"] = _growth(run.load_rows, WARM_UP)
            # Slow filling grows less and less. A leak does not.
            result["memoryGrowthLastHalf"] = _growth(run.load_rows, 0.5)
        closed = target.live_counts().closed - before.closed
        result |= {"closedByServers": dict(closed), "findings": findings}
        result["examples"] = end["examples"]
    where = servers if servers else f"{workers} process(es)"
    cost = _cost_us(end["phases"]["play"])
    subtitle = _subtitle(where, end, cost, len(findings))
    _write_file(plot, lambda: picture(run.load_rows, title.capitalize(), subtitle))
    _write_file(json, lambda: _json_document(result, run.series.rows))
    return result


def summary(end: DriverEnd, run: LoadRun) -> dict[str, object]:
    """The figures of a load."""
    load_rows = run.load_rows
    playing = [row for row in load_rows if row["phase"] == "play"]
    phases = end["phases"]
    for name, tally in run.tallies.items():
        cpu_s = tally.last.cpu_s - tally.first.cpu_s
        if name in phases:
            phases[name]["serverCpuSeconds"] = round(cpu_s, 3)
    play = phases["play"]
    return {
        "stopped": end["stopped"],
        "seconds": round(sum(each["seconds"] for each in phases.values()), 1),
        "phases": phases,
        "deliveries": end["deliveries"],
        "deliveriesPerSecond": play["deliveriesPerSecond"],
        "cpuUsPerDelivery": _cost_us(play),
        # Latencies are those of single commands, events, ticks, joins and resumes.
        "latencyMs": play["latencyMs"],
        "beat": end["beat"],
        "counts": end["counts"],
        "errors": end["errors"],
        "closes": end["closes"],
        "memoryMb": _summary_of(load_rows, "memoryMb"),
        "tasks": _summary_of(load_rows, "tasks"),
        "driver": {
            "cpu": play["driverCpu"],
            "waitedForACore": play["driverWaited"],
            "lateMs": _late(playing),
            "bottleneck": bottleneck(playing),
        },
        "serverWaitedForACore": _mean(playing, "serverWaited"),
    }


def _cost_us(play: PhaseReport) -> float | None:
    """CPU of the servers per delivery, µs; None where it is not known."""
    if not play["deliveries"] or "serverCpuSeconds" not in play:
        return None
    return round(play["serverCpuSeconds"] / play["deliveries"] * 1e6, 2)


def _summary_of(rows: list[LoadRow], column: str) -> dict[str, float] | None:
    values = [value for row in rows if (value := figure(row, column)) is not None]
    if not values:
        return None
    tenth = max(1, int(len(values) * _TENTH))
    return {
        "firstTenth": round(fmean(values[:tenth]), 2),
        "lastTenth": round(fmean(values[-tenth:]), 2),
        "most": round(max(values), 2),
    }


def _late(rows: list[LoadRow]) -> dict[str, float] | None:
    late = [row["driverLagMs"] for row in rows]
    return {"median": percentile(late, 0.5), "max": max(late)} if late else None


def _mean(rows: list[LoadRow], column: str) -> float | None:
    values = [value for row in rows if (value := figure(row, column)) is not None]
    return round(fmean(values), 3) if values else None


def _must_return(usage: ResourceUsage | None) -> dict[str, float]:
    """Resources that must return to their initial values."""
    if usage is None:
        return {}
    used: dict[str, float] = {"descriptors": usage.descriptors}
    if usage.threads is not None:
        used["threads"] = usage.threads
    return used


def _idle_usage(target: LoadTarget) -> ResourceUsage | None:
    """The resources of the idle servers, once they are constant."""
    last = target.usage()
    for _ in range(10):
        time.sleep(_POLL_S)
        usage = target.usage()
        if usage is not None and last is not None and _must_return(usage) == _must_return(last):
            break
        last = usage
    return target.usage()


def _growth(rows: list[LoadRow], warm_up: float) -> float | None:
    measured = [(row["t"], row["memoryMb"]) for row in rows if row["memoryMb"] is not None]
    memory = trend([at for at, _ in measured], [value for _, value in measured], warm_up)
    return None if memory is None else round(memory.growth, 4)


def _wait_for_release(
    target: LoadTarget, before: dict[str, float]
) -> tuple[dict[str, float], list[str]]:
    """Wait until all counts are as ``before``; return them, and the leftovers as sentences."""
    deadline = now_s() + _RELEASE_S
    while True:
        after = target.live_counts().current | _must_return(target.usage())
        left = left_behind(before, after)
        if not left or now_s() > deadline:
            return after, left
        time.sleep(_POLL_S)


def _subtitle(servers: str, end: DriverEnd, cost: float | None, findings: int) -> str:
    rate = end["phases"]["play"]["deliveriesPerSecond"]
    return (
        f"{servers}, {rate:,.0f} deliveries/s, "
        f"{'-' if cost is None else cost} µs of CPU each, {findings} findings"
    )


def _json_document(result: dict[str, object], rows: list[LoadRow]) -> str:
    return dumps(result | {"rows": [merged([row]) for row in rows]}, indent=1) + "\n"


def _write_file(path: str, text: Callable[[], str]) -> None:
    if path:
        Path(path).write_text(text(), encoding="utf-8")
