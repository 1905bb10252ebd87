"""Transport arithmetic, by property."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bandsync.model.transport import (
    At,
    Transport,
    auto_lead,
    beat_at,
    beats_of,
    count_in_ms,
    in_force,
    initial,
    pause,
    play,
    position_at,
    seek,
    set_tempo,
    shift,
    stop,
)

NOW = 1_800_000_000_000.0
# Half a microsecond: the step of a float at today's instants, twice.
NOISE_MS = 0.0005
NOISE_BEATS = 1e-5

positions = st.floats(0, 3_600_000)
tempi = st.floats(20, 300)
bars = st.integers(1, 16)
whens = st.sampled_from(["now", "beat", "bar"])
later = st.floats(0, 600_000)


@st.composite
def transports(draw: st.DrawFn) -> Transport:
    """Any transport that commands can lead to, at NOW or a little before."""
    current = replace(initial(NOW), tempo_bpm=draw(tempi), beats_per_bar=draw(bars))
    instant = NOW
    for _ in range(draw(st.integers(0, 5))):
        instant += draw(st.floats(0, 5000))
        match draw(st.integers(0, 5)):
            case 0:
                current = play(
                    current, instant, draw(st.none() | positions), draw(st.floats(0, 3000))
                )
            case 1:
                current = pause(current, instant)
            case 2:
                current = stop(current, instant)
            case 3:
                current = seek(current, instant, draw(positions), draw(whens))
            case 4:
                current = set_tempo(
                    current, instant, draw(tempi), draw(st.none() | bars), draw(whens)
                )
            case 5:
                current = shift(current, instant, draw(st.floats(-5000, 5000)))
    return current


def sample(transport: Transport, instant: float) -> tuple[bool, float, float]:
    segment = in_force(transport, instant)
    return segment.is_playing, position_at(segment, instant), beat_at(segment, instant)


@given(transports(), later, tempi, st.none() | bars, whens)
def test_tempo_change_keeps_position_and_beat(
    transport: Transport, wait: float, tempo: float, bar: int | None, at: str
) -> None:
    now = NOW + 30_000 + wait
    before = sample(transport, now)
    changed = set_tempo(transport, now, tempo, bar, at)
    after = sample(changed, now)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=NOISE_MS)
    assert after[2] == pytest.approx(before[2], abs=NOISE_BEATS)
    if changed.next is not None and before[0]:
        # The same at the instant it takes effect.
        edge = changed.next.anchor_time
        assert position_at(changed, edge) == pytest.approx(changed.next.position_ms, abs=NOISE_MS)
        assert beat_at(changed, edge) == pytest.approx(changed.next.beat, abs=NOISE_BEATS)


@given(transports(), later, tempi, st.sampled_from(["beat", "bar"]))
def test_quantised_tempo_takes_effect_on_the_next_beat_or_bar(
    transport: Transport, wait: float, tempo: float, at: str
) -> None:
    now = NOW + 30_000 + wait
    playing = play(transport, now, None, 0)
    changed = set_tempo(playing, now, tempo, None, at)
    if changed.next is None:
        assert tempo == in_force(changed, now).tempo_bpm
        return
    unit = 1 if at == "beat" else playing.beats_per_bar
    lines = changed.next.beat / unit
    assert lines == pytest.approx(round(lines), abs=1e-4)
    assert now < changed.next.anchor_time <= now + unit * 60_000 / playing.tempo_bpm + 1
    assert in_force(changed, now).tempo_bpm == playing.tempo_bpm
    assert in_force(changed, changed.next.anchor_time).tempo_bpm == tempo


@given(transports(), later, positions, whens)
def test_seek_reaches_its_position(
    transport: Transport, wait: float, position: float, at: str
) -> None:
    now = NOW + 30_000 + wait
    playing = in_force(transport, now).is_playing
    sought = seek(transport, now, position, at)
    landing = sought.next if playing and at != "now" else in_force(sought, now)
    assert landing is not None
    assert landing.position_ms == position
    assert landing.beat == pytest.approx(beats_of(position, landing.tempo_bpm))
    assert in_force(sought, now).is_playing == playing


@given(transports(), later, st.none() | positions, st.floats(0, 10_000))
def test_start_happens_exactly_after_its_lead(
    transport: Transport, wait: float, position: float | None, delay: float
) -> None:
    now = NOW + 30_000 + wait
    before = sample(transport, now)
    started = play(transport, now, position, delay)
    start = now + delay
    assert in_force(started, start + 1).is_playing
    if before[0] and position is None:
        assert sample(started, start)[1] == pytest.approx(before[1] + delay, abs=NOISE_MS)
        return
    expected = before[1] if position is None else position
    assert sample(started, max(start, now))[1] == pytest.approx(expected, abs=NOISE_MS * 4)
    if not before[0] and delay > 1:
        assert sample(started, start - 1) == (
            False,
            expected,
            pytest.approx(sample(started, start)[2]),
        )


@given(transports(), later)
def test_pause_freezes_and_stop_rewinds(transport: Transport, wait: float) -> None:
    now = NOW + 30_000 + wait
    _, position, beat = sample(transport, now)
    paused = pause(transport, now)
    assert sample(paused, now + 5000) == (False, position, beat)
    assert sample(stop(transport, now), now + 5000) == (False, 0.0, 0.0)
    assert paused.next is None


@given(transports(), later, st.floats(-1000, 60_000))
def test_shift_moves_position_and_beat_together(
    transport: Transport, wait: float, difference: float
) -> None:
    now = NOW + 30_000 + wait
    playing, position, beat = sample(transport, now)
    shifted = shift(transport, now, difference)
    tempo = in_force(transport, now).tempo_bpm
    if shifted.next is not None and shifted.next.anchor_time <= now:
        return  # The shift went past a scheduled change, which is then in force.
    expected = max(0.0, position + difference)
    moved = expected - position
    assert sample(shifted, now) == (
        playing,
        pytest.approx(expected, abs=NOISE_MS),
        pytest.approx(beat + moved * tempo / 60_000, abs=NOISE_BEATS),
    )


def test_tempo_change_during_the_count_in_keeps_the_start() -> None:
    counted = play(initial(NOW), NOW, 4000.0, 2000.0)
    tapped = set_tempo(counted, NOW + 500, 90.0, 3, "now")
    assert not in_force(tapped, NOW + 1999).is_playing
    start = in_force(tapped, NOW + 2000)
    assert (start.is_playing, start.anchor_time) == (True, NOW + 2000)
    assert (start.tempo_bpm, start.beats_per_bar, start.position_ms) == (90.0, 3, 4000.0)


def test_seek_during_the_count_in_moves_the_start_position() -> None:
    sought = seek(play(initial(NOW), NOW, None, 2000.0), NOW + 500, 6000.0, "bar")
    assert in_force(sought, NOW + 1000).position_ms == 6000.0
    assert in_force(sought, NOW + 2000) == replace(
        in_force(sought, NOW + 2000), is_playing=True, position_ms=6000.0, beat=12.0
    )


def test_tempo_change_keeps_a_scheduled_seek_on_its_bar() -> None:
    playing = play(initial(NOW), NOW, 0.0, 0)  # 120 BPM: the bar line is at 2000 ms.
    sought = seek(playing, NOW + 500, 60_000.0, "bar")
    assert sought.next is not None
    assert sought.next.anchor_time == pytest.approx(NOW + 2000)
    slower = set_tempo(sought, NOW + 1000, 60.0, None, "now")  # Two beats to go, at 1 s each.
    assert slower.next is not None
    assert slower.next.anchor_time == pytest.approx(NOW + 3000)
    assert (slower.next.position_ms, slower.next.tempo_bpm) == (60_000.0, 60.0)


def test_seek_moves_a_scheduled_tempo_to_the_next_bar() -> None:
    playing = play(initial(NOW), NOW, 0.0, 0)
    pending = set_tempo(playing, NOW + 100, 60.0, None, "bar")
    sought = seek(pending, NOW + 200, 10_250.0, "now")  # Beat 20.5: 3.5 beats to the bar line.
    assert sought.next is not None
    assert sought.next.anchor_time == pytest.approx(NOW + 200 + 1750)
    assert (sought.next.beat, sought.next.tempo_bpm) == (pytest.approx(24.0), 60.0)


def test_shift_before_the_start_moves_the_beat_with_the_position() -> None:
    playing = play(initial(NOW), NOW, 1000.0, 0)
    shifted = shift(playing, NOW, -5000.0)
    assert (shifted.position_ms, shifted.beat) == (0.0, 0.0)


def test_position_stops_at_the_longest_song() -> None:
    playing = play(initial(NOW), NOW, 86_399_000.0, 0)
    assert position_at(playing, NOW + 5000) == 86_400_000.0
    assert pause(playing, NOW + 5000).position_ms == 86_400_000.0


def test_scheduled_start_of_a_playing_song_keeps_its_instant() -> None:
    playing = play(initial(NOW), NOW, 0.0, 0)
    restart = play(playing, NOW + 100, 30_000.0, 1234.5)
    slower = set_tempo(restart, NOW + 200, 60.0, None, "now")
    assert slower.next is not None
    assert slower.next.anchor_time == pytest.approx(NOW + 1334.5)
    assert slower.next.position_ms == 30_000.0


@pytest.mark.parametrize("at", ["beat", "bar"])
def test_scheduled_start_keeps_its_instant_on_a_quantised_tempo_change(at: At) -> None:
    playing = play(initial(NOW), NOW, 0.0, 0)
    restart = play(playing, NOW + 100, 30_000.0, 2234.5)  # Four beats of count-in, and a lead.
    slower = set_tempo(restart, NOW + 200, 60.0, None, at)
    assert in_force(slower, NOW + 2334).tempo_bpm == 120.0
    start = in_force(slower, NOW + 2334.5)
    assert start.anchor_time == pytest.approx(NOW + 2334.5)
    assert (start.position_ms, start.tempo_bpm, start.beat) == (30_000.0, 60.0, 30.0)


def test_seek_and_tempo_on_the_same_bar_both_take_effect() -> None:
    playing = play(initial(NOW), NOW, 0.0, 0)
    both = set_tempo(seek(playing, NOW + 10, 8000.0, "bar"), NOW + 20, 90.0, None, "bar")
    landing = both.next
    assert landing is not None
    assert (landing.position_ms, landing.tempo_bpm) == (8000.0, 90.0)
    assert landing.beat == pytest.approx(12.0)


def test_automatic_lead_is_the_largest_latency_up_to_its_limit() -> None:
    assert auto_lead([]) == auto_lead([300.0]) == 0.0
    assert auto_lead([20.0, 130.0]) == 130.0
    assert auto_lead([20.0, 3000.0]) == 400.0
    assert count_in_ms(4, initial(NOW), NOW) == 2000.0
    assert math.isclose(count_in_ms(0, initial(NOW), NOW), 0.0)
