"""Two servers that share their sessions through Redis; bench.py starts it."""

import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import cycle

from scripts.bench.commands import NO_EVENTS, bands, event_rate, expect_no_failover
from scripts.bench.fleet import ACK, Client, Fleet, masked, masked_text
from scripts.bench.load import SETTLE_S, WARM_UP_S, ClosedLoop, after, join, settle
from scripts.bench.processes import (
    BenchError,
    Server,
    bandsync,
    cpu_of,
    now_s,
    percentile,
    spread,
    yardstick,
)
from scripts.bench.redis import RedisServer, new_redis
from scripts.bench.windows import Contender, Window, alternate, cpu_us, median_ratio, total

INSTALL = "the yardstick is missing: pip install -e '.[bench]'"

_SERVERS = 2
# What python-socketio sends: an event, and the answers to those that were sent.
_EVENT = b'42["'
_ANSWERS = tuple(b"43%d[" % number for number in range(10))
_CHANGE = b'{"type":"seek"'
# A leader, a member on the other server and one on the same.
_MEMBERS = 3
# Longer than a change takes, so that each finds everybody idle.
_PAUSE_S = 0.02
_PATIENCE_S = 5.0


class Cluster:
    """Servers and the Redis that they share, measured as one."""

    def __init__(self, servers: Sequence[Server], redis: RedisServer) -> None:
        self.servers = servers
        self.ports = [server.port for server in servers]
        self._redis = redis
        self._redis_cpu_s = 0.0
        self._since = 0.0

    def suspend(self) -> None:
        """Let the servers use no CPU at all while others are measured."""
        for server in self.servers:
            server.suspend()

    def resume(self) -> None:
        """Let the servers go on."""
        for server in self.servers:
            server.resume()

    def cpu_s(self) -> float:
        """User and system time of all of them so far, seconds."""
        return sum(server.cpu_s() for server in self.servers) + cpu_of(self._redis.pid)

    def begin(self) -> None:
        """A slice begins."""
        self._since = cpu_of(self._redis.pid)

    def end(self) -> None:
        """A slice ends."""
        self._redis_cpu_s += cpu_of(self._redis.pid) - self._since

    def redis_share(self, windows: Iterable[Window]) -> float:
        """How much of the time of all was Redis's in the slices."""
        return self._redis_cpu_s / sum(window.server_cpu_s for window in windows)


class SocketIoFleet(Fleet):
    """Clients of python-socketio: frames of Engine.IO 4 and Socket.IO 5 in texts."""

    target = "/socket.io/?EIO=4&transport=websocket&room=bench-{}"
    kind_at = 0


def bandsync_cluster(stack: ExitStack, connections: int, members: int) -> Cluster:
    """BandSync servers on a Redis of their own."""
    redis = stack.enter_context(new_redis())
    return Cluster(
        [
            stack.enter_context(bandsync(connections, members, redis_url=redis.url(), patient=True))
            for _ in range(_SERVERS)
        ],
        redis,
    )


