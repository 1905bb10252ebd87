"""Jittered exponential backoff."""

from redis.backoff import EqualJitterBackoff

# The cap is reached long before. Beyond a thousand doublings a float overflows.
_MAX_DOUBLINGS = 16


class Backoff(EqualJitterBackoff):
    """Exponential backoff, half of it random, for any number of failures; seconds."""

    def compute(self, failures: int) -> float:
        """The delay after this many failures in a row."""
        return super().compute(min(failures, _MAX_DOUBLINGS))
