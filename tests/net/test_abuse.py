"""Clients that are broken, slow or hostile: they must not affect other clients."""

import os
import random
import socket
import ssl
import struct
from collections.abc import Iterator

import httpx
import pytest
import trio
import trustme
from websockets.frames import Frame, Opcode

from tests.support.servers import PATIENCE_S, Musician, Server, band, musician, start_server

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
)
JUNK = [
    b"",
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 500,
    b"GET /ws HTTP/1.1\r\nHos",
    UPGRADE,
    UPGRADE.replace(b"Host: x", b"Host: \xff\xfe") + b"\r\n",
    UPGRADE.replace(b"Host: x\r\n", b"") + b"\r\n",
    UPGRADE + b"Sec-WebSocket-Protocol: \xe9t\xe9\r\n\r\n",
    UPGRADE + b"Sec-WebSocket-Extensions: \xff\r\n\r\n",
    UPGRADE + b"Origin: http://\xff\r\n\r\n",
    UPGRADE + b"Cookie: caf\xc3\xa9\r\n\r\n",
    UPGRADE.replace(b"13", b"8") + b"\r\n",
    UPGRADE.replace(b"AAAAAAAAAAAAAAAAAAAAAA==", b"short") + b"\r\n",
    UPGRADE.replace(b"GET", b"POST") + b"\r\n",
    UPGRADE + b"\r\n" + b"\xff" * 300,
    UPGRADE + b"\r\n" + b"\x81\x05hello",
    UPGRADE + b"\r\n" + Frame(Opcode.CLOSE, b"\x01").serialize(mask=True),
    UPGRADE + b"\r\n" + Frame(Opcode.CLOSE, struct.pack("!H", 1005)).serialize(mask=True),
    UPGRADE + b"\r\n" + Frame(Opcode.TEXT, b"\xff").serialize(mask=True),
    UPGRADE + b"X: " + b"x" * 1_000_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"\r\n" * 9000,
]


async def send_junk(server: Server, junk: bytes, how: int) -> None:
    """Send junk, then reset the connection (0), half-close it and read (1), or close it (2)."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    try:
        await stream.send_all(junk)
        if how == 0:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == 1:
            await stream.send_eof()
            with trio.move_on_after(PATIENCE_S):
                async for _ in stream:
                    pass
    except trio.BrokenResourceError:
        pass
    finally:
        await stream.aclose()


async def test_thousand_junk_handshakes_leak_nothing_and_end_no_connection(server: Server) -> None:
    draw = random.Random(2)
    async with band(server, "Ann", "Bob") as (ann, bob):
        tasks = trio.lowlevel.current_statistics().tasks_living
        files = len(os.listdir("/proc/self/fd"))
        limit = trio.CapacityLimiter(50)

        async def one(junk: bytes, how: int) -> None:
            async with limit:
                await send_junk(server, junk, how)

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(one, JUNK[number % len(JUNK)], draw.randrange(3))
        # Connections that are still closing end after their deadlines of seconds.
        with trio.fail_after(PATIENCE_S):
            while trio.lowlevel.current_statistics().tasks_living > tasks:
                await ann.ok("heartbeat")
        assert len(os.listdir("/proc/self/fd")) <= files
        await ann.ok("play")
        await bob.next("play")
        async with musician(server) as third:
            await third.join()
    assert server.events("connection.failed") == []


async def test_bad_message_is_refused_and_the_tenth_closes(server: Server) -> None:
    async with musician(server) as player:
        await player.join()
        for number in range(1, 11):
            await player.socket.send(b"\x00" if number % 2 else "{")
            assert (await player.next("error"))["code"] == "bad_message"
            assert (number < 10) or await player.closed() == 1008


async def test_oversized_message_closes_with_1009(server: Server) -> None:
    for size in (16_385, 1_000_000):
        async with musician(server) as player:
            await player.socket.send("x" * size)
            assert await player.closed() == 1009
    async with musician(server) as player:
        await player.socket.send('{"type":"heartbeat","x":"' + "x" * 16_300 + '"}')
        await player.next("heartbeat")


async def test_invalid_utf_8_closes_with_1007(server: Server) -> None:
    async with musician(server) as player:
        await player.socket.send(b"\xff", text=True)
        assert await player.closed() == 1007


async def test_message_over_the_rate_limit_is_refused_and_dropped(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, rate_limit_factor=1.0)
    async with musician(server) as player:
        await player.join()
        for _ in range(40):
            await player.send("chat_message", text="x", requestId="r")
        await player.until(lambda: len(player.all("ack", "error")) >= 41)
        codes = [error["code"] for error in player.all("error")]
        assert set(codes) == {"rate_limited"}
        assert 20 <= len(codes) <= 30
        assert len(player.all("chat_message")) == 40 - len(codes)
        # Each type has its own bucket, and an invalid message counts like a valid one.
        await player.ok("heartbeat")
        for _ in range(30):
            await player.send("set_tempo", tempo=0)
        await player.next("error", code="rate_limited")
        await player.send("bogus")
        await player.next("error", code="unknown_type")
    await server.stop()


async def test_full_server_closes_with_1013(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, max_connections=1)
    async with musician(server) as player:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(UPGRADE + b"\r\n")
        with trio.fail_after(PATIENCE_S):
            answer = b""
            while b"\x88" not in answer:
                answer += await stream.receive_some()
        assert answer.partition(b"\r\n\r\n")[2][2:4] == struct.pack("!H", 1013)
        await stream.aclose()
        await player.ok("heartbeat")
    await server.stop()


async def join_and_stop_reading(server: Server, session: str) -> tuple[trio.SocketStream, bytes]:
    """A member that stops reading, and the bytes that it had read after the handshake."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    join = f'{{"type":"join_session","sessionId":"{session}","displayName":"Deaf"}}'.encode()
    await stream.send_all(UPGRADE + b"\r\n" + Frame(Opcode.TEXT, join).serialize(mask=True))
    answer = b""
    while b"snapshot" not in answer:
        answer += await stream.receive_some()
    return stream, answer.partition(b"\r\n\r\n")[2]


