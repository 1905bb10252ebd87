"""The verdict of `chaos.py --servers`: what must not be, in what musicians and servers saw."""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scripts.chaos.judge import CHAT_RING, Asked, Finding, Message, essence, versions
from scripts.chaos.roaming import PATIENCE_S, Line, Return
from scripts.chaos.servers import GRACE_S, Life
from scripts.chaos.trace import Entry, Traces, stamp

_TRANSPORT = frozenset({"play", "pause", "stop", "seek", "set_tempo"})
# A conflict: the others were faster, again and again. The figures show how many there were.
_RIGHTLY_REFUSED = frozenset({"not_leader", "leader_present", "not_member", "conflict"})
# A process that is killed is seen to be, and a pause to begin and end, a little earlier or later.
_FUZZ_S = 0.25
# Out of sight of the others for so long, a server may find its members swept.
_SIGHT_S = 35.0
# What others hear may be late by a little.
_LATE_S = 1.0
# After a loss of data: until those who host a session have put it back.
_PUT_BACK_S = 6.0
# Who was paused for long finds out what it missed after it has gone on.
_AFTER_PAUSE_S = 2.0


@dataclass
class Ending:
    """A session at the end.

    Attributes:
        snapshots: by whom it was asked for.
        stored: the same in Redis.
        head: the registers in Redis, with their stamps.
        members: who is there, by id.
    """

    session: str
    snapshots: dict[str, Message]
    stored: Message
    head: Entry
    members: dict[str, str]


def disagreements(ending: Ending) -> list[str]:
    """In what the parties do not agree, or are not right."""
    found = []
    (first, state), *others = [*ending.snapshots.items(), ("Redis", ending.stored)]
    ours = essence(state)
    for name, other in others:
        theirs = essence(other)
        for part, value in ours.items():
            if part == "leaderId":
                same = (value or "") == (theirs[part] or "")
            else:
                same = value == theirs[part]
            if not same:
                found.append(f"{part}: {first} has {value}, {name} has {theirs[part]}")
    listed = [member["memberId"] for member in ending.stored["members"]]
    if sorted(listed) != sorted(ending.members):
        found.append(f"members are {listed}, not {ending.members}")
    found += [f"{m['displayName']} is away" for m in state["members"] if not m["connected"]]
    leaders = [member for member in state["members"] if member["role"] == "leader"]
    if len(leaders) != 1 and len(state["members"]) > 1:
        found.append(f"led by {leaders}")
    return [f"{ending.session}: {text}" for text in found]


def judge_lines(lines: Sequence[Line], traces: Traces, end: float) -> Iterator[Finding]:
    """What is wrong with single connections.

    Args:
        end: when everything had been calm for long.
    """
    for line in lines:
        where = _where(line)
        yield from versions(line)
        for at, text in line.faults:
            yield Finding("state", at, f"{where}: {text}")
        for asked in line.asked:
            text = _answer(line, asked, end)
            if text is not None:
                yield Finding("ack", asked.sent, f"{where}: {asked.type} {text}")
        wrong = _closing(line, end)
        if wrong is not None:
            yield Finding("connection", line.closed[0] if line.closed else end, f"{where}: {wrong}")


def judge_returns(
    returns: Iterable[Return], wiped: Sequence[float], gone: Mapping[str, float], traces: Traces
) -> Iterator[Finding]:
    """Whoever comes back in time, with a token that could be known, is the same member again.

    Args:
        wiped: when Redis lost data.
        gone: see `removed`.
    """
    for back in returns:
        if not back.resumed and excuse(back, wiped, gone, traces) is None:
            late_s = back.asked.answered - back.away
            text = f"{_where(back.new)}: not resumed {late_s:.2f} s after {_where(back.old)}"
            yield Finding("state", back.asked.sent, f"{text}: {back.old.member_id}")


def excuse(
    back: Return, wiped: Sequence[float], gone: Mapping[str, float], traces: Traces
) -> str | None:
    """Why somebody was rightly not resumed; None if that was wrong."""
    sent, old = back.asked.sent, back.old
    if back.asked.answered - back.away > GRACE_S - _FUZZ_S:
        return "late"
    if traces.bound_in_memory(old, sent):
        return "bound in memory"
    entry = traces.find(back.new, (back.asked.answer or {})["version"], back.asked.answered)
    if entry is not None and entry["storage"] == "memory":
        return "to a server in memory mode"
    if any(0 <= sent - at <= _PUT_BACK_S for at in wiped):
        return "data lost"
    if gone.get(old.member_id, float("inf")) < back.asked.answered:
        return "removed before"
    return None


def removed(lines: Sequence[Line], traces: Traces) -> dict[str, float]:
    """Who was removed by others, and when, as those heard whose server was on Redis."""
    return {
        message["memberId"]: at
        for at, message in _heard_of_others(lines, traces, "user_left")
        if message["reason"] in {"timeout", "server_lost"}
    }


def judge_removals(lines: Sequence[Line], traces: Traces) -> Iterator[Finding]:
    """Nobody is removed who is connected, or in its grace; nor shown as away while connected.

    Args:
        lines: of one session.
    """
    gone = [(member, at, GRACE_S - _FUZZ_S) for member, at in removed(lines, traces).items()]
    away = [
        (message["memberId"], at, -_FUZZ_S)
        for at, message in _heard_of_others(lines, traces, "member_connection")
        if not message["connected"]
    ]
    for member, at, allowed_s in (*gone, *away):
        for line in lines:
            if line.member_id != member or line.deserted < at:
                continue
            joined = next((at for at, m in line.heard if m["type"] == "snapshot"), float("inf"))
            over = min(line.left, line.closed[0] if line.closed else float("inf"))
            if joined > at - _LATE_S or over < at - allowed_s or _out_of_sight(line, at, traces):
                continue
            text = "away" if allowed_s < 0 else "removed"
            text = f"{member} was {text}, connected from {joined:.2f} to {over:.2f}"
            yield Finding("state", at, f"{_where(line)}: {text}")


