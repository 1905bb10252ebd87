"""The state machine of the storage: failover, recovery, migration; on virtual time."""

from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from bandsync.storage.era import Loss
from bandsync.storage.recovery_policy import MAX_RETRY_DELAY_S, STABLE_CHECKS
from tests.support.managed_storage import INTERVAL_S, SETTINGS, TIMEOUT_S, Stage


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return Stage(nursery)


async def test_first_connect_uses_redis_at_once(stage: Stage, autojump_clock: MockClock) -> None:
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


async def test_disabled_redis_means_memory_for_ever(nursery: trio.Nursery) -> None:
    stage = Stage(nursery, enabled=False)
    await stage.manager.run(stage, stage.tell)
    assert stage.manager.settled.is_set()
    assert (stage.manager.storage_type, stage.manager.degraded) == ("memory", False)
    assert stage.manager.reason == "REDIS_ENABLED=false"


async def test_absent_redis_is_retried_for_ever(stage: Stage, autojump_clock: MockClock) -> None:
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


async def test_loss_ends_the_era_and_notifies_the_host(
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


async def test_full_redis_is_a_loss(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.full = True
    await trio.sleep(3 + 2 * INTERVAL_S)
    assert stage.counters.failovers == {"oom": 1}
    await trio.sleep(60)
    assert stage.manager.mode == "memory"
    assert stage.manager.reason == "oom: OOM"
    assert len(stage.migrations) == 1


async def test_loss_has_the_reason_of_its_first_observer(
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


async def test_recovery_needs_three_checks_with_a_write(
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


async def test_each_flap_doubles_the_required_checks(
    stage: Stage, autojump_clock: MockClock
) -> None:
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


async def test_loss_during_a_migration_is_a_loss(stage: Stage, autojump_clock: MockClock) -> None:
    stage.gate = trio.Event()
    stage.start()
    await trio.sleep(1)
    assert stage.manager.mode == "migrating"
    assert stage.manager.storage_type == "memory"
    # New sessions are opened in Redis.
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


async def test_sessions_in_memory_require_a_stable_redis(
    stage: Stage, autojump_clock: MockClock
) -> None:
    await stage.keep_a_session()
    stage.start()
    await stage.manager.settled.wait()
    assert len(stage.redis.writes) == STABLE_CHECKS


async def test_no_recovery_without_auto_recover(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(nursery, redis_auto_recover=False)
    stage.start()
    await stage.manager.settled.wait()
    stage.redis.drop()
    await trio.sleep(100)
    assert stage.manager.mode == "memory"
    assert len(stage.redis.attempts) == 1
    assert "REDIS_AUTO_RECOVER=false" in (stage.manager.reason or "")


async def test_required_redis_is_awaited_for_all_fast_attempts(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(nursery, redis_required=True, redis_max_retries=3)
    stage.redis.there = False
    stage.start()
    await stage.manager.settled.wait()
    assert len(stage.redis.attempts) == 4


async def test_shutdown_does_not_wait_for_stability(
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


async def test_shutdown_tries_an_absent_redis_once(stage: Stage, autojump_clock: MockClock) -> None:
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


async def test_redis_without_a_needed_command_is_not_used(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.lacks_scripts = True
    stage.start()
    await stage.manager.settled.wait()
    assert stage.manager.mode == "memory"
    assert stage.manager.reason == "unsupported: ERR unknown command 'EVALSHA'"
    assert stage.migrations == []
