"""The presence entry of a server, and the claim of its SERVER_ID."""

from itertools import pairwise

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from bandsync.storage.health import PRESENCE_EXPIRY_MS
from tests.support.managed_storage import (
    GONE,
    INTERVAL_S,
    RIVAL,
    Stage,
)


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return Stage(nursery)


async def test_presence_is_refreshed_every_three_seconds(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.start()
    await stage.manager.settled.wait()
    await trio.sleep(60)
    gaps = [after - before for before, after in pairwise(stage.redis.writes)]
    assert len(gaps) >= 15
    assert max(gaps) <= 3 + INTERVAL_S


async def test_presence_does_not_expire_between_rare_checks(
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


async def test_entry_of_an_earlier_process_is_taken_over(
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


async def test_live_server_of_the_same_name_prevents_the_start(
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
async def test_one_of_two_servers_of_one_name_yields(
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
    # The yielding server retries for ever.
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


async def test_yielding_server_uses_redis_when_the_other_is_gone(
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


async def test_shutdown_removes_the_entry(stage: Stage, autojump_clock: MockClock) -> None:
    stage.start()
    await stage.manager.settled.wait()
    assert stage.redis.entry is not None
    await stage.manager.hand_over()
    assert stage.redis.entry is None
    await trio.sleep(10)
    assert stage.redis.entry is None


async def test_entry_of_an_ended_process_is_taken_over_at_once(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.redis.entry = replace(RIVAL, pid=GONE)
    stage.start()
    await stage.manager.settled.wait()
    assert trio.current_time() == stage.redis.attempts[0]
    assert stage.manager.mode == "redis"
