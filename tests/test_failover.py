"""Whole servers and a real Redis that breaks: bands play on and lose nothing."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from msgspec import Struct

from scripts.testbed.redis_server import HOST
from tests.support.outages import (
    ProxiedRedis,
    blocking,
    chatter,
    get,
    heard,
    in_order,
    kill,
    mode,
    reset,
    start,
    stored_chat,
    until,
)
from tests.support.servers import (
    Musician,
    Server,
    band,
    musician,
)


class Fault(Struct):
    """A fault of Redis, and its repair.

    Attributes:
        reason: the loss reason that operators see.
        before: done while all is well, some time before.
    """

    reason: str
    breaks: Callable[[ProxiedRedis], Awaitable[object]]
    mends: Callable[[ProxiedRedis], Awaitable[object]]
    before: Callable[[ProxiedRedis], Awaitable[object]] | None = None
    health_timeout_ms: int = 2000


def cli(*command: str | int) -> Callable[[ProxiedRedis], Awaitable[object]]:
    return lambda proxied_redis: blocking(proxied_redis.redis.cli, *command)


async def heal(proxied_redis: ProxiedRedis) -> None:
    proxied_redis.proxy.heal()


async def silence(proxied_redis: ProxiedRedis) -> None:
    proxied_redis.proxy.black_hole()


async def half_close(proxied_redis: ProxiedRedis) -> None:
    proxied_redis.proxy.refuse()
    proxied_redis.proxy.half_close()


FAULTS = {
    "killed": Fault("reset", kill, lambda proxied_redis: blocking(proxied_redis.redis.restart)),
    "restarted empty": Fault(
        "reset",
        kill,
        lambda proxied_redis: blocking(lambda: proxied_redis.redis.restart(empty=True)),
    ),
    "restarted with an older dump": Fault(
        "reset",
        kill,
        lambda proxied_redis: blocking(proxied_redis.redis.restart_from_dump),
        lambda proxied_redis: blocking(proxied_redis.redis.dump),
    ),
    "stopped": Fault(
        "timed_out",
        lambda proxied_redis: blocking(proxied_redis.redis.stop),
        lambda proxied_redis: blocking(proxied_redis.redis.resume),
        health_timeout_ms=400,
    ),
    "black hole": Fault("timed_out", silence, heal, health_timeout_ms=400),
    "reset": Fault("reset", reset, heal),
    "half-closed": Fault("reset", half_close, heal),
    "full": Fault(
        "oom", cli("CONFIG", "SET", "maxmemory", 1), cli("CONFIG", "SET", "maxmemory", 0)
    ),
    "a replica": Fault("readonly", cli("REPLICAOF", HOST, 1), cli("REPLICAOF", "NO", "ONE")),
    "without the right to write": Fault(
        "auth",
        cli("ACL", "SETUSER", "default", "-hset", "-set"),
        cli("ACL", "SETUSER", "default", "+hset", "+set"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_band_plays_on_while_redis_is(
    proxied_redis: ProxiedRedis, nursery: trio.Nursery, fault: Fault
) -> None:
    server = await start(
        nursery,
        proxied_redis.url,
        redis_health_timeout_ms=fault.health_timeout_ms,
        server_id="hall",
    )
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play", positionMs=5000, startInMs=0)
        await ann.ok("update_message", message="Verse")
        async with chatter(ann, bob) as talk:
            if fault.before is not None:
                await fault.before(proxied_redis)
            await talk.more()
            await fault.breaks(proxied_redis)
            lost = await ann.next("storage_status", storageType="memory")
            assert (lost["degraded"], lost["reason"]) == (True, fault.reason)
            await talk.more()

            health = await get(server, "/api/health")
            assert (health["healthy"], health["storageType"]) == (True, "memory")
            assert health["fallbackReason"]
            status = await get(server, "/api/storage/status")
            assert status["mode"] == "memory"
            assert status["lastFailover"]["reason"] == fault.reason
            assert status["lastFailover"]["detail"]
            metrics = await get(server, "/metrics")
            assert f'bandsync_storage_failovers_total{{reason="{fault.reason}"}} ' in metrics
            assert 'bandsync_storage_mode{mode="memory"} 1.0' in metrics
            await talk.more()

            await fault.mends(proxied_redis)
            found = await ann.next("storage_status", storageType="redis")
            assert (found["degraded"], found["reason"]) == (False, None)
            await talk.more()
        health = await get(server, "/api/health")
        assert (health["storageType"], health["fallbackReason"]) == ("redis", None)
        status = await mode(server, "redis")
        assert status["keptInMemory"] == 0
        assert status["lastRecovery"]["sessions"] == 1
        for player in (ann, bob):
            await player.ok("sync_request")
            last = player.all("snapshot")[-1]
            assert heard(player) >= set(talk.texts)
            assert player.close_code is None
            in_order(player)
            assert player.all("error") == []
            assert last["message"] == "Verse"
            assert last["transport"] == ann.all("play")[0]["transport"]
            assert last["leaderId"] == ann.you["memberId"]
            assert [member["connected"] for member in last["members"]] == [True, True]
        assert bob.all("storage_status") == ann.all("storage_status")
        # Everybody has the same last word, and so has Redis.
        assert stored_chat(proxied_redis.redis) == [chat["text"] for chat in last["chat"]]
        assert set(talk.texts[-10:]) <= set(stored_chat(proxied_redis.redis))


@pytest.mark.slow
async def test_loss_during_a_migration_loses_nothing(
    proxied_redis: ProxiedRedis, nursery: trio.Nursery
) -> None:
    names = [f"song-{number}" for number in range(24)]
    server = await start(nursery, proxied_redis.url)

    async def stored() -> int:
        return len(await blocking(proxied_redis.redis.cli, "KEYS", "bandsync:session:*"))

    async with trio.open_nursery() as players:
        band_of = {name: await players.start(join_alone, server, name) for name in names[:12]}
        await reset(proxied_redis)
        first = band_of[names[0]]
        await first.next("storage_status", storageType="memory")
        # Half of them were never in Redis.
        for name in names[12:]:
            band_of[name] = await players.start(join_alone, server, name)
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"one in {name}")
        assert await stored() == 12
        proxied_redis.proxy.heal()
        proxied_redis.proxy.delay_s = 0.1
        await until(lambda: more_than(stored, 12))
        proxied_redis.proxy.black_hole("down")
        await reset(proxied_redis)
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"two in {name}")
        assert 12 < await stored() < 24
        proxied_redis.proxy.heal()
        await first.next("storage_status", storageType="redis")
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"three in {name}")
            key = f"bandsync:session:{{{name}}}"
            texts = [f"{count} in {name}" for count in ("one", "two", "three")]
            assert stored_chat(proxied_redis.redis, key) == texts
            assert [message["text"] for message in player.all("chat_message")] == texts
            assert player.close_code is None
            in_order(player)
        status = await mode(server, "redis")
        assert (status["keptInMemory"], status["totalSessions"]) == (0, 24)
        players.cancel_scope.cancel()


async def more_than(count: Callable[[], Awaitable[int]], least: int) -> bool:
    return await count() > least


async def join_alone(
    server: Server, session: str, *, task_status: trio.TaskStatus[Musician]
) -> None:
    async with musician(server) as player:
        await player.join(session, displayName="Ann")
        task_status.started(player)
        await trio.sleep_forever()
