"""Handoff between worker processes: all members of a session are on one worker."""

import itertools
import math
import os
import signal
import socket
import ssl
import struct

import httpx
import pytest
import trio
import trustme
import wsproto

from bandsync.handoff.channel import ANSWER_TIMEOUT_S
from bandsync.handoff.rendezvous import preference
from bandsync.workers import supervisor
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.handoffs import SESSIONS, session_for
from tests.support.servers import PATIENCE_S, Musician, musician
from tests.support.worker_groups import WorkerGroup, upgrade, working


def path_of(session_id: str) -> str:
    return f"/ws/{session_id}"


async def member(
    group: WorkerGroup,
    nursery: trio.Nursery,
    session_id: str,
    context: ssl.SSLContext | None = None,
    **fields: object,
) -> Musician:
    """A client that has joined the session that the path names."""

    async def stay(*, task_status: trio.TaskStatus[Musician]) -> None:
        options = {"ssl": context} if context else {}
        async with musician(group, path_of(session_id), **options) as player:
            task_status.started(player)
            await trio.sleep_forever()

    player = await nursery.start(stay)
    await player.join(None, **fields)
    return player


def server_of(player: Musician) -> str:
    return player.inbox[0]["serverId"]


def read_until(client: socket.socket, wanted: bytes) -> bytes:
    """The received bytes, until an object ends that contains ``wanted``."""
    received = b""
    while b"}" not in received.partition(wanted)[2]:
        data = client.recv(4096)
        assert data, received
        received += data
    return received


