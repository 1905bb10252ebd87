"""The end of a worker process, and its exit status in words."""

import signal

from msgspec import Struct


class ProcessEnd(Struct, frozen=True):
    """The end of a worker process.

    Attributes:
        pid: process id; None if no process could be started.
        how: exit status or signal, in words.
        refused: reason that the process reported for not starting, if it did.
        listened_s: time that it listened, seconds; None if it never did.
    """

    pid: int | None
    how: str
    refused: str | None = None
    listened_s: float | None = None


def status_text(status: int | None) -> str:
    """An exit status in words."""
    if status is not None and status < 0:
        return f"it was ended by signal {-status}, {signal.strsignal(-status)}"
    return f"it ended with status {status}"
