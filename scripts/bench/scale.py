"""Does it scale: with sessions in one process, and with processes; bench.py starts it."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from scripts.bench.commands import NO_EVENTS, acked, command_frames
from scripts.bench.fleet import Client, Fleet, masked
from scripts.bench.hosts import Hosted, hosted
from scripts.bench.load import ClosedLoop, join, settle
from scripts.bench.processes import HOST, BenchError, all_cores, bandsync, cpu_of, raise_file_limit
from scripts.bench.redis import new_redis
from scripts.bench.windows import Contender, Window, alternate, cpu_us, total

# The figures of issue 6.
MOST_GROWTH = 0.15
LEAST_SPEED_UP = 1.7

_WHATS = ("ticks", "commands")
_HOWS = ("apart", "passed", "scattered")
_ATTEMPTS = 20
_TICKS_PER_S = 10
_SHORT = 0.95


def sessions(few: int, many: int, members: int, seconds: float) -> dict[str, object]:
    """Ticks of few and of many playing sessions: does a delivery cost the same?

    Two servers on one core take turns; each sends to all of its own bands.
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
        settle()
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
            # Less was sent: the core was taken by others, or is too slow; ticks were left out.
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
    """Does a server of several processes deliver so many times what one does? Computed from CPU.

    All processes share the first core; the driver and the Redis of each server have the others, so
    that neither is part of a figure. What a delivery costs over all processes, beside what it costs
    as many that know nothing of each other, is how much is lost to sharing the sessions: that all
    share one core, whose caches they take from each other, is the same for both. The speed-up is
    what follows if each process has a core of its own, the busiest is the limit, and Redis, whose
    CPU is told, is none.

    ``apart``: servers of one process, each with a Redis and a part of the bands of its own.
    ``passed``: all come to the shared port, and a band is on one process because connections are
    passed on. ``scattered``: members take turns on the ports of the processes, which tell each
    other through Redis: what is lost without that, as with TLS.
    ``ticks`` are those of playing bands, ``commands`` are given as fast as they are answered.
    """
    if len(all_cores()) < 2:
        raise BenchError("the driver needs a core of its own")
    # More than the connections of one server are never open in one process but this.
    raise_file_limit(6 * sessions * members)
    crews: dict[tuple[str, str], _Crew] = {}
    windows: dict[tuple[str, str], list[Window]] = {}
    for what in _WHATS:
        # One after the other: fewer that take turns meet noise that is more alike.
        with ExitStack() as stack:
            for how in _HOWS:
                crew = _Crew(stack, sessions, members, processes, how, what)
                crews[what, how] = crew
            settle()
            contenders = {how: crews[what, how].contender for how in _HOWS}
            for how, parts in alternate(contenders, seconds).items():
                windows[what, how] = parts
    result: dict[str, object] = {
        "bench": "workers",
        "sessions": sessions,
        "members": members,
        "processes": processes,
        "cores": len(all_cores()),
        "measured": "CPU on one core; the speed-up is computed for a core per process",
    }
    findings = []
    for what in _WHATS:
        figures: dict[str, object] = {}
        apart = windows[what, "apart"]
        for how in _HOWS:
            parts, crew = windows[what, how], crews[what, how]
            figures[how] = _figures(what, parts, crew)
            if how == "apart":
                continue
            speed_up = processes / _dearer(what, parts, apart) / crew.imbalance()
            figures[f"{how}SpeedUp"] = round(speed_up, 2)
            if how == "passed" and processes == 2 and speed_up < LEAST_SPEED_UP:
                findings.append(f"{what}, {how}: two deliver {speed_up:.2f} times what one does")
        result[what] = figures
    return result | {"findings": findings}


def _figures(what: str, parts: Sequence[Window], crew: "_Crew") -> dict[str, object]:
    whole = total(parts)
    handed = _handed(what, whole)
    return {
        "cpuUsPerDelivery": round(_cost(what, whole), 2),
        "cpuUsPerSlice": [round(_cost(what, part), 2) for part in parts],
        "deliveriesPerSecond": round(handed / whole.seconds),
        "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
        "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        "redisCpu": round(crew.redis_s / whole.seconds, 3),
        "redisCpuUsPerDelivery": round(crew.redis_s / handed * 1e6, 2),
        "busiestOverMean": round(crew.imbalance(), 3),
    }


