"""The judge of a run with several servers: every violation in records and traces. No I/O."""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scripts.chaos.cluster_records import (
    GRACE_S,
    PATIENCE_S,
    Registers,
    ResumeAttempt,
    RoamingRecord,
    ServerRun,
)
from scripts.chaos.judge import Violation, versions
from scripts.chaos.records import CHAT_RING, CommandRecord, agreed_state
from scripts.chaos.trace import CommitTraces, RegisterName, sort_key
from scripts.testbed.json_messages import JsonChat, JsonMessage

# A conflict: other servers were faster on every attempt. The statistics count them.
_RIGHTLY_REFUSED = frozenset({"not_leader", "leader_present", "not_member", "conflict"})
# Error of the recorded times of a kill, and of the beginning and end of a suspension.
_TIME_ERROR_S = 0.25
# Other servers may sweep the members of a server that was isolated within this time.
_ISOLATION_S = 35.0
# Delay of an event on its way to another client.
_LATE_S = 1.0
# After a loss of data, the hosting servers have put a session back within this time.
_PUT_BACK_S = 6.0
# A server that was suspended for long applies the missed changes within this time.
_AFTER_PAUSE_S = 2.0


@dataclass
class ClusterFinalState:
    """A session at the end.

    Attributes:
        session: its id.
        snapshots: by the name of the member who received it.
        stored: the session in Redis, in the form of a snapshot.
        registers: ranks and stamps in Redis.
        members: names of the members that should be present, by id.
    """

    session: str
    snapshots: dict[str, JsonMessage]
    stored: JsonMessage
    registers: Registers
    members: dict[str, str]


def disagreements(final: ClusterFinalState) -> list[str]:
    """All parts in which the snapshots and Redis differ, or are wrong."""
    found = []
    (first, state), *others = [*final.snapshots.items(), ("Redis", final.stored)]
    own = agreed_state(state)
    for name, other in others:
        others_state = agreed_state(other)
        for part, value in own.items():
            if part == "leaderId":
                same = (value or "") == (others_state[part] or "")
            else:
                same = value == others_state[part]
            if not same:
                found.append(f"{part}: {first} has {value}, {name} has {others_state[part]}")
    listed = [member["memberId"] for member in final.stored["members"]]
    if sorted(listed) != sorted(final.members):
        found.append(f"members are {listed}, not {final.members}")
    found += [f"{m['displayName']} is disconnected" for m in state["members"] if not m["connected"]]
    leaders = [member for member in state["members"] if member["role"] == "leader"]
    if len(leaders) != 1 and len(state["members"]) > 1:
        found.append(f"leaders are {leaders}")
    return [f"{final.session}: {text}" for text in found]


def judge_connections(
    records: Sequence[RoamingRecord], traces: CommitTraces, end: float
) -> Iterator[Violation]:
    """Violations on single connections: versions, replicas, replies, close codes.

    Args:
        records: of all connections.
        end: a time after a long rest.
    """
    for record in records:
        where = _name_of(record)
        yield from versions(record)
        for at, text in record.replica_errors:
            yield Violation("state", at, f"{where}: {text}")
        for command in record.commands:
            error = _reply_error(record, command, end)
            if error is not None:
                yield Violation("ack", command.sent, f"{where}: {command.type} {error}")
        error = _close_error(record, end)
        if error is not None:
            at = record.closed[0] if record.closed else end
            yield Violation("connection", at, f"{where}: {error}")


def judge_resumes(
    resumes: Iterable[ResumeAttempt],
    data_losses: Sequence[float],
    removals: Mapping[str, float],
    traces: CommitTraces,
) -> Iterator[Violation]:
    """A member who resumes within the grace, with a stored token, must be the same member again.

    Args:
        resumes: all answered attempts.
        data_losses: times at which Redis lost data.
        removals: see `removed`.
        traces: of all servers.
    """
    for attempt in resumes:
        if not attempt.resumed and excuse(attempt, data_losses, removals, traces) is None:
            late_s = attempt.command.answered - attempt.last_seen
            text = f"{_name_of(attempt.after)}: not resumed {late_s:.2f} s after"
            before = f"{_name_of(attempt.before)}: {attempt.before.member_id}"
            yield Violation("state", attempt.command.sent, f"{text} {before}")


