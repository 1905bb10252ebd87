"""Samples of the last ten minutes of the server, one per second."""

import math
from collections import deque
from collections.abc import Iterable
from itertools import takewhile
from time import process_time
from typing import Protocol

import trio

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session
from bandsync.ops.process import resident_bytes
from bandsync.ops.samples import Durations, Sample, State, Totals, packed, sample, unpacked
from bandsync.storage.manager import StorageManager

PERIOD_S = 1.0
KEPT = 600


class Observed(Protocol):
    """The server state that samples are taken of."""

    @property
    def boot_id(self) -> str:
        """Id of this process of the server."""

    @property
    def storage(self) -> StorageManager:
        """The storage of sessions."""

    @property
    def clock(self) -> ServerClock:
        """The session clock."""

    def now(self) -> float:
        """Session clock, milliseconds since the Unix epoch."""

    def connections(self) -> int:
        """Open WebSocket connections."""

    def members(self) -> int:
        """Members connected to this server."""

    def rooms(self) -> int:
        """Sessions with a room on this server."""

    def sessions(self) -> int:
        """Sessions in this server's memory, hosted or kept."""

    def hosted(self) -> Iterable[Session]:
        """The sessions with a room on this server."""


class Recorder:
    """Takes samples of a server and keeps the last `KEPT` of them.

    Attributes:
        commands: durations of commands in the current period.
        commits: durations of commits in the current period.
    """

    def __init__(self, counters: Counters) -> None:
        self.commands = Durations()
        self.commits = Durations()
        self._counters = counters
        self._lag_s = 0.0
        # As objects, ten minutes take half a megabyte, which looks like a leak while it fills up.
        self._samples: deque[bytes] = deque(maxlen=KEPT)
        self._latest = -math.inf

    def lag(self, seconds: float) -> None:
        """Record how late a timer fired."""
        self._lag_s = max(self._lag_s, seconds)

    def since(self, at: float | None = None) -> list[Sample]:
        """The samples, the oldest first.

        Args:
            at: only samples after this instant, milliseconds. An instant in the future belongs to
                an earlier setting of the clock: then all samples are returned.
        """
        if at is None or at > self._latest:
            return [unpacked(each) for each in self._samples]
        latest_first = map(unpacked, reversed(self._samples))
        return list(takewhile(lambda each: each.at > at, latest_first))[::-1]

    async def run(self, server: Observed) -> None:
        """Take a sample per period, for ever; missed periods are not made up for."""
        before = self._totals()
        while True:
            due = (math.floor(trio.current_time() / PERIOD_S) + 1) * PERIOD_S
            await trio.sleep_until(due)
            # Measure the lag here too: an idle server has no other timer.
            self.lag(trio.current_time() - due)
            after = self._totals()
            self._keep(
                sample(
                    before,
                    after,
                    _state(server),
                    command=self.commands.take(),
                    commit=self.commits.take(),
                    loop_lag_s=self._lag_s,
                )
            )
            self._lag_s = 0.0
            before = after

    def _keep(self, new: Sample) -> None:
        if new.at <= self._latest:
            # The clock was set back: the kept samples are from the old setting.
            self._samples.clear()
        self._samples.append(packed(new))
        self._latest = new.at

    def _totals(self) -> Totals:
        counters = self._counters
        return Totals(
            at_s=trio.current_time(),
            deliveries=counters.deliveries,
            received=counters.received,
            dropped=counters.dropped,
            slow_consumers=counters.slow_consumers,
            internal_errors=counters.errors["internal"],
            cpu_s=process_time(),
        )


def _state(server: Observed) -> State:
    storage = server.storage.report()
    clock = server.clock
    return State(
        at=server.now(),
        connections=server.connections(),
        members=server.members(),
        rooms=server.rooms(),
        sessions=server.sessions(),
        spread=_spread(server.hosted(), server.boot_id),
        mode=storage.mode,
        degraded=storage.degraded,
        listening=storage.listening,
        link_queue=storage.redis_status.outstanding,
        round_trip_ms=storage.round_trip_ms,
        clock_error_ms=clock.error_ms,
        clock_uncertainty_ms=clock.uncertainty_ms,
        memory_bytes=resident_bytes(),
    )


def _spread(sessions: Iterable[Session], boot_id: str) -> int:
    """The number of sessions with members that are connected to another server."""
    return sum(
        any(each.connected and each.boot_id != boot_id for each in session.members.values())
        for session in sessions
    )
