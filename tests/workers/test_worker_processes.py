"""`scripts/serve.py --workers` as processes: signals, output, exit codes, the port."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import trio
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bandsync.settings import Settings
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.servers import PATIENCE_S, Message
from tests.support.worker_groups import group_settings
from tests.test_serve import SCRIPT, environment


def test_stop_during_the_start_ends_it() -> None:
    """Workers that still wait for Redis end too, and nothing is announced."""
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
    """The command line of a worker group."""
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
    """`serve.py --workers`, started as an operator starts it.

    Attributes:
        lines: lines on standard output.
        pids: process ids of the workers.
    """

    def __init__(self, redis: RedisServer, **more: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(group_settings(redis.url()), **more)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The supervisor and its workers form one process group, for signals.
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
        """Wait for the end; return the remaining standard output and standard error."""
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


def test_group_is_announced_once_and_log_lines_name_the_worker(
    start: Callable[..., Process],
) -> None:
    group = start()
    assert group.lines[0].startswith(f"BandSync listening on http://{HOST}:")
    assert group.lines[1].startswith("Storage: redis (")
    assert group.lines[2] == "Workers: stage-1, stage-2"
    os.kill(group.pids[0], signal.SIGKILL)
    group.until("worker.started")
    group.process.terminate()
    out, err = group.end()
    assert out == ""
    assert group.process.returncode == 0
    group.log += [json.loads(line) for line in err.splitlines()]
    assert {entry.get("server_id") for entry in group.log if entry["event"][:7] != "workers"} == {
        "stage-1",
        "stage-2",
    }


def test_workers_drain_when_the_supervisor_is_killed(
    start: Callable[..., Process],
) -> None:
    group = start()
    handles = [os.pidfd_open(pid) for pid in group.pids]
    with connect(f"{group.url}/ws") as client:
        client.recv(PATIENCE_S)
        group.process.kill()
        assert json.loads(client.recv(PATIENCE_S))["type"] == "server_draining"

    async def gone() -> None:
        with trio.fail_after(PATIENCE_S):
            for handle in handles:
                await trio.lowlevel.wait_readable(handle)
                os.close(handle)

    trio.run(gone)


def test_second_signal_kills_all_workers(start: Callable[..., Process]) -> None:
    group = start(drain_timeout_ms=60_000)
    # A stopped worker delays the end until the drain timeout.
    os.kill(group.pids[0], signal.SIGSTOP)
    group.process.terminate()
    group.until("server.draining")
    group.process.terminate()
    assert group.process.wait(PATIENCE_S) == 0


def test_signal_to_the_process_group_drains_once(start: Callable[..., Process]) -> None:
    """A terminal and a container runtime signal every process; this is not a second signal."""
    group = start()
    with connect(f"{group.url}/ws") as client:
        client.recv(PATIENCE_S)
        os.killpg(group.process.pid, signal.SIGINT)
        assert json.loads(client.recv(PATIENCE_S))["type"] == "server_draining"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    assert group.process.wait(PATIENCE_S) == 0


def test_sighup_replaces_all_workers(start: Callable[..., Process]) -> None:
    group = start()
    group.process.send_signal(signal.SIGHUP)
    group.until("workers.replaced")
    started = [entry["pid"] for entry in group.log if entry["event"] == "worker.started"]
    assert len(set(started)) == 4
    group.pids = started[2:]


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
def test_port_is_not_shared_with_another_server(
    start: Callable[..., Process], shared_redis: RedisServer, more: list[str]
) -> None:
    group = start()
    port = group.lines[0].rpartition(":")[2]
    result = run(f"--port={port}", f"--redis-url={shared_redis.url()}", *more)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"PORT={port}: cannot listen there" in result.stderr
    assert "in use" in result.stderr


def test_groups_that_start_at_the_same_time_do_not_share_the_port() -> None:
    with socket.create_server((HOST, 0)) as mute:
        settings = group_settings(f"redis://{HOST}:{mute.getsockname()[1]}", port=free_port())
        first = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(settings)], env=environment(), stderr=subprocess.DEVNULL
        )
        # The workers wait for Redis and do not listen yet.
        with first, mute.accept()[0]:
            second = run(*flags(settings))
            first.terminate()
    assert second.returncode == 1
    assert "in use" in second.stderr


def test_workers_do_not_start_without_redis() -> None:
    result = run("--workers=2", "--port=0")
    assert result.returncode == 2
    assert "WORKERS=2: must be 1 when REDIS_ENABLED is false" in result.stderr
    nowhere = f"--redis-url=redis://{HOST}:{free_port()}"
    result = run(
        "--workers=2", "--port=0", "--redis-enabled=true", nowhere, "--redis-max-retries=0"
    )
    assert (result.returncode, result.stdout) == (1, "")
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("serve.py:")]
    assert message.startswith(
        "serve.py: WORKERS=2 share their sessions: Redis cannot be used: refused"
    )
    assert message.endswith("or set WORKERS=1")
