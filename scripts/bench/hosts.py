"""The servers under a load: local processes or remote addresses, and the resources they use."""

import contextlib
import http.client
import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self
from urllib.parse import urlsplit

from bandsync.settings import OPTIONS
from scripts.bench.processes import HOST, ROOT, BenchError, MeasuredServer, all_cores, cpu_of

_TASKS = "bandsync_tasks"
# Gauges of `/metrics` that must return to their initial values.
LIVE_GAUGES = {
    "bandsync_connections": "connections",
    "bandsync_rooms": "rooms",
    "bandsync_members": "members",
    # Older versions lack it.
    _TASKS: "tasks",
    "bandsync_process_open_fds": "descriptors",
}
# Counted by code. A slow consumer closed with 1013 often has no room for a close frame.
_CLOSED = re.compile(r'^bandsync_closed_total\{code="(\w+)"\} (\S+)$', re.MULTILINE)
_START = "bandsync_process_start_time_seconds"
_CPU = "bandsync_process_cpu_seconds_total"
_MEMORY = "bandsync_process_resident_memory_bytes"
_FDS = "bandsync_process_open_fds"
_PATIENCE_S = 3.0
# Scrapes that meet every worker behind one port, with near certainty.
_SCRAPES_PER_WORKER = 12


class ResourceUsage(NamedTuple):
    """The resources of all processes of a server; None where unknown.

    Attributes:
        cpu_s: user and system time so far, seconds.
        memory_mb: resident, 1 048 576 bytes.
        descriptors: open files and sockets.
        threads: number of threads.
        waited_s: time runnable without a core so far, seconds.
        tasks: Trio tasks; only the server itself knows them.
    """

    cpu_s: float
    memory_mb: float
    descriptors: int
    threads: int | None = None
    waited_s: float | None = None
    tasks: int | None = None


class LiveCounts(NamedTuple):
    """Counts from `/metrics`, summed over the servers.

    Attributes:
        current: present values, by the names of `LIVE_GAUGES`.
        closed: connections closed by the servers so far, by code.
    """

    current: dict[str, float]
    closed: Counter[str]


class LoadTarget(Protocol):
    """Servers whose resources can be measured."""

    def usage(self) -> ResourceUsage | None:
        """The resources they use now; None if unknown."""

    def live_counts(self) -> LiveCounts:
        """Counts from `/metrics`, summed over the servers."""

    def poll_metrics(self) -> AbstractContextManager[object]:
        """Within the block, `usage` has the number of tasks, at the cost of their CPU time."""


