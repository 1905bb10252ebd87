"""Transport arithmetic: the position of the song, and when a command takes effect.

A transport is an anchor, not a sample. At instant ``t`` its ``next`` is in force if there is one
and ``t >= next.anchor_time``; otherwise the transport itself is.

Every instant is in milliseconds since the Unix epoch on the session clock, every position in
milliseconds from the start of the song, every tempo in quarter notes per minute.
"""

import math
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

MIN_TEMPO_BPM = 20.0
MAX_TEMPO_BPM = 300.0
MAX_POSITION_MS = 86_400_000.0
MAX_LEAD_MS = 400.0

# A position closer than this to a beat (in beats) is on it, and "the next beat" is the one after.
# Without it, float noise would turn "at the next bar" into "now".
_ON_THE_BEAT = 1e-6
# Positions that differ by less than this (milliseconds) are equal up to float noise.
_SAME_POSITION_MS = 1e-3

At = Literal["now", "beat", "bar"]


class Segment(Struct, frozen=True, rename="camel"):
    """A stretch of song from ``anchor_time`` on, moving at one tempo or standing still."""

    is_playing: bool
    position_ms: float
    anchor_time: float
    tempo_bpm: float
    beat: float
    beats_per_bar: int


class Transport(Segment, frozen=True, rename="camel"):
    """The segment in force, and the one change scheduled after it (None if there is none)."""

    next: Segment | None = None


def position_at(segment: Segment, instant: float) -> float:
    """Position in milliseconds at ``instant`` if ``segment`` is in force then.

    The position stops at `MAX_POSITION_MS`, the longest song; the beat goes on.
    """
    if not segment.is_playing:
        return segment.position_ms
    return min(segment.position_ms + (instant - segment.anchor_time), MAX_POSITION_MS)


def beat_at(segment: Segment, instant: float) -> float:
    """Beats from the start of the song at ``instant`` if ``segment`` is in force then."""
    if not segment.is_playing:
        return segment.beat
    return segment.beat + (instant - segment.anchor_time) * segment.tempo_bpm / 60_000


def in_force(transport: Transport, instant: float) -> Segment:
    """The segment in force at ``instant``."""
    upcoming = transport.next
    if upcoming is not None and instant >= upcoming.anchor_time:
        return upcoming
    return transport


def beats_of(position_ms: float, tempo_bpm: float) -> float:
    """The beat at ``position_ms`` if ``tempo_bpm`` held since the start of the song."""
    return position_ms * tempo_bpm / 60_000


def initial(now: float) -> Transport:
    """The transport of a new session: 120 BPM, four beats per bar, stopped at the start."""
    return Transport(
        is_playing=False,
        position_ms=0.0,
        anchor_time=now,
        tempo_bpm=120.0,
        beat=0.0,
        beats_per_bar=4,
    )


def auto_lead(latencies_ms: list[float]) -> float:
    """Lead of a start for which the client names none, in milliseconds.

    Args:
        latencies_ms: round trips of the connected members, 0 where unknown.
    """
    if len(latencies_ms) < 2:
        return 0.0
    return min(MAX_LEAD_MS, max(latencies_ms))


def count_in_ms(beats: int, transport: Transport, now: float) -> float:
    """How long ``beats`` of count-in last at the tempo in force at ``now``."""
    return beats * 60_000 / in_force(transport, now).tempo_bpm


def play(transport: Transport, now: float, position_ms: float | None, delay_ms: float) -> Transport:
    """Start ``delay_ms`` from now, at ``position_ms`` or at the current position.

    A song that already plays runs on without a jump if no position is given. A scheduled change
    is replaced.
    """
    current = _anchored(in_force(transport, now), now)
    if position_ms is None:
        if current.is_playing:
            return current
        start = replace(current, is_playing=True)
    else:
        start = replace(_moved(current, position_ms), is_playing=True)
    if delay_ms <= 0:
        return start
    if not current.is_playing:
        current = replace(start, is_playing=False)
    return replace(current, next=_segment(start, now + delay_ms))


def pause(transport: Transport, now: float) -> Transport:
    """Freeze position and beat at ``now``; a scheduled change is dropped."""
    return replace(_anchored(in_force(transport, now), now), is_playing=False)


def stop(transport: Transport, now: float) -> Transport:
    """Stop, with position and beat at 0; a scheduled change is dropped."""
    current = _anchored(in_force(transport, now), now)
    return replace(current, is_playing=False, position_ms=0.0, beat=0.0)


def seek(transport: Transport, now: float, position_ms: float, at: At) -> Transport:
    """Move to ``position_ms`` now or, while playing, on the next beat or bar.

    A scheduled start is kept and moved along. A scheduled tempo change is kept; an earlier
    scheduled seek is superseded.
    """
    before = _settled(transport, now)
    current = _anchored(before, now)
    upcoming = before.next
    moved = _moved(current, position_ms)
    if not current.is_playing:
        return replace(moved, next=upcoming and _standing_start(upcoming, moved))
    if at != "now":
        return _scheduled(current, _boundary(current, at), position_ms, then=upcoming or current)
    if upcoming is None:
        return moved
    return _scheduled(moved, _requantised(before, moved), None, then=upcoming)


