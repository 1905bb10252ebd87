"""The servers under a load: our own processes, or those at given addresses; what they use."""

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
from scripts.bench.processes import HOST, ROOT, BenchError, Server, all_cores, cpu_of

_TASKS = "bandsync_tasks"
# What is asked of `/metrics` to see whether everything came to an end.
CENSUS = {
    "bandsync_connections": "connections",
    "bandsync_rooms": "rooms",
    "bandsync_members": "members",
    # Not told by every version.
    _TASKS: "tasks",
    "bandsync_process_open_fds": "descriptors",
}
# Counted by code; what is closed with 1013 has often no room for a close frame any more.
_CLOSED = re.compile(r'^bandsync_closed_total\{code="(\w+)"\} (\S+)$', re.MULTILINE)
_START = "bandsync_process_start_time_seconds"
_CPU = "bandsync_process_cpu_seconds_total"
_MEMORY = "bandsync_process_resident_memory_bytes"
_FDS = "bandsync_process_open_fds"
_PATIENCE_S = 3.0
# Of workers at one port, each is met by then, as good as surely.
_ASKS_PER_WORKER = 12


class Vitals(NamedTuple):
    """What all processes of a server use together; None is what cannot be told.

    Attributes:
        cpu_s: so far, seconds.
        memory_mb: resident, 1 048 576 bytes.
        descriptors: open files and sockets.
        waited_s: how long they could run and had no core, seconds.
        tasks: those that have not ended; only the servers themselves can tell.
    """

    cpu_s: float
    memory_mb: float
    descriptors: int
    threads: int | None = None
    waited_s: float | None = None
    tasks: int | None = None


class Census(NamedTuple):
    """What servers tell, all of them together.

    Attributes:
        there: what there is now, by the names of `CENSUS`.
        closed: connections that they closed so far, by code.
    """

    there: dict[str, float]
    closed: Counter[str]


class Host(Protocol):
    """Servers that can be watched."""

    def vitals(self) -> Vitals | None:
        """What they use now; None if they do not tell."""

    def census(self) -> Census:
        """Who and what is there, of all of them together."""

    def asked(self) -> AbstractContextManager[object]:
        """Have the vitals show what only they themselves can tell, at the cost of their time."""


class Hosted(Server):
    """A server of our own, with all its workers.

    Args:
        spread: several workers may use all cores, and share them with the driver; one process keeps
            to the first core, as in other benchmarks.
    """

    def __init__(self, workers: int, spread: bool, *command: str) -> None:
        self._workers = workers
        self._asked: Elsewhere | None = None
        super().__init__(*command)
        if spread and workers > 1:
            for pid in self.pids():
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), all_cores())

    def pids(self) -> list[int]:
        """The first process, and those that it started."""
        return [self.pid, *children(self.pid)]

    def serving(self) -> list[int]:
        """Those that have connections."""
        return self.pids()[1:] if self._workers > 1 else [self.pid]

    def suspend(self) -> None:
        """Let none of them use CPU while another server is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            # Of those that end at this moment there is nothing to suspend.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def vitals(self) -> Vitals | None:
        """What its processes use; one that ends at this moment is left out."""
        found = [each for each in map(_vitals_of, self.pids()) if each is not None]
        if not found:
            return None
        told = None if self._asked is None else self._asked.vitals()
        return Vitals(
            sum(each.cpu_s for each in found),
            sum(each.memory_mb for each in found),
            sum(each.descriptors for each in found),
            sum(each.threads or 0 for each in found),
            sum(each.waited_s or 0.0 for each in found),
            None if told is None else told.tasks,
        )

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Have the vitals show its tasks, too."""
        with Elsewhere([(HOST, self.port)], None) as self._asked:
            yield
        self._asked = None

    def census(self) -> Census:
        """Who and what is there."""
        return census([(HOST, self.port)], self._workers)

    def cpu_s(self) -> float:
        """User and system time of all its processes so far, seconds."""
        return sum(cpu_of(pid) for pid in self.pids())


