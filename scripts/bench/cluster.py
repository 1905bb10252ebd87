"""Benchmarks `cluster` and `remote`: two servers that share their sessions through Redis."""

import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import cycle

from scripts.bench.commands import NO_EVENTS, event_rate, expect_no_failover, start_bands
from scripts.bench.fleet import ACK, Fleet, FleetClient, masked, masked_text
from scripts.bench.load import (
    SETTLE_S,
    WARM_UP_S,
    ClosedLoop,
    after,
    disable_garbage_collection,
    join,
)
from scripts.bench.processes import (
    BenchError,
    MeasuredServer,
    bandsync,
    cpu_of,
    now_s,
    percentile,
    spread,
    yardstick,
)
from scripts.bench.redis import RedisServer, new_redis
from scripts.bench.windows import Contender, MeasuredWindow, alternate, cpu_us, median_ratio, total

INSTALL = "the yardstick is missing: pip install -e '.[bench]'"

_SERVERS = 2
# Frames of python-socketio: an event, and the acknowledgements of sent events.
_EVENT = b'42["'
_ANSWERS = tuple(b"43%d[" % number for number in range(10))
_CHANGE = b'{"type":"seek"'
# A leader, a member on the other server and one on the same.
_MEMBERS = 3
# Longer than a change takes, so that each change finds all servers idle.
_PAUSE_S = 0.02
_PATIENCE_S = 5.0


class ServerCluster:
    """Servers and their Redis, measured as one."""

    def __init__(self, servers: Sequence[MeasuredServer], redis: RedisServer) -> None:
        self.servers = servers
        self.ports = [server.port for server in servers]
        self._redis = redis
        self._redis_cpu_s = 0.0
        self._since = 0.0

    def suspend(self) -> None:
        """Stop the servers while others are measured."""
        for server in self.servers:
            server.suspend()

    def resume(self) -> None:
        """Continue the servers."""
        for server in self.servers:
            server.resume()

    def cpu_s(self) -> float:
        """User and system time of the servers and Redis so far, seconds."""
        return sum(server.cpu_s() for server in self.servers) + cpu_of(self._redis.pid)

    def begin(self) -> None:
        """Begin to count the CPU of Redis in a slice."""
        self._since = cpu_of(self._redis.pid)

    def end(self) -> None:
        """End a slice."""
        self._redis_cpu_s += cpu_of(self._redis.pid) - self._since

    def redis_share(self, windows: Iterable[MeasuredWindow]) -> float:
        """Redis's share of all CPU time in the slices."""
        return self._redis_cpu_s / sum(window.server_cpu_s for window in windows)


class SocketIoFleet(Fleet):
    """Clients of python-socketio: frames of Engine.IO 4 and Socket.IO 5 in text frames."""

    target = "/socket.io/?EIO=4&transport=websocket&room=bench-{}"
    kind_at = 0


def bandsync_cluster(stack: ExitStack, connections: int, members: int) -> ServerCluster:
    """Start BandSync servers with a Redis of their own."""
    redis = stack.enter_context(new_redis())
    return ServerCluster(
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
        # No ticks: the yardstick has none, and the pages do not request them either.
        own, event_bytes = start_bands(stack, ours, ours.ports, sessions, members, ticks=False)
        theirs, other = _yardstick(stack, sessions, members, event_bytes)
        disable_garbage_collection()
        contenders = {
            "bandsync": _with_redis_cpu(own, ours),
            "socketio": _with_redis_cpu(other, theirs),
        }
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
    plain["socketio"] = [_with_our_kinds(window) for window in windows["socketio"]]
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
) -> tuple[ServerCluster, Contender]:
    """Start python-socketio servers that broadcast what a leader sends."""
    redis = stack.enter_context(new_redis())
    servers = [stack.enter_context(yardstick("socketio", redis.url())) for _ in range(_SERVERS)]
    theirs = ServerCluster(servers, redis)
    fleet = stack.enter_context(SocketIoFleet(*theirs.ports))
    places = [fleet.open(range(sessions), masked_text(b"40"), place=n) for n in range(members)]
    fleet.run_until(lambda: fleet.kinds[b'40{"'] == sessions * members)
    fleet.run_for(SETTLE_S)
    # As long as our events, including what Socket.IO adds.
    head, tail = b'["change",{"pad":"', b'"}]'
    pad = b"x" * (event_bytes - len(b"42" + head + tail))
    frames = [masked_text(b"42%d" % number + head + pad + tail) for number in range(10)]
    # An acknowledgement precedes the delivery on the other server. A closed loop on it would let
    # the delivery fall ever further behind. So the reply is the event on the other server.
    loop = ClosedLoop(frames, _answered)
    for leader, receiver in zip(places[0], places[1], strict=True):
        loop.add(leader, receiver)
    return theirs, Contender(
        theirs, fleet, begin_turn=loop.start, end_turn=lambda: loop.stop(fleet)
    )


def _answered(data: bytes, start: int, end: int) -> int | None:
    return -1 if data.startswith(_EVENT, start) else None


def _with_redis_cpu(contender: Contender, clustered: ServerCluster) -> Contender:
    """Count the CPU of Redis within the slices only."""

    def rest() -> None:
        clustered.end()
        contender.end_turn()

    return contender._replace(begin_slice=clustered.begin, end_turn=rest)


def _with_our_kinds(window: MeasuredWindow) -> MeasuredWindow:
    """Frames of python-socketio, under the names of ours."""
    kinds = window.kinds.copy()
    answers = sum(kinds.pop(kind, 0) for kind in _ANSWERS)
    if set(kinds) - {_EVENT}:
        raise BenchError(f"not only events and answers: {dict(kinds)}")
    kinds[ACK] = answers
    return window._replace(kinds=kinds)


def _delivery_cost(window: MeasuredWindow) -> float:
    return cpu_us(window, window.frames(without=NO_EVENTS))


def remote(seconds: float) -> dict[str, object]:
    """Latency of a change for members on another server, beside members on the same one."""
    near: list[float] = []
    far: list[float] = []
    with ExitStack() as stack:
        ours = bandsync_cluster(stack, 2 * _MEMBERS, _MEMBERS)
        fleet = stack.enter_context(Fleet(*ours.ports))
        # One session is led on each server, with one member on each.
        pairs = [(leader, _ReceiptTimes()) for leader in join(fleet, _SERVERS, _MEMBERS)]
        for leader, receipts in pairs:
            for client in fleet.clients:
                if client.session == leader.session and client is not leader:
                    receipts.add(client, "near" if client.server == leader.server else "far")
        disable_garbage_collection()
        fleet.run_for(WARM_UP_S)
        ended = after(seconds)
        for number, (leader, receipts) in enumerate(cycle(pairs)):
            if ended():
                break
            frame = masked({"type": "seek", "positionMs": 1000.0 * (number % 1000)})
            receipts.received.clear()
            sent = now_s()
            leader.send(frame)
            fleet.run_until(receipts.complete, _PATIENCE_S)
            near.append((receipts.received["near"] - sent) * 1000)
            far.append((receipts.received["far"] - sent) * 1000)
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


class _ReceiptTimes:
    """When the two followers of a session received its latest change."""

    def __init__(self) -> None:
        self.received: dict[str, float] = {}

    def complete(self) -> bool:
        """Whether both have received it."""
        return len(self.received) == 2

    def add(self, client: FleetClient, where: str) -> None:
        """Record when ``client`` receives a change."""

        def note(data: bytes, start: int, end: int) -> None:
            if data.startswith(_CHANGE, start):
                self.received[where] = now_s()

        client.on_text = note
