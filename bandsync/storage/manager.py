"""The storage in use: Redis while it can be used, memory otherwise (`bandsync/README.md`).

redis ──loss──▶ memory ──stable──▶ migrating ──last room across──▶ redis
▲                    │
└───────loss─────────┘

`StorageManager.run` is the supervising loop. `bandsync.storage.recovery_policy` decides when to try
again, `bandsync.storage.reporting` keeps what operators see.
"""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial

import trio
from redis.exceptions import RedisError
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.exception_leaves import leaves
from bandsync.model.session import Session
from bandsync.redis_link.errors import LossReason
from bandsync.redis_link.interfaces import Executor
from bandsync.settings import Settings
from bandsync.storage.base import Lost, RedisStatus, StorageType
from bandsync.storage.dependencies import Host, Redis
from bandsync.storage.era import Era, Loss, loss_of
from bandsync.storage.health import HealthCheck, NameTakenError
from bandsync.storage.history import History, Mode
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.recovery_policy import RecoveryPolicy
from bandsync.storage.redis import RedisStorage
from bandsync.storage.relay import Relay
from bandsync.storage.reporting import StorageReport, StorageReporter

# How long a migration waits for the first subscription. Sessions that were subscribed before they
# are read need no resync afterwards.
_SUBSCRIBE_S = 0.5


