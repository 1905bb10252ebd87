"""Workers: several processes on one port, and who looks after them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import msgspec
import pytest
import trio
from msgspec.structs import replace
from trio.testing import memory_stream_pair
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bandsync.app import StartError, serve
from bandsync.handoff.rendezvous import preference
from bandsync.settings import Settings, SettingsError, parse
from bandsync.workers import supervisor as workers
from bandsync.workers.supervisor import Pace, supervise
from bandsync.workers.worker import LEAVE, Orders, WorkerReport, work
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.log_capture import LogCapture
from tests.support.servers import (
    PATIENCE_S,
    TEST_SETTINGS,
    Message,
    Musician,
    play_along,
    start_server,
)
from tests.support.worker_groups import COMMAND, WorkerGroup, group_settings, upgrade, working
from tests.test_serve import SCRIPT, environment

UPGRADE = upgrade("/ws")
# With two workers, the odds that so many connections all miss one of them are one to 10^19.
MANY = 64


async def on(crew: WorkerGroup, nursery: trio.Nursery, server_id: str) -> Musician:
    """Somebody whose connection this worker has."""
    for _ in range(MANY):
        player = await nursery.start(play_along, crew)
        if player.inbox[0]["serverId"] == server_id:
            return player
        await player.socket.aclose()
    raise AssertionError(f"no connection came to {server_id}")


async def test_members_on_different_workers_are_one_band(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (crew, nursery):
        ann = await on(crew, nursery, "stage-1")
        bob = await on(crew, nursery, "stage-2")
        await ann.join(displayName="Ann")
        snapshot = await bob.join(displayName="Bob")
        assert [member["displayName"] for member in snapshot["members"]] == ["Ann", "Bob"]
        assert [member["serverId"] for member in snapshot["members"]] == ["stage-1", "stage-2"]
        await ann.ok("play", startInMs=0)
        await bob.next("play", by=ann.you["memberId"])
        await bob.ok("chat_message", text="here")
        await ann.next("chat_message", text="here")


async def test_a_killed_worker_is_replaced_and_its_members_resume(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url()) as (crew, nursery):
        ann = await on(crew, nursery, "stage-1")
        bob = await on(crew, nursery, "stage-2")
        first = await ann.join(displayName="Ann")
        await bob.join(displayName="Bob")
        await ann.ok("play", startInMs=0)
        os.kill(crew.pid("stage-1"), signal.SIGKILL)
        await ann.closed()
        # The kernel closes its listening socket last: until then it still gets connections.
        ended = await crew.log.until("worker.exited", server_id="stage-1")
        assert "Killed" in ended["how"]
        again = await nursery.start(play_along, crew)
        back = await again.join(resumeToken=ann.you["resumeToken"])
        assert back["you"]["resumed"]
        assert back["you"]["memberId"] == first["you"]["memberId"]
        assert back["you"]["role"] == "leader"
        assert back["isPlaying"]

        await crew.log.until("worker.started", 2, server_id="stage-1")
        cat = await on(crew, nursery, "stage-1")
        await cat.join(displayName="Cat")
        await bob.next("user_joined")
        await again.ok("chat_message", text="as before")
        await cat.next("chat_message", text="as before")


async def test_they_drain_together(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (crew, nursery):
        players = [await on(crew, nursery, name) for name in ("stage-1", "stage-2")]
        for player in players:
            await player.join()
        await crew.stop()
        for player in players:
            assert await player.closed() == 1012
            assert player.all("server_draining")
        assert [entry["event"] for entry in crew.log.entries[-2:]] == [
            "workers.draining",
            "workers.stopped",
        ]
        assert not crew.log.all("worker.exited")


async def test_who_does_not_drain_is_killed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "DRAIN_MARGIN_S", 0.1)
    async with working(redis_server.url(), drain_timeout_ms=100) as (crew, _):
        os.kill(crew.pid("stage-2"), signal.SIGSTOP)
        await crew.stop()
        (killed,) = crew.log.all("worker.killed")
        assert killed["server_id"] == "stage-2"


async def test_who_hangs_is_replaced(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SILENCE_S", 3.0)
    async with working(redis_server.url()) as (crew, nursery):
        os.kill(crew.pid("stage-2"), signal.SIGSTOP)
        killed = await crew.log.until("worker.killed")
        assert killed["server_id"] == "stage-2"
        assert "silent" in killed["how"]
        await crew.log.until("worker.started", 2, server_id="stage-2")
        await on(crew, nursery, "stage-2")
        assert len(crew.log.all("worker.killed")) == 1


async def test_they_are_replaced_one_at_a_time_and_nobody_is_turned_away(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LEAVING_S", 2.0)
    async with working(redis_server.url(), drain_timeout_ms=1500) as (crew, nursery):
        ann = await on(crew, nursery, "stage-1")
        await ann.join(displayName="Ann")
        # Who does not answer the goodbye makes the drains last.
        with silent_clients(crew.port, {"stage-1", "stage-2"}), accepted(crew.port) as last:
            crew.supervising.replace()
            # Those who are accepted when a worker leaves the port are served as before.
            with trio.fail_after(PATIENCE_S):
                while listening(crew.port) == 2:
                    await trio.lowlevel.checkpoint()
            assert asked(last)[0] == 200
            assert await ann.closed() == 1012
            statuses = set()
            while not crew.log.all("workers.replaced"):
                async with httpx.AsyncClient() as client:
                    answer = await client.get(f"{crew.supervising.url}/api/health")
                statuses.add(answer.status_code)
        assert statuses == {200}
        order = [
            (entry["event"], entry["server_id"])
            for entry in crew.log.entries
            if entry["event"] == "worker.started"
        ]
        assert [name for _, name in order[2:]] == ["stage-1", "stage-2"]
        assert len({entry["pid"] for entry in crew.log.all("worker.started")}) == 4

        again = await nursery.start(play_along, crew)
        back = await again.join(resumeToken=ann.you["resumeToken"])
        assert (back["you"]["resumed"], back["you"]["role"]) == (True, "leader")


async def test_whose_head_comes_late_is_served_by_another(redis_server: RedisServer) -> None:
    async with working(redis_server.url(), drain_timeout_ms=30_000) as (crew, _):
        # Who does not answer the goodbye makes the drains last.
        with (
            silent_clients(crew.port, {"stage-1", "stage-2"}),
            accepted(crew.port) as last,
            accepted(crew.port) as other,
        ):
            crew.supervising.replace()
            with trio.fail_after(PATIENCE_S):
                while asked(last)[0] == 200:
                    await trio.lowlevel.checkpoint()
            last.sendall(upgrade("/ws"))
            assert await trio.to_thread.run_sync(welcomed_by, last) == "stage-2"
            session_id = next(name for name in map(str, range(99)) if preference(name, 2)[0] == 1)
            other.sendall(upgrade(f"/ws/{session_id}"))
            assert await trio.to_thread.run_sync(welcomed_by, other) == "stage-2"


def listening(port: int) -> int:
    """How many sockets listen on this port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines
    )


