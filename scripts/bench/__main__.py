#!/usr/bin/env python3
"""Measure a BandSync server, beside yardsticks that run on the same machine in the same minute.

Servers run on the first core, the load generator on the others. While one server is measured,
the rest are suspended; their windows alternate, so that noise of the machine meets all alike.
Each sub-command prints one line of JSON. `cpuUs…` is microseconds of the server's user and system
time, `…Ms` milliseconds, `…Kb` 1024 bytes, `…Cpu` a fraction of one core.
"""

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from scripts.bench.cluster import cluster, remote
from scripts.bench.commands import commands
from scripts.bench.commit import commit
from scripts.bench.fleet import Fleet, masked
from scripts.bench.gig import load, soak
from scripts.bench.load import (
    SETTLE_S,
    TICK,
    WARM_UP_S,
    Chatter,
    Latencies,
    after,
    capture,
    join,
    settle,
)
from scripts.bench.migrate import migrate
from scripts.bench.processes import (
    BenchError,
    bandsync,
    now_s,
    percentile,
    pin_generator,
    raise_file_limit,
    spread,
    yardstick,
)
from scripts.bench.resume import resume
from scripts.bench.rolling import rolling
from scripts.bench.scale import sessions, workers
from scripts.bench.windows import Contender, Window, alternate, cpu_us, measure, median_ratio, total

# A whole number of ping and statistics periods.
_IDLE_S = 5.0


def fanout(connections: int, members: int, seconds: float) -> dict[str, object]:
    """Ticks of playing sessions: CPU per delivery, latency, memory."""
    sessions = connections // members
    latencies = Latencies()
    measured: list[float] = []
    with ExitStack() as stack:
        server = stack.enter_context(bandsync(connections, members))
        empty = server.rss_kb()
        fleet = stack.enter_context(Fleet(server.port))
        leaders = join(fleet, sessions, members)
        fleet.run_for(SETTLE_S)
        full = server.rss_kb()
        idle = measure(server, fleet, _IDLE_S)
        for leader in leaders:
            leader.send(masked({"type": "play"}))
        fleet.run_for(WARM_UP_S)
        payload = capture(fleet, leaders[0], TICK)

        def note() -> None:
            measured.extend(latencies.take())

        latencies.watch(fleet.clients[::16])
        contenders = {"bandsync": Contender(server, fleet, start=latencies.take, rest=note)}
        for name in ("bare", "send_message"):
            contenders[name] = _yardstick(stack, name, sessions, members, payload)
        settle()
        windows = alternate(contenders, seconds)
    result: dict[str, object] = {
        "bench": "fanout",
        "connections": sessions * members,
        "sessions": sessions,
        "payloadBytes": len(payload),
        "windowSeconds": round(seconds, 1),
        "slices": len(windows["bare"]),
        "latencyMs": spread(measured),
        "latencySamples": len(measured),
        "rssPerConnectionKb": round((full - empty) / (sessions * members), 2),
        # Pings and statistics, which the yardsticks do not have; part of BandSync's figure below.
        "idleServerCpu": round(idle.server_cpu_s / idle.seconds, 3),
    }
    costs: dict[str, float] = {}
    for name, parts in windows.items():
        whole = total(parts)
        costs[name] = _tick_cost(whole)
        result[name] = {
            "cpuUsPerDelivery": round(costs[name], 2),
            "cpuUsPerSlice": [round(_tick_cost(part), 2) for part in parts],
            "deliveriesPerSecond": round(whole.frames() / whole.seconds),
            "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    return result | {
        "ratioToBare": round(costs["bandsync"] / costs["bare"], 2),
        "ratioToSendMessage": round(costs["bandsync"] / costs["send_message"], 2),
        "medianRatioToBare": median_ratio(windows["bandsync"], windows["bare"], _tick_cost),
        "medianRatioToSendMessage": median_ratio(
            windows["bandsync"], windows["send_message"], _tick_cost
        ),
    }


def _tick_cost(window: Window) -> float:
    return cpu_us(window, window.frames())


def _yardstick(
    stack: ExitStack, name: str, sessions: int, members: int, payload: bytes
) -> Contender:
    server = stack.enter_context(
        yardstick(name, str(sessions * members), str(members), payload.decode())
    )
    fleet = stack.enter_context(Fleet(server.port))
    # Member by member, as BandSync's sessions were filled.
    for _ in range(members):
        fleet.open(range(sessions))
    fleet.run_until(lambda: bool(fleet.kinds))
    return Contender(server, fleet)