class StorageManager:
    """Uses Redis whenever it can be used, and knows where sessions are kept.

    Args:
        redis: None keeps sessions in memory for good.
        memory: sessions that are not in Redis, or not yet.
        health: checks each link.
        now: the session clock.
        recovery_seconds: receives the duration of each migration.

    Attributes:
        memory: see above.
        settled: set when Redis is in use, or the server may start without it.
        claiming: whether a check for another live server with our SERVER_ID is under way.
        name_taken: the server that uses our SERVER_ID; None if there is none.
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
        self.claiming = False
        self.name_taken: str | None = None
        self._settings = settings
        self._redis = redis
        self._health = health
        self._server_id = server_id
        self._event_ids = (f"{boot_id}-r{number:x}" for number in itertools.count(1))
        self._counters = counters
        self._log = log
        self._policy = RecoveryPolicy(settings)
        self._reporter = StorageReporter(
            lambda: None if redis is None else str(redis),
            auto_recover=settings.redis_auto_recover,
            now=now,
            counters=counters,
            recovery_seconds=recovery_seconds,
            log=log,
        )
        # The link of the current attempt; None between attempts.
        self._link: Executor | None = None
        # The current or the last era; None before the first.
        self._era: Era | None = None
        # Set when the server is about to end: try once more, without delays.
        self._hurry = trio.Event()
        # Set and replaced at each transition.
        self._transition = trio.Event()

    @property
    def era(self) -> Era | None:
        """The current era, in which sessions are opened; None in memory mode."""
        era = self._era
        return None if era is None or era.over else era

    @property
    def history(self) -> History:
        """The modes so far."""
        return self._reporter.history

    @property
    def mode(self) -> Mode:
        """State of the state machine."""
        return self._reporter.history.mode

    @property
    def awaited(self) -> bool:
        """Whether Redis is enabled, and to be used sooner or later."""
        return self._redis is not None

    @property
    def storage_type(self) -> StorageType:
        """Where sessions are kept; memory until the last one is in Redis."""
        return "redis" if self.mode == "redis" and self.era is not None else "memory"

    @property
    def degraded(self) -> bool:
        """Whether sessions are in memory although Redis is enabled."""
        return self.awaited and self.storage_type != "redis"

    @property
    def reason(self) -> str | None:
        """Why sessions are in memory, for operators; None while they are in Redis."""
        return self._reporter.reason(self.storage_type)

    def report(self) -> StorageReport:
        """The state at this instant, for operators."""
        link, era, reporter = self._link, self.era, self._reporter
        return StorageReport(
            mode=self.mode,
            since=self.history.since,
            storage_type=self.storage_type,
            awaited=self.awaited,
            degraded=self.degraded,
            reason=self.reason,
            loss=reporter.loss,
            gave_up=reporter.gave_up,
            redis_status=RedisStatus(
                connected=link is not None and link.usable,
                connection_attempts=reporter.attempts,
                address=None if self._redis is None else str(self._redis),
                outstanding=0 if link is None else link.outstanding,
            ),
            listening=era is not None and era.relay is not None and era.relay.listening,
            round_trip_ms=None if link is None else self._health.round_trip_ms,
            kept_in_memory=len(self.memory),
            migration=reporter.migration,
            last_failover=self.history.last_failover,
            last_recovery=self.history.last_recovery,
        )

    async def list_sessions(self) -> list[Session]:
        """All readable sessions. The state in memory takes precedence over that in Redis."""
        found: dict[str, Session] = {}
        era = self.era
        if era is not None:
            stored = await era.storage.list_sessions()
            if not isinstance(stored, Lost):
                found = {session.session_id: session for session in stored}
        found.update((session.session_id, session) for session in await self.memory.list_sessions())
        return list(found.values())

    async def hand_over(self) -> None:
        """Before the server ends: migrate what is in memory if Redis can be used, trying once."""
        self._hurry.set()
        while self.degraded and len(self.memory) and not self._reporter.stopped_trying:
            await self._transition.wait()
        if self.era is not None and self._link is not None:
            with contextlib.suppress(RedisError):
                await self._health.withdraw(self._link)

    async def run(self, host: Host, on_transition: Callable[[], None]) -> None:
        """Use Redis whenever it can be used, for ever.

        Args:
            on_transition: called after each failover and recovery; never blocks.
        """
        if self._redis is None:
            self.settled.set()
            return
        policy = self._policy
        while True:
            self._reporter.attempts += 1
            used = await self._attempt(self._redis, host, on_transition)
            policy.attempt_ended(used=used)
            if policy.may_start_without or self.name_taken is not None:
                self.settled.set()
            if policy.gives_up:
                self._stop_trying()
                self._log.warning("storage.gave_up", hint="REDIS_AUTO_RECOVER=false")
                return
            if self._hurry.is_set() and not used:
                self._stop_trying()
                return
            with trio.move_on_after(policy.delay_s):
                await self._hurry.wait()

    async def _attempt(self, redis: Redis, host: Host, on_transition: Callable[[], None]) -> bool:
        """Connect, and use Redis until it is lost; False if it was never in use."""
        era: Era | None = None
        loss: Loss | None = None
        link = redis.link()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                self._link = link
                await self._claim_name(link)
                await self._prove_stable(link)
                era = await self._begin_era(redis, link, host, nursery.cancel_scope.cancel)
                nursery.start_soon(self._watch, link, era)
                await self._start_relay(nursery, era)
                await self._migrate(era, host, on_transition)
        except* RedisError as group:
            loss = loss_of(list(leaves(group)))
        finally:
            self._link = None
            if era is not None:
                era.end(loss or Loss("closed", "the server stops"))
        if era is None:
            self._reporter.unreachable(loss or Loss("reset", "the connection was closed"))
            return False
        assert era.loss is not None
        self._fail_over(era.loss)
        on_transition()
        return True

    async def _claim_name(self, link: Executor) -> None:
        """Make sure that no other live server uses our SERVER_ID.

        Raises:
            NameTakenError: another one does.
            RedisError: Redis cannot be used.
        """
        self.claiming = True
        try:
            await self._health.claim(link)
            self.name_taken = None
        except NameTakenError as error:
            self.name_taken = str(error)
            raise
        finally:
            self.claiming = False

    async def _prove_stable(self, link: Executor) -> None:
        checks = self._policy.required_checks(sessions_in_memory=len(self.memory) > 0)
        await self._health.prove(link, checks, self._hurry)

    async def _begin_era(
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
        await storage.check_scripts()
        era = Era(storage, cancel)
        era.relay = Relay(
            partial(redis.subscriber, link),
            redis.keys,
            hosted=lambda: host.rooms,
            on_message=host.receive,
            resync=partial(host.compare, era),
            counters=self._counters,
            log=self._log,
        )
        self._era = era
        self._reporter.era_began()
        self._notify_transition()
        return era

    async def _watch(self, link: Executor, era: Era) -> None:
        """Check the health of Redis for ever.

        Raises:
            RedisError: Redis cannot be used any more.
        """
        try:
            await self._health.watch(link)
        except RedisError as error:
            # First the era, then the link: callers of a closed link know no reason but "reset".
            era.end(loss_of([error]))
            raise

    async def _start_relay(self, nursery: trio.Nursery, era: Era) -> None:
        assert era.relay is not None
        nursery.start_soon(era.relay.run)
        with trio.move_on_after(_SUBSCRIBE_S):
            await era.relay.tried.wait()

    async def _migrate(self, era: Era, host: Host, on_transition: Callable[[], None]) -> None:
        """Migrate all sessions to Redis; then Redis is in use again."""
        started = trio.current_time()
        migration = self._reporter.migrating(len({*host.rooms, *self.memory.ids()}))

        def moved() -> None:
            migration.moved += 1

        await host.migrate(era, moved)
        if era.over:
            return
        finished = trio.current_time()
        self._reporter.recovered(
            migrated=migration.moved,
            migration_s=finished - started,
            outage_s=self._policy.recovered(finished),
        )
        self._notify_transition()
        self.settled.set()
        on_transition()

    def _fail_over(self, loss: Loss) -> None:
        migrating = self.mode == "migrating"
        lasted_s = self._policy.lost(trio.current_time(), migrating=migrating)
        self._reporter.failed_over(loss, lasted_s)
        self._notify_transition()

    def _stop_trying(self) -> None:
        self._reporter.stopped_trying = True
        self._notify_transition()

    def _notify_transition(self) -> None:
        self._transition.set()
        self._transition = trio.Event()