class LocalTarget(MeasuredServer):
    """A server on this machine, with all its workers.

    Args:
        workers: number of its processes that serve.
        all_cores_allowed: several workers may use all cores, together with the driver. One process
            stays on the first core, as in other benchmarks.
        command: arguments of the interpreter.
    """

    def __init__(self, workers: int, all_cores_allowed: bool, *command: str) -> None:
        self._workers = workers
        self._remote: RemoteTarget | None = None
        super().__init__(*command)
        if all_cores_allowed and workers > 1:
            for pid in self.pids():
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), all_cores())

    def pids(self) -> list[int]:
        """Ids of the first process and its children."""
        return [self.pid, *children(self.pid)]

    def serving(self) -> list[int]:
        """Ids of the processes that have connections."""
        return self.pids()[1:] if self._workers > 1 else [self.pid]

    def suspend(self) -> None:
        """Stop all its processes while another server is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue all its processes."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            # A process that exits at this moment.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def usage(self) -> ResourceUsage | None:
        """The resources of its processes. A process that exits at this moment is left out."""
        found = [each for each in map(_vitals_of, self.pids()) if each is not None]
        if not found:
            return None
        name = None if self._remote is None else self._remote.usage()
        return ResourceUsage(
            sum(each.cpu_s for each in found),
            sum(each.memory_mb for each in found),
            sum(each.descriptors for each in found),
            sum(each.threads or 0 for each in found),
            sum(each.waited_s or 0.0 for each in found),
            None if name is None else name.tasks,
        )

    @contextlib.contextmanager
    def poll_metrics(self) -> Iterator[None]:
        """Within the block, `usage` has the number of tasks, too."""
        with RemoteTarget([(HOST, self.port)], None) as self._remote:
            yield
        self._remote = None

    def live_counts(self) -> LiveCounts:
        """Counts from its `/metrics`."""
        return live_counts([(HOST, self.port)], self._workers)

    def cpu_s(self) -> float:
        """User and system time of all its processes so far, seconds."""
        return sum(cpu_of(pid) for pid in self.pids())


def start_target(
    connections: int,
    members: int,
    *,
    workers: int = 1,
    redis_url: str | None = None,
    only_measured: bool = False,
    first_port: int | None = None,
) -> LocalTarget:
    """Start a server on a free port.

    Args:
        connections: the most that are open at once.
        members: of each session.
        workers: number of processes. Several need Redis.
        redis_url: where sessions are stored; None for memory.
        only_measured: keep all processes on the first core, without rate limits, and with long
            timeouts for their suspensions.
        first_port: the first of the workers' own ports; None for none.
    """
    many: tuple[str, ...] = ()
    if workers > 1:
        if not any(option.name == "WORKERS" for option in OPTIONS):
            raise BenchError("scripts/serve.py of this version has no workers")
        many = ("--workers", str(workers))
    if first_port is not None:
        many += ("--worker-ports", str(first_port))
    redis: tuple[str, ...] = ("--redis-enabled", "false")
    if redis_url is not None:
        redis = ("--redis-enabled", "true", "--redis-url", redis_url)
    if only_measured:
        many += ("--rate-limit-factor", "0", "--connection-timeout-ms", "600000")
        many += ("--redis-health-timeout-ms", "60000")
    return LocalTarget(
        workers,
        not only_measured,
        str(ROOT / "scripts" / "serve.py"),
        *("--host", HOST, "--port", "0", "--log-level", "warning", *redis, *many),
        *("--max-connections", str(connections + 64), "--max-members", str(members)),
    )


class RemoteTarget:
    """Servers at given addresses. A thread reads their `/metrics` once a second.

    Args:
        addresses: host and port of each.
        token: their ADMIN_TOKEN; None if they have none.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], token: str | None) -> None:
        self._addresses = addresses
        self._token = token
        self._stop = threading.Event()
        self._first: dict[tuple[int, float], float] = {}
        self._latest: dict[tuple[int, float], dict[str, float]] = {}
        self._thread = threading.Thread(target=self._poll_for_ever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop reading `/metrics`."""
        self._stop.set()
        self._thread.join(2 * _PATIENCE_S * len(self._addresses))

    def usage(self) -> ResourceUsage | None:
        """The resources of the processes that ever answered."""
        latest = dict(self._latest)
        if not latest:
            return None
        return ResourceUsage(
            sum(values.get(_CPU, 0.0) - self._first[process] for process, values in latest.items()),
            sum(values.get(_MEMORY, 0.0) for values in latest.values()) / 2**20,
            int(sum(values.get(_FDS, 0.0) for values in latest.values())),
            tasks=_sum(values.get(_TASKS) for values in latest.values()),
        )

    def live_counts(self) -> LiveCounts:
        """Counts from their `/metrics`."""
        return live_counts(self._addresses, 1, self._token)

    def poll_metrics(self) -> AbstractContextManager[object]:
        """They are polled all the time."""
        return contextlib.nullcontext()

    def _poll_for_ever(self) -> None:
        while not self._stop.wait(1.0):
            for number, (host, port) in enumerate(self._addresses):
                try:
                    values = numbers(scrape(host, port, self._token))
                except BenchError:
                    continue
                # Several processes may share an address. Their start times tell them apart.
                process = (number, values.get(_START, 0.0))
                self._first.setdefault(process, values.get(_CPU, 0.0))
                self._latest[process] = values


def live_counts(
    addresses: Sequence[tuple[str, int]], workers: int, token: str | None = None
) -> LiveCounts:
    """The counts of `LIVE_GAUGES`, summed over the servers.

    Raises:
        BenchError: a server does not answer, or not all ``workers`` did.
    """
    current: dict[str, float] = {}
    closed: Counter[str] = Counter()
    for host, port in addresses:
        answered: dict[float, str] = {}
        for _ in range(workers * _SCRAPES_PER_WORKER if workers > 1 else 1):
            metrics = scrape(host, port, token)
            answered[numbers(metrics).get(_START, 0.0)] = metrics
        if len(answered) < workers:
            raise BenchError(f"{len(answered)} of {workers} workers answered")
        for metrics in answered.values():
            values = numbers(metrics)
            for metric, name in LIVE_GAUGES.items():
                if metric in values:
                    current[name] = current.get(name, 0.0) + values[metric]
            for code, count in _CLOSED.findall(metrics):
                closed[code] += int(float(count))
    return LiveCounts(current, closed)


def scrape(host: str, port: int, token: str | None = None) -> str:
    """The text of `/metrics`.

    Raises:
        BenchError: the server did not send it.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{host}:{port} does not serve its metrics: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"{host}:{port} does not serve its metrics: status {answer.status}")
    return text


def numbers(metrics: str) -> dict[str, float]:
    """The metrics without labels, by name."""
    found = re.finditer(r"^([a-z_]+) (\S+)$", metrics, re.MULTILINE)
    return {match[1]: float(match[2]) for match in found}


def addresses_of(servers: str) -> list[tuple[int, str, int, str]]:
    """Parse a comma-separated list into family, host, port, and host for requests.

    Raises:
        BenchError: an address is invalid.
    """
    addresses = []
    for text in filter(None, (each.strip() for each in servers.split(","))):
        try:
            url = urlsplit(text if "//" in text else f"http://{text}")
            port = url.port or 80
            if url.scheme not in {"http", "ws"} or not url.hostname or url.path not in {"", "/"}:
                raise ValueError("use the form http://127.0.0.1:3001")
            family, _, _, _, place = socket.getaddrinfo(
                url.hostname, port, type=socket.SOCK_STREAM
            )[0]
        except (ValueError, OSError) as error:
            raise BenchError(f"the address {text}: {error}") from error
        addresses.append((int(family), str(place[0]), port, url.netloc.rpartition("@")[2]))
    return addresses


def children(pid: int) -> list[int]:
    """Ids of the running child processes of ``pid``."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, thread.read_text().split())
    return sorted(found)


def _sum(counts: Iterable[float | None]) -> int | None:
    """The sum; None if one count is None."""
    known = list(counts)
    return None if None in known else int(sum(filter(None, known)))


def _vitals_of(pid: int) -> ResourceUsage | None:
    process = Path(f"/proc/{pid}")
    try:
        status = (process / "status").read_text()
        memory_kb = re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
        threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
        if memory_kb is None or threads is None:
            return None
        waited_ns = 0
        for thread in (process / "task").iterdir():
            waited_ns += int((thread / "schedstat").read_text().split()[1])
        return ResourceUsage(
            cpu_of(pid),
            int(memory_kb[1]) / 1024,
            sum(1 for _ in (process / "fd").iterdir()),
            int(threads[1]),
            waited_ns / 1e9,
        )
    except OSError:
        return None
