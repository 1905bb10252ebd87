"""One of several processes on one port: what it is told, what it tells, and how it obeys.

It shares two pipes with its supervisor. Its standard input brings its `Orders` and then stays open:
a `LEAVE` in it gives up the shared port, and its end is the order to drain, whether the supervisor
closed it or died. Its standard output carries one `WorkerReport`, and then a newline now and then.
"""

from collections.abc import Callable, Collection

import msgspec
import trio
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.app import Serving, StartError, serve
from bandsync.model.exception_leaves import first_leaf
from bandsync.settings import Settings

LEAVE = b"leave\n"
# How often a worker shows that it is alive.
BEAT_S = 1.0


class Orders(Struct, frozen=True):
    """What a worker is told before it starts.

    Attributes:
        settings: with a `server_id` and a port.
        worker: which one it is, from 1.
        crew: a name that the workers of this supervisor share with nobody else.
    """

    settings: Settings
    worker: int
    crew: str | None = None


class WorkerReport(Struct, frozen=True):
    """What a worker tells when it listens, or that it cannot start.

    Attributes:
        lines: what it would have announced.
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
    """Serve as a worker of the supervisor at the other ends of these pipes, until it says so.

    Args:
        log_for: the logger that settings ask for.
        signals: see `bandsync.app.serve`.
    """
    line = await read_line(inlet)
    if line is None:
        return
    orders = msgspec.json.decode(line, type=Orders)
    log = log_for(orders.settings).bind(server_id=orders.settings.server_id)
    serving: Serving | None = None
    lines: list[str] = []
    refused: BaseExceptionGroup[StartError] | None = None

    async def run(*, task_status: trio.TaskStatus[Serving]) -> None:
        await serve(
            orders.settings,
            log,
            worker=orders.worker,
            crew=orders.crew,
            announce=lines.append,
            signals=signals,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()

    async def obey() -> None:
        while await inlet.receive_some():
            if serving is not None:
                serving.leave()
        if serving is None:
            nursery.cancel_scope.cancel()
        else:
            serving.stop()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey)
            serving = await nursery.start(run)
            await _tell(outlet, msgspec.json.encode(WorkerReport(lines)) + b"\n")
            while True:
                await trio.sleep(BEAT_S)
                await _tell(outlet, b"\n")
    except* StartError as group:
        refused = group
    if refused is not None:
        await _tell(
            outlet, msgspec.json.encode(WorkerReport(refused=str(first_leaf(refused)))) + b"\n"
        )


async def _tell(outlet: trio.abc.SendStream, line: bytes) -> None:
    try:
        await outlet.send_all(line)
    except trio.BrokenResourceError:
        # The supervisor has died, and so ends the standard input, which ends us.
        return


async def read_line(stream: trio.abc.ReceiveStream) -> bytes | None:
    """The first line; None if the stream ends before it does."""
    line = b""
    while not line.endswith(b"\n"):
        data = await stream.receive_some()
        if not data:
            return None
        line += data
    return line