def server_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Opcode and payload of every frame; the last one may be incomplete."""
    while len(data) >= 4:
        start = 4 if data[1] == 126 else 10 if data[1] == 127 else 2
        size = data[1] if start == 2 else int.from_bytes(data[2:start], "big")
        assert data[0] & 0x70 == 0
        assert data[0] & 0x0F in {Opcode.TEXT, Opcode.CLOSE, Opcode.PING, Opcode.PONG}
        if len(data) < start + size:
            return
        yield data[0] & 0x0F, data[start : start + size]
        data = data[start + size :]


async def flood(leader: Musician, until: trio.Event) -> None:
    while not until.is_set():
        await leader.ok("update_message", message="🎵" * 500)


@pytest.mark.parametrize("outbox_limit", [65_536, 262_144])
async def test_slow_consumer_is_closed_and_delays_nobody(
    nursery: trio.Nursery, outbox_limit: int
) -> None:
    server = await start_server(nursery, outbox_limit_bytes=outbox_limit, resume_grace_ms=500)
    async with band(server, "Ann", "Bob") as (ann, bob):
        stream, left_over = await join_and_stop_reading(server, "song")
        await ann.ok("play")
        done = trio.Event()
        nursery.start_soon(flood, ann, done)
        gone = await bob.next("member_connection", connected=False)
        left = await bob.next("user_left")
        done.set()
        assert left["memberId"] == gone["memberId"]
        assert left["reason"] == "slow_consumer"
        # Every frame that was started is whole, and the close frame is the last one.
        answer = left_over
        with trio.fail_after(PATIENCE_S):
            try:
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
        await stream.aclose()
        await ann.ok("heartbeat")
        assert server.events("connection.slow")
        async with httpx.AsyncClient(base_url=server.serving.url) as client:
            metrics = (await client.get("/metrics")).text
        assert "bandsync_slow_consumers_total 1.0" in metrics
        assert all(player.close_code is None for player in (ann, bob))
        frames = list(server_frames(answer))
        assert len(frames) > 10
        if frames[-1][0] == Opcode.CLOSE:  # Unless the close timeout came first.
            assert frames[-1][1][:2] == struct.pack("!H", 1013)
    await server.stop()


async def test_client_that_reads_receives_the_largest_snapshots(
    nursery: trio.Nursery, certificate: tuple[trustme.CA, str, str]
) -> None:
    authority, cert, key = certificate
    context = ssl.create_default_context()
    authority.configure_trust(context)
    for options, tls in (({}, None), ({"tls_cert": cert, "tls_key": key}, context)):
        server = await start_server(nursery, outbox_limit_bytes=65_536, **options)
        security = {"ssl": tls} if tls else {}
        async with musician(server, **security) as ann:
            await ann.join()
            for _ in range(50):
                await ann.ok("chat_message", text="\x01" * 1000)
            async with musician(server, **security, max_size=None) as bob:
                await bob.send("join_session", sessionId="song")
                await bob.send("clock_sync", t0=1)
                for _ in range(20):
                    await bob.send("sync_request")
                await bob.ok("heartbeat")
                assert len(bob.all("snapshot")) == 21
        await server.stop()


async def test_flood_of_pings_is_answered_and_delays_nobody(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(UPGRADE + b"\r\n")
        pings = b"".join(Frame(Opcode.PING, b"%04d" % n).serialize(mask=True) for n in range(5000))
        close = Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True)

        answer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, pings + close)
            async for part in stream:
                answer += part
        await ann.ok("play")
        await bob.next("play")
        pongs = [
            payload
            for opcode, payload in server_frames(answer.partition(b"\r\n\r\n")[2])
            if opcode == Opcode.PONG
        ]
        # In order; some are dropped when the send queue is long.
        assert pongs == sorted(pongs)
        assert len(pongs) > 100
        await stream.aclose()
    assert server.events("connection.failed") == []


async def test_concurrent_handshakes_cannot_exceed_max_connections(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, max_connections=5)
    streams = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(40)]
    for stream in streams:
        await stream.send_all(UPGRADE + b"\r\n")
    firsts = []
    for stream in streams:
        with trio.fail_after(PATIENCE_S):
            answer = b""
            while len(answer.partition(b"\r\n\r\n")[2]) < 4:
                answer += await stream.receive_some()
        firsts.append(next(opcode for opcode, _ in server_frames(answer.partition(b"\r\n\r\n")[2])))
    assert firsts.count(Opcode.TEXT) == 5
    assert firsts.count(Opcode.CLOSE) == 35
    for stream in streams:
        await stream.aclose()
    await server.stop()


async def test_message_after_a_close_frame_is_ignored(server: Server) -> None:
    async with band(server, "Ann") as (ann,):
        stream, _ = await join_and_stop_reading(server, "song")
        close = Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True)
        late = Frame(Opcode.TEXT, b'{"type":"chat_message","text":"late"}').serialize(mask=True)
        await stream.send_all(close + late)
        await ann.next("member_connection", connected=False)
        assert ann.all("chat_message") == []
        await stream.aclose()


async def test_tls_serves_clients_and_survives_junk(
    nursery: trio.Nursery, certificate: tuple[trustme.CA, str, str]
) -> None:
    authority, cert, key = certificate
    server = await start_server(nursery, tls_cert=cert, tls_key=key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    assert server.lines[0].startswith("BandSync listening on https://127.0.0.1:")
    async with musician(server, ssl=context) as ann, musician(server, ssl=context) as bob:
        await ann.join()
        await bob.join()
        await ann.ok("play")
        await bob.next("scroll_tick")
        for number in range(50):
            await ann.ok("update_message", message=str(number) * 250)
        await bob.next("message_updated", message="49" * 250)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x16\x03\x01", b"\xff" * 5000):
            await send_junk(server, junk, 1)
        await ann.ok("heartbeat")
    await server.stop()
    assert server.events("connection.failed") == []


async def test_bug_in_one_connection_ends_only_that_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with band(server, "Ann", "Bob") as (ann, bob):
        with monkeypatch.context() as patch:
            patch.setattr("bandsync.net.connection.Connection.run", broken)
            await send_junk(server, UPGRADE + b"\r\n", 1)
        (logged,) = server.events("connection.failed")
        assert "a bug" in logged["exception"]
        await ann.ok("play")
        await bob.next("play")


async def test_bug_in_a_command_is_reported_with_an_id_and_ends_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with band(server, "Ann", "Bob") as (ann, bob):
        with monkeypatch.context() as patch:
            patch.setattr("bandsync.rooms.mirror.decide", broken)
            error = await ann.ask("play")
        assert error["code"] == "internal"
        (logged,) = server.events("command.failed")
        assert logged["error_id"] == error["context"]["errorId"]
        assert "a bug" in logged["exception"]
        await ann.ok("play")
        await bob.next("play")
