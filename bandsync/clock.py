"""The session clock: instants that every member can share.

Wall time once, at the start, carried forward by the monotonic clock, so that it never steps
backwards (design.md section 6).
"""

from msgspec import Struct


class SessionClock(Struct, frozen=True):
    """Maps the monotonic clock to instants.

    Attributes:
        wall_ms: wall time at the start, milliseconds since the Unix epoch.
        monotonic_s: what the monotonic clock showed at that moment, seconds.
    """

    wall_ms: float
    monotonic_s: float

    def at(self, monotonic_s: float) -> float:
        """The instant, in milliseconds since the Unix epoch, at a monotonic time in seconds."""
        return self.wall_ms + (monotonic_s - self.monotonic_s) * 1000
