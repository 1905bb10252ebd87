"""The judge of a run with one server: finds every violation in what the clients recorded. No I/O.

Times are seconds on the clock of the clients' process, unless a name says `_ms`.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from scripts.chaos.records import (
    CHAT_RING,
    EVENTS,
    ClockSample,
    CommandRecord,
    ConnectionRecord,
    agreed_state,
)
from scripts.testbed.json_messages import JsonMessage, JsonTransport

ViolationKind = Literal["ack", "connection", "version", "refusal", "state"]

# Over a longer time the session clock may be slewed legitimately, as Redis's clock was.
_CLOCK_MEMORY_S = 15.0
_TRANSPORT_COMMANDS = frozenset({"play", "pause", "stop", "seek", "set_tempo"})


@dataclass
class FaultWindow:
    """One fault and its consequences. A run's first window, ``none``, is the time before faults.

    Attributes:
        fault: name of the fault.
        kind: the detection that may be expected: at once for an ``end`` of the connection, after a
            deadline for ``silence``, unspecified for ``other``.
        injected: when the fault began.
        detected: when the first client received the change to memory mode.
        lifted: when the fault ended.
        recovered: when the last client received the change back to Redis.
        quiet_from: when everything was as without a fault again.
    """

    fault: str
    kind: Literal["none", "end", "silence", "other"]
    injected: float
    detected: float | None = None
    lifted: float | None = None
    recovered: float | None = None
    quiet_from: float = float("inf")


@dataclass
class FinalState:
    """A session at the end.

    Attributes:
        session: its id.
        snapshots: by the name of the member who received it; a fresh joiner is among them.
        stored: the session in Redis, in the form of a snapshot; None to skip that comparison.
        members: ids of the members that should be present.
    """

    session: str
    snapshots: dict[str, JsonMessage]
    stored: JsonMessage | None
    members: set[str]


@dataclass
class Violation:
    """Something that must never happen, and when it happened."""

    kind: ViolationKind
    at: float
    text: str


@dataclass
class FaultRow:
    """A line of the table; None where there was nothing to measure.

    Attributes:
        fault: name of the fault.
        kind: as in `FaultWindow`.
        detection_ms: from the fault to its detection.
        stall_ms: longest wait for a reply that arrived in the window.
        recovery_ms: from the end of the fault to the recovery.
        position_error_ms: largest jump of the song's position.
        found: number of violations by kind.
    """

    fault: str
    kind: str
    detection_ms: float | None
    stall_ms: float
    recovery_ms: float | None
    position_error_ms: float
    found: dict[ViolationKind, int]


@dataclass
class RunResult:
    """All rows, all violations, and the longest stall without a fault."""

    rows: list[FaultRow]
    violations: list[Violation]
    quiet_stall_ms: float


def judge(
    records: Sequence[ConnectionRecord],
    windows: Sequence[FaultWindow],
    finals: Sequence[FinalState],
) -> RunResult:
    """Find all violations, and measure detection, stalls and recovery of each fault."""
    violations = [
        violation
        for record in records
        for violation in (
            *versions(record),
            *_answers(record),
            *_connection(record),
            *_replica_errors(record),
        )
    ]
    for final in finals:
        violations += _state(final, [r for r in records if r.session == final.session])
    violations.sort(key=lambda violation: violation.at)
    errors = [error for record in records for error in (*_positions(record), *_clock(record))]
    starts = [window.injected for window in windows]
    rows = []
    for number, window in enumerate(windows):
        begin = window.injected
        end = starts[number + 1] if number + 1 < len(starts) else float("inf")
        found: dict[ViolationKind, int] = {}
        for violation in violations:
            if max(bisect_right(starts, violation.at) - 1, 0) == number:
                found[violation.kind] = found.get(violation.kind, 0) + 1
        rows.append(
            FaultRow(
                window.fault,
                window.kind,
                _ms(window.injected, window.detected),
                longest_stall_ms(records, begin, end),
                _ms(window.lifted, window.recovered),
                max((error for at, error in errors if begin <= at < end), default=0.0),
                found,
            )
        )
    quiet = [
        longest_stall_ms(records, window.quiet_from, end, whole=True)
        for window, end in zip(windows, [*starts[1:], float("inf")], strict=True)
    ]
    return RunResult(rows, violations, max(quiet, default=0.0))


def longest_stall_ms(
    records: Iterable[ConnectionRecord], begin: float, end: float, *, whole: bool = False
) -> float:
    """The longest wait for a reply that arrived between ``begin`` and ``end``.

    Args:
        records: of all connections.
        begin: start of the time.
        end: end of the time.
        whole: count only commands that were also sent in this time.
    """
    waits = (
        command.answered - command.sent
        for record in records
        for command in record.commands
        if command.answer is not None
        and begin <= command.answered < end
        and (command.sent >= begin or not whole)
    )
    return max(waits, default=0.0) * 1000


def position_at(transport: JsonTransport, instant: float) -> float:
    """The song's position at an instant of the session clock, by the clients' formula."""
    upcoming = transport["next"]
    if upcoming is not None and instant >= upcoming["anchorTime"]:
        transport = upcoming
    elapsed = instant - transport["anchorTime"] if transport["isPlaying"] else 0.0
    return float(transport["positionMs"]) + elapsed


def versions(record: ConnectionRecord) -> Iterator[Violation]:
    """Each event must have the next version, unless a snapshot comes between."""
    version = epoch = None
    for at, message in record.received:
        kind = message["type"]
        if kind == "snapshot":
            if epoch == message["epoch"] and version is not None and message["version"] < version:
                yield _out_of_order(record, at, f"snapshot {message['version']} after {version}")
            version, epoch = message["version"], message["epoch"]
        elif kind in EVENTS:
            if version is None or message["version"] != version + 1:
                yield _out_of_order(record, at, f"{kind} {message['version']} after {version}")
            version = message["version"]


def _out_of_order(record: ConnectionRecord, at: float, text: str) -> Violation:
    return Violation("version", at, f"{record.session}/{record.name}: {text}")


def _answers(record: ConnectionRecord) -> Iterator[Violation]:
    """Each command must be answered and not refused, and its version must be received."""
    seen = {m["version"] for _, m in record.received if m["type"] in EVENTS}
    snapshot = max((m["version"] for _, m in record.received if m["type"] == "snapshot"), default=0)
    for command in record.commands:
        where = f"{record.session}/{record.name}: {command.type}"
        if command.answer is None:
            yield Violation("ack", command.sent, f"{where} was never answered")
        elif not command.acked:
            text = f"{where} was refused: {command.answer['code']} {command.answer['message']}"
            yield Violation("refusal", command.answered, text)
        elif "version" in command.answer and command.type not in {"join_session", "leave_session"}:
            version = command.answer["version"]
            if version not in seen and version > snapshot:
                yield Violation(
                    "ack", command.answered, f"{where}: no connection received version {version}"
                )


def _connection(record: ConnectionRecord) -> Iterator[Violation]:
    if record.closed is not None:
        at, code = record.closed
        yield Violation("connection", at, f"{record.session}/{record.name}: closed with {code}")


def _replica_errors(record: ConnectionRecord) -> Iterator[Violation]:
    for at, text in record.replica_errors:
        yield Violation("state", at, f"{record.session}/{record.name}: {text}")


def _positions(record: ConnectionRecord) -> Iterator[tuple[float, float]]:
    """Position errors of ticks and snapshots against the transport announced before, ms."""
    known: JsonTransport | None = None
    for at, message in record.received:
        if known is not None and message["type"] == "scroll_tick":
            yield at, abs(message["positionMs"] - position_at(known, message["serverTime"]))
        if (transport := message.get("transport")) is None:
            continue
        if known is not None and message["type"] in {"snapshot", "sync_response"}:
            now = message["serverTime"]
            yield at, abs(position_at(transport, now) - position_at(known, now))
        known = transport


def _clock(record: ConnectionRecord) -> Iterator[tuple[float, float]]:
    """Differences of two estimates of the session clock beyond the error of their round trips, ms.

    A step of that clock makes the music jump on clients that calculate, though no tick shows it.
    """
    recent: deque[ClockSample] = deque()
    for sample in record.clock:
        while recent and sample.at - recent[0].at > _CLOCK_MEMORY_S:
            recent.popleft()
        if recent:
            best = min(recent, key=lambda earlier: earlier.round_trip_ms)
            unsure = (sample.round_trip_ms + best.round_trip_ms) / 2
            yield sample.at, max(0.0, abs(sample.offset_ms - best.offset_ms) - unsure)
        recent.append(sample)


def _state(final: FinalState, records: Sequence[ConnectionRecord]) -> Iterator[Violation]:
    """Every acknowledged change must be in the final state, or overwritten by a later one."""
    at = float("inf")
    (first, state), *others = final.snapshots.items()
    for name, other in [*others, *([("Redis", final.stored)] if final.stored else [])]:
        for part, ours in agreed_state(state).items():
            if part in (theirs := agreed_state(other)) and theirs[part] != ours:
                text = f"{final.session}: {part}: {first} has {ours}, {name} has {theirs[part]}"
                yield Violation("state", at, text)
    members = {member["memberId"] for member in state["members"]}
    if members != final.members:
        yield Violation("state", at, f"{final.session}: members {members}, not {final.members}")
    commands = sorted((a for r in records for a in r.commands), key=lambda command: command.sent)
    received = [message for record in records for _, message in record.received]
    yield from _last_writes(final.session, state, commands, received)
    yield from _chats(final.session, state, commands, received)


def _last_writes(
    session: str,
    state: JsonMessage,
    commands: Sequence[CommandRecord],
    received: Sequence[JsonMessage],
) -> Iterator[Violation]:
    """Headline, transport and leader must be those of the last acknowledged write."""
    transports = {
        message["version"]: message["transport"]
        for message in received
        if "transport" in message and _is_event(message)
    }
    finals: tuple[tuple[str, frozenset[str], object], ...] = (
        ("message", frozenset({"update_message"}), state["message"]),
        ("transport", _TRANSPORT_COMMANDS, state["transport"]),
        ("leaderId", frozenset({"set_role"}), state["leaderId"]),
    )
    for name, types, value in finals:
        writes = [command for command in commands if command.type in types]
        acked = [write for write in writes if write.acked and "version" in (write.answer or {})]
        if not acked:
            continue
        last_acked = acked[-1]
        assert last_acked.answer is not None
        # A later write without a reply may have been carried out or not: both are right.
        unanswered = [
            write for write in writes if write.answer is None and write.sent > last_acked.sent
        ]
        right: list[object]
        match name:
            case "message":
                right = [write.fields["message"] for write in (last_acked, *unanswered)]
            case "leaderId":
                right = [write.fields["memberId"] for write in (last_acked, *unanswered)]
            case _:
                right = [value if unanswered else transports.get(last_acked.answer["version"])]
        if value not in right:
            text = f"{session}: {name} is {value}, acknowledged was {right[0]}"
            yield Violation("ack", last_acked.answered, text)


def _is_event(message: JsonMessage) -> bool:
    return message["type"] in EVENTS


def _chats(
    session: str,
    state: JsonMessage,
    commands: Sequence[CommandRecord],
    received: Sequence[JsonMessage],
) -> Iterator[Violation]:
    """An acknowledged chat message must be in the ring, or be followed by a full ring."""
    ring = {chat["text"] for chat in state["chat"]}
    oldest = min(((chat["sentAt"], chat["messageId"]) for chat in state["chat"]), default=None)
    full = len(state["chat"]) >= CHAT_RING
    sent = {
        m["text"]: (m["sentAt"], m["messageId"]) for m in received if m["type"] == "chat_message"
    }
    for command in commands:
        if command.type != "chat_message" or not command.acked or command.fields["text"] in ring:
            continue
        place = sent.get(str(command.fields["text"]))
        if place is None or not full or oldest is None or place > oldest:
            text = f"{session}: chat {command.fields['text']!r} was acknowledged and is gone"
            yield Violation("ack", command.answered, text)


def _ms(begin: float | None, end: float | None) -> float | None:
    if begin is None or end is None:
        return None
    return max(0.0, end - begin) * 1000
