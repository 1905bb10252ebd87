"""What chaos.py measures: the records of the musicians, and the verdict over them. No I/O.

Times are seconds on the clock of the musicians' process, unless a name says `_ms`.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
Kind = Literal["ack", "connection", "version", "refusal", "state"]

CHAT_RING = 50
# Longer ago, the clock may have been slewed rightly, as that of Redis was.
_CLOCK_MEMORY_S = 15.0
# Each makes a version; the others in `protocol.md` section 4 are private, volatile or answers.
EVENTS = frozenset(
    {
        *("user_joined", "user_left", "member_connection", "role_changed", "message_updated"),
        *("play", "pause", "stop", "seek", "tempo_changed", "position_sync", "chat_message"),
    }
)
_TRANSPORT_COMMANDS = frozenset({"play", "pause", "stop", "seek", "set_tempo"})


@dataclass
class Asked:
    """A command and what became of it; ``answer`` is None while there is none."""

    type: str
    fields: Message
    sent: float
    answered: float = float("inf")
    answer: Message | None = None

    @property
    def acked(self) -> bool:
        """Whether it was carried out."""
        return self.answer is not None and self.answer["type"] == "ack"


@dataclass
class ClockSample:
    """One `clock_sync` exchange: how far the session clock is ahead of ours."""

    at: float
    offset_ms: float
    round_trip_ms: float


@dataclass
class Record:
    """All that one connection saw.

    Attributes:
        heard: every message, with its arrival.
        closed: when the server ended it, and the close code; None if it did not.
        wrong: what the client made of what it heard, where that was not what the server had.
    """

    session: str
    name: str
    heard: list[tuple[float, Message]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    clock: list[ClockSample] = field(default_factory=list)
    closed: tuple[float, int] | None = None
    wrong: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Window:
    """One fault; the first of a run is the time before all faults, named ``none``.

    Attributes:
        kind: what the operator may expect: an ``end`` is seen at once, ``silence`` only after a
            deadline, ``other`` promises no time.
        quiet_from: everything is as without a fault again.
    """

    fault: str
    kind: Literal["none", "end", "silence", "other"]
    injected: float
    detected: float | None = None
    lifted: float | None = None
    recovered: float | None = None
    quiet_from: float = float("inf")


@dataclass
class Final:
    """A session at the end.

    Attributes:
        snapshots: by whom it was asked for; a fresh joiner among them.
        stored: the same in Redis, as a snapshot has it; None to leave that out.
        members: ids of those who are there.
    """

    session: str
    snapshots: dict[str, Message]
    stored: Message | None
    members: set[str]


@dataclass
class Finding:
    """Something that must not be."""

    kind: Kind
    at: float
    text: str


@dataclass
class Row:
    """A line of the table; None where there was nothing to measure."""

    fault: str
    kind: str
    detection_ms: float | None
    stall_ms: float
    recovery_ms: float | None
    position_error_ms: float
    found: dict[Kind, int]


@dataclass
class Verdict:
    """All rows, what is wrong, and the longest stall while all was well."""

    rows: list[Row]
    findings: list[Finding]
    quiet_stall_ms: float


def judge(records: Sequence[Record], windows: Sequence[Window], finals: Sequence[Final]) -> Verdict:
    """Everything that was lost, and how long things took."""
    findings = [
        finding
        for record in records
        for finding in (
            *versions(record),
            *_answers(record),
            *_connection(record),
            *_wrong(record),
        )
    ]
    for final in finals:
        findings += _state(final, [r for r in records if r.session == final.session])
    findings.sort(key=lambda finding: finding.at)
    errors = [error for record in records for error in (*_positions(record), *_clock(record))]
    starts = [window.injected for window in windows]
    rows = []
    for number, window in enumerate(windows):
        begin = window.injected
        end = starts[number + 1] if number + 1 < len(starts) else float("inf")
        found: dict[Kind, int] = {}
        for finding in findings:
            if max(bisect_right(starts, finding.at) - 1, 0) == number:
                found[finding.kind] = found.get(finding.kind, 0) + 1
        rows.append(
            Row(
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
    return Verdict(rows, findings, max(quiet, default=0.0))


def longest_stall_ms(
    records: Iterable[Record], begin: float, end: float, *, whole: bool = False
) -> float:
    """The longest wait for an answer that came in this time.

    Args:
        whole: of the commands that were sent in this time, too.
    """
    waits = (
        asked.answered - asked.sent
        for record in records
        for asked in record.asked
        if asked.answer is not None
        and begin <= asked.answered < end
        and (asked.sent >= begin or not whole)
    )
    return max(waits, default=0.0) * 1000


def position_at(transport: Message, instant: float) -> float:
    """Where the song is at an instant of the session clock: the formula that clients are given."""
    upcoming = transport["next"]
    if upcoming is not None and instant >= upcoming["anchorTime"]:
        transport = upcoming
    elapsed = instant - transport["anchorTime"] if transport["isPlaying"] else 0.0
    return float(transport["positionMs"]) + elapsed


def versions(record: Record) -> Iterator[Finding]:
    """Each event must make the next version, unless a snapshot comes between."""
    version = epoch = None
    for at, message in record.heard:
        kind = message["type"]
        if kind == "snapshot":
            if epoch == message["epoch"] and version is not None and message["version"] < version:
                yield _out_of_order(record, at, f"snapshot {message['version']} after {version}")
            version, epoch = message["version"], message["epoch"]
        elif kind in EVENTS:
            if version is None or message["version"] != version + 1:
                yield _out_of_order(record, at, f"{kind} {message['version']} after {version}")
            version = message["version"]


def _out_of_order(record: Record, at: float, text: str) -> Finding:
    return Finding("version", at, f"{record.session}/{record.name}: {text}")


def _answers(record: Record) -> Iterator[Finding]:
    """Each command must be answered, not refused, and its acknowledged versions seen."""
    seen = {m["version"] for _, m in record.heard if m["type"] in EVENTS}
    snapshot = max((m["version"] for _, m in record.heard if m["type"] == "snapshot"), default=0)
    for asked in record.asked:
        where = f"{record.session}/{record.name}: {asked.type}"
        if asked.answer is None:
            yield Finding("ack", asked.sent, f"{where} was never answered")
        elif not asked.acked:
            text = f"{where} was refused: {asked.answer['code']} {asked.answer['message']}"
            yield Finding("refusal", asked.answered, text)
        elif "version" in asked.answer and asked.type not in {"join_session", "leave_session"}:
            version = asked.answer["version"]
            if version not in seen and version > snapshot:
                yield Finding("ack", asked.answered, f"{where}: nobody heard of version {version}")


def _connection(record: Record) -> Iterator[Finding]:
    if record.closed is not None:
        at, code = record.closed
        yield Finding("connection", at, f"{record.session}/{record.name}: closed with {code}")


def _wrong(record: Record) -> Iterator[Finding]:
    for at, text in record.wrong:
        yield Finding("state", at, f"{record.session}/{record.name}: {text}")


def _positions(record: Record) -> Iterator[tuple[float, float]]:
    """How far ticks and snapshots are off the line of the last transport that was announced."""
    line: Message | None = None
    for at, message in record.heard:
        if line is not None and message["type"] == "scroll_tick":
            yield at, abs(message["positionMs"] - position_at(line, message["serverTime"]))
        if (transport := message.get("transport")) is None:
            continue
        if line is not None and message["type"] in {"snapshot", "sync_response"}:
            now = message["serverTime"]
            yield at, abs(position_at(transport, now) - position_at(line, now))
        line = transport


def _clock(record: Record) -> Iterator[tuple[float, float]]:
    """By how much more than their round trips explain two estimates of the session clock differ.

    A step of that clock is a jump of the music for all who calculate, though no tick shows it.
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


