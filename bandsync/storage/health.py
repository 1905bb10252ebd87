"""The health check of Redis: liveness, writes, round trip, and the time for the session clock."""

import math
from collections.abc import Callable
from importlib import resources

import trio
from redis.exceptions import RedisError

from bandsync.model.clock import ServerClock
from bandsync.redis_link.interfaces import Executor
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.script import Script
from bandsync.redis_link.timeouts import Timeouts
from bandsync.storage.base import Presence, Unreadable
from bandsync.storage.records import read_presence, write_presence

# Presence: see `bandsync/wire/PROTOCOL.md`.
PRESENCE_PERIOD_S = 3.0
PRESENCE_EXPIRY_MS = 10_000
# The clock error of one answer is up to half of its round trip, so several answers are compared.
_FIRST_CHECKS = 3
_CLAIM_POLL_S = 0.25

_PRESENCE = Script(resources.files("bandsync").joinpath("storage", "presence.lua").read_text())


class NameTakenError(RedisError):
    """Another live server uses our SERVER_ID; the message names it."""


class HealthCheck:
    """Checks Redis at regular intervals, and disciplines the session clock to its TIME.

    Args:
        timeouts: interval and deadline of a check.
        clock: the session clock.
        presence_key: key of this server's presence entry, which a check writes.
        presence: the current presence entry.
        is_gone: whether the process of an entry has certainly ended.
        serving: whether a client may have seen a timestamp: then the clock is slewed, not stepped.

    Attributes:
        round_trip_ms: round trip of the last check; None before the first.
    """

    def __init__(
        self,
        *,
        timeouts: Timeouts,
        clock: ServerClock,
        presence_key: str,
        presence: Callable[[], Presence],
        is_gone: Callable[[Presence], bool],
        serving: Callable[[], bool],
    ) -> None:
        self.round_trip_ms: float | None = None
        self._timeouts = timeouts
        self._clock = clock
        self._presence_key = presence_key
        self._presence = presence
        self._is_gone = is_gone
        self._serving = serving
        # When the presence entry was written last.
        self._written_at = -PRESENCE_PERIOD_S
        # Whether the presence entry is ours since `claim`.
        self._owned = False
        # The server whose TIME the clock follows.
        self._time_source: RedisAddress | None = None

    async def claim(self, link: Executor) -> None:
        """Make sure that no other live server uses our SERVER_ID.

        The entry of an earlier process of this server is not refreshed any more, so wait one
        period. If that process ran on this machine and has ended, there is no wait.

        Raises:
            NameTakenError: another process refreshed the entry.
            RedisError: Redis cannot be used.
        """
        self._owned = False
        mine = self._presence().boot_id
        deadline = trio.current_time() + PRESENCE_PERIOD_S + self._timeouts.silence_s
        before_ms = float(PRESENCE_EXPIRY_MS)
        while True:
            value = await link.execute("GET", self._presence_key)
            left_ms = await link.execute("PTTL", self._presence_key)
            if value is None or not isinstance(left_ms, int):
                return
            entry = read_presence(value)
            if isinstance(entry, Presence) and (entry.boot_id == mine or self._is_gone(entry)):
                return
            if left_ms > before_ms:
                raise _taken(entry)
            before_ms = left_ms
            if trio.current_time() >= deadline:
                return
            await trio.sleep(_CLAIM_POLL_S)

    async def withdraw(self, link: Executor) -> None:
        """Delete our presence entry, before the process ends."""
        self._written_at = math.inf
        await link.execute("DEL", self._presence_key)

    async def prove(self, link: Executor, checks: int, hurry: trio.Event) -> None:
        """Return after so many checks in a row, each with a write: a full Redis still answers PING.

        Args:
            hurry: once set, one check is enough.

        Raises:
            RedisError: a check failed.
        """
        self._clock.reset_filter()
        for _ in range(_FIRST_CHECKS):
            await self._check(link, write=False)
        for number in range(checks):
            if number:
                with trio.move_on_after(self._timeouts.health_interval_s):
                    await hurry.wait()
                    return
            await self._check(link, write=True)

    async def watch(self, link: Executor) -> None:
        """Check at each interval, for ever.

        Raises:
            RedisError: Redis cannot be used any more.
        """
        while True:
            await trio.sleep(min(self._timeouts.health_interval_s, PRESENCE_PERIOD_S))
            due = trio.current_time() - self._written_at >= PRESENCE_PERIOD_S
            await self._check(link, write=due)

    async def _check(self, link: Executor, *, write: bool) -> None:
        if link.address != self._time_source:
            # Another node of a Cluster, with a clock of its own.
            self._time_source = link.address
            self._clock.reset_filter()
        sent = trio.current_time()
        # The link enforces the deadline: it tells stalls of this process from silence of Redis.
        replies = await link.execute_all([("PING",), ("TIME",)])
        received = trio.current_time()
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        if write:
            await self._write_presence(link)
            self._written_at = sent
        self.round_trip_ms = (received - sent) * 1000
        time = replies[1]
        if isinstance(time, list) and len(time) == 2:
            seconds, microseconds = time
            if isinstance(seconds, bytes) and isinstance(microseconds, bytes):
                reference_ms = int(seconds) * 1000 + int(microseconds) / 1000
                self._clock.observe(sent, received, reference_ms, serving=self._serving())

    async def _write_presence(self, link: Executor) -> None:
        """Refresh our presence entry.

        Raises:
            NameTakenError: two servers with this SERVER_ID started at once, and we yield.
        """
        mine = self._presence()
        arguments = (mine.boot_id, write_presence(mine), PRESENCE_EXPIRY_MS, int(self._owned))
        rival = await _PRESENCE.execute(link, (self._presence_key,), arguments)
        if rival is not None:
            raise _taken(read_presence(rival))
        self._owned = True


def _taken(entry: Presence | Unreadable) -> NameTakenError:
    where = "of another version" if isinstance(entry, Unreadable) else f"at {entry.address}"
    return NameTakenError(f"another server that is alive, {where}, has the same SERVER_ID")
