"""A real Redis Cluster that moves slots, masters and nodes: redirects and topology."""

from typing import Any

import pytest
import trio
from redis.crc import key_slot
from redis.exceptions import RedisError

from bandsync.redis_link.cluster.nodes import Seeds
from bandsync.redis_link.cluster.slots import Endpoint, slot_of
from bandsync.redis_link.errors import loss_reason
from bandsync.redis_link.redis_address import parse_address
from bandsync.redis_link.script import Script
from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_sentinels import wait_until
from scripts.testbed.redis_server import HOST
from tests.support.outages import blocking, until
from tests.support.redis_clusters import KEYS, asked
from tests.support.redis_storages import cluster_access, open_cluster
from tests.support.scripted_redis import start
from tests.support.servers import PATIENCE_S


async def test_migrated_slot_is_found_again(mended: RedisCluster) -> None:
    source, target, _ = mended.masters
    key = next(key for key in KEYS if mended.owner(key) is source)
    slot = key_slot(key.encode())
    there = [f"{{{key}}} {number}" for number in range(20)]
    async with open_cluster(mended.url()) as link:

        async def check(value: str) -> None:
            """Write and read everything, many commands at the same time."""
            replies = await link.execute_all([("SET", each, value) for each in there])
            assert replies == [b"OK"] * len(there)

            async def read(each: str) -> None:
                assert await link.execute("GET", each) == value.encode()
                assert await script.execute(link, (each,), ()) == value.encode()

            async with trio.open_nursery() as nursery:
                for each in there:
                    nursery.start_soon(read, each)

        script = Script("return redis.call('GET', KEYS[1])")
        await check("before")
        await blocking(mended.open_slot, slot, source, target)
        await check("open")
        # Half of it is across: these are asked for there, each with a word before it.
        await blocking(source.cli, "MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *there[:10])
        before = asked(source)
        await check("half")
        assert asked(source) > before
        # So is what does not exist yet.
        assert await link.execute("SET", f"{{{key}}} new", "x") == b"OK"
        await blocking(mended.move_keys, slot, source, target)
        await check("across")
        await blocking(mended.close_slot, slot, target, source)
        await check("after")
        before = asked(source)
        await check("known")
        assert asked(source) == before
        assert link.usable


async def test_short_redirection_loop_is_retried(mended: RedisCluster) -> None:
    source, target, _ = mended.masters
    key = next(key for key in KEYS if mended.owner(key) is source)
    slot = key_slot(key.encode())
    async with open_cluster(mended.url()) as link:
        await blocking(mended.open_slot, slot, source, target)
        await blocking(mended.move_keys, slot, source, target)
        # The wrong way round: the old one sends to the new one, which sends back.
        target_id = await blocking(target.cli, "CLUSTER", "MYID")
        await blocking(source.cli, "CLUSTER", "SETSLOT", slot, "NODE", target_id)
        before = asked(source), asked(target)
        replies: list[Any] = []

        async def write() -> None:
            replies.append(await link.execute("SET", key, "x"))

        async def sent_back() -> bool:
            return (await blocking(asked, target)) > before[1]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await until(sent_back)
            assert replies == []
            await blocking(mended.close_slot, slot, target, *mended.masters)
        assert replies == [b"OK"]
        assert asked(source) > before[0]


async def test_redirections_are_bounded(mended: RedisCluster) -> None:
    source, target, _ = mended.masters
    key = next(key for key in KEYS if mended.owner(key) is source)
    async with open_cluster(mended.url()) as link:
        # Its keys are nowhere: here it is said to be there, and there it is not expected.
        target_id = await blocking(target.cli, "CLUSTER", "MYID")
        await blocking(
            source.cli, "CLUSTER", "SETSLOT", key_slot(key.encode()), "MIGRATING", target_id
        )
        with trio.fail_after(PATIENCE_S), pytest.raises(RedisError, match="too often") as caught:
            await link.execute("SET", key, "x")
        assert loss_reason(caught.value) == "clusterdown"
        (reply,) = await link.execute_all([("SET", key, "x")])
        assert isinstance(reply, RedisError)
        assert link.usable
    source.cli("CLUSTER", "SETSLOT", key_slot(key.encode()), "STABLE")


@pytest.mark.slow
async def test_nodes_may_join_and_leave(
    redis_binary: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.redis_link.cluster.link._ROUND_S", 0.05)
    with RedisCluster(last=20) as cluster:
        last = cluster.masters[2]
        slots = range(16_364, 16_384)
        found = {key_slot(b"%d" % number): str(number) for number in range(200_000)}
        keys = [found[slot] for slot in slots]
        async with open_cluster(cluster.url()) as link:
            replies = await link.execute_all([("SET", key, "x") for key in keys])
            assert replies == [b"OK"] * len(keys)
            new = await blocking(cluster.add_master)
            await blocking(cluster.move_slots, slots, last, new)
            replies = await link.execute_all([("GET", key) for key in keys])
            assert replies == [b"x"] * len(keys)
            with trio.fail_after(PATIENCE_S):
                # Known to be without slots, not yet known to be no master.
                assert await link.hash_tag(Endpoint(HOST, last.port)) is None
                assert await link.hash_tag(Endpoint(HOST, new.port)) is not None

            async def left() -> bool:
                return Endpoint(HOST, last.port) not in link.masters

            await until(left)
            await blocking(last.kill)
            replies = await link.execute_all([("GET", key) for key in KEYS])
            assert replies == [None] * len(KEYS)
            assert [part.address.port for part in link.parts()][-1] == new.port
            assert link.usable


async def test_failover_to_a_replica_is_followed(redis_binary: None) -> None:
    with RedisCluster(replicas=1) as cluster:
        async with open_cluster(cluster.url()) as link:
            await link.execute_all([("SET", key, "x") for key in KEYS])
            replica = cluster.replicas[0]
            await blocking(replica.cli, "CLUSTER", "FAILOVER")
            answers = 0
            while (await blocking(replica.cli, "ROLE"))[0] != "master" or not answers:
                assert await link.execute_all([("GET", key) for key in KEYS]) == [b"x"] * len(KEYS)
                assert await link.execute("SET", KEYS[answers % 300], "x") == b"OK"
                answers += 1
            assert await link.execute_all([("SET", key, "y") for key in KEYS]) == [b"OK"] * 300

            async def clock_moved() -> bool:
                return link.address.port == replica.port

            await until(clock_moved)
            assert link.usable


@pytest.mark.parametrize("named", [False, True])
async def test_nodes_may_have_names_or_none(cluster: RedisCluster, named: bool) -> None:
    if not cluster.masters[0].has_shard_channels:
        pytest.skip("before Redis 7 nodes have no names")
    for node in cluster.masters:
        node.cli("CONFIG", "SET", "cluster-preferred-endpoint-type", "hostname")
        if named:
            node.cli("CONFIG", "SET", "cluster-announce-hostname", "localhost")
    wanted = "localhost" if named else "?"

    def told() -> bool:
        return all(
            {shard[2][0] for shard in node.cli("CLUSTER", "SLOTS")} == {wanted}
            for node in cluster.masters
        )

    await blocking(wait_until, told, "nodes that know the names")
    async with open_cluster(cluster.url()) as link:
        replies = await link.execute_all([("SET", key, "x") for key in KEYS])
        assert replies == [b"OK"] * len(KEYS)
        assert {master.host for master in link.masters} == {"localhost" if named else HOST}


async def test_node_without_a_master_for_a_moment_is_retried(
    mended: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For as long as this machine may need.
    delays = (0.0, *[0.05] * round(PATIENCE_S / 0.05))
    monkeypatch.setattr("bandsync.redis_link.cluster.link.REDIRECT_DELAYS_S", delays)
    monkeypatch.setattr("bandsync.redis_link.cluster.link._ATTEMPTS_WHILE_DOWN", len(delays))
    node = mended.masters[0]
    keys = [key for key in KEYS if mended.owner(key) is node]
    slot = next(slot for slot in range(5000) if slot not in map(slot_of, keys))

    def refused() -> int:
        counts = node.cli("INFO", "ERRORSTATS")
        return int(counts.get("errorstat_CLUSTERDOWN", {}).get("count", 0))

    async with open_cluster(mended.url()) as link:
        before = refused()
        node.cli("CLUSTER", "DELSLOTS", slot)
        replies: list[Any] = []

        async def write() -> None:
            replies.append(await link.execute("SET", keys[0], "x"))

        async def write_all() -> None:
            replies.extend(await link.execute_all([("SET", key, "x") for key in keys]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(write_all)

            async def all_refused() -> bool:
                return await blocking(refused) > before + len(keys)

            await until(all_refused)
            assert replies == []
            node.cli("CLUSTER", "ADDSLOTS", slot)
        assert replies == [b"OK"] * (1 + len(keys))
        assert link.usable


async def test_node_without_a_master_is_not_retried_for_each_command(
    mended: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.redis_link.cluster.link._ROUND_S", 3600.0)
    node = mended.masters[0]
    keys = [key for key in KEYS if mended.owner(key) is node]
    slot = next(slot for slot in range(5000) if slot not in map(slot_of, keys))

    def refused() -> int:
        counts = node.cli("INFO", "ERRORSTATS")
        return int(counts.get("errorstat_CLUSTERDOWN", {}).get("count", 0))

    async with open_cluster(mended.url()) as link:
        node.cli("CLUSTER", "DELSLOTS", slot)
        with pytest.raises(RedisError) as caught:
            await link.execute("SET", keys[0], "x")
        assert loss_reason(caught.value) == "clusterdown"
        before = refused()
        replies = await link.execute_all([("SET", key, "x") for key in keys])
        assert {loss_reason(reply) for reply in replies} == {"clusterdown"}  # type: ignore[arg-type]
        assert refused() - before < 2 * len(keys)
        node.cli("CLUSTER", "ADDSLOTS", slot)


@pytest.mark.slow
async def test_other_seeds_are_used_without_the_configured_node(
    redis_binary: None, nursery: trio.Nursery
) -> None:
    with RedisCluster(replicas=1) as cluster:
        access = cluster_access(cluster.url())
        link = access.link()
        await start(nursery, link)  # type: ignore[arg-type]
        cluster.hang(cluster.masters[0])
        await blocking(cluster.wait_for_takeover, cluster.replicas[0])
        # It hangs: whoever asked it alone would wait for long.
        again = access.link()
        await start(nursery, again)  # type: ignore[arg-type]
        assert again.address.port == cluster.replicas[0].port
        await blocking(cluster.masters[0].kill)

        async def followed() -> bool:
            return link.address.port == cluster.replicas[0].port

        # Nor is that a loss: by now it is no master.
        await until(followed)
        assert await link.execute_all([("GET", key) for key in KEYS]) == [None] * len(KEYS)
        nursery.cancel_scope.cancel()


def test_seeds_are_bounded_and_the_configured_one_is_first() -> None:
    seeds = Seeds(parse_address("rediss://u:p@a:1"))
    seeds.learn([Endpoint("b", port) for port in range(20)])
    assert len(seeds.addresses()) == 8
    seeds.learn([Endpoint("c", 2), Endpoint("a", 1), Endpoint("c", 3)])
    addresses = seeds.addresses()
    # Nodes that left are no longer seeds.
    assert [str(address) for address in addresses] == [
        "rediss://a:1/0",
        "rediss://c:2/0",
        "rediss://c:3/0",
    ]
    assert all(address.password == "p" and address.tls is not None for address in addresses)
