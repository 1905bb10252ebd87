"""The session clock, as estimated by a client."""

import trio

from bandsync.client.estimate import ClockEstimate, Exchange


def local_ms() -> float:
    """The local clock (Trio's), milliseconds; its zero is arbitrary."""
    return trio.current_time() * 1000.0


class SessionClock:
    """The clock that all members of a session share.

    After the first seconds it never runs backwards, unless the estimate turns out to be wrong by
    more than a quarter of a second.
    """

    __slots__ = ("_estimate",)

    def __init__(self) -> None:
        self._estimate = ClockEstimate()

    def now(self) -> float:
        """The current instant: milliseconds since the Unix epoch on the session clock.

        Before the first connection it is the local clock.
        """
        now = local_ms()
        return now + (self._estimate.offset_at(now) or 0.0)

    @property
    def offset_ms(self) -> float | None:
        """The session clock minus the local one, milliseconds; None before the first connection."""
        return self._estimate.offset_at(local_ms())

    @property
    def error_ms(self) -> float | None:
        """Upper bound on the error of `now`, milliseconds, for any network delays.

        None until the first exchange on the current connection.
        """
        return self._estimate.error_at(local_ms())

    @property
    def samples(self) -> int:
        """The number of exchanges in use."""
        return self._estimate.samples

    def to_local(self, instant: float) -> float:
        """Convert an instant of the session clock to Trio's clock, in seconds.

        ``await trio.sleep_until(clock.to_local(instant))`` sleeps until then, according to the
        current estimate.
        """
        return (instant - (self.offset_ms or 0.0)) / 1000.0

    @property
    def probe_interval_s(self) -> float:
        """Seconds between exchanges: the more jitter, the shorter."""
        return 30.0 / max(15.0, min(100.0, self._estimate.jitter))

    def greet(self, server_time: float) -> None:
        """Start with a new connection, whose ``welcome`` has the server's time."""
        self._estimate.forget_exchanges()
        self._estimate.guess(server_time, local_ms())

    def observe(self, t0: float, t1: float, t2: float, t3: float, *, burst: bool) -> None:
        """Update the estimate with a ``clock_sync`` exchange; see `Exchange`."""
        self._estimate.observe(Exchange(t0, t1, t2, t3), local_ms(), burst=burst)
