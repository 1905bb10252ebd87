"""Whether all is well, and if not what that means for the band. Pure: numbers in, sentences out.

A sentence changes only when what it says changes, because screen readers speak it; figures that
move stand in the meaning beside it.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from bandsync.ops.loss_reasons import in_words
from bandsync.ops.samples import Sample
from bandsync.storage.era import Loss
from bandsync.storage.history import Migration, ModeChange

Level = Literal["good", "warn", "bad"]

# A timer that is late once is nobody's trouble; one that keeps being late is.
LATE_MS = 100.0
LATE_SECONDS = 3
LATE_WINDOW_MS = 10_000.0
RECENT_MS = 60_000.0
# Members of one session on two servers hear each other off by this.
CLOCK_ERROR_MS = 25.0


class Finding(Struct, frozen=True, rename="camel"):
    """Something that an operator should know.

    Attributes:
        code: names it.
        level: ``bad`` when the band can notice it, or data is at stake with nobody working on it.
        text: a sentence.
        meaning: what it means for the band, and what to do; its figures move.
        since: when it began, session clock, milliseconds; null if that is not known.
    """

    code: str
    level: Level
    text: str
    meaning: str
    since: float | None = None


class Verdict(Struct, frozen=True, rename="camel"):
    """The state of the server in one sentence.

    Attributes:
        level: the worst of the findings'.
        text: the worst finding, or that all is well.
        meaning: what stands beside it.
        since: when it began; null if that is not known.
        others: the other findings.
    """

    level: Level
    text: str
    meaning: str
    since: float | None
    others: list[Finding]


class Facts(Struct, frozen=True):
    """What is judged.

    Attributes:
        now: session clock, milliseconds.
        awaited: whether Redis is to be used.
        degraded: whether sessions are in memory although it is.
        connected: whether a link to Redis is open.
        gave_up: whether Redis is not tried again.
        loss: why Redis cannot be used, as last seen; None if it never failed.
        kept_in_memory: sessions that are not in Redis, or not yet.
        listening: whether changes of other servers are heard.
        migration: the move to Redis that is under way, if one is.
        changes: of the mode, the oldest first.
        full: whether no more connections are taken.
        samples: at least the last minute's, the oldest first.
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
    """The verdict on a server."""
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
            "Sessions are in Redis, and mirrored in this server's memory."
            if facts.awaited
            else "Sessions are in memory only, as configured: a restart forgets them."
        )
        return Verdict("good", "All is well.", meaning, None, [])
    worst, *others = found
    return Verdict(worst.level, worst.text, worst.meaning, worst.since, others)


def degraded_since(changes: Sequence[ModeChange]) -> float:
    """When sessions left Redis, or would have been there: the start of the first stretch since."""
    since = changes[-1].at
    for change in reversed(changes):
        if change.mode == "redis":
            break
        since = change.at
    return since


def _draining(facts: Facts) -> list[Finding]:
    if not facts.draining:
        return []
    told = "Clients are told to reconnect, a few at a time"
    sessions = facts.kept_in_memory
    if not sessions:
        meaning = f"{told}; the bands play on elsewhere."
        return [Finding("draining", "warn", "This server is stopping.", meaning)]
    text = "This server is stopping, and sessions end with it."
    only = f"{_counted(sessions)} {_is(sessions)} in its memory only"
    if not facts.awaited:
        return [Finding("draining", "warn", text, f"{told}. {only}, as configured.")]
    meaning = f"{told}. {only}: what Redis does not take before the end is lost."
    return [Finding("draining", "bad", text, meaning)]


def _storage(facts: Facts) -> list[Finding]:
    if not facts.degraded:
        return []
    since = degraded_since(facts.changes)
    if facts.migration is not None or facts.changes[-1].mode == "migrating":
        return [_migrating(facts, since)]
    # Who is cut off from half of the band notices it.
    apart = _spread(facts)
    level: Level = "bad" if apart else "warn"
    why = "" if facts.loss is None else f"Redis: {in_words(facts.loss.reason)}. "
    stake = f"{_at_stake(facts)} {_apart(apart)}"
    known = _was_there(facts)
    if facts.gave_up:
        state = "lost, and is not used again" if known else "not there, and is not tried again"
        text = f"Redis is {state} before a restart."
        return [
            Finding("gave_up", "bad", text, f"{why}{stake} REDIS_AUTO_RECOVER is false.", since)
        ]
    if facts.connected:
        state = "answers again" if known else "answers"
        text = f"Redis {state}, and is watched before it is used."
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
    text = f"Redis is {state}: sessions are on their way to it."
    progress = ""
    if facts.migration is not None and facts.migration.total:
        progress = f"{facts.migration.moved} of {facts.migration.total} sessions are there. "
    apart = _spread(facts)
    meets = (
        f"The members of {_counted(apart)} were apart on several servers: they meet again, and "
        "what each side did is merged."
        if apart
        else "Members notice nothing, unless others played in their session on another server: "
        "then both are merged."
    )
    return Finding("migrating", "warn", text, progress + meets, since)


