"""Latencies in buckets: millions of them in bounded memory, with percentiles to some per cent."""

import math

# A bucket is 2 ** (1 / 16) wide: what is told is wrong by 2.2 % at most.
_PER_OCTAVE = 16
_LEAST_MS = 0.001
_MOST = 32 * _PER_OCTAVE


class Histogram:
    """Counts latencies, milliseconds.

    Attributes:
        count: how many were added.
        longest: of these; exact.
    """

    __slots__ = ("_buckets", "count", "longest")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.longest = 0.0

    def add(self, latency_ms: float) -> None:
        """Count one; one that is not positive, by an error of clocks, as the shortest there is."""
        if latency_ms > _LEAST_MS:
            bucket = min(_MOST, int(math.log2(latency_ms / _LEAST_MS) * _PER_OCTAVE))
        else:
            bucket = 0
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        if latency_ms > self.longest:
            self.longest = latency_ms

    def percentile(self, share: float) -> float | None:
        """What ``share`` (0 to 1) of them do not exceed; None if there are none."""
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
        """The percentiles that are told; None if there are none."""
        if not self.count:
            return None
        shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
        told = {name: round(self.percentile(share) or 0.0, 3) for name, share in shares.items()}
        return told | {"max": round(self.longest, 3), "count": self.count}