def asked(client: socket.socket) -> tuple[int, str]:
    """The status and the server id that `/api/health` answers over this connection."""
    client.sendall(b"GET /api/health HTTP/1.1\r\nHost: stage\r\n\r\n")
    heard = b""
    while (found := re.search(rb'^HTTP/1.1 (\d+).*"serverId":"([^"]+)"', heard, re.DOTALL)) is None:
        heard += client.recv(4096)
    return int(found[1]), found[2].decode()


@contextmanager
def accepted(port: int) -> Iterator[socket.socket]:
    """A connection to the first worker that may ask once more."""
    with ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(socket.create_connection((HOST, port), PATIENCE_S))
            if asked(client)[1] == "stage-1":
                yield client
                return
        raise AssertionError("no connection came to the first worker")


@contextmanager
def silent_clients(port: int, wanted: set[str]) -> Iterator[None]:
    """Connections, to each of these workers, that do not answer anything."""
    with ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(socket.create_connection((HOST, port), PATIENCE_S))
            client.sendall(UPGRADE)
            wanted = wanted - {welcomed_by(client)}
            if not wanted:
                yield
                return
        raise AssertionError(f"no connection came to {wanted}")


def welcomed_by(client: socket.socket) -> str:
    """Whose welcome comes over this connection."""
    heard = b""
    while (welcome := re.search(rb'"welcome".*"serverId":"([^"]+)"', heard)) is None:
        data = client.recv(4096)
        assert data, heard
        heard += data
    return welcome[1].decode()


async def test_each_worker_says_which_it_is(redis_server: RedisServer) -> None:
    ports = free_port()
    async with (
        working(redis_server.url(), worker_ports=ports) as (crew, _),
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
        assert crew.lines[2] == (
            f"Workers: stage-1, stage-2; each alone on ports {ports} to {ports + 1}"
        )


async def test_a_port_of_its_own_that_is_taken_stops_the_start(redis_server: RedisServer) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"WORKER_PORTS={port}: cannot listen"):
            await supervise(
                group_settings(redis_server.url(), worker_ports=port - 1),
                LogCapture().logger,
                command=COMMAND,
            )


