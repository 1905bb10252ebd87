"""What servers wrote down of their commits (`chaosserve.py`), for the judge."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from scripts.chaos.roaming import Line
from scripts.chaos.servers import Life

Entry = dict[str, Any]


class Traces:
    """The traces of all lives.

    Args:
        lag: what must be added to a time of a trace to have one of ours.
    """

    def __init__(self, lives: Iterable[Life], lag: float) -> None:
        self._lag = lag
        # By the life's trace; then by session, in order.
        self._entries: dict[str, dict[str, list[Entry]]] = {}
        # When commits were made in memory, by the life's trace.
        self._memory: dict[str, list[float]] = {}
        for life in lives:
            by_session = self._entries.setdefault(str(life.trace), {})
            for text in life.trace.read_bytes().splitlines(keepends=True):
                # A kill can cut the last one off.
                if text.endswith(b"\n"):
                    entry: Entry = msgspec.json.decode(text)
                    by_session.setdefault(entry["session"], []).append(entry)
                    if entry["storage"] == "memory":
                        self._memory.setdefault(str(life.trace), []).append(entry["at"])

    def find(self, line: Line, version: int, answered: float) -> Entry | None:
        """The commit that made a version that this connection was told of."""
        for entry in reversed(self._of(line)):
            if (
                entry["version"] == version
                and entry["storage"] != "mirror"
                and entry["at"] + self._lag <= answered
            ):
                return entry
        return None

    def told(self, line: Line, message_id: str) -> Entry | None:
        """The commit of a chat message that came by this connection."""
        for entry in self._of(line):
            if entry["storage"] != "mirror" and any(message_id == id_ for id_, _ in entry["chat"]):
                return entry
        return None

    def exposed(self, line: Line, entry: Entry) -> bool:
        """Whether a commit was only ever in the memory of a process, which has ended."""
        if entry["storage"] != "memory" or line.life.how is None:
            return False
        return not any(
            later["at"] > entry["at"] and "-r" in later["event"] for later in self._of(line)
        )

    def bound_in_memory(self, line: Line, sent: float) -> bool:
        """Whether the binding to this connection had not come to Redis by this time."""
        join = next((asked for asked in line.asked if asked.type == "join_session"), None)
        if join is None or join.answer is None or "version" not in join.answer:
            return False
        entry = self.find(line, join.answer["version"], join.answered)
        if entry is None or entry["storage"] != "memory":
            return False
        return not any(
            entry["at"] < later["at"] <= sent - self._lag and "-r" in later["event"]
            for later in self._of(line)
        )

    def in_memory(self, line: Line, begin: float, end: float) -> bool:
        """Whether the server of this connection kept sessions in memory in this time."""
        times = self._memory.get(str(line.life.trace), [])
        return bisect_left(times, begin - self._lag) < bisect_right(times, end - self._lag)

    def mirrors(self, life: Life) -> Iterator[tuple[Entry, Entry]]:
        """Each state that a server knew, and the next one."""
        for entries in self._entries[str(life.trace)].values():
            before = None
            for entry in entries:
                if entry["storage"] == "mirror":
                    if before is not None and not entry["first"]:
                        yield before, entry
                    before = entry

    def when(self, entry: Entry) -> float:
        """On our clock."""
        return float(entry["at"]) + self._lag

    def _of(self, line: Line) -> list[Entry]:
        return self._entries[str(line.life.trace)].get(line.session, [])


def stamp(register: Entry) -> tuple[Any, ...]:
    """A stamp or rank, in its order."""
    if "term" in register:
        return (register["term"], register["time"], register["bootId"])
    return (*stamp(register["rank"]), register["time"], register["bootId"])
