#!/usr/bin/env python3
"""Measure a BandSync server, beside yardsticks that run on the same machine in the same minute.

Servers run on the first core, the load generator on the others. While one server is measured,
the rest are suspended; their windows alternate, so that noise of the machine meets all alike.
Each sub-command prints one line of JSON. `cpuUs…` is microseconds of the server's user and system
time, `…Ms` milliseconds, `…Kb` 1024 bytes, `…Cpu` a fraction of one core.
"""

import argparse
import asyncio
import base64
import gc
import hashlib
import json
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from statistics import median

from benchload import (
    HOST,
    SETTLE_S,
    TICK,
    WARM_UP_S,
    BenchError,
    Chatter,
    Client,
    ClosedLoop,
    Contender,
    Fleet,
    Latencies,
    Server,
    Window,
    after,
    alternate,
    bandsync,
    masked,
    masked_text,
    measure,
    now_s,
    percentile,
    pin_generator,
    raise_file_limit,
    spread,
    total,
)

from bandsync.hub import TICK_SLOTS

_TICK_S = 0.1
# The bursts of the yardsticks are those of the server.
_TICK_SLOTS = TICK_SLOTS
# A whole number of ping and statistics periods.
_IDLE_S = 5.0
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_ACK = b'{"type":"ack","requestId":"'
_NO_EVENTS = (b'ack"', b"erro", b"room", b"scro", b"snap", b"sync", b"welc")


def join(fleet: Fleet, sessions: int, members: int, *, slow: bool = False) -> list[Client]:
    """Fill the sessions, the first of each leads.

    Args:
        slow: give the last member of each session a small receive buffer.

    Returns:
        The leaders.
    """
    greeting = masked({"type": "join_session"})
    leaders = fleet.open(range(sessions), greeting)
    fleet.run_until(lambda: fleet.kinds[b"snap"] == sessions)
    for place in range(1, members):
        small = 16_384 if slow and place == members - 1 else None
        fleet.open(range(sessions), greeting, receive_buffer=small)
    fleet.run_until(lambda: fleet.kinds[b"snap"] == sessions * members)
    return leaders


def settle() -> None:
    """Let nothing but the measured code use the generator's time."""
    gc.collect()
    gc.freeze()
    gc.disable()


def capture(fleet: Fleet, client: Client, start: bytes) -> bytes:
    """The payload of the next frame of ``client`` that begins with ``start``."""
    found: list[bytes] = []

    def look(data: bytes, begin: int, end: int) -> None:
        if data.startswith(start, begin):
            found.append(data[begin:end])

    client.on_text = look
    fleet.run_until(lambda: bool(found))
    client.on_text = None
    return found[0]


def cpu_us(window: Window, deliveries: int) -> float:
    """Server CPU per delivery, µs."""
    return window.server_cpu_s / deliveries * 1e6


def median_ratio(
    mine: Sequence[Window], other: Sequence[Window], figure: Callable[[Window], float]
) -> float:
    """The median of the ratios of ``figure`` in neighbouring slices: less moved by noise."""
    pairs = zip(mine, other, strict=True)
    return round(median(figure(own) / figure(yardstick) for own, yardstick in pairs), 2)


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
        Server(__file__, name, str(sessions * members), str(members), payload.decode())
    )
    fleet = stack.enter_context(Fleet(server.port))
    # Member by member, as BandSync's sessions were filled.
    for _ in range(members):
        fleet.open(range(sessions))
    fleet.run_until(lambda: bool(fleet.kinds))
    return Contender(server, fleet)


