"""Which storage is in use: Redis while it can be used, memory otherwise (design.md section 5).

redis ──loss──▶ memory ──stable──▶ migrating ──last room across──▶ redis
▲                    │
└───────loss─────────┘
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import trio
from redis.exceptions import RedisError
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.exception_leaves import leaves
from bandsync.model.session import Session
from bandsync.redis_link.backoff import Backoff
from bandsync.redis_link.errors import LossReason, loss_reason
from bandsync.redis_link.interfaces import Executor, Listener
from bandsync.settings import Settings
from bandsync.storage.base import Lost, RedisStatus, StorageType
from bandsync.storage.era import Era, Loss
from bandsync.storage.health import HealthCheck, NameTakenError
from bandsync.storage.history import Failover, History, Migration, Mode, Recovery
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.storage.relay import Relay

# Redis is used again after so many health checks in a row, each with a write.
STABLE_CHECKS = 3
# A loss so soon after a recovery doubles what is asked for next time, up to MAX_STABLE_S.
FLAPPING_S = 60.0
MAX_STABLE_S = 30.0
MAX_RETRY_DELAY_S = 5.0
_SUBSCRIBED_S = 0.5


class Redis(Protocol):
    """How to reach Redis. As a text it says where that is, without secrets."""

    @property
    def keys(self) -> Keys:
        """The names of everything there."""

    def link(self) -> Executor:
        """A link for one attempt."""

    def subscriber(self, link: Executor, heard: Callable[[bytes, bytes], None]) -> Listener:
        """A subscriber beside ``link``, that calls ``heard`` with each channel and message."""


class Host(Protocol):
    """Who hosts sessions here."""

    @property
    def rooms(self) -> Mapping[str, object]:
        """What is hosted, by session id."""

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        """Bring all sessions of this server to Redis; tells of each one."""

    async def compare(self, era: Era) -> None:
        """Catch up with what was committed unheard."""

    def hear(self, session_id: str, payload: bytes) -> None:
        """Take a message of a session's channel, without waiting."""


