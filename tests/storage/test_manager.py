"""Which storage is in use, when: the state machine, on virtual time and a Redis that obeys."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import anyio
import pytest
import structlog
import trio
from msgspec.structs import replace
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from structlog.testing import CapturingLogger
from trio.testing import MockClock

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.subscriber import Subscriber
from bandsync.rules.draft import new_session
from bandsync.settings import Settings
from bandsync.storage.base import Presence
from bandsync.storage.era import Era, Loss
from bandsync.storage.health import PRESENCE_EXPIRY_MS, HealthCheck
from bandsync.storage.manager import StorageManager
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.operations import create_session
from bandsync.storage.records import read_presence, write_presence
from bandsync.storage.recovery_policy import MAX_RETRY_DELAY_S, STABLE_CHECKS
from bandsync.storage.redis import Keys
from bandsync.storage.redis_connector import read_timeouts
from tests.support.redis_storages import IMPATIENT
from tests.support.states import HERE, NOW

SETTINGS = Settings(redis_auto_recover=True)
INTERVAL_S = SETTINGS.redis_health_interval_ms / 1000
TIMEOUT_S = SETTINGS.redis_health_timeout_ms / 1000


class ObedientLink(Link):
    """A link to nowhere."""

    def __init__(self, redis: "ObedientRedis") -> None:
        super().__init__(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
        )
        self.redis = redis
        self.died = trio.Event()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self.redis.attempts.append(trio.current_time())
        if not self.redis.there:
            raise LinkLostError("nobody there", "refused")
        self._usable = True
        task_status.started()
        try:
            await self.died.wait()
        finally:
            self._usable = False
            self.redis.ended()
        raise LinkLostError("gone", "reset")

    async def execute(self, *args: Argument) -> Reply:
        await trio.sleep(self.redis.latency_s)
        if args[0] == "DEL":
            self.redis.entry = None
            return 1
        if args[0] == "EVALSHA":
            if self.redis.lacks_scripts:
                raise ResponseError("ERR unknown command 'EVALSHA'")
            return [] if ":session:" in str(args[3]) else self._write_presence(*args[4:])
        entry = self.redis.entry
        if args[0] == "GET":
            return None if entry is None else write_presence(entry)
        assert args[0] == "PTTL"
        refreshed = self.redis.refreshed
        moment = trio.current_time()
        if self.redis.rival_lives:
            refreshed = moment - moment % 3
        return round(10_000 - (moment - refreshed) * 1000)

    def _write_presence(
        self, boot_id: Argument, entry: Argument, expiry_ms: Argument, owned: Argument
    ) -> Reply:
        """What presence.lua does."""
        stored = self.redis.entry
        if stored is not None and owned and stored.boot_id < str(boot_id):
            return write_presence(stored)
        self.redis.writes.append(trio.current_time())
        if self.redis.full:
            raise OutOfMemoryError("OOM")
        assert isinstance(entry, bytes)
        written = read_presence(entry)
        assert isinstance(written, Presence)
        self.redis.entry = written
        self.redis.refreshed = trio.current_time()
        return None

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        if self.redis.silent:
            await trio.sleep(TIMEOUT_S)
            raise LinkLostError("no reply in time", "timed_out")
        await trio.sleep(self.redis.latency_s)
        replies: list[Reply | RedisError] = []
        for command in commands:
            if command[0] == "TIME":
                replies.append([b"1800000000", b"0"])
            else:
                replies.append(b"PONG")
        return replies


class DeafSubscriber(Subscriber):
    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep_forever()


class ObedientRedis:
    """What the links of a manager find.

    Attributes:
        attempts, writes: when somebody connected, and wrote its presence.
        entry: the presence under our name, and when it was last refreshed.
        rival_lives: whether somebody else refreshes it every three seconds.
        latency_s: how long each answer takes.
        ended: called when a link ends.
    """

    def __init__(self) -> None:
        self.there = True
        self.silent = False
        self.full = False
        self.attempts: list[float] = []
        self.writes: list[float] = []
        self.entry: Presence | None = None
        self.refreshed = trio.current_time()
        self.rival_lives = False
        self.latency_s = 0.0
        self.lacks_scripts = False
        self.ended: Callable[[], None] = lambda: None
        self.links: list[ObedientLink] = []
        self.keys = Keys("bandsync:")

    def __str__(self) -> str:
        return "redis://stage"

    def subscriber(self, link: Link, heard: Callable[[bytes, bytes], None]) -> Subscriber:
        """Nobody is heard, and nobody speaks."""
        return DeafSubscriber(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
            on_message=heard,
            probe_channel=b"probe",
            probe=trio.sleep,
        )

    def link(self) -> ObedientLink:
        self.links.append(ObedientLink(self))
        return self.links[-1]

    def drop(self) -> None:
        """Reset the connection."""
        self.links[-1].died.set()


class Stage:
    """A manager that runs.

    Attributes:
        told: the storage type at each transition that clients are told of, with its time.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        redis: ObedientRedis | None = None,
        enabled: bool = True,
        boot_id: str = "boot-1",
        **changes: object,
    ) -> None:
        settings = replace(SETTINGS, **changes)
        self.redis = redis or ObedientRedis()
        self.counters = Counters()
        self.log = CapturingLogger()
        self.rooms: dict[str, object] = {}
        self.told: list[tuple[str, float]] = []
        self.migrations: list[Era] = []
        self.gate = trio.Event()
        self.gate.set()
        self.recoveries: list[float] = []
        self.memory = MemoryStorage(boot_id, "for a test")
        clock = ServerClock(NOW, trio.current_time())
        self.manager = StorageManager(
            settings,
            self.redis if enabled else None,
            memory=self.memory,
            health=HealthCheck(
                timeouts=read_timeouts(settings),
                clock=clock,
                presence_key="server:stage",
                presence=lambda: Presence(boot_id, NOW, f"http://{boot_id}", [], 0),
                is_gone=lambda entry: entry.pid == GONE,
                serving=lambda: True,
            ),
            server_id="stage",
            boot_id=boot_id,
            now=lambda: clock.at(trio.current_time()),
            counters=self.counters,
            recovery_seconds=self.recoveries.append,
            log=structlog.wrap_logger(
                self.log,
                processors=[],
                wrapper_class=structlog.make_filtering_bound_logger("info"),
            ),
        )
        self._nursery = nursery
        self._news = trio.Event()

    def start(self) -> None:
        self._nursery.start_soon(self.manager.run, self, self.tell)

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        self.migrations.append(era)
        await self.gate.wait()

    async def compare(self, era: Era) -> None:
        """Nothing is committed unheard here."""

    def hear(self, session_id: str, payload: bytes) -> None:
        raise AssertionError(session_id)

    def tell(self) -> None:
        self.told.append((self.manager.storage_type, trio.current_time()))
        self._news.set()
        self._news = trio.Event()

    async def until(self, storage_type: str) -> None:
        """Wait until clients are told that this is in use."""
        while self.manager.storage_type != storage_type:
            await self._news.wait()

    def modes(self) -> list[str]:
        return [mode for mode, _ in self.told]

    async def keep_a_session(self) -> None:
        session = replace(new_session("song", "epoch", HERE, NOW), version=1)
        await create_session(self.memory, session)


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return Stage(nursery)


