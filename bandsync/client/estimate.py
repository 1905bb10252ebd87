"""Estimate of the session clock from ``clock_sync`` exchanges. Pure: every time is an argument.

A request leaves at ``t0`` and its reply arrives at ``t3``, both on the local clock; the server
stamps it with ``t1`` and ``t2`` on the session clock. For any network delay the offset (session
clock minus local clock) is at least ``t2 - t3`` and at most ``t1 - t0``. The intersection of these
intervals (Marzullo; RFC 5905 section 11.2.1) is a strict bound. Its middle combines the fastest
request with the fastest reply, and is better than the exchange with the best round trip.

All times are in milliseconds.
"""

from collections import deque
from statistics import median

from msgspec import Struct

MAX_SAMPLES = 128
MAX_AGE_MS = 30_000.0

# Largest drift between the clocks: the server slews by up to 500 ppm, crystals differ by 100 ppm.
_WORST_DRIFT = 6e-4
# Typical drift of crystals.
_LIKELY_DRIFT = 5e-5
# A correction runs the clock 2 % faster or slower, which is inaudible and skips or doubles no beat.
# A difference over `_STEP_MS` is another clock: step instead of slewing for a minute.
_SLEW = 0.02
_STEP_MS = 250.0
# Float noise: an instant of 2026 has a resolution of 0.00025 ms, and sums add a few of these.
_NOISE_MS = 0.002


class Exchange(Struct, frozen=True):
    """One exchange: ``t0``, ``t3`` on the local clock, ``t1``, ``t2`` on the session clock."""

    t0: float
    t1: float
    t2: float
    t3: float

    def least(self, now: float, drift: float) -> float:
        """Lower bound of the offset at ``now``."""
        return self.t2 - self.t3 - drift * (now - self.t3)

    def most(self, now: float, drift: float) -> float:
        """Upper bound of the offset at ``now``."""
        return self.t1 - self.t0 + drift * (now - self.t0)


class ClockEstimate:
    """The offset of the session clock from the local clock, with a bound on its error.

    Until the first burst of exchanges is complete, the offset in use is stepped. Later it is
    slewed, so that instants never run backwards; it is stepped again only for an error over a
    quarter of a second.
    """

    __slots__ = ("_exchanges", "_settled", "_start", "_target", "_used")

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque(maxlen=MAX_SAMPLES)
        self._used: float | None = None
        # The offset in use was `_used` at `_start` and slews to `_target` from there.
        self._start = 0.0
        self._target = 0.0
        self._settled = False

    @property
    def samples(self) -> int:
        """The number of exchanges in use."""
        return len(self._exchanges)

    def offset_at(self, now: float) -> float | None:
        """The offset to add to the local clock at ``now``; None before the first ``welcome``."""
        if self._used is None:
            return None
        reach = _SLEW * max(0.0, now - self._start)
        distance = self._target - self._used
        return self._used + max(-reach, min(reach, distance))

    def error_at(self, now: float) -> float | None:
        """Upper bound on the error of the offset in use at ``now``; None before an exchange."""
        used = self.offset_at(now)
        if used is None or not self._exchanges:
            return None
        least, most = self._bounds(now, _WORST_DRIFT)
        return max(most - used, used - least, 0.0) + _NOISE_MS

    @property
    def jitter(self) -> float:
        """Median delay above the minimum, in the worse direction."""
        if not self._exchanges:
            return 0.0
        there = [exchange.t1 - exchange.t0 for exchange in self._exchanges]
        back = [exchange.t3 - exchange.t2 for exchange in self._exchanges]
        return max(median(there) - min(there), median(back) - min(back))

    def guess(self, server_time: float, now: float) -> None:
        """Use a server time received at about ``now``, if there is nothing better."""
        if self._used is None:
            self._set(now, server_time - now)

    def observe(self, exchange: Exchange, now: float, *, burst: bool) -> None:
        """Update the estimate with an exchange.

        Args:
            exchange: the exchange.
            now: the current local time, possibly long after the reply arrived. Callers have read
                instants meanwhile, and later ones must not be earlier.
            burst: the first exchanges of a connection are still in progress.
        """
        while self._exchanges and now - self._exchanges[0].t3 > MAX_AGE_MS:
            self._exchanges.popleft()
        self._exchanges.append(exchange)
        least, most = self._bounds(now, _WORST_DRIFT)
        if least > most:
            # A clock stepped or was suspended: earlier exchanges are invalid.
            self._exchanges = deque([exchange], maxlen=MAX_SAMPLES)
            least, most = self._bounds(now, _WORST_DRIFT)
        self._settled = self._settled or not burst
        target = self._middle(now, least, most)
        used = self.offset_at(now)
        if used is None or not self._settled or abs(target - used) > _STEP_MS:
            self._set(now, target)
            return
        if burst:
            # After a reconnect the first exchanges are less precise than the offset in use. Keep it
            # unless they rule it out.
            target = max(least, min(most, used))
        self._used, self._start, self._target = used, now, target

    def forget_exchanges(self) -> None:
        """Discard all exchanges, because the next ones may be with another server.

        The offset in use stays until new exchanges rule it out.
        """
        self._exchanges.clear()

    def _set(self, now: float, offset: float) -> None:
        self._used = self._target = offset
        self._start = now

    def _bounds(self, now: float, drift: float) -> tuple[float, float]:
        least = max(exchange.least(now, drift) for exchange in self._exchanges)
        most = min(exchange.most(now, drift) for exchange in self._exchanges)
        return least, most

    def _middle(self, now: float, least: float, most: float) -> float:
        likely = sum(self._bounds(now, _LIKELY_DRIFT)) / 2
        return max(least, min(most, likely))
