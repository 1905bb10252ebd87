"""Memory: a connection that has ended is freed at once, and a silent one keeps nothing.

Connections come and go all evening. The cyclic garbage collector looks at old objects minutes
later, so nothing may wait for it: it is disabled here.
"""

import contextlib
import gc
import socket
import struct
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from bandsync.net import connection as connection_module
from bandsync.net.connection import Connection
from bandsync.rooms.mirror import Mirror
from bandsync.rooms.room import Room
from tests.net.test_abuse import UPGRADE, send_junk
from tests.support.servers import PATIENCE_S, Server, band, musician, start_server

CLOSE = Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True)
CLOSE_ANSWER = b"\x88\x02\x03\xe8"
BAD_MESSAGE = Frame(Opcode.TEXT, b"{").serialize(mask=True)
# Everything that belongs to one connection, wsproto's parser included.
PACKAGES = ("bandsync.net", "trio_websocket", "wsproto", "h11")


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def count_objects(belongs: Callable[[type], bool]) -> int:
    return sum(belongs(type(each)) for each in gc.get_objects())


def of_connections(kind: type) -> bool:
    return str(kind.__module__).startswith(PACKAGES)


async def until_freed(belongs: Callable[[type], bool], before: int) -> None:
    with trio.fail_after(PATIENCE_S):
        while count_objects(belongs) > before:
            await wait_all_tasks_blocked(0.01)


async def upgraded(server: Server) -> trio.SocketStream:
    """A client on a bare socket that has read its welcome."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    await stream.send_all(UPGRADE + b"\r\n")
    answer = b""
    while b'"welcome"' not in answer:
        answer += await stream.receive_some()
    return stream


async def read_to_end(stream: trio.SocketStream) -> bytes:
    answer = b""
    with contextlib.suppress(trio.BrokenResourceError):
        async for data in stream:
            answer += data
    return answer


def reset(stream: trio.SocketStream) -> None:
    """Let the close of this stream send a reset."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def client_closes(stream: trio.SocketStream) -> None:
    await stream.send_all(CLOSE)
    assert CLOSE_ANSWER in await read_to_end(stream)


async def client_closes_and_ends_its_side(stream: trio.SocketStream) -> None:
    await stream.send_all(CLOSE)
    await stream.send_eof()
    await read_to_end(stream)


async def client_closes_and_resets(stream: trio.SocketStream) -> None:
    await stream.send_all(CLOSE)
    reset(stream)


async def client_ends_its_side(stream: trio.SocketStream) -> None:
    await stream.send_eof()
    await read_to_end(stream)


async def client_resets(stream: trio.SocketStream) -> None:
    reset(stream)


async def client_resets_in_a_frame(stream: trio.SocketStream) -> None:
    await stream.send_all(BAD_MESSAGE[:-1])
    reset(stream)


async def server_closes_and_client_answers(stream: trio.SocketStream) -> None:
    await stream.send_all(BAD_MESSAGE * 10)
    answer = b""
    while struct.pack("!H", 1008) not in answer:
        answer += await stream.receive_some()
    await stream.send_all(CLOSE)
    await read_to_end(stream)


async def server_closes_and_client_is_silent(stream: trio.SocketStream) -> None:
    await stream.send_all(BAD_MESSAGE * 10)
    assert struct.pack("!H", 1008) in await read_to_end(stream)


async def server_closes_and_client_resets(stream: trio.SocketStream) -> None:
    await stream.send_all(BAD_MESSAGE * 10)
    reset(stream)


async def server_rejects_a_frame(stream: trio.SocketStream) -> None:
    await stream.send_all(b"\x81\x05hello")
    assert struct.pack("!H", 1002) in await read_to_end(stream)


async def client_stops_answering_pings(stream: trio.SocketStream) -> None:
    assert struct.pack("!H", 4000) in await read_to_end(stream)