async def test_while_redis_is_away_they_play_on_and_a_dead_one_waits(
    redis_server: RedisServer,
) -> None:
    async with working(redis_server.url()) as (crew, nursery):
        ann = await on(crew, nursery, "stage-1")
        await ann.join(displayName="Ann")
        redis_server.kill()
        await ann.next("storage_status", storageType="memory")
        await ann.ok("update_message", message="we play on")
        os.kill(crew.pid("stage-2"), signal.SIGKILL)
        waiting = await crew.log.until("worker.exited", 2, server_id="stage-2")
        assert "WORKERS=2 share their sessions: Redis cannot be used" in waiting["reason"]
        await ann.ok("chat_message", text="still")
        redis_server.start()
        await crew.log.until("worker.started", 2, server_id="stage-2")
        bob = await on(crew, nursery, "stage-2")
        await ann.next("storage_status", storageType="redis")
        assert (await bob.join(displayName="Bob"))["message"] == "we play on"


# What a worker does, as far as its supervisor can see, in a few words of shell.
LISTENS = "read orders; echo '{\"lines\":[]}'; "


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "worker"]


async def test_signals_replace_and_stop() -> None:
    log = LogCapture()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                supervise,
                group_settings("redis://nowhere"),
                log.logger,
                command=shell(LISTENS + "cat"),
                announce=log.logger.info,
                stop_on=[signal.SIGUSR1],
                replace_on=[signal.SIGUSR2],
            )
        )
        for number in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR2)
            await log.until("workers.replaced", number)
        os.kill(os.getpid(), signal.SIGUSR1)
        await log.until("workers.stopped")
    assert len({entry["pid"] for entry in log.all("worker.started")}) == 6


async def ended_with(script: str) -> str:
    with pytest.raises(StartError) as caught, trio.fail_after(PATIENCE_S):
        await supervise(
            group_settings("redis://nowhere"), LogCapture().logger, command=shell(script)
        )
    return str(caught.value)


async def test_a_start_that_is_refused_is_told_once() -> None:
    assert await ended_with('read orders; echo \'{"refused":"the stage is locked"}\'') == (
        "the stage is locked"
    )
    assert "ended with status 7" in await ended_with("exit 7")
    with pytest.raises(StartError, match="could not be started"):
        await supervise(
            group_settings("redis://nowhere"), LogCapture().logger, command=["/nonexistent/python"]
        )


async def test_a_start_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_MARGIN_S", -20.5)
    assert "did not start in time" in await ended_with("sleep 1000")
    assert "did not start in time" in await ended_with("exec >&-; sleep 1000")


async def test_what_keeps_ending_is_started_ever_more_slowly(nursery: trio.Nursery) -> None:
    crew = WorkerGroup(group_settings("redis://nowhere"))
    await crew.start(nursery, shell(LISTENS), Pace(first=0.01, longest=0.08))
    await crew.log.until("worker.exited", 9, server_id="stage-1")
    waits = [entry["restart_in_s"] for entry in crew.log.all("worker.exited")]
    assert waits[0] <= 0.02 < max(waits) <= 0.08
    await crew.stop()


async def test_after_it_was_stable_it_is_started_soon(nursery: trio.Nursery) -> None:
    crew = WorkerGroup(group_settings("redis://nowhere"))
    await crew.start(nursery, shell(LISTENS), Pace(first=0.01, longest=0.08, stable=0))
    await crew.log.until("worker.exited", 9, server_id="stage-1")
    assert all(entry["restart_in_s"] <= 0.01 for entry in crew.log.all("worker.exited"))
    await crew.stop()


def test_a_stop_ends_a_start() -> None:
    """Who still waits for Redis when the stop comes ends too, and nothing is announced."""
    with socket.create_server((HOST, 0)) as mute:
        settings = group_settings(f"redis://{HOST}:{mute.getsockname()[1]}")
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(settings)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with process, mute.accept()[0]:
            process.terminate()
            out, _ = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (0, b"")


def flags(settings: Settings, **more: object) -> list[str]:
    """The command line of a crew."""
    given = {
        "redis-enabled": "true",
        "redis-url": settings.redis_url,
        "workers": settings.workers,
        "port": settings.port,
        "server-id": "stage",
        "log-format": "json",
        "redis-max-retries": 0,
    }
    given |= {name.replace("_", "-"): value for name, value in more.items()}
    return [f"--{name}={value}" for name, value in given.items()]


