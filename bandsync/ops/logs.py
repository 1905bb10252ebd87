"""Structured logs on standard error: named events, as text or as JSON lines."""

import queue
import sys
import threading
from typing import TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from bandsync.settings import Settings

_QUEUE_LINES = 10_000


class Sink:
    """Writes lines to ``out`` from a thread, so that a blocked log cannot block the server.

    The reader of a pipe may hang or be gone, a disk may be full. Lines that cannot be written, or
    exceed the queue, are dropped and counted.

    Attributes:
        dropped: number of dropped lines.
    """

    def __init__(self, out: TextIO) -> None:
        self.dropped = 0
        self._out = out
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUE_LINES)
        # A daemon thread: a write that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue ``text``; never blocks, never raises."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: the writing thread flushes each line."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Write the queued lines, for at most ``timeout_s`` seconds."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._out.write(text)
                self._out.flush()
            except (OSError, ValueError):
                self.dropped += 1


def make_logger(settings: Settings, out: Sink | TextIO) -> FilteringBoundLogger:
    """Return a logger to ``out`` with the level and format of the settings."""
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_format == "json":
        processors += [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    logger: FilteringBoundLogger = structlog.wrap_logger(
        # One write for a line and its newline: several processes may share the output.
        structlog.WriteLogger(cast("TextIO", out)),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
    )
    return logger
