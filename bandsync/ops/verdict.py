"""Diagnosis of a server in sentences for operators. Pure: numbers in, sentences out.

Screen readers speak the sentence of a finding whenever it changes. It therefore contains no
figures that move; these are in the meaning beside it.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from bandsync.ops.loss_reasons import in_words
from bandsync.ops.samples import Sample
from bandsync.storage.era import Loss
from bandsync.storage.history import Migration, ModeChange

Level = Literal["good", "warn", "bad"]

# Event loop lag counts as a finding when so many of the samples in the window exceed the limit.
LATE_MS = 100.0
LATE_SECONDS = 3
LATE_WINDOW_MS = 10_000.0
# Findings about events, such as errors, are shown for this long, milliseconds.
RECENT_MS = 60_000.0
# Limit of the clock error, milliseconds: members of one session on two servers are apart by it.
CLOCK_ERROR_MS = 25.0


class Finding(Struct, frozen=True, rename="camel"):
    """A condition that an operator should know about.

    Attributes:
        code: identifier for programs.
        level: ``bad`` if bands can notice it, or if data is at risk and recovery is not automatic.
        text: one sentence without moving figures.
        meaning: effect on the bands, and advice; contains moving figures.
        since: start, session clock, milliseconds; null if unknown.
    """

    code: str
    level: Level
    text: str
    meaning: str
    since: float | None = None


class Verdict(Struct, frozen=True, rename="camel"):
    """The state of the server in one sentence.

    Attributes:
        level: level of the worst finding.
        text: sentence of the worst finding, or that all is well.
        meaning: meaning of the worst finding.
        since: start of the worst finding; null if unknown.
        others: the other findings.
    """

    level: Level
    text: str
    meaning: str
    since: float | None
    others: list[Finding]


class Facts(Struct, frozen=True):
    """Input of `judge`.

    Attributes:
        now: session clock, milliseconds.
        awaited: whether Redis is configured.
        degraded: whether sessions are in memory although Redis is configured.
        connected: whether a link to Redis is open.
        gave_up: whether reconnecting to Redis has ended for good.
        loss: latest reason why Redis cannot be used; None if it never failed.
        kept_in_memory: sessions that are not in Redis, or not yet.
        listening: whether changes of other servers are received.
        migration: move to Redis that is in progress, if any.
        changes: changes of the storage mode, the oldest first.
        draining: whether the server is shutting down.
        full: whether the limit of connections is reached.
        samples: samples of the last minute or more, the oldest first.
    """

    now: float
    awaited: bool
    degraded: bool
    connected: bool
    gave_up: bool
    loss: Loss | None
    kept_in_memory: int
    listening: bool
    migration: Migration | None
    changes: Sequence[ModeChange]
    draining: bool
    full: bool
    samples: Sequence[Sample]


def judge(facts: Facts) -> Verdict:
    """Return the verdict on a server: the worst finding first."""
    found = [
        *_draining(facts),
        *_storage(facts),
        *_listening(facts),
        *_failures(facts),
        *_full(facts),
        *_late(facts),
        *_slow(facts),
        *_clock(facts),
    ]
    found.sort(key=lambda finding: finding.level != "bad")
    if not found:
        meaning = (
            "Sessions are in Redis, with a copy in this server's memory."
            if facts.awaited
            else "Sessions are in memory only, as configured: a restart deletes them."
        )
        return Verdict("good", "All is well.", meaning, None, [])
    worst, *others = found
    return Verdict(worst.level, worst.text, worst.meaning, worst.since, others)


def degraded_since(changes: Sequence[ModeChange]) -> float:
    """The start of the current outage: the first mode change after the last use of Redis."""
    since = changes[-1].at
    for change in reversed(changes):
        if change.mode == "redis":
            break
        since = change.at
    return since


def _draining(facts: Facts) -> list[Finding]:
    if not facts.draining:
        return []
    effect = "Clients are asked to reconnect, a few at a time"
    sessions = facts.kept_in_memory
    if not sessions:
        meaning = f"{effect}; the bands play on elsewhere."
        return [Finding("draining", "warn", "This server is stopping.", meaning)]
    text = "This server is stopping, and sessions end with it."
    only = f"{_counted(sessions)} {_is(sessions)} in its memory only"
    if not facts.awaited:
        return [Finding("draining", "warn", text, f"{effect}. {only}, as configured.")]
    meaning = f"{effect}. {only}: a session that does not reach Redis before the end is lost."
    return [Finding("draining", "bad", text, meaning)]


def _storage(facts: Facts) -> list[Finding]:
    if not facts.degraded:
        return []
    since = degraded_since(facts.changes)
    if facts.migration is not None or facts.changes[-1].mode == "migrating":
        return [_migrating(facts, since)]
    # Bands with members on several servers notice that they are cut apart.
    apart = _spread(facts)
    level: Level = "bad" if apart else "warn"
    why = "" if facts.loss is None else f"Redis: {in_words(facts.loss.reason)}. "
    stake = f"{_at_stake(facts)} {_apart(apart)}"
    known = _was_there(facts)
    if facts.gave_up:
        state = "lost, and is not used again" if known else "not there, and is not tried again"
        text = f"Redis is {state} until a restart."
        return [
            Finding("gave_up", "bad", text, f"{why}{stake} REDIS_AUTO_RECOVER is false.", since)
        ]
    if facts.connected:
        state = "answers again" if known else "answers"
        text = f"Redis {state}, and is checked before it is used."
        return [Finding("proving", level, text, stake, since)]
    if apart:
        text = "Redis is lost: bands on several servers are cut apart."
        return [Finding("lost", level, text, why + stake, since)]
    if known:
        text = "Redis is lost: the bands play on from memory."
        return [Finding("lost", level, text, why + stake, since)]
    text = "Redis is not there: the bands play from memory."
    return [Finding("absent", level, text, why + stake, since)]


def _migrating(facts: Facts, since: float) -> Finding:
    state = "back" if _was_there(facts) else "there"
    text = f"Redis is {state}: sessions are moving to it."
    progress = ""
    if facts.migration is not None and facts.migration.total:
        progress = f"{facts.migration.moved} of {facts.migration.total} sessions have moved. "
    apart = _spread(facts)
    meets = (
        f"The members of {_counted(apart)} were apart on several servers: they are together "
        "again, and the changes of each side are merged."
        if apart
        else "Members notice nothing, unless others played in their session on another server: "
        "then the changes of both sides are merged."
    )
    return Finding("migrating", "warn", text, progress + meets, since)


def _was_there(facts: Facts) -> bool:
    """Whether Redis was in use before."""
    return any(change.mode == "redis" for change in facts.changes)


def _spread(facts: Facts) -> int:
    """The number of sessions with members on other servers, as far as this server knows."""
    return facts.samples[-1].spread if facts.samples else 0


def _apart(sessions: int) -> str:
    """The effect on bands while servers cannot exchange changes."""
    if not sessions:
        return (
            "Members notice nothing, unless others join their session on another server: these "
            "are out of reach until Redis is used again."
        )
    return (
        f"{_counted(sessions)} {_has(sessions)} members on other servers too: each server's "
        "members play on among themselves, out of reach of the others, until Redis is used again; "
        "then the changes of all sides are merged."
    )


def _at_stake(facts: Facts) -> str:
    """The data that a restart of this server would lose."""
    sessions = facts.kept_in_memory
    if not sessions:
        if not _was_there(facts) or not facts.samples or not facts.samples[-1].sessions:
            return "No session is in this server's memory alone."
        # Redis may come back empty, or with an older state.
        return (
            "No session has changed since. But if Redis comes back without its data, this "
            "server's memory is the only copy: do not stop it before Redis is back."
        )
    advice = "a restart loses them" if facts.gave_up else "do not stop it before Redis is back"
    subject = f"{_counted(sessions)} {_has(sessions)}"
    return f"{subject} changes that are only in this server's memory: {advice}."


def _is(sessions: int) -> str:
    return "is" if sessions == 1 else "are"


def _has(sessions: int) -> str:
    return "has" if sessions == 1 else "have"


def _counted(sessions: int) -> str:
    return "1 session" if sessions == 1 else f"{sessions} sessions"


def _listening(facts: Facts) -> list[Finding]:
    recent = facts.samples[-3:]
    lost = len(recent) == 3 and not any(each.listening or each.degraded for each in recent)
    if not facts.awaited or facts.listening or not lost:
        return []
    text = "Changes made on other servers arrive late."
    meaning = "Bands with members on several servers see them up to five seconds late."
    return [Finding("deaf", "warn", text, meaning)]


def _failures(facts: Facts) -> list[Finding]:
    count = sum(each.internal_errors for each in _recent(facts, RECENT_MS))
    if not count:
        return []
    text = "Commands fail because of a bug in the server."
    meaning = (
        f"{count} in the last minute. The log has them under command.failed; "
        "their senders received an error."
    )
    return [Finding("failures", "bad", text, meaning)]


def _full(facts: Facts) -> list[Finding]:
    if not facts.full:
        return []
    text = "The server is full."
    meaning = "New clients are asked to try again later. MAX_CONNECTIONS is the limit."
    return [Finding("full", "bad", text, meaning)]


def _late(facts: Facts) -> list[Finding]:
    late = [each for each in _recent(facts, LATE_WINDOW_MS) if each.loop_lag_ms > LATE_MS]
    if len(late) < LATE_SECONDS:
        return []
    longest = max(each.loop_lag_ms for each in late)
    text = "The server is overloaded."
    meaning = f"Every message is delayed by up to {longest:.0f} ms: the machine is too busy."
    return [Finding("late", "bad", text, meaning)]


def _slow(facts: Facts) -> list[Finding]:
    count = sum(each.slow_consumers for each in _recent(facts, RECENT_MS))
    if not count:
        return []
    text = "Slow clients were disconnected."
    meaning = (
        f"{count} in the last minute, with close code 1013: they read more slowly than their band "
        "plays. They reconnect by themselves; other clients are not delayed."
    )
    return [Finding("slow", "warn", text, meaning)]


def _clock(facts: Facts) -> list[Finding]:
    if not facts.samples:
        return []
    latest = facts.samples[-1]
    if latest.clock_error_ms is None or latest.clock_uncertainty_ms is None:
        return []
    certain_ms = abs(latest.clock_error_ms) - latest.clock_uncertainty_ms
    if certain_ms <= CLOCK_ERROR_MS:
        return []
    text = "The session clock does not agree with Redis's clock yet."
    meaning = (
        f"It is off by {certain_ms:.0f} ms, and is corrected by 0.5 ms per second. The beat of "
        "members on different servers differs by that much; on one server it does not."
    )
    return [Finding("clock", "warn", text, meaning)]


def _recent(facts: Facts, window_ms: float) -> list[Sample]:
    return [each for each in facts.samples if each.at > facts.now - window_ms]