def _state(final: Final, records: Sequence[Record]) -> Iterator[Finding]:
    """Every acknowledged change must be in the final state, or overwritten by a later one."""
    at = float("inf")
    (first, state), *others = final.snapshots.items()
    for name, other in [*others, *([("Redis", final.stored)] if final.stored else [])]:
        for part, ours in essence(state).items():
            if part in (theirs := essence(other)) and theirs[part] != ours:
                text = f"{final.session}: {part}: {first} has {ours}, {name} has {theirs[part]}"
                yield Finding("state", at, text)
    members = {member["memberId"] for member in state["members"]}
    if members != final.members:
        yield Finding("state", at, f"{final.session}: members {members}, not {final.members}")
    commands = sorted((a for r in records for a in r.asked), key=lambda asked: asked.sent)
    heard = [message for record in records for _, message in record.heard]
    yield from _last_writes(final.session, state, commands, heard)
    yield from _chats(final.session, state, commands, heard)


def essence(snapshot: Message) -> dict[str, object]:
    """What all must agree on, of a snapshot."""
    members = [
        (member["memberId"], member["displayName"], member["role"], member["connected"])
        for member in snapshot["members"]
    ]
    return {
        "members": sorted(members),
        "chat": [chat["messageId"] for chat in snapshot["chat"]],
        **{
            name: snapshot[name]
            for name in ("epoch", "version", "message", "transport", "leaderId")
            if name in snapshot
        },
    }