@pytest.mark.parametrize(
    "end",
    [
        client_closes,
        client_closes_and_ends_its_side,
        client_closes_and_resets,
        client_ends_its_side,
        client_resets,
        client_resets_in_a_frame,
        server_closes_and_client_answers,
        server_closes_and_client_is_silent,
        server_closes_and_client_resets,
        server_rejects_a_frame,
        client_stops_answering_pings,
    ],
    ids=lambda end: end.__name__,
)
async def test_ended_connections_leave_no_garbage(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[trio.SocketStream], Awaitable[None]],
) -> None:
    monkeypatch.setattr(connection_module, "CLOSE_TIMEOUT_S", 0.1)
    settings: dict[str, object] = {}
    if end is client_stops_answering_pings:
        settings = {"connection_timeout_ms": 200, "ping_interval_ms": 100}
    server = await start_server(nursery, **settings)

    async def one() -> None:
        stream = await upgraded(server)
        async with stream:
            await end(stream)

    # The first connection fills caches.
    await one()
    await wait_all_tasks_blocked(0.01)
    with without_collector():
        before = count_objects(of_connections)
        async with trio.open_nursery() as clients:
            for _ in range(20):
                clients.start_soon(one)
        await until_freed(of_connections, before)
    assert server.events("connection.failed") == []
    await server.stop()


@pytest.mark.parametrize("how", range(3))
@pytest.mark.parametrize(
    "last",
    [
        pytest.param(b"", id="silent"),
        pytest.param(CLOSE, id="closed"),
        pytest.param(b"\x81\x05hello", id="rejected"),
    ],
)
async def test_connection_that_ends_during_its_handshake_leaves_no_garbage(
    server: Server, last: bytes, how: int
) -> None:
    with without_collector():
        before = count_objects(of_connections)
        for _ in range(3):
            await send_junk(server, UPGRADE + b"\r\n" + last, how)
        await until_freed(of_connections, before)


async def test_connections_closed_by_a_drain_leave_no_garbage(nursery: trio.Nursery) -> None:
    with without_collector():
        before = count_objects(lambda kind: kind is Connection)
        server = await start_server(nursery)
        async with band(server, "Ann", "Bob") as (ann, bob):
            await server.stop()
            assert await ann.closed() == await bob.closed() == 1012
        await until_freed(lambda kind: kind is Connection, before)


async def test_member_that_leaves_is_freed_at_once(server: Server) -> None:
    with without_collector():
        before = count_objects(lambda kind: kind is Connection)
        async with musician(server) as ann, musician(server) as bob:
            await ann.join()
            await bob.join()
            await ann.ok("leave_session")
            assert count_objects(lambda kind: kind is Connection) == before + 2
        await until_freed(lambda kind: kind is Connection, before)


async def test_silent_client_keeps_no_message_in_memory(server: Server) -> None:
    """One small piece for each client would fragment the heap."""
    tracemalloc.start()
    try:
        async with band(server, "Ann", "Bob", "Cyd") as players:
            for player in players:
                await player.ok("chat_message", text="x" * 1000)
            await wait_all_tasks_blocked(0.01)
            received = tracemalloc.Filter(inclusive=True, filename_pattern="*/net/stream.py")
            kept = tracemalloc.take_snapshot().filter_traces([received]).traces
            assert [trace for trace in kept if trace.size > 1000] == []
    finally:
        tracemalloc.stop()


async def test_empty_room_is_freed_at_once(nursery: trio.Nursery) -> None:
    """Its session may be in Redis, and then need not be in memory."""
    server = await start_server(nursery, resume_grace_ms=0)

    def of_rooms(kind: type) -> bool:
        return kind in {Room, Mirror}

    with without_collector():
        before = count_objects(of_rooms)
        async with band(server, "Ann", "Bob") as (ann, bob):
            await ann.ok("play")
            assert count_objects(of_rooms) == before + 2
            await bob.ok("leave_session")
            await ann.ok("leave_session")
        await until_freed(of_rooms, before)
