"""Several processes on one port: who starts them, watches them, replaces them and ends them.

The supervisor holds no sessions. How it speaks with its workers is in `worker.py`. The kernel
spreads connections over them (SO_REUSEPORT), and they pass them on to each other, so that a band is
on one (`net/neighbours.py`). The kernel passes over a worker that has ended, but not over one that
hangs: who is silent is replaced.
"""

import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial

import msgspec
import trio
from msgspec import Struct
from msgspec.structs import replace
from structlog.typing import FilteringBoundLogger

from bandsync.app import StartError, listen, server_name, url_of
from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.backoff import Backoff
from bandsync.settings import Settings
from bandsync.workers.worker import LEAVE, Orders, WorkerReport, read_line

# What a start may take besides its waiting for Redis, and a drain besides DRAIN_TIMEOUT_MS.
START_MARGIN_S = 30.0
DRAIN_MARGIN_S = 5.0
# Between leaving the port and the drain: who was accepted last is not turned away.
LEAVING_S = 0.5
# How long a worker may fail to show that it is alive: `worker.BEAT_S`.
SILENCE_S = 30.0
# The claim of a name that an earlier life left behind.
_CLAIM_S = 10.0


class Supervising(Struct, frozen=True):
    """Workers that all listen.

    Attributes:
        url: the address to open in a browser.
        stop: begins the drain; `supervise` returns when all have ended.
        replace: begins to replace the workers, one after the other.
    """

    url: str
    port: int
    stop: Callable[[], None]
    replace: Callable[[], None]


class Pace(Struct, frozen=True):
    """How fast a worker that keeps ending is started again, seconds.

    Attributes:
        first, longest: waits; they double from one to the other.
        stable: having listened for so long, a worker starts from the first wait again.
    """

    first: float = 0.2
    longest: float = 30.0
    stable: float = 60.0


PACE = Pace()