def many_connections(connections: int, members: int) -> dict[str, object]:
    """How fast connections are accepted, and what an idle one keeps."""
    sessions = connections // members
    count = sessions * members
    result: dict[str, object] = {"bench": "connections", "connections": count, "members": members}
    with bandsync(count, members) as server, Fleet(server.port) as fleet:
        empty, cpu, began = server.rss_kb(), server.cpu_s(), now_s()
        fleet.open(index // members for index in range(count))
        took = now_s() - began
        result["acceptedPerSecond"] = round(count / took)
        result["cpuUsPerAccept"] = round((server.cpu_s() - cpu) / count * 1e6)
        fleet.run_for(WARM_UP_S)
        result["rssPerConnectionKb"] = round((server.rss_kb() - empty) / count, 2)
    with bandsync(count, members) as server, Fleet(server.port) as fleet:
        empty, cpu, began = server.rss_kb(), server.cpu_s(), now_s()
        fleet.open((index // members for index in range(count)), masked({"type": "join_session"}))
        fleet.run_until(lambda: fleet.kinds[b"snap"] == count)
        took = now_s() - began
        result["joinedPerSecond"] = round(count / took)
        result["cpuUsPerJoin"] = round((server.cpu_s() - cpu) / count * 1e6)
        fleet.run_for(WARM_UP_S)
        result["rssPerJoinedKb"] = round((server.rss_kb() - empty) / count, 2)
        # Ten seconds in which everybody is pinged twice.
        idle = measure(server, fleet, 10.0)
        result["rssPerJoinedAfterPingsKb"] = round((server.rss_kb() - empty) / count, 2)
        result["idleServerCpu"] = round(idle.server_cpu_s / idle.seconds, 3)
        result["gone"] = fleet.gone
    return result


def slow_consumer(
    sessions: int, members: int, seconds: float, chats_per_second: float
) -> dict[str, object]:
    """What a member that stops reading costs the others, while the band chats a lot."""
    latencies = Latencies()
    dropped: dict[int, float] = {}
    phases: dict[str, dict[str, float]] = {}
    with bandsync(sessions * members, members) as server, Fleet(server.port) as fleet:
        leaders = join(fleet, sessions, members, slow=True)
        sleepers = fleet.clients[-sessions:]
        latencies.watch(fleet.clients[sessions:-sessions])
        for leader in leaders:
            leader.on_text = _watch_for_drop(leader.session, dropped)
            leader.send(masked({"type": "play"}))
        chatter = Chatter(fleet, leaders, chats_per_second)
        settle()

        def phase(name: str, ended: Callable[[], bool]) -> None:
            latencies.take()
            chatter.run_until(ended)
            phases[name] = spread(latencies.take())

        chatter.run_until(after(WARM_UP_S))
        phase("before", after(seconds))
        for sleeper in sleepers:
            fleet.stop_reading(sleeper)
        began = now_s()
        phase("during", lambda: len(dropped) == sessions)
        phase("after", after(seconds))
        closed = closes(server.get("/metrics"), 1013)
    if closed != sessions:
        raise BenchError(f"{closed} of {sessions} slow consumers were closed with 1013")
    waits = [at - began for at in dropped.values()]
    return {
        "bench": "slow",
        "sessions": sessions,
        "members": members,
        "chatsPerSecondAndSession": chats_per_second,
        "chatBytes": len(chatter.frame),
        "tickLatencyMs": phases,
        "p99BeforeMs": phases["before"]["p99"],
        "p99DuringMs": phases["during"]["p99"],
        "p99AfterMs": phases["after"]["p99"],
        "closedWith1013": closed,
        "secondsToDrop": {"median": round(percentile(waits, 0.5), 2), "max": round(max(waits), 2)},
        "windowSeconds": seconds,
    }


def closes(metrics: str, code: int) -> int:
    """How many connections the server closed with ``code``, by its own count."""
    found = re.search(
        rf'^bandsync_\w*clos\w*\{{[^}}]*"{code}"[^}}]*\}} (\S+)', metrics, re.MULTILINE
    )
    return int(float(found[1])) if found else 0


def _watch_for_drop(session: int, dropped: dict[int, float]) -> Callable[[bytes, int, int], None]:
    def look(data: bytes, start: int, end: int) -> None:
        if data.startswith(b'{"type":"member_connection"', start):
            dropped[session] = now_s()

    return look


def main() -> int:
    """Run one benchmark."""
    options = vars(parse_arguments())
    bench = _BENCHES[options.pop("bench")]
    pin_generator()
    # As an exception, like Ctrl-C: whatever was started, or suspended, must not stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        members = options.get("members", 1)
        bands = options.get("sessions", options.get("bands", 0))
        connections = options.get("connections", bands * members)
        raise_file_limit(3 * connections)
        result = bench.run(**options)
    except BenchError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    findings = result.get("findings", [])
    assert isinstance(findings, list)
    for finding in findings:
        print(f"bench.py: {finding}", file=sys.stderr)
    return 1 if findings else 0


class Bench(NamedTuple):
    """A benchmark, and the arguments it takes with their defaults."""

    run: Callable[..., dict[str, object]]
    defaults: dict[str, float | str]


def parse_arguments() -> argparse.Namespace:
    """Which benchmark, and how large."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, bench in _BENCHES.items():
        meaning = bench.run.__doc__
        sub = benches.add_parser(name, help=meaning, description=meaning)
        for argument, default in bench.defaults.items():
            flag = f"--{argument.replace('_', '-')}"
            if isinstance(default, bool):
                sub.add_argument(flag, action="store_true", help=_HELP[argument])
            else:
                sub.add_argument(flag, type=type(default), default=default, help=_HELP[argument])
    return parser.parse_args()


_LOAD: dict[str, float | str] = {
    "bands": 100,
    "minutes": 1.0,
    "members": 8,
    "workers": 1,
    "servers": "",
    "redis": False,
    "seed": 1,
    "pace": 1.0,
    "json": "",
    "plot": "",
}
_BENCHES = {
    "fanout": Bench(fanout, {"connections": 1000, "members": 8, "seconds": 10.0}),
    "commands": Bench(commands, {"sessions": 25, "members": 8, "seconds": 10.0, "redis": False}),
    "connections": Bench(many_connections, {"connections": 5000, "members": 8}),
    "slow": Bench(
        slow_consumer, {"sessions": 25, "members": 8, "seconds": 5.0, "chats_per_second": 20.0}
    ),
    "commit": Bench(commit, {"callers": 50, "members": 8, "seconds": 10.0}),
    "cluster": Bench(cluster, {"sessions": 25, "members": 8, "seconds": 10.0}),
    "remote": Bench(remote, {"seconds": 10.0}),
    "resume": Bench(resume, {"connections": 1000, "members": 8, "seconds": 25.0, "alone": False}),
    "rolling": Bench(rolling, {"sessions": 10, "members": 4, "seconds": 6.0}),
    "migrate": Bench(migrate, {"sessions": 1000, "members": 1, "seconds": 2.0}),
    "sessions": Bench(sessions, {"few": 125, "many": 1000, "members": 8, "seconds": 10.0}),
    "workers": Bench(workers, {"sessions": 200, "members": 8, "seconds": 20.0, "processes": 2}),
    "load": Bench(load, _LOAD),
    "soak": Bench(soak, _LOAD),
}

_HELP = {
    "alone": "all members of a session are on the server that dies, not every other one",
    "bands": "how many (default %(default)s)",
    "callers": "how many commit at the same time (default %(default)s)",
    "chats_per_second": "long messages of each leader (default %(default)s)",
    "connections": "how many, in sessions of --members (default %(default)s)",
    "few": "sessions of the one server (default %(default)s)",
    "many": "sessions of the other one (default %(default)s)",
    "processes": "workers of the server beside the one of a single process (default %(default)s)",
    "json": "file for the summary and what was measured each second",
    "members": "of each session (default %(default)s)",
    "minutes": "from the first join to the last command (default %(default)s)",
    "pace": "how much livelier than usual bands are (default %(default)s)",
    "plot": "file for a picture of it, SVG",
    "redis": "a server of our own keeps its sessions in Redis (commands: measured, too)",
    "seed": "the same one makes the bands wish the same (default %(default)s)",
    "servers": "addresses, with commas, instead of servers of our own; ADMIN_TOKEN is theirs",
    "seconds": "how long each measurement takes (default %(default)s)",
    "sessions": "how many (default %(default)s)",
    "workers": "processes of a server of our own; several of them need Redis, and get one",
}


if __name__ == "__main__":
    sys.exit(main())