def serve_bare(connections: int, members: int, payload: str) -> None:
    """The yardstick that is nothing but sends: no reading, no event loop, no protocol."""
    listener = socket.create_server((HOST, 0), backlog=1024)
    print(f"listening on {HOST}:{listener.getsockname()[1]}", flush=True)
    places: list[list[socket.socket]] = [[] for _ in range(connections // members)]
    for _ in range(connections):
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(4096)
        sock.sendall(_switching_protocols(head))
        sock.setblocking(False)
        places[int(head.split(b" ")[1].rpartition(b"-")[2])].append(sock)
    encoded = payload.encode()
    frame = (
        b"\x81"
        + (
            bytes([len(encoded)])
            if len(encoded) < 126
            else b"\x7e" + len(encoded).to_bytes(2, "big")
        )
        + encoded
    )
    slots = [
        [sock for room in places[slot::_TICK_SLOTS] for sock in room] for slot in range(_TICK_SLOTS)
    ]
    # The clients leave at the end.
    with suppress(ConnectionError):
        for slot in _steps(time.sleep):
            for sock in slots[slot]:
                sock.send(frame)


def _steps(sleep: Callable[[float], None]) -> Iterator[int]:
    """Slots at the moments at which BandSync visits them."""
    due = now_s()
    while True:
        for slot in range(_TICK_SLOTS):
            due += _TICK_S / _TICK_SLOTS
            late = now_s() - due
            if late > _TICK_S:
                due += late
            elif late < 0:
                sleep(-late)
            yield slot


def _switching_protocols(head: bytes) -> bytes:
    found = re.search(rb"Sec-WebSocket-Key: (\S+)", head)
    assert found is not None
    # RFC 6455 asks for it.
    digest = hashlib.sha1(found[1] + _GUID).digest()  # noqa: S324
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
    )


def serve_send_message(connections: int, payload: str) -> None:
    """The yardstick that sends each member a message by trio-websocket's own means."""
    # Not at the top: only this process should pay for them.
    import trio
    from trio_websocket import (
        ConnectionClosed,
        WebSocketConnection,
        WebSocketRequest,
        WebSocketServer,
    )

    rooms: dict[str, list[WebSocketConnection]] = defaultdict(list)
    joined = 0
    complete = trio.Event()

    async def handle(request: WebSocketRequest) -> None:
        nonlocal joined
        websocket = await request.accept()
        rooms[request.path].append(websocket)
        joined += 1
        if joined == connections:
            complete.set()
        try:
            while True:
                await websocket.get_message()
        except ConnectionClosed:
            pass

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=1024)
            server = WebSocketServer(handle, listeners, handler_nursery=nursery)
            await nursery.start(server.run)
            print(f"listening on {HOST}:{server.port}", flush=True)
            await complete.wait()
            everybody = list(rooms.values())
            due = trio.current_time()
            while True:
                for slot in range(_TICK_SLOTS):
                    due += _TICK_S / _TICK_SLOTS
                    await trio.sleep_until(due)
                    due = max(due, trio.current_time() - _TICK_S)
                    for room in everybody[slot::_TICK_SLOTS]:
                        for websocket in room:
                            await websocket.send_message(payload)

    try:
        trio.run(run)
    except* ConnectionClosed:
        pass  # The clients leave at the end.


def command_frames() -> list[bytes]:
    """A cycle of leader's commands, each of which changes something."""
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
    """Which command of `command_frames` a frame of BandSync answers."""
    if data.startswith(b'{"type":"error"', start):
        raise BenchError(f"refused: {data[start:end].decode()}")
    if not data.startswith(_ACK, start):
        return None
    at = start + len(_ACK)
    return int(data[at + 1 : data.index(b'"', at, end)])


