"""Measured server processes: their start, CPU, memory and suspension."""

import gc
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bandsync.settings import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"

_CORES = sorted(os.sched_getaffinity(0))
_START_S = 20.0
_STOP_S = 5.0
_RECEIVE_BYTES = 65_536


class BenchError(Exception):
    """The measurement failed, or would mean nothing."""


def now_s() -> float:
    """A clock for durations, seconds."""
    return time.perf_counter()


def wall_ms() -> float:
    """The wall clock, milliseconds since the Unix epoch."""
    return time.time_ns() / 1e6


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of ``values`` do not exceed."""
    if not values:
        raise BenchError("there are no samples")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def relax_garbage_collection() -> None:
    """Collect garbage as rarely as `scripts/serve.py` does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def raise_file_limit(connections: int) -> None:
    """Allow this process and its children this many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise BenchError(f"{wanted} file descriptors are needed: raise ulimit -n ({hard})")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def pin_generator() -> None:
    """Keep this process off the servers' core, if there is another one.

    Child processes inherit that, for example a Redis.
    """
    if len(_CORES) > 1:
        os.sched_setaffinity(0, _CORES[1:])


def all_cores() -> list[int]:
    """The cores of this process at its start. Servers run on the first one."""
    return list(_CORES)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The percentiles of latencies, milliseconds."""
    return {
        "p50": round(percentile(values, 0.5), 2),
        "p99": round(percentile(values, 0.99), 2),
        "max": round(max(values), 2),
    }


class MeasuredServer:
    """A server in a process of its own, on the first core.

    Args:
        command: arguments of the interpreter. The program prints a line with `:PORT` when it
            listens.

    Attributes:
        pid: process id.
        port: the listening port.
    """

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own programs
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            env=clean_environment(),
            # Not the repository's directory: it may contain an .env.
            cwd=ROOT / "scripts",
            start_new_session=True,
        )
        self.pid = self._process.pid
        os.sched_setaffinity(self.pid, _CORES[:1])
        try:
            self.port = self._read_port()
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def suspend(self) -> None:
        """Stop the process while another server is measured."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL; return when the process is gone."""
        self._process.kill()
        self._process.wait()

    def cpu_s(self) -> float:
        """User and system time of all its threads so far, seconds."""
        return cpu_of(self.pid)

    def rss_kb(self) -> float:
        """Resident memory, KB (1024 bytes)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    def get(self, path: str) -> str:
        """GET the body of an HTTP resource."""
        with socket.create_connection((HOST, self.port), timeout=_STOP_S) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while data := sock.recv(_RECEIVE_BYTES):
                received += data
        return received.partition(b"\r\n\r\n")[2].decode()

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(_START_S * 1000):
            raise BenchError("the server did not start")
        line = self._process.stdout.readline().decode()
        found = re.search(r":(\d+)\s*$", line)
        if found is None:
            raise BenchError(f"the server did not print its port: {line!r}")
        return int(found[1])


def cpu_of(pid: int) -> float:
    """User and system time of all threads of a process so far, seconds."""
    total_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def clean_environment() -> dict[str, str]:
    """The environment, with this repository's modules and without a server's settings."""
    ours = {option.name for option in OPTIONS}
    kept = {name: text for name, text in os.environ.items() if name not in ours}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def bandsync(
    connections: int, members: int, *, redis_url: str | None = None, patient: bool = False
) -> MeasuredServer:
    """Start a BandSync server without rate limits and logs, to measure nothing else.

    Args:
        connections: the most that are open at once.
        members: of each session.
        redis_url: where sessions are stored; None for memory.
        patient: use a long health timeout, because the server is suspended now and then.
    """
    redis = (
        ("--redis-enabled", "false")
        if redis_url is None
        else ("--redis-enabled", "true", "--redis-url", redis_url)
    )
    return MeasuredServer(
        str(ROOT / "scripts" / "serve.py"),
        *("--host", HOST, "--port", "0", "--log-level", "warning", *redis),
        *("--rate-limit-factor", "0", "--connection-timeout-ms", "600000"),
        *(("--redis-health-timeout-ms", "60000") if patient else ()),
        *("--max-connections", str(connections + 64), "--max-members", str(members)),
    )


def yardstick(name: str, *given: str) -> MeasuredServer:
    """Start one of the servers of `scripts.bench.yardsticks`."""
    return MeasuredServer("-m", "scripts.bench.yardsticks", name, *given)