def _heard_of_others(
    lines: Sequence[Line], traces: Traces, kind: str
) -> Iterator[tuple[float, Message]]:
    for line in lines:
        for at, message in line.heard:
            if message["type"] == kind and not _out_of_sight(line, at, traces):
                yield at, message


def _out_of_sight(line: Line, at: float, traces: Traces) -> bool:
    """Whether the server of this connection was, recently, for the others."""
    since = at - _SIGHT_S
    return line.life.paused(since, at) or traces.in_memory(line, since, at)


def judge_mirrors(lives: Iterable[Life], traces: Traces) -> Iterator[Finding]:
    """What a server knows of a register or a member never gets older, all the way."""
    for life in lives:
        for before, now in traces.mirrors(life):
            for name in ("leader", "transport", "message"):
                if _stamp(now, name) < _stamp(before, name):
                    text = f"{before['session']}: {name} of {life.server} went back at"
                    yield Finding(
                        "state", traces.when(now), f"{text} {now['version']}: {before} {now}"
                    )


def judge_changes(lines: Sequence[Line], ending: Ending, traces: Traces) -> Iterator[Finding]:
    """Every acknowledged change must be in the final state, or overwritten by a later one."""
    head = ending.head
    texts = {
        chat["text"]: (chat["sentAt"], chat["messageId"])
        for line in lines
        for _, message in line.heard
        for chat in _chats(message)
    }
    ring = {chat["messageId"] for chat in ending.stored["chat"]}
    oldest = min(texts[text] for text in texts if texts[text][1] in ring) if ring else None
    for line in lines:
        for asked in line.asked:
            if not asked.acked or asked.answer is None:
                continue
            where = f"{_where(line)}: {asked.type} {asked.fields}"
            if asked.type == "chat_message":
                place = texts.get(str(asked.fields["text"]))
                if place is not None and (
                    place[1] in ring
                    or (oldest is not None and len(ring) >= CHAT_RING and place < oldest)
                ):
                    continue
                entry = None if place is None else traces.told(line, place[1])
                if entry is None and "version" in asked.answer:
                    entry = traces.find(line, asked.answer["version"], asked.answered)
                if entry is None or not traces.exposed(line, entry):
                    yield Finding("ack", asked.answered, f"{where} is gone: {place} {entry}")
            elif "version" in asked.answer and asked.type in _registers:
                register, final = _registers[asked.type], head
                entry = traces.find(line, asked.answer["version"], asked.answered)
                if entry is None:
                    yield Finding("ack", asked.answered, f"{where} was not committed")
                    continue
                mine, last = _stamp(entry, register), _stamp(final, register)
                lost = mine > last
                if register == "message" and mine == last:
                    lost = ending.stored["message"] != asked.fields["message"]
                if lost and not traces.exposed(line, entry):
                    text = f"{where} was lost: {entry['storage']} {mine} > {last}"
                    yield Finding("ack", asked.answered, text)


_registers = {
    **dict.fromkeys(_TRANSPORT, "transport"),
    "update_message": "message",
    "set_role": "leader",
}


def _stamp(registers: Entry, name: str) -> tuple[object, ...]:
    """Of a register, as the head in Redis or a line of a trace has it."""
    register = registers[name]
    if name == "leader":
        return stamp(register["rank"])
    return stamp(register.get("stamp", register))


def _chats(message: Message) -> Sequence[Message]:
    if message["type"] == "chat_message":
        return [message]
    chats: Sequence[Message] = message["chat"] if message["type"] == "snapshot" else []
    return chats


def _where(line: Line) -> str:
    return f"{line.session}/{line.name}@{line.life.server} since {line.opened:.2f}"


def _answer(line: Line, asked: Asked, end: float) -> str | None:
    """What is wrong with the answer to a command."""
    if asked.answer is None or asked.answered - asked.sent > PATIENCE_S:
        until = asked.sent + PATIENCE_S
        over = min(line.left, line.closed[0] if line.closed else end)
        if over <= until or line.life.paused(asked.sent - _FUZZ_S, until):
            return None
        return f"was not answered for {min(asked.answered, over) - asked.sent:.1f} s"
    if asked.acked:
        return None
    code = asked.answer["code"]
    if code in _RIGHTLY_REFUSED:
        return None
    if code == "not_joined" and (
        line.deserted < asked.answered
        or line.life.paused(asked.answered - _AFTER_PAUSE_S, asked.answered)
    ):
        return None
    return f"was refused: {code} {asked.answer['message']}"


def _closing(line: Line, end: float) -> str | None:
    """What is wrong with the end of a connection."""
    if line.closed is None:
        if line.left == float("inf") and line.superseded < end:
            return "is still open although its member was resumed elsewhere"
        return None
    at, code = line.closed
    life: Life = line.life
    if at >= life.ended - _FUZZ_S:
        if life.how == signal.SIGKILL or (code == 1012 and life.how == signal.SIGTERM):
            return None
        # Not welcomed yet, or closed by the end of the process after a pause.
        if life.how == signal.SIGTERM and not line.heard:
            return None
    if code == 4001 and line.deserted <= at:
        return None
    return f"was closed with {code}"