def commands(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Commands as fast as they are answered: BandSync beside a server that only broadcasts."""
    connections = sessions * members
    with ExitStack() as stack:
        server = stack.enter_context(bandsync(connections, members))
        fleet = stack.enter_context(Fleet(server.port))
        leaders = join(fleet, sessions, members)
        own = ClosedLoop(command_frames(), acked)
        for leader in leaders:
            own.add(leader)
        own.start()
        fleet.run_for(WARM_UP_S)
        own.stop(fleet)
        event_bytes = _event_bytes(fleet, leaders[0])

        plain = stack.enter_context(Server(__file__, "websockets"))
        plain_fleet = stack.enter_context(Fleet(plain.port))
        plain_leaders = plain_fleet.open(range(sessions))
        for _ in range(1, members):
            plain_fleet.open(range(sessions))
        plain_fleet.run_for(SETTLE_S)
        text = b'{"type":"yardstick","pad":"' + b"x" * (event_bytes - 29) + b'"}'
        echo = ClosedLoop([masked_text(text)], lambda data, start, end: -1)
        for leader in plain_leaders:
            echo.add(leader)
        settle()

        contenders = {
            "bandsync": Contender(server, fleet, wake=own.start, rest=lambda: own.stop(fleet)),
            "websockets": Contender(
                plain, plain_fleet, wake=echo.start, rest=lambda: echo.stop(plain_fleet)
            ),
        }
        windows = alternate(contenders, seconds)
    result: dict[str, object] = {
        "bench": "commands",
        "sessions": sessions,
        "members": members,
        "outstandingPerLeader": 2,
        "windowSeconds": round(seconds, 1),
        "slices": len(windows["websockets"]),
        "eventBytes": event_bytes,
    }
    rates: dict[str, float] = {}
    for name, parts in windows.items():
        whole = total(parts)
        deliveries = whole.frames(without=_NO_EVENTS)
        rates[name] = _event_rate(whole)
        result[name] = {
            "deliveriesPerSecond": round(rates[name]),
            "perSlice": [round(_event_rate(part)) for part in parts],
            "cpuUsPerDelivery": round(cpu_us(whole, deliveries), 2),
            "otherFramesPerSecond": round((whole.frames() - deliveries) / whole.seconds),
            "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    return result | {
        "ratio": round(rates["bandsync"] / rates["websockets"], 2),
        "medianRatio": median_ratio(windows["bandsync"], windows["websockets"], _event_rate),
    }


def _event_rate(window: Window) -> float:
    return window.frames(without=_NO_EVENTS) / window.seconds


def _event_bytes(fleet: Fleet, leader: Client) -> int:
    """The mean size of the events that one turn of commands causes, bytes."""
    sizes: list[int] = []

    def note(data: bytes, start: int, end: int) -> None:
        if data[start + 9 : start + 13] not in _NO_EVENTS:
            sizes.append(end - start)

    previous, leader.on_text = leader.on_text, note
    # Eight: both play and pause, at whose end the song stands as it did.
    for frame in command_frames()[:8]:
        leader.send(frame)
    fleet.run_until(lambda: len(sizes) >= 8)
    fleet.run_for(SETTLE_S)
    leader.on_text = previous
    return round(sum(sizes) / len(sizes))


def serve_websockets() -> None:
    """The yardstick that broadcasts what it receives to the room, with the websockets library."""
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    rooms: dict[str, set[ServerConnection]] = defaultdict(set)

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        room = rooms[connection.request.path]
        room.add(connection)
        try:
            async for message in connection:
                broadcast(room, message)
        finally:
            room.discard(connection)

    async def run() -> None:
        async with serve(handle, HOST, 0, compression=None) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            print(f"listening on {HOST}:{port}", flush=True)
            await server.serve_forever()

    asyncio.run(run())


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
    """Run one benchmark, or be one of the yardsticks."""
    if sys.argv[1:2] and sys.argv[1] in YARDSTICKS:
        YARDSTICKS[sys.argv[1]](sys.argv[2:])
        return 0
    options = parse_arguments()
    pin_generator()
    try:
        if options.bench == "fanout":
            raise_file_limit(3 * options.connections)
            result = fanout(options.connections, options.members, options.seconds)
        elif options.bench == "commands":
            raise_file_limit(2 * options.sessions * options.members)
            result = commands(options.sessions, options.members, options.seconds)
        elif options.bench == "connections":
            raise_file_limit(options.connections)
            result = many_connections(options.connections, options.members)
        else:
            raise_file_limit(options.sessions * options.members)
            result = slow_consumer(
                options.sessions, options.members, options.seconds, options.chats_per_second
            )
    except BenchError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Which benchmark, and how large."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    defaults: dict[Callable[..., object], dict[str, float]] = {
        fanout: {"connections": 1000, "seconds": 10.0},
        commands: {"sessions": 25, "seconds": 10.0},
        many_connections: {"connections": 5000},
        slow_consumer: {"sessions": 25, "seconds": 5.0, "chats-per-second": 20.0},
    }
    names = ("fanout", "commands", "connections", "slow")
    for name, (bench, flags) in zip(names, defaults.items(), strict=True):
        meaning = bench.__doc__
        sub = benches.add_parser(name, help=meaning, description=meaning)
        for flag, default in {"members": 8, **flags}.items():
            sub.add_argument(f"--{flag}", type=type(default), default=default, help=_HELP[flag])
    return parser.parse_args()


_HELP = {
    "chats-per-second": "long messages of each leader (default %(default)s)",
    "connections": "how many, in sessions of --members (default %(default)s)",
    "members": "of each session (default %(default)s)",
    "seconds": "how long each measurement takes (default %(default)s)",
    "sessions": "how many (default %(default)s)",
}

YARDSTICKS: dict[str, Callable[[list[str]], None]] = {
    "bare": lambda given: serve_bare(int(given[0]), int(given[1]), given[2]),
    "send_message": lambda given: serve_send_message(int(given[0]), given[2]),
    "websockets": lambda given: serve_websockets(),
}


if __name__ == "__main__":
    sys.exit(main())