def set_tempo(
    transport: Transport, now: float, tempo_bpm: float, beats_per_bar: int | None, at: At
) -> Transport:
    """Change tempo, and beats per bar unless None, with position and beat continuous.

    Takes effect now or, while playing, on the next beat or bar. A scheduled start keeps its
    instant and takes the new tempo; a scheduled seek is kept, on its beat. Only one change can be
    scheduled, so a quantised tempo change takes effect together with that start or seek.
    """
    before = _settled(transport, now)
    current = _anchored(before, now)
    upcoming = before.next
    bar = current.beats_per_bar if beats_per_bar is None else beats_per_bar
    changed = replace(current, tempo_bpm=tempo_bpm, beats_per_bar=bar)
    if not current.is_playing:
        return replace(changed, next=upcoming and _standing_start(upcoming, changed))
    jump = _jump(before)
    if upcoming is not None and jump is not None and at != "now":
        # Do not cut short the count-in of a playing song or the bar before a seek.
        return _scheduled(current, upcoming.anchor_time, jump, then=changed)
    if at != "now":
        return _scheduled(current, _boundary(current, at), None, then=changed)
    if upcoming is None:
        return changed
    return _scheduled(changed, _moved_instant(before, changed), jump, then=changed)


def shift(transport: Transport, now: float, difference_ms: float) -> Transport:
    """Re-anchor at ``now``, ``difference_ms`` further into the song; the beat shifts along."""
    before = _settled(transport, now)
    current = _anchored(before, now)
    upcoming = before.next
    position = _clamped(current.position_ms + difference_ms)
    shifted = position - current.position_ms
    moved = replace(
        current,
        position_ms=position,
        beat=current.beat + beats_of(shifted, current.tempo_bpm),
    )
    if not current.is_playing:
        return replace(moved, next=upcoming and _standing_start(upcoming, moved))
    if upcoming is None:
        return moved
    return _scheduled(moved, _moved_instant(before, moved), _jump(before), then=upcoming)


def _scheduled(
    current: Transport, instant: float, jump: float | None, *, then: Segment
) -> Transport:
    """``current``, with the tempo and beats per bar of ``then`` in force from ``instant`` on.

    Args:
        jump: the position it jumps to at that instant; None if position and beat run on.
    """
    same_tempo = (then.tempo_bpm, then.beats_per_bar) == (current.tempo_bpm, current.beats_per_bar)
    if jump is None and same_tempo:
        return current
    landing = Segment(
        is_playing=True,
        position_ms=position_at(current, instant) if jump is None else jump,
        anchor_time=instant,
        tempo_bpm=then.tempo_bpm,
        beat=beat_at(current, instant) if jump is None else beats_of(jump, then.tempo_bpm),
        beats_per_bar=then.beats_per_bar,
    )
    return replace(current, next=landing)


def _standing_start(start: Segment, current: Transport) -> Segment:
    """The scheduled start, at its instant, from the position of ``current``."""
    return replace(_segment(current, start.anchor_time), is_playing=True)


def _moved_instant(before: Transport, after: Transport) -> float:
    """The instant of the change scheduled in ``before``, once ``after`` (anchored now) holds.

    A change scheduled on a beat stays on that beat and moves with it. Any other change, such as a
    start announced for an instant, keeps its instant.
    """
    assert before.next is not None
    instant = before.next.anchor_time
    beat = beat_at(before, instant)
    if abs(beat - round(beat)) > _ON_THE_BEAT:
        return instant
    now = after.anchor_time
    return max(now, now + (round(beat) - after.beat) * 60_000 / after.tempo_bpm)


def _requantised(before: Transport, after: Transport) -> float:
    """The instant of the change scheduled in ``before``, after a jump to ``after``.

    A change scheduled on a bar line or beat moves to the next one after the new position.
    """
    assert before.next is not None
    instant = before.next.anchor_time
    beat = beat_at(before, instant)
    if abs(beat - round(beat)) > _ON_THE_BEAT:
        return instant
    return _boundary(after, "beat" if round(beat) % before.beats_per_bar else "bar")


def _jump(transport: Transport) -> float | None:
    """The position that the scheduled change jumps to; None if it is continuous."""
    upcoming = transport.next
    if upcoming is None:
        return None
    expected = position_at(transport, upcoming.anchor_time)
    if abs(upcoming.position_ms - expected) < _SAME_POSITION_MS:
        return None
    return upcoming.position_ms


def _boundary(current: Transport, at: At) -> float:
    """The instant of the first beat or bar line after the anchor of ``current``, which plays."""
    unit = current.beats_per_bar if at == "bar" else 1
    target = (math.floor(current.beat / unit + _ON_THE_BEAT) + 1) * unit
    return current.anchor_time + (target - current.beat) * 60_000 / current.tempo_bpm


def _moved(transport: Transport, position_ms: float) -> Transport:
    return replace(
        transport, position_ms=position_ms, beat=beats_of(position_ms, transport.tempo_bpm)
    )


def _settled(transport: Transport, now: float) -> Transport:
    """The same transport; a ``next`` that is already in force replaces it."""
    segment = in_force(transport, now)
    if segment is transport:
        return transport
    return _transport(segment)


def _anchored(segment: Segment, now: float) -> Transport:
    """The segment alone, anchored at ``now``."""
    return Transport(
        is_playing=segment.is_playing,
        position_ms=_clamped(position_at(segment, now)),
        anchor_time=now,
        tempo_bpm=segment.tempo_bpm,
        beat=beat_at(segment, now),
        beats_per_bar=segment.beats_per_bar,
    )


def _clamped(position_ms: float) -> float:
    return min(max(position_ms, 0.0), MAX_POSITION_MS)


def _transport(segment: Segment) -> Transport:
    return Transport(
        is_playing=segment.is_playing,
        position_ms=segment.position_ms,
        anchor_time=segment.anchor_time,
        tempo_bpm=segment.tempo_bpm,
        beat=segment.beat,
        beats_per_bar=segment.beats_per_bar,
    )


def _segment(transport: Transport, instant: float) -> Segment:
    return Segment(
        is_playing=transport.is_playing,
        position_ms=transport.position_ms,
        anchor_time=instant,
        tempo_bpm=transport.tempo_bpm,
        beat=transport.beat,
        beats_per_bar=transport.beats_per_bar,
    )