def _handed(what: str, window: Window) -> int:
    return window.frames(without=NO_EVENTS) if what == "commands" else window.frames()


def _cost(what: str, window: Window) -> float:
    return cpu_us(window, _handed(what, window))


def _dearer(what: str, parts: Sequence[Window], others: Sequence[Window]) -> float:
    """How many times as much a delivery costs: the median over slices that are neighbours."""
    pairs = zip(parts, others, strict=True)
    return median(_cost(what, part) / _cost(what, other) for part, other in pairs)


class _Whole(Fleet):
    """Connects all members of a session to the same server."""

    def connect(
        self, session: int, greeting: bytes, server: int, receive_buffer: int | None = None
    ) -> Client:
        """Begin to open one connection; ``server`` is where another fleet would."""
        return super().connect(session, greeting, session % self._servers, receive_buffer)

    def __init__(self, *ports: int) -> None:
        super().__init__(*ports)
        self._servers = len(ports)


class _Together:
    """Servers that are measured as one."""

    def __init__(self, servers: Sequence[Hosted]) -> None:
        self._servers = servers

    def suspend(self) -> None:
        for server in self._servers:
            server.suspend()

    def resume(self) -> None:
        for server in self._servers:
            server.resume()

    def cpu_s(self) -> float:
        return sum(server.cpu_s() for server in self._servers)


class _Crew:
    """Servers with a Redis of their own (sessions have the same names everywhere), and the bands.

    Attributes:
        contender: to be measured.
        redis_s: CPU of Redis while measured, seconds.
    """

    def __init__(
        self, stack: ExitStack, sessions: int, members: int, processes: int, how: str, what: str
    ) -> None:
        first_port = _free_ports(processes) if how == "scattered" else None
        redises = [stack.enter_context(new_redis()) for _ in range(processes)]
        servers = [
            stack.enter_context(
                hosted(
                    sessions * members,
                    members,
                    workers=1 if how == "apart" else processes,
                    redis_url=redis.url(),
                    only_measured=True,
                    first_port=first_port,
                )
            )
            for redis in (redises if how == "apart" else redises[:1])
        ]
        ports = [server.port for server in servers]
        if first_port is not None:
            ports = [first_port + number for number in range(processes)]
        fleet = stack.enter_context(_Whole(*ports) if how == "apart" else Fleet(*ports))
        self._serving = [pid for server in servers for pid in server.serving()]
        self._redises = [redis.pid for redis in redises]
        self._began: dict[int, float] = {}
        self._used: dict[int, float] = {}
        leaders = join(fleet, sessions, members, ticks=what == "ticks")
        loop = ClosedLoop(command_frames(), acked)
        for leader in leaders:
            if what == "ticks":
                leader.send(masked({"type": "play"}))
            else:
                loop.add(leader)
        self.contender = Contender(
            _Together(servers),
            fleet,
            wake=loop.start,
            start=self._start,
            rest=lambda: self._rest(loop, fleet),
        )

    @property
    def redis_s(self) -> float:
        return sum(self._used[pid] for pid in self._redises)

    def imbalance(self) -> float:
        """How much more the busiest process did than it would if all did the same."""
        shares = [self._used[pid] for pid in self._serving]
        return max(shares) * len(shares) / sum(shares)

    def _start(self) -> None:
        self._began = self._now()

    def _rest(self, loop: ClosedLoop, fleet: Fleet) -> None:
        for pid, cpu_s in self._now().items():
            self._used[pid] = self._used.get(pid, 0.0) + cpu_s - self._began[pid]
        loop.stop(fleet)

    def _now(self) -> dict[int, float]:
        return {pid: cpu_of(pid) for pid in (*self._redises, *self._serving)}


def _free_ports(count: int) -> int:
    """The first of so many neighbours that nobody listens on now."""
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            try:
                first = stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1]
                for number in range(1, count):
                    stack.enter_context(socket.create_server((HOST, first + number)))
            except OSError:
                continue
            return first
    raise BenchError("there are no free ports beside each other")