async def test_at_the_start_redis_is_used_at_once(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    assert trio.current_time() == stage.redis.attempts[0]
    assert stage.manager.mode == "redis"
    assert stage.manager.era is stage.migrations[0]
    assert stage.manager.reason is None
    assert not stage.manager.degraded
    assert stage.manager.report().redis_status.connected
    # The presence says so right away.
    assert len(stage.redis.writes) == 1


async def test_disabled_is_memory_for_good(nursery: trio.Nursery) -> None:
    stage = Stage(nursery, enabled=False)
    await stage.manager.run(stage, stage.tell)
    assert stage.manager.settled.is_set()
    assert (stage.manager.storage_type, stage.manager.degraded) == ("memory", False)
    assert stage.manager.reason == "REDIS_ENABLED=false"


async def test_without_redis_it_is_tried_again_for_ever(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.there = False
    stage.start()
    await stage.manager.settled.wait()
    assert (stage.manager.mode, stage.manager.degraded) == ("memory", True)
    assert stage.manager.reason == "refused: nobody there"
    await trio.sleep(60)
    attempts = stage.redis.attempts
    assert stage.manager.report().redis_status.connection_attempts == len(attempts)
    delays = [after - before for before, after in pairwise(attempts)]
    fast = delays[: SETTINGS.redis_max_retries]
    # 100 ms doubled each time, half of it drawn; then the slow cadence.
    for number, delay in enumerate(fast, 1):
        assert 0.05 * 2**number <= delay <= 0.1 * 2**number
    assert set(map(round, delays[len(fast) :])) == {MAX_RETRY_DELAY_S}
    assert len(delays) > len(fast) + 5
    stage.redis.there = True
    await trio.sleep(MAX_RETRY_DELAY_S)
    assert stage.manager.mode == "redis"
    assert stage.manager.report().redis_status.connection_attempts == 0
    # One line for the first attempt, not one for each.
    names = [call.kwargs["event"] for call in stage.log.calls]
    assert names.count("storage.unreachable") == 1


async def test_a_loss_ends_the_era_and_everybody_is_told(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    era = stage.manager.era
    assert era is not None
    await trio.sleep(100)
    stage.redis.there = False
    stage.redis.drop()
    await trio.sleep(0.001)
    assert era.over
    assert stage.manager.era is None
    assert (stage.manager.mode, stage.manager.storage_type) == ("memory", "memory")
    assert stage.manager.reason == "reset: gone"
    assert stage.modes() == ["redis", "memory"]
    assert stage.counters.failovers == {"reset": 1}
    failover = stage.manager.history.last_failover
    assert failover is not None
    assert failover.reason == "reset"


async def test_silence_is_a_loss_after_the_timeout(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.silent = True
    started = trio.current_time()
    await trio.sleep(INTERVAL_S + TIMEOUT_S + 0.001)
    assert stage.counters.failovers == {"timed_out": 1}
    assert stage.told[-1][1] - started <= INTERVAL_S + TIMEOUT_S + 0.001


async def test_a_redis_that_is_full_is_lost_although_it_answers(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.full = True
    await trio.sleep(3 + 2 * INTERVAL_S)
    assert stage.counters.failovers == {"oom": 1}
    await trio.sleep(60)
    assert stage.manager.mode == "memory"
    assert stage.manager.reason == "oom: OOM"
    assert len(stage.migrations) == 1


async def test_a_loss_has_the_reason_of_whoever_saw_it(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    era = stage.manager.era
    assert era is not None
    # Commits that wait are told only that the link was closed, because of the watcher.
    stage.redis.ended = lambda: era.end(Loss("reset", "the link was closed"))
    stage.redis.full = True
    await stage.until("memory")
    assert stage.counters.failovers == {"oom": 1}


async def test_redis_is_used_again_after_three_checks_with_a_write(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    await trio.sleep(100)
    stage.redis.writes.clear()
    stage.redis.drop()
    await stage.until("memory")
    await stage.until("redis")
    connected = stage.redis.attempts[-1]
    checks = [moment - connected for moment in stage.redis.writes]
    assert checks == pytest.approx([number * INTERVAL_S for number in range(STABLE_CHECKS)])
    assert stage.modes() == ["redis", "memory", "redis"]
    recovery = stage.manager.history.last_recovery
    assert recovery is not None
    assert recovery.outage_ms is not None
    assert recovery.outage_ms >= 2 * INTERVAL_S * 1000


async def test_each_flap_doubles_what_is_asked_for(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    await trio.sleep(100)
    asked = []
    for _ in range(8):
        stage.redis.drop()
        await stage.until("memory")
        await stage.until("redis")
        asked.append(round((trio.current_time() - stage.redis.attempts[-1]) / INTERVAL_S) + 1)
    assert asked == [3, 6, 12, 24, 48, 60, 60, 60]
    # A minute of peace, and it is forgiven.
    await trio.sleep(61)
    stage.redis.drop()
    await stage.until("memory")
    await stage.until("redis")
    assert round((trio.current_time() - stage.redis.attempts[-1]) / INTERVAL_S) + 1 == 3


async def test_a_loss_while_migrating_is_just_a_loss(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.gate = trio.Event()
    stage.start()
    await trio.sleep(1)
    assert stage.manager.mode == "migrating"
    assert stage.manager.storage_type == "memory"
    # What is opened now is opened in Redis.
    assert stage.manager.era is stage.migrations[0]
    assert stage.manager.report().migration is not None
    stage.redis.drop()
    await trio.sleep(0.001)
    assert stage.manager.mode == "memory"
    assert stage.migrations[0].over
    assert stage.manager.report().migration is None
    stage.gate.set()
    await trio.sleep(10)
    assert stage.manager.mode == "redis"
    assert len(stage.migrations) == 2


async def test_sessions_from_before_redis_came_need_a_stable_redis(
    stage: Stage, autojump_clock: MockClock
) -> None:
    await stage.keep_a_session()
    stage.start()
    await stage.manager.settled.wait()
    assert len(stage.redis.writes) == STABLE_CHECKS


async def test_no_recovery_without_leave(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    stage = Stage(nursery, redis_auto_recover=False)
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.drop()
    await trio.sleep(100)
    assert stage.manager.mode == "memory"
    assert len(stage.redis.attempts) == 1
    assert "REDIS_AUTO_RECOVER=false" in (stage.manager.reason or "")


async def test_a_required_redis_has_all_fast_attempts_to_appear(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(nursery, redis_required=True, redis_max_retries=3)
    stage.redis.there = False
    stage.start()
    await stage.manager.settled.wait()
    assert len(stage.redis.attempts) == 4


async def test_presence_is_refreshed_every_three_seconds(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    await trio.sleep(60)
    gaps = [after - before for before, after in pairwise(stage.redis.writes)]
    assert len(gaps) >= 15
    assert max(gaps) <= 3 + INTERVAL_S


async def test_presence_does_not_expire_between_checks_that_are_far_apart(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(nursery, redis_health_interval_ms=60_000)
    stage.start()
    await stage.manager.settled.wait()
    await trio.sleep(300)
    gaps = [after - before for before, after in pairwise(stage.redis.writes)]
    assert len(gaps) >= 75
    # One that is late does no harm either.
    assert 2 * max(gaps) < PRESENCE_EXPIRY_MS / 1000


async def test_before_the_end_nobody_waits_for_a_stable_redis(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.there = False
    stage.redis.drop()
    await stage.until("memory")
    await stage.keep_a_session()
    await trio.sleep(60)
    stage.redis.there = True
    started = trio.current_time()
    await stage.manager.hand_over()
    assert stage.manager.storage_type == "redis"
    assert trio.current_time() == started


async def test_before_the_end_a_redis_that_is_not_there_is_tried_once(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.there = False
    stage.start()
    await stage.manager.settled.wait()
    await stage.keep_a_session()
    await trio.sleep(60)
    attempts = len(stage.redis.attempts)
    started = trio.current_time()
    await stage.manager.hand_over()
    assert len(stage.redis.attempts) == attempts + 1
    assert trio.current_time() == started


GONE = 99
RIVAL = Presence("boot-2", NOW, "http://there", [], 0)


async def test_an_entry_of_an_earlier_life_is_taken_over(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.entry = RIVAL
    stage.start()
    await stage.manager.settled.wait()
    assert stage.manager.mode == "redis"
    assert stage.manager.name_taken is None
    assert stage.redis.entry.boot_id == "boot-1"
    # Not at once: it might have been alive.
    assert 3 <= trio.current_time() - stage.redis.attempts[0] <= 10


async def test_a_live_server_of_the_same_name_keeps_us_out(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.entry = RIVAL
    stage.redis.rival_lives = True
    stage.start()
    await stage.manager.settled.wait()
    assert stage.manager.storage_type == "memory"
    assert "http://there" in (stage.manager.name_taken or "")
    assert "http://there" in (stage.manager.reason or "")
    assert stage.redis.entry is RIVAL


@pytest.mark.parametrize("first", [0, 1], ids=["who stays is first", "who yields is first"])
@pytest.mark.parametrize("lag_s", [0.0, 0.05, 0.09])
async def test_of_two_servers_of_one_name_that_start_together_one_yields(
    nursery: trio.Nursery, autojump_clock: MockClock, first: int, lag_s: float
) -> None:
    one = Stage(nursery)
    two = Stage(nursery, boot_id="boot-2", redis=one.redis)
    # Each looks before the other has written.
    one.redis.latency_s = 0.1
    for stage in (one, two) if first == 0 else (two, one):
        stage.start()
        await trio.sleep(lag_s)
    for stage in (one, two):
        await stage.manager.settled.wait()
        assert stage.modes() == ["redis"]
    # Whoever yields tries again, until it is told why not.
    await trio.sleep(300)
    before = len(two.told)
    await trio.sleep(300)
    assert one.modes() == ["redis"]
    # It yields once, and is kept out from then on.
    assert (two.modes(), len(two.told)) == (["redis", "memory"], before)
    assert "http://boot-1" in (two.manager.name_taken or "")
    assert one.manager.name_taken is None
    assert one.redis.entry is not None
    assert one.redis.entry.boot_id == "boot-1"


async def test_who_yielded_uses_redis_when_the_other_one_is_gone(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one = Stage(nursery)
    two = Stage(nursery, boot_id="boot-2", redis=one.redis)
    one.redis.latency_s = 0.1
    for stage in (one, two):
        stage.start()
    await trio.sleep(300)
    assert (one.manager.mode, two.manager.mode) == ("redis", "memory")
    await one.manager.hand_over()
    await two.until("redis")
    assert two.manager.name_taken is None


async def test_at_the_end_the_entry_is_taken_back(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    assert stage.redis.entry is not None
    await stage.manager.hand_over()
    assert stage.redis.entry is None
    await trio.sleep(10)
    assert stage.redis.entry is None


async def test_an_entry_of_a_process_that_has_ended_is_taken_over_at_once(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.entry = replace(RIVAL, pid=GONE)
    stage.start()
    await stage.manager.settled.wait()
    assert trio.current_time() == stage.redis.attempts[0]
    assert stage.manager.mode == "redis"


async def test_a_redis_that_cannot_do_what_we_need_is_not_used(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.lacks_scripts = True
    stage.start()
    await stage.manager.settled.wait()
    assert stage.manager.mode == "memory"
    assert stage.manager.reason == "unsupported: ERR unknown command 'EVALSHA'"
    assert stage.migrations == []
