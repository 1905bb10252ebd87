"""Measure a BandSync server beside yardsticks, on the same machine in the same minute.

Servers run on the first core, the load generator on the others. While one server is measured, the
others are suspended. Their windows alternate, so that noise of the machine hits all alike.

Each sub-command prints one line of JSON. `cpuUs…` is user and system time of the server in
microseconds, `…Ms` milliseconds, `…Kb` 1024 bytes, `…Cpu` a fraction of one core.
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
    ChatSender,
    Latencies,
    after,
    capture,
    disable_garbage_collection,
    join,
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
from scripts.bench.windows import (
    Contender,
    MeasuredWindow,
    alternate,
    cpu_us,
    measure,
    median_ratio,
    total,
)

_PROGRAM = "python -m scripts.bench"
# A whole number of periods of pings and statistics.
_IDLE_S = 5.0


def fanout(connections: int, members: int, seconds: float) -> dict[str, object]:
    """CPU per delivery, latency and memory of the ticks of playing sessions."""
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

        def save_latencies() -> None:
            measured.extend(latencies.take())

        latencies.watch(fleet.clients[::16])
        contenders = {
            "bandsync": Contender(
                server, fleet, begin_slice=latencies.take, end_turn=save_latencies
            )
        }
        for name in ("bare", "send_message"):
            contenders[name] = _yardstick(stack, name, sessions, members, payload)
        disable_garbage_collection()
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
        # Pings and statistics are part of BandSync's figures below. The yardsticks have none.
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


def _tick_cost(window: MeasuredWindow) -> float:
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
    """Rate of accepted connections, and memory per idle connection."""
    sessions = connections // members
    count = sessions * members
    result: dict[str, object] = {"bench": "connections", "connections": count, "members": members}
    with bandsync(count, members) as server, Fleet(server.port) as fleet:
        empty, cpu, began = server.rss_kb(), server.cpu_s(), now_s()
        fleet.open(index // members for index in range(count))
        add_latency = now_s() - began
        result["acceptedPerSecond"] = round(count / add_latency)
        result["cpuUsPerAccept"] = round((server.cpu_s() - cpu) / count * 1e6)
        fleet.run_for(WARM_UP_S)
        result["rssPerConnectionKb"] = round((server.rss_kb() - empty) / count, 2)
    with bandsync(count, members) as server, Fleet(server.port) as fleet:
        empty, cpu, began = server.rss_kb(), server.cpu_s(), now_s()
        fleet.open((index // members for index in range(count)), masked({"type": "join_session"}))
        fleet.run_until(lambda: fleet.kinds[b"snap"] == count)
        add_latency = now_s() - began
        result["joinedPerSecond"] = round(count / add_latency)
        result["cpuUsPerJoin"] = round((server.cpu_s() - cpu) / count * 1e6)
        fleet.run_for(WARM_UP_S)
        result["rssPerJoinedKb"] = round((server.rss_kb() - empty) / count, 2)
        # Within ten seconds every member is pinged twice.
        idle = measure(server, fleet, 10.0)
        result["rssPerJoinedAfterPingsKb"] = round((server.rss_kb() - empty) / count, 2)
        result["idleServerCpu"] = round(idle.server_cpu_s / idle.seconds, 3)
        result["gone"] = fleet.gone
    return result


def slow_consumer(
    sessions: int, members: int, seconds: float, chats_per_second: float
) -> dict[str, object]:
    """Tick latency of the other members, while slow consumers stop reading and are closed."""
    latencies = Latencies()
    dropped: dict[int, float] = {}
    phases: dict[str, dict[str, float]] = {}
    with bandsync(sessions * members, members) as server, Fleet(server.port) as fleet:
        leaders = join(fleet, sessions, members, slow=True)
        slow_clients = fleet.clients[-sessions:]
        latencies.watch(fleet.clients[sessions:-sessions])
        for leader in leaders:
            leader.on_text = _note_drop(leader.session, dropped)
            leader.send(masked({"type": "play"}))
        chatter = ChatSender(fleet, leaders, chats_per_second)
        disable_garbage_collection()

        def phase(name: str, ended: Callable[[], bool]) -> None:
            latencies.take()
            chatter.run_until(ended)
            phases[name] = spread(latencies.take())

        chatter.run_until(after(WARM_UP_S))
        phase("before", after(seconds))
        for slow_client in slow_clients:
            fleet.stop_reading(slow_client)
        began = now_s()
        phase("during", lambda: len(dropped) == sessions)
        phase("after", after(seconds))
        closed = close_count(server.get("/metrics"), 1013)
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


def close_count(metrics: str, code: int) -> int:
    """Number of connections that the server closed with ``code``, by its own count."""
    found = re.search(
        rf'^bandsync_\w*clos\w*\{{[^}}]*"{code}"[^}}]*\}} (\S+)', metrics, re.MULTILINE
    )
    return int(float(found[1])) if found else 0


def _note_drop(session: int, dropped: dict[int, float]) -> Callable[[bytes, int, int], None]:
    def receive(data: bytes, start: int, end: int) -> None:
        if data.startswith(b'{"type":"member_connection"', start):
            dropped[session] = now_s()

    return receive


def main() -> int:
    """Run one benchmark; return the exit code."""
    options = vars(parse_arguments())
    bench = _BENCHES[options.pop("bench")]
    pin_generator()
    # Raised as an exception, like Ctrl-C: no started or suspended server may stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        members = options.get("members", 1)
        start_bands = options.get("sessions", options.get("bands", 0))
        connections = options.get("connections", start_bands * members)
        raise_file_limit(3 * connections)
        result = bench.run(**options)
    except BenchError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    findings = result.get("findings", [])
    assert isinstance(findings, list)
    for finding in findings:
        print(f"{_PROGRAM}: {finding}", file=sys.stderr)
    return 1 if findings else 0


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        run: runs it with these arguments; returns its figures.
        defaults: of the arguments, by name.
    """

    run: Callable[..., dict[str, object]]
    defaults: dict[str, float | str]