def cluster(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Commands whose members alternate between two servers, beside python-socketio's broadcast."""
    if any(importlib.util.find_spec(name) is None for name in ("socketio", "aiohttp", "uvloop")):
        raise BenchError(INSTALL)
    with ExitStack() as stack:
        ours = bandsync_cluster(stack, sessions * members, members)
        # Ticks, which the page does not ask for either, are nothing that the yardstick has.
        own, event_bytes = bands(stack, ours, ours.ports, sessions, members, ticks=False)
        theirs, other = _yardstick(stack, sessions, members, event_bytes)
        settle()
        contenders = {"bandsync": _noting(own, ours), "socketio": _noting(other, theirs)}
        windows = alternate(contenders, seconds)
        for server in ours.servers:
            expect_no_failover(server)
    result: dict[str, object] = {
        "bench": "cluster",
        "servers": _SERVERS,
        "sessions": sessions,
        "members": members,
        "outstandingPerLeader": 2,
        "windowSeconds": round(seconds, 1),
        "slices": len(windows["bandsync"]),
        "eventBytes": event_bytes,
    }
    plain = {"bandsync": windows["bandsync"]}
    plain["socketio"] = [_translated(window) for window in windows["socketio"]]
    for name, clustered in (("bandsync", ours), ("socketio", theirs)):
        parts = plain[name]
        whole = total(parts)
        deliveries = whole.frames(without=NO_EVENTS)
        result[name] = {
            "deliveriesPerSecond": round(event_rate(whole)),
            "perSlice": [round(event_rate(part)) for part in parts],
            "deliveriesPerCommand": round(deliveries / whole.kinds[ACK], 2),
            "cpuUsPerDelivery": round(cpu_us(whole, deliveries), 2),
            "cpuUsPerCommand": round(cpu_us(whole, whole.kinds[ACK]), 1),
            "redisShare": round(clustered.redis_share(parts), 3),
            "snapshots": whole.kinds[b"snap"],
            "cpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    pair = plain["bandsync"], plain["socketio"]
    return result | {
        "ratio": round(event_rate(total(pair[0])) / event_rate(total(pair[1])), 2),
        "medianRatio": median_ratio(*pair, event_rate),
        "medianCpuRatio": median_ratio(*pair, _delivery_cost),
    }


def _yardstick(
    stack: ExitStack, sessions: int, members: int, event_bytes: int
) -> tuple[Cluster, Contender]:
    """Servers that do nothing but broadcast what a leader sends."""
    redis = stack.enter_context(new_redis())
    servers = [stack.enter_context(yardstick("socketio", redis.url())) for _ in range(_SERVERS)]
    theirs = Cluster(servers, redis)
    fleet = stack.enter_context(SocketIoFleet(*theirs.ports))
    places = [fleet.open(range(sessions), masked_text(b"40"), place=n) for n in range(members)]
    fleet.run_until(lambda: fleet.kinds[b'40{"'] == sessions * members)
    fleet.run_for(SETTLE_S)
    # As long as our events are, with what Socket.IO puts around it.
    head, tail = b'["change",{"pad":"', b'"}]'
    pad = b"x" * (event_bytes - len(b"42" + head + tail))
    frames = [masked_text(b"42%d" % number + head + pad + tail) for number in range(10)]
    # Its acknowledgements come before anybody on the other server has the event, and if nobody
    # waits for that, it falls ever further behind. So what answers is the event over there.
    loop = ClosedLoop(frames, _heard)
    for leader, hearer in zip(places[0], places[1], strict=True):
        loop.add(leader, hearer)
    return theirs, Contender(theirs, fleet, wake=loop.start, rest=lambda: loop.stop(fleet))


def _heard(data: bytes, start: int, end: int) -> int | None:
    return -1 if data.startswith(_EVENT, start) else None


def _noting(contender: Contender, clustered: Cluster) -> Contender:
    """Note the time of Redis in the slices, not in between."""

    def rest() -> None:
        clustered.end()
        contender.rest()

    return contender._replace(start=clustered.begin, rest=rest)


def _translated(window: Window) -> Window:
    """Frames of python-socketio under the names that ours have."""
    kinds = window.kinds.copy()
    answers = sum(kinds.pop(kind, 0) for kind in _ANSWERS)
    if set(kinds) - {_EVENT}:
        raise BenchError(f"not only events and answers: {dict(kinds)}")
    kinds[ACK] = answers
    return window._replace(kinds=kinds)


def _delivery_cost(window: Window) -> float:
    return cpu_us(window, window.frames(without=NO_EVENTS))


def remote(seconds: float) -> dict[str, object]:
    """How much later a change reaches members on another server than those on the same."""
    near: list[float] = []
    far: list[float] = []
    with ExitStack() as stack:
        ours = bandsync_cluster(stack, 2 * _MEMBERS, _MEMBERS)
        fleet = stack.enter_context(Fleet(*ours.ports))
        # One is led on each server, with a member here and a member there.
        pairs = [(leader, _Hearing()) for leader in join(fleet, _SERVERS, _MEMBERS)]
        for leader, hearing in pairs:
            for client in fleet.clients:
                if client.session == leader.session and client is not leader:
                    hearing.add(client, "near" if client.server == leader.server else "far")
        settle()
        fleet.run_for(WARM_UP_S)
        ended = after(seconds)
        for number, (leader, hearing) in enumerate(cycle(pairs)):
            if ended():
                break
            frame = masked({"type": "seek", "positionMs": 1000.0 * (number % 1000)})
            hearing.heard.clear()
            sent = now_s()
            leader.send(frame)
            fleet.run_until(lambda heard=hearing.heard: len(heard) == 2, _PATIENCE_S)
            near.append((hearing.heard["near"] - sent) * 1000)
            far.append((hearing.heard["far"] - sent) * 1000)
            fleet.run_for(_PAUSE_S)
        for server in ours.servers:
            expect_no_failover(server)
    later = [there - here for here, there in zip(near, far, strict=True)]
    return {
        "bench": "remote",
        "changes": len(near),
        "sameServerMs": spread(near),
        "otherServerMs": spread(far),
        "laterMs": spread(later),
        "p50Difference": round(percentile(far, 0.5) - percentile(near, 0.5), 2),
    }


class _Hearing:
    """When the members of a session heard the change that was made last."""

    def __init__(self) -> None:
        self.heard: dict[str, float] = {}

    def add(self, client: Client, where: str) -> None:
        """Note what ``client`` hears."""

        def note(data: bytes, start: int, end: int) -> None:
            if data.startswith(_CHANGE, start):
                self.heard[where] = now_s()

        client.on_text = note