def hosted(
    connections: int,
    members: int,
    *,
    workers: int = 1,
    redis_url: str | None = None,
    only_measured: bool = False,
    first_port: int | None = None,
) -> Hosted:
    """Start a server on a free port.

    Args:
        workers: processes; more than one need Redis.
        redis_url: where it keeps sessions; None for its memory.
        only_measured: all processes keep to the first core; they have no rate limits, and patience
            with being suspended.
        first_port: of those that workers have for themselves; None for none.
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
    return Hosted(
        workers,
        not only_measured,
        str(ROOT / "scripts" / "serve.py"),
        *("--host", HOST, "--port", "0", "--log-level", "warning", *redis, *many),
        *("--max-connections", str(connections + 64), "--max-members", str(members)),
    )


class Elsewhere:
    """Servers at given addresses, whose `/metrics` is read once a second by a thread of its own.

    Args:
        token: their ADMIN_TOKEN; None if they have none.
    """

    def __init__(self, places: Sequence[tuple[str, int]], token: str | None) -> None:
        self._places = places
        self._token = token
        self._stop = threading.Event()
        self._first: dict[tuple[int, float], float] = {}
        self._latest: dict[tuple[int, float], dict[str, float]] = {}
        self._thread = threading.Thread(target=self._ask_for_ever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ask no more."""
        self._stop.set()
        self._thread.join(2 * _PATIENCE_S * len(self._places))

    def vitals(self) -> Vitals | None:
        """What those use that ever answered."""
        latest = dict(self._latest)
        if not latest:
            return None
        return Vitals(
            sum(values.get(_CPU, 0.0) - self._first[process] for process, values in latest.items()),
            sum(values.get(_MEMORY, 0.0) for values in latest.values()) / 2**20,
            int(sum(values.get(_FDS, 0.0) for values in latest.values())),
            tasks=_sum(values.get(_TASKS) for values in latest.values()),
        )

    def census(self) -> Census:
        """Who and what is there."""
        return census(self._places, 1, self._token)

    def asked(self) -> AbstractContextManager[object]:
        """They are asked all the time: there is no other way."""
        return contextlib.nullcontext()

    def _ask_for_ever(self) -> None:
        while not self._stop.wait(1.0):
            for number, (host, port) in enumerate(self._places):
                try:
                    values = numbers(scrape(host, port, self._token))
                except BenchError:
                    continue
                # Behind one address may be several processes; each tells when it began.
                process = (number, values.get(_START, 0.0))
                self._first.setdefault(process, values.get(_CPU, 0.0))
                self._latest[process] = values


def census(places: Sequence[tuple[str, int]], workers: int, token: str | None = None) -> Census:
    """What servers tell of `CENSUS`, summed up.

    Raises:
        BenchError: one does not answer, or not all ``workers`` of it were met.
    """
    there: Counter[str] = Counter()
    closed: Counter[str] = Counter()
    for host, port in places:
        met: dict[float, str] = {}
        for _ in range(workers * _ASKS_PER_WORKER if workers > 1 else 1):
            metrics = scrape(host, port, token)
            met[numbers(metrics).get(_START, 0.0)] = metrics
        if len(met) < workers:
            raise BenchError(f"{len(met)} of {workers} workers answered")
        for metrics in met.values():
            values = numbers(metrics)
            for name, told in CENSUS.items():
                if name in values:
                    there[told] += values[name]
            for code, count in _CLOSED.findall(metrics):
                closed[code] += int(float(count))
    return Census(dict(there), closed)


def scrape(host: str, port: int, token: str | None = None) -> str:
    """The text of `/metrics`.

    Raises:
        BenchError: it did not come.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{host}:{port} does not tell its metrics: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"{host}:{port} does not tell its metrics: status {answer.status}")
    return text


def numbers(metrics: str) -> dict[str, float]:
    """The metrics without labels, by name."""
    found = re.finditer(r"^([a-z_]+) (\S+)$", metrics, re.MULTILINE)
    return {match[1]: float(match[2]) for match in found}


def places_of(servers: str) -> list[tuple[int, str, int, str]]:
    """The addresses of a list with commas: family, host, port, and the host as requests name it.

    Raises:
        BenchError: one is none.
    """
    places = []
    for text in filter(None, (each.strip() for each in servers.split(","))):
        try:
            url = urlsplit(text if "//" in text else f"http://{text}")
            port = url.port or 80
            if url.scheme not in {"http", "ws"} or not url.hostname or url.path not in {"", "/"}:
                raise ValueError("it is none such as http://127.0.0.1:3001")
            family, _, _, _, place = socket.getaddrinfo(
                url.hostname, port, type=socket.SOCK_STREAM
            )[0]
        except (ValueError, OSError) as error:
            raise BenchError(f"the address {text}: {error}") from error
        places.append((int(family), str(place[0]), port, url.netloc.rpartition("@")[2]))
    return places


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started and that run."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, thread.read_text().split())
    return sorted(found)


def _sum(counts: Iterable[float | None]) -> int | None:
    """None if one of them is."""
    known = list(counts)
    return None if None in known else int(sum(filter(None, known)))


def _vitals_of(pid: int) -> Vitals | None:
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
        return Vitals(
            cpu_of(pid),
            int(memory_kb[1]) / 1024,
            sum(1 for _ in (process / "fd").iterdir()),
            int(threads[1]),
            waited_ns / 1e9,
        )
    except OSError:
        return None
