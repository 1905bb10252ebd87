"""The health watcher: whether Redis lives and takes writes, how far it is, and what time it has."""

import math
from collections.abc import Callable
from importlib import resources

import trio
from redis.exceptions import RedisError

from bandsync.model.clock import ServerClock
from bandsync.redis_link.interfaces import Executor
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.script import Script
from bandsync.storage.base import Presence, Unreadable
from bandsync.storage.records import read_presence, write_presence

# Presence: protocol.md section 8.
PRESENCE_PERIOD_S = 3.0
PRESENCE_EXPIRY_MS = 10_000
# A clock that is set by one answer is wrong by half of its round trip, however slow that was.
_FIRST_LOOKS = 3
_CLAIM_POLL_S = 0.25

_PRESENCE = Script(resources.files("bandsync").joinpath("storage", "presence.lua").read_text())


class NameTakenError(RedisError):
    """Another live server has our name; the message says which."""


class HealthCheck:
    """Asks Redis at regular intervals, and takes the time from it.

    Args:
        interval_s: between two checks, seconds.
        timeout_s: how long the link lets an answer take, seconds.
        presence_key: what a check writes.
        presence: its value, and who we are.
        is_gone: whether the process of an entry has certainly ended.
        serving: whether anybody has been told an instant yet.

    Attributes:
        round_trip_ms: of the last check; None before the first.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        clock: ServerClock,
        presence_key: str,
        presence: Callable[[], Presence],
        is_gone: Callable[[Presence], bool],
        serving: Callable[[], bool],
    ) -> None:
        self.round_trip_ms: float | None = None
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._presence_key = presence_key
        self._presence = presence
        self._is_gone = is_gone
        self._serving = serving
        self._written = -PRESENCE_PERIOD_S
        self._owned = False
        self._reference: RedisAddress | None = None

    async def claim(self, link: Executor) -> None:
        """Make sure that no other live server has our name.

        An entry that an earlier life of ours left behind is not refreshed, and if that was on this
        machine it need not be waited for.

        Raises:
            NameTakenError: somebody refreshed it.
            RedisError: Redis cannot be used.
        """
        self._owned = False
        mine = self._presence().boot_id
        deadline = trio.current_time() + PRESENCE_PERIOD_S + self._timeout_s
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

    async def give_up(self, link: Executor) -> None:
        """Take our presence back: we are about to end."""
        self._written = math.inf
        await link.execute("DEL", self._presence_key)

    async def prove(self, link: Executor, checks: int, hurry: trio.Event) -> None:
        """Return after so many checks in a row, each with a write: a full Redis answers PING.

        Args:
            hurry: once set, one is enough.

        Raises:
            RedisError: one of them failed.
        """
        self._clock.reset_filter()
        for _ in range(_FIRST_LOOKS):
            await self._check(link, write=False)
        for number in range(checks):
            if number:
                with trio.move_on_after(self._interval_s):
                    await hurry.wait()
                    return
            await self._check(link, write=True)

    async def watch(self, link: Executor) -> None:
        """Check for ever.

        Raises:
            RedisError: Redis cannot be used any more.
        """
        while True:
            await trio.sleep(min(self._interval_s, PRESENCE_PERIOD_S))
            due = trio.current_time() - self._written >= PRESENCE_PERIOD_S
            await self._check(link, write=due)

    async def _check(self, link: Executor, *, write: bool) -> None:
        if link.address != self._reference:
            # Of a Cluster another node answers by now, with a clock of its own.
            self._reference = link.address
            self._clock.reset_filter()
        sent = trio.current_time()
        # The link has the deadline: it knows our own stalls from the silence of Redis.
        replies = await link.execute_all([("PING",), ("TIME",)])
        received = trio.current_time()
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        if write:
            await self._write(link)
            self._written = sent
        self.round_trip_ms = (received - sent) * 1000
        time = replies[1]
        if isinstance(time, list) and len(time) == 2:
            seconds, microseconds = time
            if isinstance(seconds, bytes) and isinstance(microseconds, bytes):
                reference_ms = int(seconds) * 1000 + int(microseconds) / 1000
                self._clock.observe(sent, received, reference_ms, serving=self._serving())

    async def _write(self, link: Executor) -> None:
        """Refresh our presence.

        Raises:
            NameTakenError: of two servers of one name that started at the same time we yield.
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
