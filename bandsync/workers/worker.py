"""One of several processes on one port, and its pipe protocol with the supervisor.

Two pipes connect a worker with its supervisor. Standard input carries one `WorkerConfig` line and
then stays open: `CLOSE_SHARED_PORT` closes the shared port, and end of file begins the drain. The
pipe also ends when the supervisor dies, so that no worker outlives it. Standard output carries one
`WorkerReport` line and then an empty line every `HEARTBEAT_S`.
"""

from collections.abc import Callable, Collection

import msgspec
import trio
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.app import Serving, serve
from bandsync.model.exception_leaves import first_leaf
from bandsync.settings import Settings
from bandsync.startup import StartError

CLOSE_SHARED_PORT = b"close_shared_port\n"
# Period of the heartbeats, seconds; the supervisor's limit is `supervisor.SILENCE_S`.
HEARTBEAT_S = 1.0


class WorkerConfig(Struct, frozen=True):
    """Everything that a worker needs to start.

    Attributes:
        settings: settings with `server_id` and port filled in.
        worker: number of the worker, from 1.
        group: random name that only the workers of this supervisor know.
    """

    settings: Settings
    worker: int
    group: str | None = None


class WorkerReport(Struct, frozen=True):
    """The result of a worker's start.

    Attributes:
        lines: lines that a single server would have printed.
        refused: why it cannot start; None if it listens.
    """

    lines: list[str] = []
    refused: str | None = None


async def work(
    inlet: trio.abc.ReceiveStream,
    outlet: trio.abc.SendStream,
    log_for: Callable[[Settings], FilteringBoundLogger],
    *,
    signals: Collection[int] = (),
) -> None:
    """Serve as a worker until ``inlet`` ends; then drain.

    Args:
        inlet: the supervisor's end writes `WorkerConfig` and `CLOSE_SHARED_PORT`.
        outlet: the supervisor's end reads `WorkerReport` and heartbeats.
        log_for: makes the logger that the settings describe.
        signals: see `bandsync.app.serve`.
    """
    line = await read_line(inlet)
    if line is None:
        return
    config = msgspec.json.decode(line, type=WorkerConfig)
    log = log_for(config.settings).bind(server_id=config.settings.server_id)
    serving: Serving | None = None
    lines: list[str] = []
    refused: BaseExceptionGroup[StartError] | None = None

    async def run_server(*, task_status: trio.TaskStatus[Serving]) -> None:
        await serve(
            config.settings,
            log,
            worker=config.worker,
            group=config.group,
            announce=lines.append,
            signals=signals,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()

    async def run_commands() -> None:
        # `CLOSE_SHARED_PORT` is the only command: any bytes stand for it.
        while await inlet.receive_some():
            if serving is not None:
                serving.close_shared_port()
        if serving is None:
            nursery.cancel_scope.cancel()
        else:
            serving.stop()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_commands)
            serving = await nursery.start(run_server)
            await _send(outlet, msgspec.json.encode(WorkerReport(lines)) + b"\n")
            while True:
                await trio.sleep(HEARTBEAT_S)
                await _send(outlet, b"\n")
    except* StartError as errors:
        refused = errors
    if refused is not None:
        report = WorkerReport(refused=str(first_leaf(refused)))
        await _send(outlet, msgspec.json.encode(report) + b"\n")


async def _send(outlet: trio.abc.SendStream, line: bytes) -> None:
    try:
        await outlet.send_all(line)
    except trio.BrokenResourceError:
        # The supervisor has died; end of file on standard input begins the drain.
        return


async def read_line(stream: trio.abc.ReceiveStream) -> bytes | None:
    """Read the first line; None if the stream ends before it does."""
    line = b""
    while not line.endswith(b"\n"):
        data = await stream.receive_some()
        if not data:
            return None
        line += data
    return line
