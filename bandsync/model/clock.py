"""The session clock: instants that every member can share, on whichever server it is.

Wall time once, at the start, carried forward by the monotonic clock; with Redis, disciplined to
its TIME (design.md section 6). The way there is NTP's in small: the clock filter of RFC 5905
(section 10) picks the exchange to believe, and what is wrong is slewed away as adjtime(3) does.
"""

import math
from collections import deque

from msgspec import Struct

# NSTAGE of RFC 5905: enough to outlast a few slow answers, few enough to follow a drift.
_SAMPLES = 8

# A machine's clock can be set under a running Redis, and no bound on drift covers that: however
# rarely Redis is asked, what it said this long ago counts no more.
_MAX_AGE_S = 30.0

# How far two clocks may part, milliseconds per second: 100 ppm, two cheap crystals of 50 ppm in
# opposite directions. (PHI of RFC 5905, 15 ppm, is for machines that are disciplined already.)
_DRIFT_MS_PER_S = 0.1

# 500 ppm, as adjtime(3) on Linux and MAXFREQ of RFC 5905: five times the drift, so it catches
# up, and a tempo that is 0.05 % off for a while is one that nobody hears.
_SLEW_MS_PER_S = 0.5

# What Redis's TIME can tell apart, and four times what a float can: an instant of 2026 in
# milliseconds has steps of 2**-12.
_RESOLUTION_MS = 0.001


class _Sample(Struct, frozen=True):
    """What one exchange told.

    Attributes:
        offset_ms: the reference minus the undisciplined clock.
        half_ms: half the round trip; `offset_ms` is wrong by no more.
        received_s: when the answer came, monotonic seconds.
    """

    offset_ms: float
    half_ms: float
    received_s: float

    def uncertainty_ms(self, now_s: float) -> float:
        """By how much the offset may be wrong at ``now_s``."""
        return self.half_ms + (now_s - self.received_s) * _DRIFT_MS_PER_S


class ServerClock:
    """Maps the monotonic clock to instants.

    Once a time has been told to anybody, the clock runs forwards only, at its own rate ± 500 ppm,
    whatever the reference says.
    Monotonic times that are a microsecond or more apart map to different instants.

    Args:
        wall_ms: wall time at the start, milliseconds since the Unix epoch.
        monotonic_s: what the monotonic clock showed at that moment, seconds.
    """

    __slots__ = (
        "_best",
        "_from_ms",
        "_from_s",
        "_latest_s",
        "_ms_per_s",
        "_samples",
        "_start_ms",
        "_start_s",
        "_target_ms",
        "_till_ms",
        "_till_s",
        "_told",
    )

    def __init__(self, wall_ms: float, monotonic_s: float) -> None:
        self._start_ms = wall_ms
        self._start_s = monotonic_s
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)
        self._best: _Sample | None = None
        self._told = False
        self._target_ms = 0.0
        self._latest_s = monotonic_s
        # A slew is a straight line from one point to another, the clock's own rate follows it.
        # Each line is one product and one sum, which rounding cannot make run backwards; the
        # offset as a term of its own could.
        self._ms_per_s = 1000.0
        self._from_s = self._till_s = monotonic_s
        self._from_ms = self._till_ms = wall_ms

    def at(self, monotonic_s: float) -> float:
        """The instant, in milliseconds since the Unix epoch, at a monotonic time in seconds."""
        if monotonic_s > self._latest_s:
            self._latest_s = monotonic_s
        if monotonic_s < self._till_s:
            return self._from_ms + (monotonic_s - self._from_s) * self._ms_per_s
        return self._till_ms + (monotonic_s - self._till_s) * 1000.0

    @property
    def offset_ms(self) -> float:
        """What is applied: this clock minus the undisciplined one, milliseconds.

        As of the latest time the clock has heard of, like the other two.
        """
        return self.at(self._latest_s) - self._undisciplined(self._latest_s)

    @property
    def error_ms(self) -> float | None:
        """What remains: the reference as best known minus this clock, milliseconds.

        Positive when this clock is behind; None before the first exchange. Up to `uncertainty_ms`
        it is no more than what cannot be known, and stays.
        """
        return None if self._best is None else self._best.offset_ms - self.offset_ms

    @property
    def uncertainty_ms(self) -> float | None:
        """By how much `error_ms` may be wrong, milliseconds; None before the first exchange.

        Half the round trip of the best exchange, and 0.1 for each second that has passed since.
        """
        return None if self._best is None else self._best.uncertainty_ms(self._latest_s)

    def observe(
        self, sent_s: float, received_s: float, reference_ms: float, *, serving: bool = True
    ) -> None:
        """Learn from one exchange with the reference.

        Of the last few exchanges the one with the least uncertainty is believed, and only as far
        as it goes: the clock makes for the nearest offset that this exchange does not rule out.
        So an answer that was held up, even alone, moves nothing that was right.

        Args:
            sent_s: when the reference was asked, monotonic seconds.
            received_s: when its answer came, monotonic seconds.
            reference_ms: its answer, milliseconds since the Unix epoch.
            serving: whether this clock's times may have been told to anybody. Until the first
                exchange that says so, the clock is set outright, forwards or backwards; from then
                on it is slewed only: a step would be a jump of every song that plays.
        """
        assert sent_s <= received_s
        # Not the time of the answer: later instants may have been told meanwhile.
        now_s = self._latest_s = max(received_s, self._latest_s)
        # Against the undisciplined clock, so that samples stay comparable while this one slews.
        offset_ms = reference_ms - self._undisciplined((sent_s + received_s) / 2)
        self._samples.append(_Sample(offset_ms, (received_s - sent_s) * 500, received_s))
        while received_s - self._samples[0].received_s > _MAX_AGE_S:
            self._samples.popleft()

        best = min(self._samples, key=lambda sample: sample.uncertainty_ms(now_s))
        self._best = best
        self._told = self._told or serving

        # Against where a slew under way will end, not against where it is.
        error_ms = best.offset_ms - self._target_ms
        slack_ms = best.uncertainty_ms(now_s) + _RESOLUTION_MS
        if abs(error_ms) <= slack_ms:
            return
        nearest_ms = best.offset_ms - math.copysign(slack_ms, error_ms)
        if not self._told:
            self._step(now_s, best.offset_ms)
        else:
            self._slew(now_s, nearest_ms)

    def reset_filter(self) -> None:
        """Forget the exchanges so far: the next ones may be with another reference.

        The clock goes on as it was, a slew under way included.
        """
        self._samples.clear()

    def _undisciplined(self, monotonic_s: float) -> float:
        return self._start_ms + (monotonic_s - self._start_s) * 1000.0

    def _step(self, now_s: float, target_ms: float) -> None:
        self._target_ms = target_ms
        self._ms_per_s = 1000.0
        self._from_s = self._till_s = now_s
        self._from_ms = self._till_ms = self._undisciplined(now_s) + target_ms

    def _slew(self, now_s: float, target_ms: float) -> None:
        now_ms = self.at(now_s)
        distance_ms = target_ms - (now_ms - self._undisciplined(now_s))
        self._target_ms = target_ms
        self._ms_per_s = 1000.0 + math.copysign(_SLEW_MS_PER_S, distance_ms)
        self._from_s, self._from_ms = now_s, now_ms
        self._till_s = now_s + abs(distance_ms) / _SLEW_MS_PER_S
        # The same expression as in `at`: at the joint, too, it must not round backwards.
        self._till_ms = now_ms + (self._till_s - now_s) * self._ms_per_s