def _was_there(facts: Facts) -> bool:
    """Whether Redis was in use before."""
    return any(change.mode == "redis" for change in facts.changes)


def _spread(facts: Facts) -> int:
    """How many sessions have members on other servers, as far as this one knows."""
    return facts.samples[-1].spread if facts.samples else 0


def _apart(sessions: int) -> str:
    """What the band notices while servers do not hear of each other."""
    if not sessions:
        return (
            "Members notice nothing, unless others join their session on another server: those "
            "are out of reach until Redis is used again."
        )
    return (
        f"{_counted(sessions)} {_has(sessions)} members on other servers too: each server's "
        "members play on among themselves, out of reach of the others, until Redis is used again; "
        "then what they did is merged."
    )


def _at_stake(facts: Facts) -> str:
    sessions = facts.kept_in_memory
    if not sessions:
        if not _was_there(facts) or not facts.samples or not facts.samples[-1].sessions:
            return "No session is in this server's memory alone."
        # It may come back empty, or older.
        return (
            "No session has changed since; but should Redis come back without its data, this "
            "server's memory is the only copy: do not stop it before Redis is back."
        )
    advice = "a restart loses them" if facts.gave_up else "do not stop it before Redis is back"
    who = f"{_counted(sessions)} {_has(sessions)}"
    return f"{who} changes that are only in this server's memory: {advice}."


def _is(sessions: int) -> str:
    return "is" if sessions == 1 else "are"


def _has(sessions: int) -> str:
    return "has" if sessions == 1 else "have"


def _counted(sessions: int) -> str:
    return "1 session" if sessions == 1 else f"{sessions} sessions"


def _listening(facts: Facts) -> list[Finding]:
    recent = facts.samples[-3:]
    deaf = len(recent) == 3 and not any(each.listening or each.degraded for each in recent)
    if not facts.awaited or facts.listening or not deaf:
        return []
    text = "Changes made on other servers are not heard as they happen."
    meaning = "Bands that are spread over several servers see them up to five seconds late."
    return [Finding("deaf", "warn", text, meaning)]


def _failures(facts: Facts) -> list[Finding]:
    count = sum(each.internal_errors for each in _recent(facts, RECENT_MS))
    if not count:
        return []
    text = "The server fails at commands."
    meaning = (
        f"{count} in the last minute: a bug. The log has them under command.failed; "
        "those who sent them were told."
    )
    return [Finding("failures", "bad", text, meaning)]


def _full(facts: Facts) -> list[Finding]:
    if not facts.full:
        return []
    text = "The server is full."
    meaning = "Newcomers are told to come back later. MAX_CONNECTIONS is the bound."
    return [Finding("full", "bad", text, meaning)]


def _late(facts: Facts) -> list[Finding]:
    late = [each for each in _recent(facts, LATE_WINDOW_MS) if each.loop_lag_ms > LATE_MS]
    if len(late) < LATE_SECONDS:
        return []
    longest = max(each.loop_lag_ms for each in late)
    text = "The server is late."
    meaning = f"Everything waits, by up to {longest:.0f} ms: the machine is too busy for it."
    return [Finding("late", "bad", text, meaning)]


def _slow(facts: Facts) -> list[Finding]:
    count = sum(each.slow_consumers for each in _recent(facts, RECENT_MS))
    if not count:
        return []
    text = "Slow clients were let go."
    meaning = (
        f"{count} in the last minute, closed with 1013: they read more slowly than their band "
        "plays. They come back by themselves; nobody else waits for them."
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
    text = "The session clock is not in step with Redis's clock yet."
    meaning = (
        f"It is off by {certain_ms:.0f} ms, and follows by 0.5 ms per second. Members on "
        "different servers hear each other that much apart; those on one server do not."
    )
    return [Finding("clock", "warn", text, meaning)]


def _recent(facts: Facts, window_ms: float) -> list[Sample]:
    return [each for each in facts.samples if each.at > facts.now - window_ms]
