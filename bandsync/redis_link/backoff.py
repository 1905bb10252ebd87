"""How long to wait before the next attempt at what failed."""

from redis.backoff import EqualJitterBackoff

# More change nothing, and after a thousand the power of two is no float any more.
_MAX_DOUBLINGS = 16


class Backoff(EqualJitterBackoff):
    """Exponential, half of it random, for any number of failures; seconds."""

    def compute(self, failures: int) -> float:
        """The wait after so many failures in a row."""
        return super().compute(min(failures, _MAX_DOUBLINGS))