def excuse(
    attempt: ResumeAttempt,
    data_losses: Sequence[float],
    removals: Mapping[str, float],
    traces: CommitTraces,
) -> str | None:
    """Why a member was legitimately not resumed; None if that was a violation."""
    sent, before = attempt.command.sent, attempt.before
    if attempt.command.answered - attempt.last_seen > GRACE_S - _TIME_ERROR_S:
        return "late"
    if traces.joined_in_memory(before, sent):
        return "joined in memory"
    answer = attempt.command.answer or {}
    entry = traces.commit_of(attempt.after, answer["version"], attempt.command.answered)
    if entry is not None and entry["storage"] == "memory":
        return "server in memory mode"
    if any(0 <= sent - at <= _PUT_BACK_S for at in data_losses):
        return "data lost"
    if removals.get(before.member_id, float("inf")) < attempt.command.answered:
        return "removed before"
    return None


def removed(records: Sequence[RoamingRecord], traces: CommitTraces) -> dict[str, float]:
    """Members removed by a server, and when, as received from servers with Redis."""
    return {
        message["memberId"]: at
        for at, message in _received_from_informed_servers(records, traces, "user_left")
        if message["reason"] in {"timeout", "server_lost"}
    }


def judge_removals(records: Sequence[RoamingRecord], traces: CommitTraces) -> Iterator[Violation]:
    """A member who is connected, or in the grace, must not be removed or shown as disconnected.

    Args:
        records: of one session.
        traces: of all servers.
    """
    removals = [
        (member, at, GRACE_S - _TIME_ERROR_S) for member, at in removed(records, traces).items()
    ]
    away = [
        (message["memberId"], at, -_TIME_ERROR_S)
        for at, message in _received_from_informed_servers(records, traces, "member_connection")
        if not message["connected"]
    ]
    for member, at, allowed_s in (*removals, *away):
        for record in records:
            if record.member_id != member or record.abandoned < at:
                continue
            joined = next(
                (at for at, m in record.received if m["type"] == "snapshot"), float("inf")
            )
            ended = min(record.left, record.closed[0] if record.closed else float("inf"))
            if joined > at - _LATE_S or ended < at - allowed_s or _isolated(record, at, traces):
                continue
            change = "shown as disconnected" if allowed_s < 0 else "removed"
            text = f"{member} was {change}, connected from {joined:.2f} to {ended:.2f}"
            yield Violation("state", at, f"{_name_of(record)}: {text}")


def _received_from_informed_servers(
    records: Sequence[RoamingRecord], traces: CommitTraces, kind: str
) -> Iterator[tuple[float, JsonMessage]]:
    for record in records:
        for at, message in record.received:
            if message["type"] == kind and not _isolated(record, at, traces):
                yield at, message


def _isolated(record: RoamingRecord, at: float, traces: CommitTraces) -> bool:
    """Whether this connection's server was suspended or without Redis shortly before."""
    since = at - _ISOLATION_S
    return record.server_run.suspended(since, at) or traces.in_memory(record, since, at)


def judge_mirrors(runs: Iterable[ServerRun], traces: CommitTraces) -> Iterator[Violation]:
    """A register must never go back to an older rank or stamp in a server's mirror."""
    for server_run in runs:
        for before, now in traces.mirrors(server_run):
            for name in _REGISTERS:
                if sort_key(now, name) < sort_key(before, name):
                    text = f"{before['session']}: {name} of {server_run.server} went back at"
                    yield Violation(
                        "state", traces.local_time(now), f"{text} {now['version']}: {before} {now}"
                    )


