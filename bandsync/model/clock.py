"""The session clock on the server: instants that members on all servers share.

It starts at wall time and is carried forward by the monotonic clock. With Redis it is disciplined
to the `TIME` of Redis, as NTP does: the clock filter of RFC 5905 (section 10) picks the exchange
to use, and the error is slewed away as adjtime(3) does.
"""

import math
from collections import deque

from msgspec import Struct

# NSTAGE of RFC 5905: enough to bridge a few slow replies, few enough to follow a drift.
_SAMPLES = 8

# Samples older than this are discarded. The clock of Redis's machine can be set at any time, and
# no bound on drift covers that.
_MAX_AGE_S = 30.0

# Largest drift between two clocks, milliseconds per second: 100 ppm, two cheap crystals of 50 ppm
# in opposite directions. (PHI of RFC 5905, 15 ppm, assumes machines that are disciplined already.)
_DRIFT_MS_PER_S = 0.1

# 500 ppm, as adjtime(3) on Linux and MAXFREQ of RFC 5905. It is five times the drift, so the clock
# catches up; a tempo that is 0.05 % off for a while is inaudible.
_SLEW_MS_PER_S = 0.5

# Resolution of Redis's TIME, and four times that of a float: an instant of 2026 in milliseconds
# has steps of 2**-12.
_RESOLUTION_MS = 0.001


class _Sample(Struct, frozen=True):
    """The result of one exchange.

    Attributes:
        offset_ms: the reference minus the undisciplined clock.
        half_ms: half the round trip, the bound on the error of `offset_ms`.
        received_s: arrival of the reply, monotonic seconds.
    """

    offset_ms: float
    half_ms: float
    received_s: float

    def uncertainty_ms(self, now_s: float) -> float:
        """The bound on the error of the offset at ``now_s``."""
        return self.half_ms + (now_s - self.received_s) * _DRIFT_MS_PER_S


class ServerClock:
    """Maps the monotonic clock to instants.

    Once a client has seen a time, the clock runs forwards only, at its own rate ± 500 ppm,
    whatever the reference says. Monotonic times at least a microsecond apart map to different
    instants.

    Args:
        wall_ms: wall time at the start, milliseconds since the Unix epoch.
        monotonic_s: the monotonic clock at that moment, seconds.
    """

    __slots__ = (
        "_best",
        "_from_ms",
        "_from_s",
        "_latest_s",
        "_ms_per_s",
        "_samples",
        "_seen",
        "_start_ms",
        "_start_s",
        "_target_ms",
        "_till_ms",
        "_till_s",
    )

    def __init__(self, wall_ms: float, monotonic_s: float) -> None:
        self._start_ms = wall_ms
        self._start_s = monotonic_s
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)
        self._best: _Sample | None = None
        self._seen = False
        self._target_ms = 0.0
        self._latest_s = monotonic_s
        # A slew is a straight line between two points; after it the clock runs at its own rate.
        # Each line is one product and one sum, so rounding cannot make it run backwards. A
        # separate offset term could.
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
        """The applied offset: this clock minus the undisciplined one, milliseconds.

        As of the latest time passed to the clock, like `error_ms` and `uncertainty_ms`.
        """
        return self.at(self._latest_s) - self._undisciplined(self._latest_s)

    @property
    def error_ms(self) -> float | None:
        """The remaining error: the best estimate of the reference minus this clock, milliseconds.

        Positive when this clock is behind; None before the first exchange. An error within
        `uncertainty_ms` is not corrected.
        """
        return None if self._best is None else self._best.offset_ms - self.offset_ms

    @property
    def uncertainty_ms(self) -> float | None:
        """The bound on the error of `error_ms`, milliseconds; None before the first exchange.

        Half the round trip of the best exchange, and 0.1 for each second that has passed since.
        """
        return None if self._best is None else self._best.uncertainty_ms(self._latest_s)

    def observe(
        self, sent_s: float, received_s: float, reference_ms: float, *, serving: bool = True
    ) -> None:
        """Discipline the clock with one exchange with the reference.

        The exchange with the least uncertainty among the last few is used. The clock moves to the
        nearest offset that this exchange does not rule out. A delayed reply, even a single one,
        therefore never moves a clock that was right.

        Args:
            sent_s: when the request was sent, monotonic seconds.
            received_s: when its reply came, monotonic seconds.
            reference_ms: the reply, milliseconds since the Unix epoch.
            serving: whether a client may have seen a time of this clock. Until the first exchange
                with True, the clock is stepped, forwards or backwards. From then on it is slewed
                only: a step would be a jump of every song that plays.
        """
        assert sent_s <= received_s
        # Not the time of the reply: clients may have seen later instants meanwhile.
        now_s = self._latest_s = max(received_s, self._latest_s)
        # Relative to the undisciplined clock: samples stay comparable while this one slews.
        offset_ms = reference_ms - self._undisciplined((sent_s + received_s) / 2)
        self._samples.append(_Sample(offset_ms, (received_s - sent_s) * 500, received_s))
        while received_s - self._samples[0].received_s > _MAX_AGE_S:
            self._samples.popleft()

        best = min(self._samples, key=lambda sample: sample.uncertainty_ms(now_s))
        self._best = best
        self._seen = self._seen or serving

        # Relative to the end of a slew in progress, not to the current offset.
        error_ms = best.offset_ms - self._target_ms
        slack_ms = best.uncertainty_ms(now_s) + _RESOLUTION_MS
        if abs(error_ms) <= slack_ms:
            return
        nearest_ms = best.offset_ms - math.copysign(slack_ms, error_ms)
        if not self._seen:
            self._step(now_s, best.offset_ms)
        else:
            self._slew(now_s, nearest_ms)

    def reset_filter(self) -> None:
        """Discard all samples, because the next exchanges may be with another reference.

        The clock goes on unchanged, a slew in progress included.
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
