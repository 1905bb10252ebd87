"""Where the session clock is, from `clock_sync` exchanges. Pure: every time is an argument.

An exchange leaves at ``t0`` and its answer arrives at ``t3``, both on our clock; the server
stamped it with ``t1`` and ``t2``, on the session clock. Whatever the network did, the offset
(session clock minus ours) was at least ``t2 - t3`` and at most ``t1 - t0``. Intersecting these
intervals (Marzullo; RFC 5905 section 11.2.1) gives a bound that is honest, and its middle, from
the quickest way there and the quickest way back, is better than the one best round trip.

All times are in milliseconds.
"""

from collections import deque
from statistics import median

from msgspec import Struct

MAX_SAMPLES = 128
MAX_AGE_MS = 30_000.0

# How fast the two clocks may part: the server slews by up to 500 ppm, crystals differ by 100 ppm.
_WORST_DRIFT = 6e-4
# What crystals really do.
_LIKELY_DRIFT = 5e-5
# What is left to correct is made up for by running 2 % faster or slower: nobody hears that, and
# no beat is missed or doubled. A larger difference is another clock: better a jump than a minute.
_SLEW = 0.02
_STEP_MS = 250.0
# A float tells instants of 2026 apart to 0.00025 ms; sums of a few are off by a few of these.
_NOISE_MS = 0.002


class Exchange(Struct, frozen=True):
    """One exchange: sent at ``t0`` and answered at ``t3`` (ours), ``t1`` and ``t2`` (theirs)."""

    t0: float
    t1: float
    t2: float
    t3: float

    def least(self, now: float, drift: float) -> float:
        """The least that the offset can be at ``now``."""
        return self.t2 - self.t3 - drift * (now - self.t3)

    def most(self, now: float, drift: float) -> float:
        """The most that the offset can be at ``now``."""
        return self.t1 - self.t0 + drift * (now - self.t0)


class ClockEstimate:
    """The offset of the session clock from ours, with a bound on its error.

    The offset in use is set outright until the first burst of exchanges is over, and when it is
    off by more than a quarter of a second. From then on it only slews, so that instants never run
    backwards.
    """

    __slots__ = ("_exchanges", "_settled", "_start", "_target", "_used")

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque(maxlen=MAX_SAMPLES)
        self._used: float | None = None
        # The offset in use was `_used` at `_start` and makes for `_target` from there.
        self._start = 0.0
        self._target = 0.0
        self._settled = False

    @property
    def samples(self) -> int:
        """How many exchanges it rests on."""
        return len(self._exchanges)

    def offset_at(self, now: float) -> float | None:
        """What is added to our clock at ``now``; None before anything is known."""
        if self._used is None:
            return None
        reach = _SLEW * max(0.0, now - self._start)
        distance = self._target - self._used
        return self._used + max(-reach, min(reach, distance))

    def error_at(self, now: float) -> float | None:
        """The most that the offset in use can be wrong at ``now``; None before an exchange."""
        used = self.offset_at(now)
        if used is None or not self._exchanges:
            return None
        least, most = self._bounds(now, _WORST_DRIFT)
        return max(most - used, used - least, 0.0) + _NOISE_MS

    @property
    def jitter(self) -> float:
        """How much longer than the quickest a message takes (median, the worse direction)."""
        if not self._exchanges:
            return 0.0
        there = [exchange.t1 - exchange.t0 for exchange in self._exchanges]
        back = [exchange.t3 - exchange.t2 for exchange in self._exchanges]
        return max(median(there) - min(there), median(back) - min(back))

    def guess(self, server_time: float, now: float) -> None:
        """Take an instant that the server told at about ``now``, if nothing better is known."""
        if self._used is None:
            self._set(now, server_time - now)

    def observe(self, exchange: Exchange, now: float, *, burst: bool) -> None:
        """Learn from an exchange.

        Args:
            now: when that is, which may be long after its answer arrived: instants were read off
                meanwhile, and those that follow must not be earlier.
            burst: the first exchanges of a connection are still under way.
        """
        while self._exchanges and now - self._exchanges[0].t3 > MAX_AGE_MS:
            self._exchanges.popleft()
        self._exchanges.append(exchange)
        least, most = self._bounds(now, _WORST_DRIFT)
        if least > most:
            # A clock stepped, or stood still: what was true before says nothing now.
            self._exchanges = deque([exchange], maxlen=MAX_SAMPLES)
            least, most = self._bounds(now, _WORST_DRIFT)
        self._settled = self._settled or not burst
        target = self._middle(now, least, most)
        used = self.offset_at(now)
        if used is None or not self._settled or abs(target - used) > _STEP_MS:
            self._set(now, target)
            return
        if burst:
            # After a reconnect: the first few exchanges know less than what is in use, which
            # stays as long as they do not rule it out.
            target = max(least, min(most, used))
        self._used, self._start, self._target = used, now, target

    def forget_exchanges(self) -> None:
        """The next exchanges are with another server, whose clock may differ.

        The offset in use stays until they say otherwise.
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