def judge_acked_changes(
    records: Sequence[RoamingRecord], final: ClusterFinalState, traces: CommitTraces
) -> Iterator[Violation]:
    """Every acknowledged change must be in the final state, or overwritten by a later one."""
    sent = {
        chat["text"]: (chat["sentAt"], chat["messageId"])
        for record in records
        for _, message in record.received
        for chat in _chats(message)
    }
    ring = {chat["messageId"] for chat in final.stored["chat"]}
    oldest = min(sent[text] for text in sent if sent[text][1] in ring) if ring else None
    for record in records:
        for command in record.commands:
            if not command.acked or command.answer is None:
                continue
            where = f"{_name_of(record)}: {command.type} {command.fields}"
            if command.type == "chat_message":
                place = sent.get(str(command.fields["text"]))
                if place is not None and (
                    place[1] in ring
                    or (oldest is not None and len(ring) >= CHAT_RING and place < oldest)
                ):
                    continue
                entry = None if place is None else traces.commit_of_chat(record, place[1])
                if entry is None and "version" in command.answer:
                    entry = traces.commit_of(record, command.answer["version"], command.answered)
                if entry is None or not traces.lost_with_process(record, entry):
                    yield Violation("ack", command.answered, f"{where} is gone: {place} {entry}")
            elif "version" in command.answer and command.type in _REGISTER_OF:
                register = _REGISTER_OF[command.type]
                entry = traces.commit_of(record, command.answer["version"], command.answered)
                if entry is None:
                    yield Violation("ack", command.answered, f"{where} was not committed")
                    continue
                written, last = sort_key(entry, register), sort_key(final.registers, register)
                lost = written > last
                if register == "message" and written == last:
                    lost = final.stored["message"] != command.fields["message"]
                if lost and not traces.lost_with_process(record, entry):
                    text = f"{where} was lost: {entry['storage']} {written} > {last}"
                    yield Violation("ack", command.answered, text)


_REGISTER_OF: dict[str, RegisterName] = {
    **dict.fromkeys(("play", "pause", "stop", "seek", "set_tempo"), "transport"),
    "update_message": "message",
    "set_role": "leader",
}
_REGISTERS: tuple[RegisterName, ...] = ("leader", "transport", "message")


def _chats(message: JsonMessage) -> Sequence[JsonChat]:
    if message["type"] == "chat_message":
        return [
            JsonChat(messageId=message["messageId"], text=message["text"], sentAt=message["sentAt"])
        ]
    return message["chat"] if message["type"] == "snapshot" else []


def _name_of(record: RoamingRecord) -> str:
    return f"{record.session}/{record.name}@{record.server_run.server} since {record.opened:.2f}"


def _reply_error(record: RoamingRecord, command: CommandRecord, end: float) -> str | None:
    """The error of a reply to a command; None if it is right."""
    if command.answer is None or command.answered - command.sent > PATIENCE_S:
        until = command.sent + PATIENCE_S
        ended = min(record.left, record.closed[0] if record.closed else end)
        if ended <= until or record.server_run.suspended(command.sent - _TIME_ERROR_S, until):
            return None
        return f"was not answered for {min(command.answered, ended) - command.sent:.1f} s"
    if command.acked:
        return None
    code = command.answer["code"]
    if code in _RIGHTLY_REFUSED:
        return None
    if code == "not_joined" and (
        record.abandoned < command.answered
        or record.server_run.suspended(command.answered - _AFTER_PAUSE_S, command.answered)
    ):
        return None
    return f"was refused: {code} {command.answer['message']}"


def _close_error(record: RoamingRecord, end: float) -> str | None:
    """The error of the end of a connection; None if it is right."""
    if record.closed is None:
        if record.left == float("inf") and record.superseded < end:
            return "is still open, although its member resumed elsewhere"
        return None
    at, code = record.closed
    server_run: ServerRun = record.server_run
    if at >= server_run.ended - _TIME_ERROR_S:
        if server_run.end_signal == signal.SIGKILL or (
            code == 1012 and server_run.end_signal == signal.SIGTERM
        ):
            return None
        # Not welcomed yet, or closed by the end of the process after a suspension.
        if server_run.end_signal == signal.SIGTERM and not record.received:
            return None
    if code == 4001 and record.abandoned <= at:
        return None
    return f"was closed with {code}"
