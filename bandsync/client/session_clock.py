"""The session clock, as a client knows it."""

import trio

from bandsync.client.estimate import ClockEstimate, Exchange


def local_ms() -> float:
    """Our own clock: Trio's, in milliseconds. Its zero means nothing."""
    return trio.current_time() * 1000.0


class SessionClock:
    """The clock that all members of a session share: `now` is the instant that counts.

    It never runs backwards after the first seconds, except when the server's clock turns out to be
    more than a quarter of a second elsewhere.
    """

    __slots__ = ("_estimate",)

    def __init__(self) -> None:
        self._estimate = ClockEstimate()

    def now(self) -> float:
        """The instant now: milliseconds since the Unix epoch on the session clock.

        Before the first connection there is nothing to go by, and it is our own clock.
        """
        now = local_ms()
        return now + (self._estimate.offset_at(now) or 0.0)

    @property
    def offset_ms(self) -> float | None:
        """The session clock minus ours (`local_ms`); None before the first connection."""
        return self._estimate.offset_at(local_ms())

    @property
    def error_ms(self) -> float | None:
        """The most that `now` can be wrong, whatever the network does, in milliseconds.

        None until the first exchange on the present connection.
        """
        return self._estimate.error_at(local_ms())

    @property
    def samples(self) -> int:
        """How many exchanges this rests on."""
        return self._estimate.samples

    def to_local(self, instant: float) -> float:
        """When an instant of the session clock is on Trio's clock, in seconds.

        ``await trio.sleep_until(clock.to_local(instant))`` sleeps until then, as well as it is
        known now.
        """
        return (instant - (self.offset_ms or 0.0)) / 1000.0

    @property
    def probe_interval_s(self) -> float:
        """How long to wait between exchanges: the more the network jitters, the shorter."""
        return 30.0 / max(15.0, min(100.0, self._estimate.jitter))

    def greet(self, server_time: float) -> None:
        """Begin with a new connection, whose server tells the time."""
        self._estimate.forget_exchanges()
        self._estimate.guess(server_time, local_ms())

    def observe(self, t0: float, t1: float, t2: float, t3: float, *, burst: bool) -> None:
        """Learn from a `clock_sync` exchange; see `Exchange`."""
        self._estimate.observe(Exchange(t0, t1, t2, t3), local_ms(), burst=burst)