class Process:
    """`serve.py --workers`, as an operator starts it.

    Attributes:
        lines: what it announced.
        pids: of its workers.
    """

    def __init__(self, redis: RedisServer, **more: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(group_settings(redis.url()), **more)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # All of them, and nobody else, are one group for signals.
            start_new_session=True,
        )
        self.log: list[Message] = []
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().strip() for _ in range(3)]
        self.pids = [self.until("worker.started")["pid"] for _ in range(2)]

    @property
    def url(self) -> str:
        return self.lines[0].split()[-1].replace("http", "ws")

    def until(self, event: str) -> Message:
        """Read the log up to the next entry of this kind."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry: Message = json.loads(line)
            self.log.append(entry)
            if entry["event"] == event:
                return entry
        raise AssertionError(f"no {event} in {self.log}")

    def end(self) -> tuple[str, str]:
        """Its remaining output."""
        return self.process.communicate(timeout=PATIENCE_S)


@pytest.fixture
def start(shared_redis: RedisServer) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(**more: object) -> Process:
        started.append(Process(shared_redis, **more))
        return started[-1]

    yield begin
    for each in started:
        for pid in [each.process.pid, *each.pids]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        each.end()


def test_it_is_announced_once_and_its_logs_say_who_speaks(start: Callable[..., Process]) -> None:
    crew = start()
    assert crew.lines[0].startswith(f"BandSync listening on http://{HOST}:")
    assert crew.lines[1].startswith("Storage: redis (")
    assert crew.lines[2] == "Workers: stage-1, stage-2"
    os.kill(crew.pids[0], signal.SIGKILL)
    crew.until("worker.started")
    crew.process.terminate()
    out, err = crew.end()
    assert out == ""
    assert crew.process.returncode == 0
    crew.log += [json.loads(line) for line in err.splitlines()]
    assert {entry.get("server_id") for entry in crew.log if entry["event"][:7] != "workers"} == {
        "stage-1",
        "stage-2",
    }


def test_when_the_supervisor_is_killed_the_workers_drain_and_end(
    start: Callable[..., Process],
) -> None:
    crew = start()
    handles = [os.pidfd_open(pid) for pid in crew.pids]
    with connect(f"{crew.url}/ws") as client:
        client.recv(PATIENCE_S)
        crew.process.kill()
        assert json.loads(client.recv(PATIENCE_S))["type"] == "server_draining"

    async def gone() -> None:
        with trio.fail_after(PATIENCE_S):
            for handle in handles:
                await trio.lowlevel.wait_readable(handle)
                os.close(handle)

    trio.run(gone)


def test_a_second_signal_ends_them_at_once(start: Callable[..., Process]) -> None:
    crew = start(drain_timeout_ms=60_000)
    # It would have all that time, and some more.
    os.kill(crew.pids[0], signal.SIGSTOP)
    crew.process.terminate()
    crew.until("server.draining")
    crew.process.terminate()
    assert crew.process.wait(PATIENCE_S) == 0


def test_a_signal_to_all_of_them_drains_once(start: Callable[..., Process]) -> None:
    """As from a terminal, or from who ends all of a container: that is no second signal."""
    crew = start()
    with connect(f"{crew.url}/ws") as client:
        client.recv(PATIENCE_S)
        os.killpg(crew.process.pid, signal.SIGINT)
        assert json.loads(client.recv(PATIENCE_S))["type"] == "server_draining"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    assert crew.process.wait(PATIENCE_S) == 0


def test_a_hangup_replaces_them(start: Callable[..., Process]) -> None:
    crew = start()
    crew.process.send_signal(signal.SIGHUP)
    crew.until("workers.replaced")
    started = [entry["pid"] for entry in crew.log if entry["event"] == "worker.started"]
    assert len(set(started)) == 4
    crew.pids = started[2:]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("more", [["--workers=2", "--redis-enabled=true"], []])
def test_the_port_is_not_shared_with_strangers(
    start: Callable[..., Process], shared_redis: RedisServer, more: list[str]
) -> None:
    crew = start()
    port = crew.lines[0].rpartition(":")[2]
    result = run(f"--port={port}", f"--redis-url={shared_redis.url()}", *more)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"PORT={port}: cannot listen there" in result.stderr
    assert "in use" in result.stderr


def test_two_that_start_at_the_same_time_do_not_share_the_port() -> None:
    with socket.create_server((HOST, 0)) as mute:
        settings = group_settings(f"redis://{HOST}:{mute.getsockname()[1]}", port=free_port())
        first = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(settings)], env=environment(), stderr=subprocess.DEVNULL
        )
        # Its workers wait for Redis: nobody listens for clients yet.
        with first, mute.accept()[0]:
            second = run(*flags(settings))
            first.terminate()
    assert second.returncode == 1
    assert "in use" in second.stderr


def test_without_redis_they_do_not_start() -> None:
    result = run("--workers=2", "--port=0")
    assert result.returncode == 2
    assert "WORKERS=2: must be 1 when REDIS_ENABLED is false" in result.stderr
    nowhere = f"--redis-url=redis://{HOST}:{free_port()}"
    result = run(
        "--workers=2", "--port=0", "--redis-enabled=true", nowhere, "--redis-max-retries=0"
    )
    assert (result.returncode, result.stdout) == (1, "")
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("serve.py:")]
    assert said.startswith(
        "serve.py: WORKERS=2 share their sessions: Redis cannot be used: refused"
    )
    assert said.endswith("or set WORKERS=1")


@pytest.mark.parametrize(
    "texts",
    [
        {"WORKERS": "3", "WORKER_PORTS": "65534"},
        {"WORKERS": "3", "WORKER_PORTS": "3000"},
        {"WORKERS": "0"},
    ],
)
def test_settings_that_leave_no_room(texts: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        parse(texts)


async def test_a_worker_obeys_its_pipe(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    log = LogCapture()
    done = trio.Event()

    async def run_worker() -> None:
        await work(theirs, theirs, lambda settings: log.logger)
        done.set()

    nursery.start_soon(run_worker)
    settings = replace(TEST_SETTINGS, worker_ports=free_port())
    await ours.send_all(msgspec.json.encode(Orders(settings, 1)) + b"\n")
    report = msgspec.json.decode(await ours.receive_some(), type=WorkerReport)
    assert report.refused is None
    port = int(report.lines[0].rpartition(":")[2])
    own = f"http://{HOST}:{settings.worker_ports}"
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://{HOST}:{port}/api/health")).status_code == 200
        await ours.send_all(LEAVE)
        # Closed by a task that runs as soon as this one waits.
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(HOST, port)
        # The port of its own still tells that it runs.
        assert (await client.get(f"{own}/api/health")).status_code == 200
    await ours.send_eof()
    with trio.fail_after(PATIENCE_S):
        await done.wait()
    assert log.all("server.stopped", server_id="stage")


async def test_who_has_connected_when_a_worker_leaves_is_served(nursery: trio.Nursery) -> None:
    server = await start_server(nursery)
    # The kernel has the connection, the server has not seen it yet.
    with socket.create_connection((HOST, server.port)) as client:
        server.serving.leave()
        status, _ = await trio.to_thread.run_sync(asked, client)
        assert status == 200
    await server.stop()


async def test_the_first_signal_to_a_worker_that_drains_is_not_a_second() -> None:
    log = LogCapture()
    async with trio.open_nursery() as nursery:
        serving = await nursery.start(
            partial(
                serve,
                TEST_SETTINGS,
                log.logger,
                announce=log.logger.info,
                signals=[signal.SIGUSR1],
            )
        )
        # Who does not answer the goodbye makes the drain last.
        with socket.create_connection((HOST, serving.port)) as silent:
            silent.sendall(UPGRADE)
            await trio.to_thread.run_sync(silent.recv, 4096)
            serving.stop()
            await log.until("server.draining")
            os.kill(os.getpid(), signal.SIGUSR1)
            await log.until("server.stopped")


async def test_a_worker_whose_supervisor_ends_before_it_listens_ends_too() -> None:
    for said in (b"", msgspec.json.encode(Orders(TEST_SETTINGS, 1)) + b"\n"):
        ours, theirs = memory_stream_pair()
        await ours.send_all(said)
        await ours.aclose()
        with trio.fail_after(PATIENCE_S):
            await work(theirs, theirs, lambda settings: LogCapture().logger)


async def test_a_worker_that_cannot_start_says_why() -> None:
    ours, theirs = memory_stream_pair()
    with socket.create_server((HOST, 0)) as taken:
        settings = replace(TEST_SETTINGS, port=taken.getsockname()[1])
        await ours.send_all(msgspec.json.encode(Orders(settings, 1)) + b"\n")
        await work(theirs, theirs, lambda settings: LogCapture().logger)
    report = msgspec.json.decode(await ours.receive_some(), type=WorkerReport)
    assert "in use" in (report.refused or "")
