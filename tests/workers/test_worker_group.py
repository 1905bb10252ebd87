"""Sessions over several workers: handoff, restart, replacement, drain."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import trio

from bandsync.handoff.rendezvous import preference
from bandsync.startup import StartError
from bandsync.workers import supervisor
from bandsync.workers.supervisor import supervise
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.servers import PATIENCE_S, Musician, play_along
from tests.support.worker_groups import (
    COMMAND,
    LogCapture,
    WorkerGroup,
    ask_health,
    group_settings,
    upgrade,
    working,
)

# With two workers, the odds that this many connections all miss one of them are 1 to 10^19.
MANY = 64


async def player_on(group: WorkerGroup, nursery: trio.Nursery, server_id: str) -> Musician:
    """A player whose connection is on this worker."""
    for _ in range(MANY):
        player = await nursery.start(play_along, group)
        if player.inbox[0]["serverId"] == server_id:
            return player
        await player.socket.aclose()
    raise AssertionError(f"no connection came to {server_id}")


async def test_members_on_different_workers_share_a_session(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (group, nursery):
        ann = await player_on(group, nursery, "stage-1")
        bob = await player_on(group, nursery, "stage-2")
        await ann.join(displayName="Ann")
        snapshot = await bob.join(displayName="Bob")
        assert [member["displayName"] for member in snapshot["members"]] == ["Ann", "Bob"]
        assert [member["serverId"] for member in snapshot["members"]] == ["stage-1", "stage-2"]
        await ann.ok("play", startInMs=0)
        await bob.next("play", by=ann.you["memberId"])
        await bob.ok("chat_message", text="here")
        await ann.next("chat_message", text="here")


async def test_killed_worker_is_replaced_and_its_members_resume(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url()) as (group, nursery):
        ann = await player_on(group, nursery, "stage-1")
        bob = await player_on(group, nursery, "stage-2")
        first = await ann.join(displayName="Ann")
        await bob.join(displayName="Bob")
        await ann.ok("play", startInMs=0)
        os.kill(group.pid("stage-1"), signal.SIGKILL)
        await ann.closed()
        # The kernel closes the listening socket last: until then the dead worker gets connections.
        ended = await group.log.until("worker.exited", server_id="stage-1")
        assert "Killed" in ended["how"]
        again = await nursery.start(play_along, group)
        back = await again.join(resumeToken=ann.you["resumeToken"])
        assert back["you"]["resumed"]
        assert back["you"]["memberId"] == first["you"]["memberId"]
        assert back["you"]["role"] == "leader"
        assert back["isPlaying"]

        await group.log.until("worker.started", 2, server_id="stage-1")
        cat = await player_on(group, nursery, "stage-1")
        await cat.join(displayName="Cat")
        await bob.next("user_joined")
        await again.ok("chat_message", text="as before")
        await cat.next("chat_message", text="as before")


async def test_stop_drains_all_workers(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (group, nursery):
        players = [await player_on(group, nursery, name) for name in ("stage-1", "stage-2")]
        for player in players:
            await player.join()
        await group.stop()
        for player in players:
            assert await player.closed() == 1012
            assert player.all("server_draining")
        assert [entry["event"] for entry in group.log.entries[-2:]] == [
            "workers.draining",
            "workers.stopped",
        ]
        assert not group.log.all("worker.exited")


async def test_worker_that_does_not_drain_is_killed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "DRAIN_MARGIN_S", 0.1)
    async with working(redis_server.url(), drain_timeout_ms=100) as (group, _):
        os.kill(group.pid("stage-2"), signal.SIGSTOP)
        await group.stop()
        (killed,) = group.log.all("worker.killed")
        assert killed["server_id"] == "stage-2"


@pytest.mark.slow
async def test_worker_without_heartbeats_is_killed_and_replaced(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SILENCE_S", 3.0)
    async with working(redis_server.url()) as (group, nursery):
        os.kill(group.pid("stage-2"), signal.SIGSTOP)
        killed = await group.log.until("worker.killed")
        assert killed["server_id"] == "stage-2"
        assert "no heartbeat" in killed["how"]
        await group.log.until("worker.started", 2, server_id="stage-2")
        await player_on(group, nursery, "stage-2")
        assert len(group.log.all("worker.killed")) == 1


@pytest.mark.slow
async def test_replacement_is_one_worker_at_a_time_and_refuses_no_client(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PORT_CLOSED_S", 2.0)
    async with working(redis_server.url(), drain_timeout_ms=1500) as (group, nursery):
        ann = await player_on(group, nursery, "stage-1")
        await ann.join(displayName="Ann")
        # Clients that do not answer the close frame make the drains last.
        with (
            unresponsive_clients(group.port, {"stage-1", "stage-2"}),
            connection_to_first_worker(group.port) as last,
        ):
            group.supervising.replace()
            # A connection accepted before the shared port closes is served as before.
            with trio.fail_after(PATIENCE_S):
                while listening_sockets(group.port) == 2:
                    await trio.lowlevel.checkpoint()
            assert ask_health(last)[0] == 200
            assert await ann.closed() == 1012
            statuses = set()
            while not group.log.all("workers.replaced"):
                async with httpx.AsyncClient() as client:
                    answer = await client.get(f"{group.supervising.url}/api/health")
                statuses.add(answer.status_code)
        assert statuses == {200}
        order = [
            (entry["event"], entry["server_id"])
            for entry in group.log.entries
            if entry["event"] == "worker.started"
        ]
        assert [name for _, name in order[2:]] == ["stage-1", "stage-2"]
        assert len({entry["pid"] for entry in group.log.all("worker.started")}) == 4

        again = await nursery.start(play_along, group)
        back = await again.join(resumeToken=ann.you["resumeToken"])
        assert (back["you"]["resumed"], back["you"]["role"]) == (True, "leader")


async def test_connection_with_a_late_head_is_handed_off_by_a_worker_under_replacement(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url(), drain_timeout_ms=30_000) as (group, _):
        # Clients that do not answer the close frame make the drains last.
        with (
            unresponsive_clients(group.port, {"stage-1", "stage-2"}),
            connection_to_first_worker(group.port) as last,
            connection_to_first_worker(group.port) as other,
        ):
            group.supervising.replace()
            with trio.fail_after(PATIENCE_S):
                while ask_health(last)[0] == 200:
                    await trio.lowlevel.checkpoint()
            last.sendall(upgrade("/ws"))
            assert await trio.to_thread.run_sync(welcoming_server, last) == "stage-2"
            session_id = next(name for name in map(str, range(99)) if preference(name, 2)[0] == 1)
            other.sendall(upgrade(f"/ws/{session_id}"))
            assert await trio.to_thread.run_sync(welcoming_server, other) == "stage-2"


def listening_sockets(port: int) -> int:
    """The number of sockets that listen on this port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines
    )


