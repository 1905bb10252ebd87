"""The supervisor of the workers: starts, watches, replaces and stops processes on one port.

The supervisor holds no sessions. `bandsync/workers/worker.py` has its pipe protocol with a worker.
The kernel distributes new connections over the workers (SO_REUSEPORT). The workers hand them off to
each other, so that all members of a session are on one worker (`bandsync/handoff/peers.py`). The
kernel skips a worker that has ended, but not one that hangs: a worker without heartbeats is killed.
"""

import secrets
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

from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.backoff import Backoff
from bandsync.settings import Settings
from bandsync.startup import StartError, listen, server_name, url_of
from bandsync.workers.process_end import ProcessEnd, status_text
from bandsync.workers.worker import CLOSE_SHARED_PORT, WorkerConfig, WorkerReport, read_line

# Limit of a worker's start, seconds, in addition to its timeouts for Redis.
START_MARGIN_S = 30.0
# Limit of a worker's drain, seconds, in addition to `DRAIN_TIMEOUT_MS`.
DRAIN_MARGIN_S = 5.0
# Delay from closing the shared port to the drain, seconds: the connections accepted last are served
# or handed off meanwhile.
PORT_CLOSED_S = 0.5
# Limit without a heartbeat, seconds, before a worker is killed; see `worker.HEARTBEAT_S`.
SILENCE_S = 30.0
# Time to claim a server id whose presence entry an earlier process left behind, seconds.
_CLAIM_S = 10.0


class Supervising(Struct, frozen=True):
    """A worker group in which every worker listens.

    Attributes:
        url: address to open in a browser.
        port: port that the workers share.
        stop: begins the drain; `supervise` returns when all workers have ended.
        replace: begins to replace the workers, one after the other.
    """

    url: str
    port: int
    stop: Callable[[], None]
    replace: Callable[[], None]


class RestartDelays(Struct, frozen=True):
    """Jittered exponential backoff of the restarts of a worker that keeps ending.

    Attributes:
        first: first delay, seconds; it doubles with every failure.
        longest: upper bound of the delay, seconds.
        stable: uptime that resets the delay to the first one, seconds.
    """

    first: float = 0.2
    longest: float = 30.0
    stable: float = 60.0


RESTART_DELAYS = RestartDelays()