def _last_writes(
    session: str, state: Message, commands: Sequence[Asked], heard: Sequence[Message]
) -> Iterator[Finding]:
    """Headline, transport and leader must be those of the last write that was acknowledged."""
    transports = {m["version"]: m["transport"] for m in heard if "transport" in m and _is_event(m)}
    for name, types in (
        ("message", {"update_message"}),
        ("transport", _TRANSPORT_COMMANDS),
        ("leaderId", {"set_role"}),
    ):
        writes = [asked for asked in commands if asked.type in types]
        acked = [asked for asked in writes if asked.acked and "version" in (asked.answer or {})]
        if not acked:
            continue
        last = acked[-1]
        assert last.answer is not None
        # Without an answer it may have been carried out or not: both are right.
        open_ = [asked for asked in writes if asked.answer is None and asked.sent > last.sent]
        match name:
            case "message":
                right = [asked.fields["message"] for asked in (last, *open_)]
            case "leaderId":
                right = [asked.fields["memberId"] for asked in (last, *open_)]
            case _:
                right = [state[name] if open_ else transports.get(last.answer["version"])]
        if state[name] not in right:
            text = f"{session}: {name} is {state[name]}, acknowledged was {right[0]}"
            yield Finding("ack", last.answered, text)


def _is_event(message: Message) -> bool:
    return message["type"] in EVENTS


def _chats(
    session: str, state: Message, commands: Sequence[Asked], heard: Sequence[Message]
) -> Iterator[Finding]:
    """An acknowledged chat message must be in the ring, or as many later ones as it holds."""
    ring = {chat["text"] for chat in state["chat"]}
    oldest = min(((chat["sentAt"], chat["messageId"]) for chat in state["chat"]), default=None)
    full = len(state["chat"]) >= CHAT_RING
    sent = {m["text"]: (m["sentAt"], m["messageId"]) for m in heard if m["type"] == "chat_message"}
    for asked in commands:
        if asked.type != "chat_message" or not asked.acked or asked.fields["text"] in ring:
            continue
        place = sent.get(asked.fields["text"])
        if place is None or not full or oldest is None or place > oldest:
            text = f"{session}: chat {asked.fields['text']!r} was acknowledged and is gone"
            yield Finding("ack", asked.answered, text)


def _ms(begin: float | None, end: float | None) -> float | None:
    if begin is None or end is None:
        return None
    return max(0.0, end - begin) * 1000
