"""Benchmark `commands`: commands in a closed loop, two per leader in flight."""

import json
from collections.abc import Sequence
from contextlib import ExitStack

from scripts.bench.fleet import ACK, Fleet, FleetClient, masked, masked_text
from scripts.bench.load import SETTLE_S, WARM_UP_S, ClosedLoop, disable_garbage_collection, join
from scripts.bench.processes import BenchError, MeasuredServer, bandsync, yardstick
from scripts.bench.redis import new_redis
from scripts.bench.windows import (
    Contender,
    Measurable,
    MeasuredWindow,
    alternate,
    cpu_us,
    median_ratio,
    total,
)

_ACK = b'{"type":"ack","requestId":"'
# Messages of BandSync that are no events caused by commands.
NO_EVENTS = (ACK, b"erro", b"room", b"scro", b"snap", b"stor", b"sync", b"welc")


def command_frames() -> list[bytes]:
    """A cycle of leader commands, each of which changes something."""
    frames: list[bytes] = []
    for turn in range(16):
        commands: list[dict[str, object]] = [
            {"type": "seek", "positionMs": 1000.0 * turn},
            {"type": "set_tempo", "tempoBpm": 100.0 + turn},
            {"type": "update_message", "message": f"Second verse, then the bridge ({turn})"},
            {"type": "pause" if turn % 2 else "play"},
        ]
        for command in commands:
            frames.append(masked({**command, "requestId": f"c{len(frames)}"}))
    return frames


def acked(data: bytes, start: int, end: int) -> int | None:
    """The index in `command_frames` that a frame acknowledges; None for any other frame."""
    if data.startswith(b'{"type":"error"', start):
        raise BenchError(f"refused: {data[start:end].decode()}")
    if not data.startswith(_ACK, start):
        return None
    at = start + len(_ACK)
    return int(data[at + 1 : data.index(b'"', at, end)])


def commands(
    sessions: int, members: int, seconds: float, *, redis: bool = False
) -> dict[str, object]:
    """Commands in a closed loop, beside a websockets server that only broadcasts."""
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        server = stack.enter_context(bandsync(sessions * members, members))
        contenders["bandsync"], event_bytes = start_bands(
            stack, server, [server.port], sessions, members
        )
        if redis:
            url = stack.enter_context(new_redis()).url()
            server = stack.enter_context(
                bandsync(sessions * members, members, redis_url=url, patient=True)
            )
            contenders["bandsyncRedis"], _ = start_bands(
                stack, server, [server.port], sessions, members
            )
        contenders["websockets"] = _yardstick(stack, sessions, members, event_bytes)
        disable_garbage_collection()
        windows = alternate(contenders, seconds)
        if redis:
            expect_no_failover(server)
    result: dict[str, object] = {
        "bench": "commands",
        "sessions": sessions,
        "members": members,
        "outstandingPerLeader": 2,
        "windowSeconds": round(seconds, 1),
        "slices": len(windows["websockets"]),
        "eventBytes": event_bytes,
    }
    for name, parts in windows.items():
        whole = total(parts)
        deliveries = whole.frames(without=NO_EVENTS)
        acks = whole.kinds[ACK]
        result[name] = {
            "deliveriesPerSecond": round(event_rate(whole)),
            "perSlice": [round(event_rate(part)) for part in parts],
            "cpuUsPerDelivery": round(cpu_us(whole, deliveries), 2),
            **({"cpuUsPerCommand": round(cpu_us(whole, acks), 1)} if acks else {}),
            "otherFramesPerSecond": round((whole.frames() - deliveries) / whole.seconds),
            "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    if redis:
        own, memory = windows["bandsyncRedis"], windows["bandsync"]
        result["ratioRedisToMemory"] = round(event_rate(total(own)) / event_rate(total(memory)), 2)
        result["medianCpuRatioRedisToMemory"] = median_ratio(own, memory, _command_cost)
    return result | {
        "ratio": round(
            event_rate(total(windows["bandsync"])) / event_rate(total(windows["websockets"])), 2
        ),
        "medianRatio": median_ratio(windows["bandsync"], windows["websockets"], event_rate),
    }


def start_bands(
    stack: ExitStack,
    server: Measurable,
    ports: Sequence[int],
    sessions: int,
    members: int,
    *,
    ticks: bool = True,
) -> tuple[Contender, int]:
    """Fill sessions whose leaders send commands; also return the mean size of events, bytes."""
    fleet = stack.enter_context(Fleet(*ports))
    leaders = join(fleet, sessions, members, ticks=ticks)
    loop = ClosedLoop(command_frames(), acked)
    for leader in leaders:
        loop.add(leader)
    loop.start()
    fleet.run_for(WARM_UP_S)
    loop.stop(fleet)
    event_bytes = _event_bytes(fleet, leaders[0])
    return Contender(
        server, fleet, begin_turn=loop.start, end_turn=lambda: loop.stop(fleet)
    ), event_bytes


def _yardstick(stack: ExitStack, sessions: int, members: int, event_bytes: int) -> Contender:
    server = stack.enter_context(yardstick("websockets"))
    fleet = stack.enter_context(Fleet(server.port))
    leaders = fleet.open(range(sessions))
    for _ in range(1, members):
        fleet.open(range(sessions))
    fleet.run_for(SETTLE_S)
    text = b'{"type":"yardstick","pad":"' + b"x" * (event_bytes - 29) + b'"}'
    echo = ClosedLoop([masked_text(text)], lambda data, start, end: -1)
    for leader in leaders:
        echo.add(leader)
    return Contender(server, fleet, begin_turn=echo.start, end_turn=lambda: echo.stop(fleet))


def expect_no_failover(server: MeasuredServer) -> None:
    """Check that the server kept its sessions in Redis all the time.

    Raises:
        BenchError: it did not.
    """
    status = json.loads(server.get("/api/storage/status"))
    if status["mode"] != "redis" or status["lastFailover"] is not None:
        raise BenchError(f"not all commands went to Redis: {status}")


def _command_cost(window: MeasuredWindow) -> float:
    return cpu_us(window, window.kinds[ACK])


def event_rate(window: MeasuredWindow) -> float:
    """Event deliveries per second."""
    return window.frames(without=NO_EVENTS) / window.seconds


def _event_bytes(fleet: Fleet, leader: FleetClient) -> int:
    """The mean size of the events of one cycle of commands, bytes."""
    sizes: list[int] = []

    def note(data: bytes, start: int, end: int) -> None:
        if data[start + 9 : start + 13] not in NO_EVENTS:
            sizes.append(end - start)

    previous, leader.on_text = leader.on_text, note
    # Eight commands contain play and pause: the song ends paused, as it began.
    for frame in command_frames()[:8]:
        leader.send(frame)
    fleet.run_until(lambda: len(sizes) >= 8)
    fleet.run_for(SETTLE_S)
    leader.on_text = previous
    return round(sum(sizes) / len(sizes))
