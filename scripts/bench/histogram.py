"""Latencies in buckets: millions of them in bounded memory. Percentiles have a small error."""

import math

# A bucket is 2 ** (1 / 16) wide: the error of a percentile is at most 2.2 %.
_PER_OCTAVE = 16
_LEAST_MS = 0.001
_MOST = 32 * _PER_OCTAVE


class Histogram:
    """Counts latencies, milliseconds.

    Attributes:
        count: number of latencies.
        longest: the largest one, exact.
    """

    __slots__ = ("_buckets", "count", "longest")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.longest = 0.0

    def add(self, latency_ms: float) -> None:
        """Count a latency. One that a clock error made negative counts as the shortest."""
        if latency_ms > _LEAST_MS:
            bucket = min(_MOST, int(math.log2(latency_ms / _LEAST_MS) * _PER_OCTAVE))
        else:
            bucket = 0
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        if latency_ms > self.longest:
            self.longest = latency_ms

    def percentile(self, share: float) -> float | None:
        """The value that ``share`` (0 to 1) of them do not exceed; None without any."""
        if not self.count:
            return None
        wanted = min(self.count, math.floor(share * self.count) + 1)
        for bucket in sorted(self._buckets):
            wanted -= self._buckets[bucket]
            if wanted <= 0:
                middle = _LEAST_MS * 2 ** ((bucket + 0.5) / _PER_OCTAVE)
                return min(middle, self.longest)
        raise AssertionError("the buckets hold what was counted")

    def spread(self) -> dict[str, float] | None:
        """The usual percentiles; None without any latency."""
        if not self.count:
            return None
        shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
        spread = {name: round(self.percentile(share) or 0.0, 3) for name, share in shares.items()}
        return spread | {"max": round(self.longest, 3), "count": self.count}