async def connect_and_stay(
    port: int,
    path: str,
    wanted: bytes,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """A client that connects, receives ``wanted``, and stays."""
    stream = await trio.open_tcp_stream(HOST, port)
    async with stream:
        await stream.send_all(upgrade(path))
        received = b""
        while wanted not in received:
            data = await stream.receive_some()
            assert data, received
            received += data
        task_status.started()
        async for _ in stream:
            pass


async def test_all_members_of_a_session_are_on_one_worker(redis_server: RedisServer) -> None:
    ports = free_port()
    async with working(redis_server.url(), worker_ports=ports) as (group, nursery):
        handoffs = 0.0
        for session_id in SESSIONS:
            home = f"stage-{preference(session_id, 2)[0]}"
            players = [await member(group, nursery, session_id) for _ in range(4)]
            assert {server_of(player) for player in players} == {home}
            await players[0].ok("chat_message", text="all here?")
            for player in players:
                await player.next("chat_message", text="all here?")
        async with httpx.AsyncClient() as client:
            for number in (1, 2):
                text = (await client.get(f"http://{HOST}:{ports + number - 1}/metrics")).text
                (line,) = [
                    line for line in text.splitlines() if line.startswith("bandsync_passed_on_t")
                ]
                handoffs += float(line.split()[1])
        # The odds that the kernel chose the right worker 32 times are one to 10^9.
        assert 0 < handoffs < len(SESSIONS) * 4


async def test_connection_to_a_workers_own_port_stays_there(redis_server: RedisServer) -> None:
    ports = free_port()
    async with working(redis_server.url(), worker_ports=ports):
        for number in (1, 2):
            with socket.create_connection((HOST, ports + number - 1), PATIENCE_S) as client:
                client.sendall(upgrade(path_of(session_for(3 - number))))
                welcome = await trio.to_thread.run_sync(read_until, client, b'"welcome"')
                assert f'"serverId":"stage-{number}"'.encode() in welcome


async def test_no_client_is_refused_while_a_worker_has_room(redis_server: RedisServer) -> None:
    ports = free_port()
    settings = {"worker_ports": ports, "max_connections": 4}
    async with working(redis_server.url(), **settings) as (group, nursery):
        for _ in range(4):
            await nursery.start(connect_and_stay, ports, "/ws", b'"welcome"')
        players = [await member(group, nursery, session_for(1)) for _ in range(4)]
        assert {server_of(player) for player in players} == {"stage-2"}
        # Now both workers are full.
        path = path_of(session_for(1))
        refusal = struct.pack("!H", 1013) + b"the server is full"
        await nursery.start(connect_and_stay, group.port, path, refusal)


async def test_frames_that_follow_the_head_are_handed_off_with_it(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url()) as (group, _):
        for session_id in SESSIONS:
            client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
            head = client.send(wsproto.events.Request("stage", path_of(session_id)))
            frames = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
            join = frames.send(wsproto.events.TextMessage('{"type":"join_session"}'))
            with socket.create_connection((HOST, group.port), PATIENCE_S) as sock:
                # After another request on the same connection, and in pieces.
                sock.sendall(b"GET /api/health HTTP/1.1\r\nHost: stage\r\n\r\n")
                await trio.to_thread.run_sync(read_until, sock, b"serverId")
                sock.sendall(head[:30])
                sock.sendall(head[30:] + join[:9])
                sock.sendall(join[9:])
                received = await trio.to_thread.run_sync(read_until, sock, b'"resumeToken"')
                home = f"stage-{preference(session_id, 2)[0]}".encode()
                assert received.count(b'"serverId":"' + home) == 2
                assert b'"sessionId":"' + session_id.encode() in received


async def test_session_of_a_killed_worker_resumes_on_another(redis_server: RedisServer) -> None:
    session_id = session_for(1)
    async with working(redis_server.url()) as (group, nursery):
        players = [await member(group, nursery, session_id) for _ in range(3)]
        await players[0].ok("play", startInMs=0)
        os.kill(group.pid("stage-1"), signal.SIGKILL)
        for player in players:
            await player.closed()
        ended = await group.log.until("worker.exited", server_id="stage-1")
        assert "Killed" in ended["how"]
        tokens = [player.you["resumeToken"] for player in players]
        back = [await member(group, nursery, session_id, resumeToken=token) for token in tokens]
        assert [player.you["resumed"] for player in back] == [True] * 3
        assert [player.you["role"] for player in back] == ["leader", "follower", "follower"]

        await group.log.until("worker.started", 2, server_id="stage-1")
        # A new member reaches the worker that hosts the session now.
        late = await member(group, nursery, session_id)
        assert server_of(late) == "stage-2"
        await back[0].ok("chat_message", text="welcome back")
        await late.next("chat_message", text="welcome back")
        for player in (*back, late):
            await player.ok("leave_session")
        # Once all members have left, the session belongs to its own worker again.
        assert server_of(await member(group, nursery, session_id)) == "stage-1"


@pytest.mark.slow
async def test_session_of_an_unresponsive_worker_resumes_on_another(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The supervisor must not replace it meanwhile.
    monkeypatch.setattr(supervisor, "SILENCE_S", math.inf)
    session_id = session_for(1)
    async with working(redis_server.url()) as (group, nursery):
        ann = await member(group, nursery, session_id)
        os.kill(group.pid("stage-1"), signal.SIGSTOP)
        try:
            # The kernel still gives connections to the stopped process: a client has to retry.
            while True:
                with trio.move_on_after(3 * ANSWER_TIMEOUT_S):
                    back = await member(
                        group, nursery, session_id, resumeToken=ann.you["resumeToken"]
                    )
                    break
        finally:
            os.kill(group.pid("stage-1"), signal.SIGCONT)
        assert server_of(back) == "stage-2"
        assert back.you["resumed"]


async def test_session_is_whole_without_redis(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (group, nursery):
        bands = {
            session_id: [await member(group, nursery, session_id) for _ in range(4)]
            for session_id in (session_for(1), session_for(2))
        }
        redis_server.kill()
        for session_id, players in bands.items():
            await players[0].next("storage_status", storageType="memory")
            # A member that joins during the outage reaches the same worker.
            players.append(await member(group, nursery, session_id))
            await players[0].ok("chat_message", text="still here?")
            for player in players:
                await player.next("chat_message", text="still here?")
        redis_server.start()


async def test_handoffs_leak_no_file_descriptors(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (group, _):
        pids = [group.pid(f"stage-{number}") for number in (1, 2)]
        rounds = itertools.count()

        async def play_and_leave() -> list[int]:
            async with trio.open_nursery() as clients:
                for session_id in SESSIONS * 2:
                    # New names: members of the last round may still be in their resume grace.
                    await member(group, clients, f"{session_id}-{next(rounds)}")
                clients.cancel_scope.cancel()
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

        before = await play_and_leave()
        with trio.fail_after(PATIENCE_S):
            while any(now > then for now, then in zip(await play_and_leave(), before, strict=True)):
                await trio.lowlevel.checkpoint()


async def test_tls_connections_are_not_handed_off(
    redis_server: RedisServer, certificate: tuple[trustme.CA, str, str]
) -> None:
    authority, cert, key = certificate
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with working(redis_server.url(), tls_cert=cert, tls_key=key) as (group, nursery):
        players = [await member(group, nursery, "song", context) for _ in range(4)]
        await players[0].ok("chat_message", text="hello")
        for player in players:
            await player.next("chat_message", text="hello")