@contextmanager
def connection_to_first_worker(port: int) -> Iterator[socket.socket]:
    """A keep-alive connection to the first worker."""
    with ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(socket.create_connection((HOST, port), PATIENCE_S))
            if ask_health(client)[1] == "stage-1":
                yield client
                return
        raise AssertionError("no connection came to the first worker")


@contextmanager
def unresponsive_clients(port: int, wanted: set[str]) -> Iterator[None]:
    """A WebSocket connection to each of these workers; none answers a close frame."""
    with ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(socket.create_connection((HOST, port), PATIENCE_S))
            client.sendall(upgrade("/ws"))
            wanted = wanted - {welcoming_server(client)}
            if not wanted:
                yield
                return
        raise AssertionError(f"no connection came to {wanted}")


def welcoming_server(client: socket.socket) -> str:
    """The server id in the `welcome` of this connection."""
    received = b""
    while (welcome := re.search(rb'"welcome".*"serverId":"([^"]+)"', received)) is None:
        data = client.recv(4096)
        assert data, received
        received += data
    return welcome[1].decode()


async def test_worker_names_itself_in_health_and_metrics(redis_server: RedisServer) -> None:
    ports = free_port()
    async with (
        working(redis_server.url(), worker_ports=ports) as (group, _),
        httpx.AsyncClient() as client,
    ):
        for number in (1, 2):
            url = f"http://{HOST}:{ports + number - 1}"
            health = (await client.get(f"{url}/api/health")).json()
            assert health["serverId"] == f"stage-{number}"
            metrics = (await client.get(f"{url}/metrics")).text
            (info,) = [line for line in metrics.splitlines() if line.startswith("bandsync_info")]
            assert f'server_id="stage-{number}"' in info
            assert f'worker="{number}"' in info
        assert group.lines[2] == (
            f"Workers: stage-1, stage-2; each alone on ports {ports} to {ports + 1}"
        )


async def test_taken_own_port_refuses_the_start(redis_server: RedisServer) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"WORKER_PORTS={port}: cannot listen"):
            await supervise(
                group_settings(redis_server.url(), worker_ports=port - 1),
                LogCapture().logger,
                command=COMMAND,
            )


@pytest.mark.slow
async def test_workers_serve_from_memory_without_redis_and_a_restarted_one_waits_for_it(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url()) as (group, nursery):
        ann = await player_on(group, nursery, "stage-1")
        await ann.join(displayName="Ann")
        redis_server.kill()
        await ann.next("storage_status", storageType="memory")
        await ann.ok("update_message", message="we play on")
        os.kill(group.pid("stage-2"), signal.SIGKILL)
        waiting = await group.log.until("worker.exited", 2, server_id="stage-2")
        assert "WORKERS=2 share their sessions: Redis cannot be used" in waiting["reason"]
        await ann.ok("chat_message", text="still")
        redis_server.start()
        await group.log.until("worker.started", 2, server_id="stage-2")
        bob = await player_on(group, nursery, "stage-2")
        await ann.next("storage_status", storageType="redis")
        assert (await bob.join(displayName="Bob"))["message"] == "we play on"