class StorageManager:
    """Opens Redis, watches it, and says where sessions are kept.

    Args:
        redis: None keeps sessions in memory for good.
        health: looks after each link.
        now: the session clock.

    Attributes:
        memory: sessions that are not in Redis, or not yet.
        history: the modes so far.
        settled: set when Redis is in use, or has failed often enough to start without it.
        claiming: whether it is being found out if another live server has our name.
        name_taken: who has it; None if nobody.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Redis | None,
        *,
        memory: MemoryStorage,
        health: HealthCheck,
        server_id: str,
        boot_id: str,
        now: Callable[[], float],
        counters: Counters,
        recovery_seconds: Callable[[float], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.memory = memory
        self.settled = trio.Event()
        self.history = History("memory (disabled)" if redis is None else "memory", now())
        self.migration: Migration | None = None
        self.claiming = False
        self.name_taken: str | None = None
        self.attempts = 0
        self._settings = settings
        self._redis = redis
        self._health = health
        self._server_id = server_id
        self._event_ids = (f"{boot_id}-r{number:x}" for number in itertools.count(1))
        self._now = now
        self._counters = counters
        self._recovery_seconds = recovery_seconds
        self._log = log
        self._backoff = Backoff(MAX_RETRY_DELAY_S, settings.redis_retry_delay_on_failure / 1000)
        self._link: Executor | None = None
        self._era: Era | None = None
        self._loss: Loss | None = None
        self._lost_at: float | None = None
        self._recovered_at: float | None = None
        self._flaps = 0
        self._gave_up = False
        self._hurry = trio.Event()
        self._transition = trio.Event()

    @property
    def era(self) -> Era | None:
        """The era of Redis that sessions are opened in; None in memory mode."""
        era = self._era
        return None if era is None or era.over else era

    @property
    def mode(self) -> Mode:
        """Where the state machine is."""
        return self.history.mode

    @property
    def awaited(self) -> bool:
        """Whether Redis is to be used, sooner or later."""
        return self._redis is not None

    @property
    def storage_type(self) -> StorageType:
        """Where the sessions are kept; memory until the last one is in Redis."""
        return "redis" if self.mode == "redis" and self.era is not None else "memory"

    @property
    def degraded(self) -> bool:
        """Whether this is not the storage that was asked for."""
        return self.awaited and self.storage_type != "redis"

    @property
    def reason(self) -> str | None:
        """Why sessions are in memory, for operators; None while they are in Redis."""
        if self._redis is None:
            return "REDIS_ENABLED=false"
        if self.storage_type == "redis":
            return None
        if self.mode == "migrating":
            return "sessions are on their way back to Redis"
        if self._loss is None:
            return f"not connected to {self._redis} yet"
        if self.gave_up:
            return f"{self._loss}; REDIS_AUTO_RECOVER=false: restart to use Redis again"
        return str(self._loss)

    @property
    def loss(self) -> Loss | None:
        """Why Redis could not be used when it was tried last; None if it always could."""
        return self._loss

    @property
    def gave_up(self) -> bool:
        """Whether Redis is not tried again because that is the setting."""
        return self._gave_up and not self._settings.redis_auto_recover

    @property
    def redis_status(self) -> RedisStatus:
        """How the link is."""
        link = self._link
        return RedisStatus(
            connected=link is not None and link.usable,
            connection_attempts=self.attempts,
            address=None if self._redis is None else str(self._redis),
            outstanding=0 if link is None else link.outstanding,
        )

    @property
    def listening(self) -> bool:
        """Whether changes of other servers are heard as they happen."""
        era = self.era
        return era is not None and era.relay is not None and era.relay.listening

    @property
    def round_trip_ms(self) -> float | None:
        """Of the last health check; None while there is no link."""
        return None if self._link is None else self._health.round_trip_ms

    async def list_sessions(self) -> list[Session]:
        """All sessions that can be had, those in memory before what Redis has of them."""
        found: dict[str, Session] = {}
        era = self.era
        if era is not None:
            stored = await era.storage.list_sessions()
            if not isinstance(stored, Lost):
                found = {session.session_id: session for session in stored}
        found.update((session.session_id, session) for session in await self.memory.list_sessions())
        return list(found.values())

    async def hand_over(self) -> None:
        """Before the end, bring what is in memory to Redis if it can be had; try once."""
        self._hurry.set()
        while self.degraded and len(self.memory) and not self._gave_up:
            await self._transition.wait()
        if self.era is not None and self._link is not None:
            with contextlib.suppress(RedisError):
                await self._health.give_up(self._link)

    async def run(self, host: Host, tell: Callable[[], None]) -> None:
        """Use Redis whenever it can be used, for ever.

        Args:
            tell: called after each transition, without waiting.
        """
        if self._redis is None:
            self.settled.set()
            return
        settings = self._settings
        failures = 0
        enough = settings.redis_max_retries + 1 if settings.redis_required else 1
        while True:
            self.attempts += 1
            used = await self._use(host, tell)
            failures = 0 if used else failures + 1
            if failures >= enough or self.name_taken is not None:
                self.settled.set()
            slow = failures > settings.redis_max_retries
            if not settings.redis_auto_recover and (used or slow):
                self._give_up()
                self._log.warning("storage.gave_up", hint="REDIS_AUTO_RECOVER=false")
                return
            if self._hurry.is_set() and not used:
                self._give_up()
                return
            with trio.move_on_after(MAX_RETRY_DELAY_S if slow else self._backoff.compute(failures)):
                await self._hurry.wait()

    async def _use(self, host: Host, tell: Callable[[], None]) -> bool:
        """Use Redis until it is lost; False if it could not be used at all."""
        assert self._redis is not None
        link = self._redis.link()
        era: Era | None = None
        loss: Loss | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                self._link = link
                await self._claim(link)
                await self._health.prove(link, self._checks_wanted(), self._hurry)
                era = await self._begin(self._redis, link, host, nursery.cancel_scope.cancel)
                nursery.start_soon(self._watch, link, era)
                assert era.relay is not None
                nursery.start_soon(era.relay.run)
                # What is subscribed before it is read need not be compared afterwards.
                with trio.move_on_after(_SUBSCRIBED_S):
                    await era.relay.tried.wait()
                await self._bring_back(era, host, tell)
        except* RedisError as group:
            loss = _loss(list(leaves(group)))
        finally:
            self._link = None
            if era is not None:
                era.end(loss or Loss("closed", "the server stops"))
        if era is None:
            self._fail(loss or Loss("reset", "the connection was closed"))
            return False
        assert era.loss is not None
        self._fail_over(era.loss)
        tell()
        return True

    async def _watch(self, link: Executor, era: Era) -> None:
        """Watch its health, for ever.

        Raises:
            RedisError: Redis cannot be used any more.
        """
        try:
            await self._health.watch(link)
        except RedisError as error:
            # Before the link is closed for it: its callers would tell of that only.
            era.end(_loss([error]))
            raise

    async def _claim(self, link: Executor) -> None:
        """Be the only live server of our name, or do not use Redis."""
        self.claiming = True
        try:
            await self._health.claim(link)
            self.name_taken = None
        except NameTakenError as error:
            self.name_taken = str(error)
            raise
        finally:
            self.claiming = False

    def _checks_wanted(self) -> int:
        if self._lost_at is None and not len(self.memory):
            # Nothing depends on it yet.
            return 1
        checks = STABLE_CHECKS << min(self._flaps, 16)
        interval_s = self._settings.redis_health_interval_ms / 1000
        return max(STABLE_CHECKS, min(checks, round(MAX_STABLE_S / interval_s)))

    async def _begin(
        self, redis: Redis, link: Executor, host: Host, cancel: Callable[[], None]
    ) -> Era:
        """From now on sessions are opened in Redis."""

        def on_loss(reason: LossReason, error: RedisError) -> None:
            era.end(Loss(reason, str(error)))

        storage = RedisStorage(
            link,
            redis.keys,
            ttl_s=self._settings.redis_ttl,
            server_id=self._server_id,
            event_ids=self._event_ids,
            on_loss=on_loss,
        )
        await storage.rehearse()
        era = Era(storage, cancel)
        era.relay = Relay(
            partial(redis.subscriber, link),
            redis.keys,
            hosted=lambda: host.rooms,
            heard=host.hear,
            catch_up=partial(host.compare, era),
            counters=self._counters,
            log=self._log,
        )
        self.attempts = 0
        self._era = era
        self.history.enter("migrating", self._now())
        self._news()
        return era

    async def _bring_back(self, era: Era, host: Host, tell: Callable[[], None]) -> None:
        """Migrate; afterwards Redis is in use again."""
        started = trio.current_time()
        migration = self.migration = Migration(len({*host.rooms, *self.memory.ids()}))
        self._log.info("storage.migrating", sessions=migration.total)

        def moved() -> None:
            migration.moved += 1

        await host.migrate(era, moved)
        if era.over:
            return
        finished = trio.current_time()
        outage_s = None if self._lost_at is None else finished - self._lost_at
        self.history.recover(
            Recovery(
                at=self._now(),
                outage_ms=None if outage_s is None else outage_s * 1000,
                migration_ms=(finished - started) * 1000,
                sessions=migration.moved,
            )
        )
        self.migration = None
        self._recovered_at = finished
        self._recovery_seconds(finished - started)
        self._news()
        self.settled.set()
        self._log.info(
            "storage.recovered" if outage_s is not None else "storage.connected",
            address=str(self._redis),
            sessions=migration.moved,
            outage_s=None if outage_s is None else round(outage_s, 3),
            migration_s=round(finished - started, 3),
        )
        tell()

    def _fail(self, loss: Loss) -> None:
        """Redis could not be reached, or not used."""
        if self._loss is None or self._loss.reason != loss.reason or self.attempts == 1:
            self._log.warning(
                "storage.unreachable",
                address=str(self._redis),
                reason=loss.reason,
                detail=loss.detail,
                attempts=self.attempts,
            )
        self._loss = loss

    def _fail_over(self, loss: Loss) -> None:
        """Redis was in use and is lost."""
        now = trio.current_time()
        lasted_s = None if self._recovered_at is None else now - self._recovered_at
        # The first era of a server ends no flap: nothing had been lost before.
        flapped = self.mode == "migrating" or (lasted_s is not None and lasted_s < FLAPPING_S)
        self._flaps = self._flaps + 1 if flapped and self._lost_at is not None else 0
        if self._lost_at is None or self.mode == "redis":
            self._lost_at = now
        self._loss = loss
        self.migration = None
        self._counters.failovers[loss.reason] += 1
        self.history.fail_over(Failover(self._now(), loss.reason, loss.detail))
        self._news()
        self._log.warning(
            "storage.failover",
            address=str(self._redis),
            reason=loss.reason,
            detail=loss.detail,
            lasted_s=None if lasted_s is None else round(lasted_s, 3),
        )

    def _give_up(self) -> None:
        self._gave_up = True
        self._news()

    def _news(self) -> None:
        self._transition.set()
        self._transition = trio.Event()


def _loss(errors: list[RedisError]) -> Loss:
    """What a nursery's Redis errors say; the first that names a reason."""
    for error in errors:
        if isinstance(error, NameTakenError):
            return Loss("name_taken", str(error))
        reason = loss_reason(error)
        if reason is not None:
            return Loss(reason, str(error))
    # An error reply that says nothing of the sort: this Redis lacks, or forbids, what we need.
    return Loss("unsupported", str(errors[0]))
