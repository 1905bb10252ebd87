"""A log whose entries a test can wait for."""

from typing import Any

import structlog
import trio

from tests.support.servers import PATIENCE_S, Message


class LogCapture:
    """A log that keeps its entries.

    Attributes:
        entries: all of them so far.
        logger: give this one to the code under test.
    """

    def __init__(self) -> None:
        self.entries: list[Message] = []
        self._added = trio.Event()
        self.logger = structlog.wrap_logger(
            None,
            processors=[self._write],
            wrapper_class=structlog.make_filtering_bound_logger("debug"),
        )

    def _write(self, logger: object, level: str, entry: Any) -> Any:
        self.entries.append(dict(entry))
        self._added.set()
        self._added = trio.Event()
        raise structlog.DropEvent

    def all(self, event: str, **fields: object) -> list[Message]:
        """The entries of this event with these fields."""
        return [
            entry
            for entry in self.entries
            if entry["event"] == event and fields.items() <= entry.items()
        ]

    async def until(self, event: str, number: int = 1, **fields: object) -> Message:
        """Wait for the ``number``th entry of this event with these fields."""
        with trio.fail_after(PATIENCE_S):
            while len(found := self.all(event, **fields)) < number:
                await self._added.wait()
        return found[number - 1]
