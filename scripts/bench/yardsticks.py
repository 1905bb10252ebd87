"""The servers beside which BandSync is measured, one process each."""

import asyncio
import base64
import hashlib
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress

from bandsync.rooms.hub import TICK_SLOTS
from scripts.bench.processes import HOST, now_s, relax_garbage_collection

_TICK_S = 0.1
# Ticks are sent in the same bursts as the server's.
_TICK_SLOTS = TICK_SLOTS
_NEVER_S = 86_400
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def serve_bare(connections: int, members: int, payload: str) -> None:
    """Serve nothing but sends: no reading, no event loop, no protocol."""
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
    # The clients disconnect at the end.
    with suppress(ConnectionError):
        for slot in _steps(time.sleep):
            for sock in slots[slot]:
                sock.send(frame)


def _steps(sleep: Callable[[float], None]) -> Iterator[int]:
    """The slots of ticks, at the times at which BandSync sends them."""
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
    # RFC 6455 requires it.
    digest = hashlib.sha1(found[1] + _GUID).digest()  # noqa: S324  # no secret
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
    )


def serve_send_message(connections: int, payload: str) -> None:
    """Send each member a message with trio-websocket's `send_message`."""
    # Imported late, so that only this process loads it.
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
            all_rooms = list(rooms.values())
            due = trio.current_time()
            while True:
                for slot in range(_TICK_SLOTS):
                    due += _TICK_S / _TICK_SLOTS
                    await trio.sleep_until(due)
                    due = max(due, trio.current_time() - _TICK_S)
                    for room in all_rooms[slot::_TICK_SLOTS]:
                        for websocket in room:
                            await websocket.send_message(payload)

    try:
        trio.run(run)
    except* ConnectionClosed:
        pass  # The clients disconnect at the end.


def serve_websockets() -> None:
    """Broadcast each received message to the room, with the websockets library."""
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


def serve_socketio(redis_url: str) -> None:
    """Broadcast to the room on all servers: python-socketio with its Redis manager.

    It runs on aiohttp and uvloop. With uvicorn a delivery costs a sixth more.
    """
    import socketio  # type: ignore[import-untyped]  # it brings no types
    import uvloop
    from aiohttp import web

    # No pings during the measurement.
    server = socketio.AsyncServer(
        async_mode="aiohttp",
        client_manager=socketio.AsyncRedisManager(redis_url),
        transports=["websocket"],
        cors_allowed_origins="*",
        ping_interval=_NEVER_S,
        ping_timeout=_NEVER_S,
    )

    @server.event  # type: ignore[untyped-decorator]  # it brings no types
    async def connect(sid: str, environ: dict[str, str]) -> None:
        await server.enter_room(sid, environ["QUERY_STRING"].rpartition("room=")[2])

    @server.event  # type: ignore[untyped-decorator]  # it brings no types
    async def change(sid: str, event: object) -> str:
        room = next(room for room in server.rooms(sid) if room != sid)
        await server.emit("change", event, room=room)
        return "done"

    listener = socket.create_server((HOST, 0), backlog=1024)
    print(f"listening on {HOST}:{listener.getsockname()[1]}", flush=True)
    application = web.Application()
    server.attach(application)
    # As BandSync does.
    relax_garbage_collection()
    web.run_app(
        application, sock=listener, access_log=None, print=None, loop=uvloop.new_event_loop()
    )


_YARDSTICKS: dict[str, Callable[[list[str]], None]] = {
    "bare": lambda given: serve_bare(int(given[0]), int(given[1]), given[2]),
    "send_message": lambda given: serve_send_message(int(given[0]), given[2]),
    "websockets": lambda given: serve_websockets(),
    "socketio": lambda given: serve_socketio(given[0]),
}

if __name__ == "__main__":
    _YARDSTICKS[sys.argv[1]](sys.argv[2:])
