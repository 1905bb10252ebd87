"""The commits that traced servers have written to files (`traced_server`), for the judge."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from scripts.chaos.cluster_records import JsonRank, JsonStamp, Registers, RoamingRecord, ServerRun

RegisterName = Literal["leader", "transport", "message"]
# Ranks and stamps in the order in which they compare.
SortKey = tuple[float | str, ...]


class TraceEntry(Registers):
    """A line of a trace: a state that a server committed, or that its mirror applied.

    Attributes:
        at: when, on the clock `time.perf_counter`.
        first: whether the server knew no earlier state.
        storage: "redis", "memory", or "mirror" for a state received from Redis.
        session: id of the session.
        epoch: id of its epoch.
        version: of the state.
        event: id of the commit; "-r" in it marks a commit to Redis.
        chat: the new chat messages: id and time.
        gone: ids of members that the state no longer holds.
    """

    at: float
    first: bool
    storage: str
    session: str
    epoch: str
    version: int
    event: str
    chat: list[tuple[str, float]]
    gone: list[str]


class CommitTraces:
    """The traces of all server processes.

    Args:
        runs: the processes.
        clock_offset_s: added to the time of a trace entry, gives the time of this process.
    """

    def __init__(self, runs: Iterable[ServerRun], clock_offset_s: float) -> None:
        self._clock_offset_s = clock_offset_s
        # By the path of the trace; then by session, in the order of commits.
        self._entries: dict[str, dict[str, list[TraceEntry]]] = {}
        # Times of commits in memory, by the path of the trace.
        self._memory: dict[str, list[float]] = {}
        for server_run in runs:
            by_session = self._entries.setdefault(str(server_run.trace), {})
            for text in server_run.trace.read_bytes().splitlines(keepends=True):
                # A kill can truncate the last line.
                if text.endswith(b"\n"):
                    entry: TraceEntry = msgspec.json.decode(text)
                    by_session.setdefault(entry["session"], []).append(entry)
                    if entry["storage"] == "memory":
                        self._memory.setdefault(str(server_run.trace), []).append(entry["at"])

    def commit_of(self, record: RoamingRecord, version: int, answered: float) -> TraceEntry | None:
        """The commit that made a version which this connection received."""
        for entry in reversed(self._entries_of(record)):
            if (
                entry["version"] == version
                and entry["storage"] != "mirror"
                and entry["at"] + self._clock_offset_s <= answered
            ):
                return entry
        return None

    def commit_of_chat(self, record: RoamingRecord, message_id: str) -> TraceEntry | None:
        """The commit of a chat message which this connection sent or received."""
        for entry in self._entries_of(record):
            if entry["storage"] != "mirror" and any(message_id == id_ for id_, _ in entry["chat"]):
                return entry
        return None

    def lost_with_process(self, record: RoamingRecord, entry: TraceEntry) -> bool:
        """Whether a commit was only ever in the memory of a process that has ended."""
        if entry["storage"] != "memory" or record.server_run.end_signal is None:
            return False
        return not any(
            later_entry["at"] > entry["at"] and "-r" in later_entry["event"]
            for later_entry in self._entries_of(record)
        )

    def joined_in_memory(self, record: RoamingRecord, sent: float) -> bool:
        """Whether the join on this connection was not yet in Redis at this time."""
        join = next(
            (command for command in record.commands if command.type == "join_session"), None
        )
        if join is None or join.answer is None or "version" not in join.answer:
            return False
        entry = self.commit_of(record, join.answer["version"], join.answered)
        if entry is None or entry["storage"] != "memory":
            return False
        return not any(
            entry["at"] < later_entry["at"] <= sent - self._clock_offset_s
            and "-r" in later_entry["event"]
            for later_entry in self._entries_of(record)
        )

    def in_memory(self, record: RoamingRecord, begin: float, end: float) -> bool:
        """Whether this connection's server committed to memory in this time."""
        times = self._memory.get(str(record.server_run.trace), [])
        return bisect_left(times, begin - self._clock_offset_s) < bisect_right(
            times, end - self._clock_offset_s
        )

    def mirrors(self, server_run: ServerRun) -> Iterator[tuple[TraceEntry, TraceEntry]]:
        """Each state of a server's mirrors, with the following state."""
        for entries in self._entries[str(server_run.trace)].values():
            before = None
            for entry in entries:
                if entry["storage"] == "mirror":
                    if before is not None and not entry["first"]:
                        yield before, entry
                    before = entry

    def local_time(self, entry: TraceEntry) -> float:
        """The time of an entry on the clock of this process."""
        return float(entry["at"]) + self._clock_offset_s

    def _entries_of(self, record: RoamingRecord) -> list[TraceEntry]:
        return self._entries[str(record.server_run.trace)].get(record.session, [])


def sort_key(registers: Registers, name: RegisterName) -> SortKey:
    """The rank or stamp of a register, comparable: the larger one wins a merge."""
    if name == "leader":
        return _rank_key(registers["leader"]["rank"])
    return _stamp_key(registers[name])


def _rank_key(rank: JsonRank) -> SortKey:
    return (rank["term"], rank["time"], rank["bootId"])


def _stamp_key(stamp: JsonStamp) -> SortKey:
    return (*_rank_key(stamp["rank"]), stamp["time"], stamp["bootId"])
