"""Benchmarks `sessions` and `workers`: cost of a delivery at scale."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from scripts.bench.commands import NO_EVENTS, acked, command_frames
from scripts.bench.fleet import Fleet, FleetClient, masked
from scripts.bench.hosts import LocalTarget, start_target
from scripts.bench.load import ClosedLoop, disable_garbage_collection, join
from scripts.bench.processes import HOST, BenchError, all_cores, bandsync, cpu_of, raise_file_limit
from scripts.bench.redis import new_redis
from scripts.bench.windows import Contender, MeasuredWindow, alternate, cpu_us, total

# The targets.
MOST_GROWTH = 0.15
LEAST_SPEED_UP = 1.7

_LOADS = ("ticks", "commands")
_LAYOUTS = ("apart", "passed", "scattered")
_ATTEMPTS = 20
_TICKS_PER_S = 10
_SHORT = 0.95


def sessions(few: int, many: int, members: int, seconds: float) -> dict[str, object]:
    """CPU per delivery of ticks with many sessions, beside few.

    Two servers on one core take turns. Each sends to all of its own bands.
    """
    raise_file_limit((few + many) * members)
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for count in (few, many):
            server = stack.enter_context(bandsync(count * members, members))
            fleet = stack.enter_context(Fleet(server.port))
            for leader in join(fleet, count, members):
                leader.send(masked({"type": "play"}))
            contenders[str(count)] = Contender(server, fleet)
        disable_garbage_collection()
        windows = alternate(contenders, seconds)
    result: dict[str, object] = {"bench": "sessions", "members": members}
    costs: dict[str, float] = {}
    for name, parts in windows.items():
        whole = total(parts)
        costs[name] = cpu_us(whole, whole.frames())
        result[name] = {
            "cpuUsPerDelivery": round(costs[name], 2),
            "cpuUsPerSlice": [round(cpu_us(part, part.frames()), 2) for part in parts],
            "deliveriesPerSecond": round(whole.frames() / whole.seconds),
            # Too few ticks were sent: other processes used the core, or it is too slow.
            "short": whole.frames() / whole.seconds < _SHORT * int(name) * members * _TICKS_PER_S,
            "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    growth = costs[str(many)] / costs[str(few)] - 1
    missed = growth > MOST_GROWTH
    return result | {
        "growth": round(growth, 3),
        "findings": [f"a delivery costs {growth:.1%} more with {many} sessions"] if missed else [],
    }


def workers(sessions: int, members: int, seconds: float, processes: int) -> dict[str, object]:
    """CPU per delivery of several workers, beside servers that share nothing.

    All processes share the first core. The driver and the Redis of each server use the others, so
    that neither is part of a figure. The cost of sharing sessions is the CPU per delivery over all
    processes, relative to servers that know nothing of each other. Sharing one core and its caches
    affects both alike. The speed-up is computed for a core per process: the busiest process is the
    limit, and Redis, whose CPU is reported, is none.

    ``apart``: servers of one process, each with its own Redis and a part of the bands. ``passed``:
    all connections arrive at the shared port, and a handoff brings each band to one process.
    ``scattered``: members take turns on the ports of the processes, which communicate through
    Redis; that is the cost without handoff, as with TLS. ``ticks``: playing bands. ``commands``: a
    closed loop.
    """
    if len(all_cores()) < 2:
        raise BenchError("the driver needs a core of its own")
    # No process but this one has more connections open than one server.
    raise_file_limit(6 * sessions * members)
    deployments: dict[tuple[str, str], _Deployment] = {}
    windows: dict[tuple[str, str], list[MeasuredWindow]] = {}
    for load in _LOADS:
        # One load after the other: the fewer take turns, the more alike is their noise.
        with ExitStack() as stack:
            for layout in _LAYOUTS:
                deployment = _Deployment(stack, sessions, members, processes, layout, load)
                deployments[load, layout] = deployment
            disable_garbage_collection()
            contenders = {layout: deployments[load, layout].contender for layout in _LAYOUTS}
            for layout, parts in alternate(contenders, seconds).items():
                windows[load, layout] = parts
    result: dict[str, object] = {
        "bench": "workers",
        "sessions": sessions,
        "members": members,
        "processes": processes,
        "cores": len(all_cores()),
        "measured": "CPU on one core; the speed-up is computed for a core per process",
    }
    findings = []
    for load in _LOADS:
        figures: dict[str, object] = {}
        apart = windows[load, "apart"]
        for layout in _LAYOUTS:
            parts, deployment = windows[load, layout], deployments[load, layout]
            figures[layout] = _figures(load, parts, deployment)
            if layout == "apart":
                continue
            speed_up = processes / _cost_ratio(load, parts, apart) / deployment.imbalance()
            figures[f"{layout}SpeedUp"] = round(speed_up, 2)
            if layout == "passed" and processes == 2 and speed_up < LEAST_SPEED_UP:
                findings.append(f"{load}, {layout}: two deliver {speed_up:.2f} times what one does")
        result[load] = figures
    return result | {"findings": findings}


def _figures(
    load: str, parts: Sequence[MeasuredWindow], deployment: "_Deployment"
) -> dict[str, object]:
    whole = total(parts)
    delivered = _delivered(load, whole)
    return {
        "cpuUsPerDelivery": round(_cost(load, whole), 2),
        "cpuUsPerSlice": [round(_cost(load, part), 2) for part in parts],
        "deliveriesPerSecond": round(delivered / whole.seconds),
        "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
        "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        "redisCpu": round(deployment.redis_s / whole.seconds, 3),
        "redisCpuUsPerDelivery": round(deployment.redis_s / delivered * 1e6, 2),
        "busiestOverMean": round(deployment.imbalance(), 3),
    }


def _delivered(load: str, window: MeasuredWindow) -> int:
    return window.frames(without=NO_EVENTS) if load == "commands" else window.frames()


def _cost(load: str, window: MeasuredWindow) -> float:
    return cpu_us(window, _delivered(load, window))


def _cost_ratio(
    load: str, parts: Sequence[MeasuredWindow], others: Sequence[MeasuredWindow]
) -> float:
    """The median ratio of the costs of a delivery in neighbouring slices."""
    pairs = zip(parts, others, strict=True)
    return median(_cost(load, part) / _cost(load, other) for part, other in pairs)


class _WholeSessionFleet(Fleet):
    """Connects all members of a session to the same server."""

    def connect(
        self, session: int, greeting: bytes, server: int, receive_buffer: int | None = None
    ) -> FleetClient:
        """Start to open one connection. ``server`` is ignored."""
        return super().connect(session, greeting, session % self._servers, receive_buffer)

    def __init__(self, *ports: int) -> None:
        super().__init__(*ports)
        self._servers = len(ports)


class _ServerGroup:
    """Servers that are measured as one."""

    def __init__(self, servers: Sequence[LocalTarget]) -> None:
        self._servers = servers

    def suspend(self) -> None:
        for server in self._servers:
            server.suspend()

    def resume(self) -> None:
        for server in self._servers:
            server.resume()

    def cpu_s(self) -> float:
        return sum(server.cpu_s() for server in self._servers)


class _Deployment:
    """Servers with Redis and their bands. Sessions have the same names in every deployment.

    Attributes:
        contender: for the measurement.
        redis_s: CPU of Redis in the slices, seconds.
    """

    def __init__(
        self, stack: ExitStack, sessions: int, members: int, processes: int, layout: str, load: str
    ) -> None:
        first_port = _free_ports(processes) if layout == "scattered" else None
        redises = [stack.enter_context(new_redis()) for _ in range(processes)]
        servers = [
            stack.enter_context(
                start_target(
                    sessions * members,
                    members,
                    workers=1 if layout == "apart" else processes,
                    redis_url=redis.url(),
                    only_measured=True,
                    first_port=first_port,
                )
            )
            for redis in (redises if layout == "apart" else redises[:1])
        ]
        ports = [server.port for server in servers]
        if first_port is not None:
            ports = [first_port + number for number in range(processes)]
        fleet = stack.enter_context(
            _WholeSessionFleet(*ports) if layout == "apart" else Fleet(*ports)
        )
        self._serving = [pid for server in servers for pid in server.serving()]
        self._redises = [redis.pid for redis in redises]
        self._began: dict[int, float] = {}
        self._used: dict[int, float] = {}
        leaders = join(fleet, sessions, members, ticks=load == "ticks")
        loop = ClosedLoop(command_frames(), acked)
        for leader in leaders:
            if load == "ticks":
                leader.send(masked({"type": "play"}))
            else:
                loop.add(leader)
        self.contender = Contender(
            _ServerGroup(servers),
            fleet,
            begin_turn=loop.start,
            begin_slice=self._begin_slice,
            end_turn=lambda: self._end_slice(loop, fleet),
        )

    @property
    def redis_s(self) -> float:
        return sum(self._used[pid] for pid in self._redises)

    def imbalance(self) -> float:
        """CPU of the busiest process, relative to the mean."""
        shares = [self._used[pid] for pid in self._serving]
        return max(shares) * len(shares) / sum(shares)

    def _begin_slice(self) -> None:
        self._began = self._cpu_by_process()

    def _end_slice(self, loop: ClosedLoop, fleet: Fleet) -> None:
        for pid, cpu_s in self._cpu_by_process().items():
            self._used[pid] = self._used.get(pid, 0.0) + cpu_s - self._began[pid]
        loop.stop(fleet)

    def _cpu_by_process(self) -> dict[int, float]:
        return {pid: cpu_of(pid) for pid in (*self._redises, *self._serving)}


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports."""
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            try:
                first = int(stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1])
                for number in range(1, count):
                    stack.enter_context(socket.create_server((HOST, first + number)))
            except OSError:
                continue
            return first
    raise BenchError("there are no free ports beside each other")