def parse_arguments() -> argparse.Namespace:
    """The benchmark and its arguments, from the command line."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    "fanout": Benchmark(fanout, {"connections": 1000, "members": 8, "seconds": 10.0}),
    "commands": Benchmark(
        commands, {"sessions": 25, "members": 8, "seconds": 10.0, "redis": False}
    ),
    "connections": Benchmark(many_connections, {"connections": 5000, "members": 8}),
    "slow": Benchmark(
        slow_consumer, {"sessions": 25, "members": 8, "seconds": 5.0, "chats_per_second": 20.0}
    ),
    "commit": Benchmark(commit, {"callers": 50, "members": 8, "seconds": 10.0}),
    "cluster": Benchmark(cluster, {"sessions": 25, "members": 8, "seconds": 10.0}),
    "remote": Benchmark(remote, {"seconds": 10.0}),
    "resume": Benchmark(
        resume, {"connections": 1000, "members": 8, "seconds": 25.0, "alone": False}
    ),
    "rolling": Benchmark(rolling, {"sessions": 10, "members": 4, "seconds": 6.0}),
    "migrate": Benchmark(migrate, {"sessions": 1000, "members": 1, "seconds": 2.0}),
    "sessions": Benchmark(sessions, {"few": 125, "many": 1000, "members": 8, "seconds": 10.0}),
    "workers": Benchmark(workers, {"sessions": 200, "members": 8, "seconds": 20.0, "processes": 2}),
    "load": Benchmark(load, _LOAD),
    "soak": Benchmark(soak, _LOAD),
}

_HELP = {
    "alone": "put all members of a session on the killed server, not every other one",
    "bands": "number of bands (default %(default)s)",
    "callers": "number of concurrent callers (default %(default)s)",
    "chats_per_second": "long chat messages of each leader (default %(default)s)",
    "connections": "number of connections, in sessions of --members (default %(default)s)",
    "few": "sessions of the one server (default %(default)s)",
    "many": "sessions of the other server (default %(default)s)",
    "processes": "number of workers (default %(default)s)",
    "json": "file for the summary and the row of each second",
    "members": "members of each session (default %(default)s)",
    "minutes": "time from the first join to the last command (default %(default)s)",
    "pace": "factor on the frequency of the bands' actions (default %(default)s)",
    "plot": "file for a picture of the rows, SVG",
    "redis": "store the sessions in Redis (commands: measure that, too)",
    "seed": "draws the bands' actions (default %(default)s)",
    "servers": "comma-separated addresses of running servers; ADMIN_TOKEN is read for them",
    "seconds": "duration of each measurement (default %(default)s)",
    "sessions": "number of sessions (default %(default)s)",
    "workers": "number of processes; several use a Redis (default %(default)s)",
}


if __name__ == "__main__":
    sys.exit(main())