async def supervise(
    settings: Settings,
    log: FilteringBoundLogger,
    *,
    command: Sequence[str],
    announce: Callable[[str], None] = print,
    stop_on: Collection[int] = (),
    replace_on: Collection[int] = (),
    pace: Pace = PACE,
    task_status: trio.TaskStatus[Supervising] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep `WORKERS` processes that serve one port, until `Supervising.stop`, or for ever.

    Args:
        command: starts a process that calls `worker.work`.
        announce: told the address, the storage and the workers, once all listen.
        stop_on: any of these signals begins the drain, a second one ends the workers at once.
        replace_on: any of these signals replaces the workers, one after the other.

    Raises:
        StartError: a worker cannot start; the message says what to change.
    """
    if sys.platform != "linux":
        raise StartError("WORKERS: needs Linux; elsewhere a shared port is not shared evenly")
    # Listening alone, as one server does, finds out any other that listens, workers included, and
    # keeps the port until all of ours do: what they share cannot be told from what others share.
    guard = await listen(settings, "PORT", settings.port)
    refused: BaseExceptionGroup[StartError] | None = None
    try:
        for listener in guard:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        supervisor = _Supervisor(settings, guard, log, command, pace)
        await supervisor.run(announce, stop_on, replace_on, task_status)
    except* StartError as group:
        refused = group
    finally:
        for listener in guard:
            listener.close()
    if refused is not None:
        raise first_leaf(refused)


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        guard: list[socket.socket],
        log: FilteringBoundLogger,
        command: Sequence[str],
        pace: Pace,
    ) -> None:
        port: int = guard[0].getsockname()[1]
        self._port = port
        self._url = url_of(settings, port)
        self._settings = settings
        self._guard = guard
        self._log = log
        self._stopping = trio.Event()
        self._replacing = trio.Event()
        name = server_name(settings, port)
        crew = secrets.token_hex(16)
        self._workers = [
            _Worker(
                Orders(replace(settings, port=port, server_id=f"{name}-{number}"), number, crew),
                command,
                pace,
                self._stopping,
                log,
            )
            for number in range(1, settings.workers + 1)
        ]

    async def run(
        self,
        announce: Callable[[str], None],
        stop_on: Collection[int],
        replace_on: Collection[int],
        task_status: trio.TaskStatus[Supervising],
    ) -> None:
        async with trio.open_nursery() as nursery:
            if stop_on or replace_on:
                nursery.start_soon(self._run_signals, stop_on, replace_on, nursery.cancel_scope)
            nursery.start_soon(self._begin, announce, task_status)
            async with trio.open_nursery() as lives:
                for worker in self._workers:
                    lives.start_soon(worker.run)
                await self._stopping.wait()
                self._log.info("workers.draining")
                for worker in self._workers:
                    worker.drain()
            self._log.info("workers.stopped")
            nursery.cancel_scope.cancel()

    async def _begin(
        self, announce: Callable[[str], None], task_status: trio.TaskStatus[Supervising]
    ) -> None:
        """Wait until all listen, say so, and replace them as often as asked."""
        for worker in self._workers:
            await worker.listening.wait()
        for listener in self._guard:
            listener.close()
        if self._stopping.is_set():
            return
        for line in self._workers[0].announced:
            announce(line)
        announce(f"Workers: {self._described()}")
        task_status.started(
            Supervising(self._url, self._port, self._stopping.set, lambda: self._replacing.set())
        )
        while True:
            await self._replacing.wait()
            self._replacing = trio.Event()
            self._log.info("workers.replacing")
            for worker in self._workers:
                await worker.replace()
            self._log.info("workers.replaced")

    def _described(self) -> str:
        text = ", ".join(worker.server_id for worker in self._workers)
        if self._settings.worker_ports is not None:
            last = self._settings.worker_ports + len(self._workers) - 1
            text += f"; each alone on ports {self._settings.worker_ports} to {last}"
        return text

    async def _run_signals(
        self, stop_on: Collection[int], replace_on: Collection[int], everything: trio.CancelScope
    ) -> None:
        with trio.open_signal_receiver(*stop_on, *replace_on) as received:
            async for number in received:
                if number in replace_on:
                    self._replacing.set()
                    continue
                if self._stopping.is_set():
                    everything.cancel()
                self._stopping.set()


class _Worker:
    """A place among the workers, and the process that has it.

    Attributes:
        announced: the lines of the process that listens.
        listening: set while one does.
    """

    def __init__(
        self,
        orders: Orders,
        command: Sequence[str],
        pace: Pace,
        stopping: trio.Event,
        log: FilteringBoundLogger,
    ) -> None:
        self.server_id = orders.settings.server_id or ""
        self.announced: list[str] = []
        self.listening = trio.Event()
        self._orders = orders
        self._command = [*command, self.server_id]
        self._pace = pace
        self._stopping = stopping
        self._log = log.bind(server_id=self.server_id)
        self._parting = trio.Event()
        self._leaving = False

    def drain(self) -> None:
        """Let the process end as on SIGTERM, and have no other."""
        self._parting.set()

    async def replace(self) -> None:
        """Let the process end, its clients going to the others, and wait until the next listens."""
        if self.listening.is_set():
            self.listening = trio.Event()
            self._leaving = True
            self._parting.set()
        await self.listening.wait()

    async def run(self) -> None:
        """Have a process, one after the other, until `drain`.

        Raises:
            StartError: the first one did not come to listen.
        """
        backoff = Backoff(self._pace.longest, self._pace.first)
        started = False
        failures = 0
        while not self._stopping.is_set():
            ending = await self._live()
            if self.listening.is_set():
                self.listening = trio.Event()
            if self._stopping.is_set():
                return
            started = started or ending.listened_s is not None
            if not started:
                raise StartError(
                    ending.refused or f"worker {self.server_id}: {ending.how}; its log says more"
                )
            if self._parting.is_set():
                self._parting = trio.Event()
                self._leaving = False
                failures = 0
                continue
            stable = ending.listened_s is not None and ending.listened_s >= self._pace.stable
            failures = 0 if stable else failures + 1
            wait_s = backoff.compute(failures)
            self._log.warning(
                "worker.exited",
                pid=ending.pid,
                how=ending.how,
                reason=ending.refused,
                restart_in_s=round(wait_s, 3),
            )
            with trio.move_on_after(wait_s):
                await self._stopping.wait()

    async def _live(self) -> "_Ending":
        """Have one process, from its start to its end."""
        listened: float | None = None
        report: WorkerReport | None = None
        silent = False
        # Whoever cannot be waited for any longer is killed by the end of this scope.
        with trio.CancelScope() as patience:
            async with trio.open_nursery() as nursery:
                start = partial(
                    trio.run_process,
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    check=False,
                    deliver_cancel=_kill,
                )
                try:
                    process: trio.Process = await nursery.start(start)
                except OSError as error:
                    # Out of memory or processes, which passes: the others go on meanwhile.
                    return _Ending(None, f"it could not be started: {error}")
                assert process.stdin is not None
                assert process.stdout is not None
                nursery.start_soon(self._instruct, process.stdin, patience)
                async with process.stdout:
                    with trio.move_on_after(self._start_s()) as starting:
                        if (line := await read_line(process.stdout)) is not None:
                            report = msgspec.json.decode(line, type=WorkerReport)
                        if report is None or report.refused is not None:
                            await process.wait()
                    if starting.cancelled_caught:
                        patience.cancel()
                    elif report is not None and report.refused is None:
                        listened = trio.current_time()
                        self.announced = report.lines
                        self._log.info("worker.started", pid=process.pid)
                        self.listening.set()
                        silent = await _silent(process.stdout)
                        patience.deadline = trio.current_time() + (0 if silent else DRAIN_MARGIN_S)
                    await process.wait()
                nursery.cancel_scope.cancel()
        how = _how(process.returncode)
        if patience.cancelled_caught:
            how = "it did not start in time and was killed"
            if listened is not None:
                how = "it did not end in time and was killed"
            if silent:
                how = f"it was silent for {SILENCE_S:g} s and was killed"
            self._log.error("worker.killed", pid=process.pid, how=how)
        return _Ending(
            process.pid,
            how,
            report.refused if report is not None else None,
            None if listened is None else trio.current_time() - listened,
        )

    async def _instruct(self, stdin: trio.abc.SendStream, patience: trio.CancelScope) -> None:
        """Give the process its orders, and when it is to part, the time for that."""
        async with stdin:
            try:
                await stdin.send_all(msgspec.json.encode(self._orders) + b"\n")
                await self._parting.wait()
                patience.deadline = (
                    trio.current_time()
                    + self._orders.settings.drain_timeout_ms / 1000
                    + DRAIN_MARGIN_S
                    + LEAVING_S
                )
                if self._leaving:
                    await stdin.send_all(LEAVE)
                    await trio.sleep(LEAVING_S)
            except trio.BrokenResourceError:
                # It has ended, as whoever waits for it will see.
                return

    def _start_s(self) -> float:
        settings = self._orders.settings
        redis_ms = settings.redis_connect_timeout + settings.redis_health_timeout_ms
        return redis_ms / 1000 + _CLAIM_S + START_MARGIN_S


class _Ending(Struct, frozen=True):
    """How a process ended.

    Attributes:
        pid: None if there was no process.
        refused: why it did not start, if it said so.
        listened_s: for how long it listened; None if it did not come to it.
    """

    pid: int | None
    how: str
    refused: str | None = None
    listened_s: float | None = None


async def _silent(stream: trio.abc.ReceiveStream) -> bool:
    """Read until the stream ends, or does not bring anything for too long: then it is true."""
    while True:
        with trio.move_on_after(SILENCE_S):
            if not await stream.receive_some():
                return False
            continue
        return True


async def _kill(process: trio.Process) -> None:
    process.kill()


def _how(status: int | None) -> str:
    """In words, how a process ended."""
    if status is not None and status < 0:
        return f"it was ended by signal {-status}, {signal.strsignal(-status)}"
    return f"it ended with status {status}"
