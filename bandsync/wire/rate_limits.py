"""Rate limits per connection and message type."""

from collections.abc import Mapping

RATES_PER_SECOND: Mapping[str, float] = {
    "position_sync": 50,
    "set_tempo": 10,
    "join_session": 2,
    "chat_message": 10,
}
OTHER_RATE_PER_SECOND = 20.0

# Tolerance for float noise: the last message of a full bucket is allowed.
_SLACK_S = 1e-9


class RateLimits:
    """One token bucket per message type, each holding one second's worth.

    A bucket is kept as one number, its theoretical arrival time (the GCRA of ITU-T I.371, the
    same as a token bucket that is refilled continuously).

    Args:
        factor: multiplies every rate; 0 lifts the limits.
    """

    __slots__ = ("_arrivals", "_factor")

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._arrivals: dict[str, float] = {}

    def allow(self, kind: str, now: float) -> bool:
        """Take a token for a message of type ``kind`` at ``now`` seconds, if there is one."""
        if not self._factor:
            return True
        rate = RATES_PER_SECOND.get(kind, OTHER_RATE_PER_SECOND) * self._factor
        interval = 1 / rate
        arrival = max(self._arrivals.get(kind, now), now)
        if arrival - now > max(1.0, interval) - interval + _SLACK_S:
            return False
        self._arrivals[kind] = arrival + interval
        return True


class AbuseCounter:
    """Counts events within a sliding minute, up to a limit.

    Args:
        limit: how many events within a minute are too many.
    """

    __slots__ = ("_limit", "_times")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: list[float] = []

    def too_many(self, now: float) -> bool:
        """Count one event at ``now`` seconds; True when it is the ``limit``-th in a minute."""
        self._times = [time for time in self._times if now - time < 60.0]
        self._times.append(now)
        return len(self._times) >= self._limit