async def supervise(
    settings: Settings,
    log: FilteringBoundLogger,
    *,
    command: Sequence[str],
    announce: Callable[[str], None] = print,
    stop_on: Collection[int] = (),
    replace_on: Collection[int] = (),
    restart_delays: RestartDelays = RESTART_DELAYS,
    task_status: trio.TaskStatus[Supervising] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run `WORKERS` processes that serve one port, until `Supervising.stop`, or for ever.

    Args:
        command: starts a process that calls `worker.work`; the worker's server id is appended.
        announce: receives three lines once all workers listen: address, storage, worker names.
        stop_on: any of these signals begins the drain, a second one kills the workers at once.
        replace_on: any of these signals replaces the workers, one after the other.
        restart_delays: backoff of the restarts of a worker that ends unexpectedly.

    Raises:
        StartError: a worker cannot start; the message says what to change.
    """
    if sys.platform != "linux":
        raise StartError("WORKERS: needs Linux; elsewhere a shared port is not shared evenly")
    # Bind without SO_REUSEPORT first: this fails if any other server or worker group listens.
    # Then keep the port until all workers listen: SO_REUSEPORT would admit other processes too.
    guard = await listen(settings, "PORT", settings.port)
    refused: BaseExceptionGroup[StartError] | None = None
    try:
        for listener in guard:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        supervisor = _Supervisor(settings, guard, log, command, restart_delays)
        await supervisor.run(announce, stop_on, replace_on, task_status)
    except* StartError as errors:
        refused = errors
    finally:
        for listener in guard:
            listener.close()
    if refused is not None:
        raise first_leaf(refused)


class _Supervisor:
    """The workers of one port.

    Args:
        guard: sockets that keep the port from other processes until all workers listen.
    """

    def __init__(
        self,
        settings: Settings,
        guard: list[socket.socket],
        log: FilteringBoundLogger,
        command: Sequence[str],
        restart_delays: RestartDelays,
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
        group = secrets.token_hex(16)
        self._workers = [
            _Worker(
                WorkerConfig(
                    replace(settings, port=port, server_id=f"{name}-{number}"), number, group
                ),
                command,
                restart_delays,
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
            nursery.start_soon(self._run_replacements, announce, task_status)
            async with trio.open_nursery() as processes:
                for worker in self._workers:
                    processes.start_soon(worker.run)
                await self._stopping.wait()
                self._log.info("workers.draining")
                for worker in self._workers:
                    worker.drain()
            self._log.info("workers.stopped")
            nursery.cancel_scope.cancel()

    async def _run_replacements(
        self, announce: Callable[[str], None], task_status: trio.TaskStatus[Supervising]
    ) -> None:
        """Announce when all workers listen, then replace them at every request, for ever."""
        for worker in self._workers:
            await worker.listening.wait()
        for listener in self._guard:
            listener.close()
        if self._stopping.is_set():
            return
        for line in self._workers[0].announced:
            announce(line)
        announce(f"Workers: {self._names()}")
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

    def _names(self) -> str:
        """The names of the workers, and their own ports if they have any."""
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
    """One worker number, and the process that currently has it.

    Attributes:
        server_id: name of the worker, the same for all its processes.
        announced: lines of the process that listens.
        listening: set while a process listens.
    """

    def __init__(
        self,
        config: WorkerConfig,
        command: Sequence[str],
        restart_delays: RestartDelays,
        stopping: trio.Event,
        log: FilteringBoundLogger,
    ) -> None:
        self.server_id = config.settings.server_id or ""
        self.announced: list[str] = []
        self.listening = trio.Event()
        self._config = config
        self._command = [*command, self.server_id]
        self._restart_delays = restart_delays
        self._stopping = stopping
        self._log = log.bind(server_id=self.server_id)
        self._ending = trio.Event()
        self._replacing = False

    def drain(self) -> None:
        """Begin the drain of the process, as SIGTERM does; no other process follows."""
        self._ending.set()

    async def replace(self) -> None:
        """Drain the process while new clients go to the other workers; wait for the next one."""
        if self.listening.is_set():
            self.listening = trio.Event()
            self._replacing = True
            self._ending.set()
        await self.listening.wait()

    async def run(self) -> None:
        """Run one process after the other, until `drain`.

        Raises:
            StartError: the first process ended before it listened.
        """
        backoff = Backoff(self._restart_delays.longest, self._restart_delays.first)
        started = False
        failures = 0
        while not self._stopping.is_set():
            end = await self._run_process()
            if self.listening.is_set():
                self.listening = trio.Event()
            if self._stopping.is_set():
                return
            started = started or end.listened_s is not None
            if not started:
                raise StartError(
                    end.refused or f"worker {self.server_id}: {end.how}; its log says more"
                )
            if self._ending.is_set():
                self._ending = trio.Event()
                self._replacing = False
                failures = 0
                continue
            stable = end.listened_s is not None and end.listened_s >= self._restart_delays.stable
            failures = 0 if stable else failures + 1
            wait_s = backoff.compute(failures)
            self._log.warning(
                "worker.exited",
                pid=end.pid,
                how=end.how,
                reason=end.refused,
                restart_in_s=round(wait_s, 3),
            )
            with trio.move_on_after(wait_s):
                await self._stopping.wait()

    async def _run_process(self) -> ProcessEnd:
        """Run one process, from its start to its end."""
        listened: float | None = None
        report: WorkerReport | None = None
        silent = False
        # When the deadline of this scope passes, the process is killed.
        with trio.CancelScope() as limit:
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
                    # Out of memory or processes: this may pass, and the other workers serve on.
                    return ProcessEnd(None, f"it could not be started: {error}")
                assert process.stdin is not None
                assert process.stdout is not None
                nursery.start_soon(self._run_stdin, process.stdin, limit)
                async with process.stdout:
                    with trio.move_on_after(self._start_s()) as starting:
                        if (line := await read_line(process.stdout)) is not None:
                            report = msgspec.json.decode(line, type=WorkerReport)
                        if report is None or report.refused is not None:
                            await process.wait()
                    if starting.cancelled_caught:
                        limit.cancel()
                    elif report is not None and report.refused is None:
                        listened = trio.current_time()
                        self.announced = report.lines
                        self._log.info("worker.started", pid=process.pid)
                        self.listening.set()
                        silent = await _wait_for_silence(process.stdout)
                        limit.deadline = trio.current_time() + (0 if silent else DRAIN_MARGIN_S)
                    await process.wait()
                nursery.cancel_scope.cancel()
        how = status_text(process.returncode)
        if limit.cancelled_caught:
            how = "it did not start in time and was killed"
            if listened is not None:
                how = "it did not end in time and was killed"
            if silent:
                how = f"it sent no heartbeat for {SILENCE_S:g} s and was killed"
            self._log.error("worker.killed", pid=process.pid, how=how)
        return ProcessEnd(
            process.pid,
            how,
            report.refused if report is not None else None,
            None if listened is None else trio.current_time() - listened,
        )

    async def _run_stdin(self, stdin: trio.abc.SendStream, limit: trio.CancelScope) -> None:
        """Send the process its configuration; close the pipe, with a deadline, to drain it."""
        async with stdin:
            try:
                await stdin.send_all(msgspec.json.encode(self._config) + b"\n")
                await self._ending.wait()
                limit.deadline = (
                    trio.current_time()
                    + self._config.settings.drain_timeout_ms / 1000
                    + DRAIN_MARGIN_S
                    + PORT_CLOSED_S
                )
                if self._replacing:
                    await stdin.send_all(CLOSE_SHARED_PORT)
                    await trio.sleep(PORT_CLOSED_S)
            except trio.BrokenResourceError:
                # The process has ended; `_run_process` waits for it.
                return

    def _start_s(self) -> float:
        """Limit of a process's start, seconds."""
        settings = self._config.settings
        redis_ms = settings.redis_connect_timeout + settings.redis_health_timeout_ms
        return redis_ms / 1000 + _CLAIM_S + START_MARGIN_S


async def _wait_for_silence(stream: trio.abc.ReceiveStream) -> bool:
    """Failure detector: True after `SILENCE_S` without a byte, False when the stream ends."""
    while True:
        with trio.move_on_after(SILENCE_S):
            if not await stream.receive_some():
                return False
            continue
        return True


async def _kill(process: trio.Process) -> None:
    process.kill()
