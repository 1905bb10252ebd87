"""Three real Sentinels, a real failover, and bands that must not notice."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from bandsync.redis_link.errors import LinkLostError, loss_reason
from bandsync.redis_link.redis_address import RedisAddress, TLSOptions
from bandsync.redis_link.sentinel import MasterLink, Sentinels
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_sentinels import MASTER, SentinelProcess, SentinelSetup, wait_until
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.outages import (
    QUICK,
    Chatter,
    blocking,
    chatter,
    get,
    head,
    heard,
    in_order,
    mode,
    stored_chat,
    until,
)
from tests.support.redis_storages import PATIENT
from tests.support.servers import PATIENCE_S, Musician, band, start_server


@pytest.fixture
def watched(redis_binary: None) -> Iterator[SentinelSetup]:
    with SentinelSetup() as made:
        yield made


@pytest.fixture(scope="module")
def calm(redis_binary: None) -> Iterator[SentinelSetup]:
    """For tests that only ask."""
    with SentinelSetup(replicas=0, password="hush") as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is tried again more often than operators would like."""
    monkeypatch.setattr("bandsync.storage.recovery_policy.MAX_RETRY_DELAY_S", 0.2)


def asking(hosts: list[int], *, master: str = MASTER, **changes: Any) -> Sentinels:
    options = {"password": "hush", "timeout_s": PATIENCE_S} | changes
    return Sentinels([(HOST, port) for port in hosts], master, RedisAddress(db=3), **options)


async def test_master_is_found_with_its_own_credentials(calm: SentinelSetup) -> None:
    like = RedisAddress("nowhere", 1, username="u", password="p", db=3)
    ports = [sentinel.port for sentinel in calm.sentinels]
    found = await Sentinels(
        [(HOST, port) for port in ports], MASTER, like, password="hush", timeout_s=PATIENCE_S
    ).find()
    assert found == RedisAddress(HOST, calm.servers[0].port, username="u", password="p", db=3)


async def test_absent_or_hanging_sentinel_is_skipped(calm: SentinelSetup) -> None:
    hanging, answering = calm.sentinels[:2]
    hanging.signal(signal.SIGSTOP)
    try:
        sentinels = asking([free_port(), hanging.port, answering.port], timeout_s=0.2)
        assert (await sentinels.find()).port == calm.servers[0].port
        assert await sentinels.find_later() is None
    finally:
        hanging.signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda calm: asking([free_port(), free_port()]), "refused"),
        (lambda calm: asking([calm.sentinels[0].port], master="choir"), "'choir'"),
        (
            lambda calm: asking([calm.sentinels[0].port], password="wrong"),
            "WRONGPASS|invalid|Authentication",
        ),
        (lambda calm: asking([calm.servers[0].port], password=None), "unknown command"),
    ],
    ids=["nobody there", "another name", "wrong password", "no Sentinel"],
)
async def test_missing_master_is_reported(
    calm: SentinelSetup, ask: Callable[[SentinelSetup], Sentinels], words: str
) -> None:
    sentinels = ask(calm)
    with pytest.raises(LinkLostError, match=words) as caught:
        await sentinels.find()
    assert loss_reason(caught.value) == "no_master"
    assert "hush" not in str(caught.value)
    assert await sentinels.find_later() is None


async def test_sentinels_use_the_tls_options_of_the_master(tls_redis: RedisServer) -> None:
    for ca_file, words in ((str(tls_redis.ca_file), "unknown command"), (None, "certificate")):
        like = RedisAddress(tls=TLSOptions(ca_certs=ca_file))
        hosts = [("localhost", tls_redis.port)]
        sentinels = Sentinels(hosts, MASTER, like, password=None, timeout_s=PATIENCE_S)
        with pytest.raises(LinkLostError, match=words):
            await sentinels.find()


async def test_cancelled_discovery_returns_at_once(
    calm: SentinelSetup,
) -> None:
    hanging = calm.sentinels[0]
    hanging.signal(signal.SIGSTOP)
    try:
        sentinels = asking([hanging.port], timeout_s=PATIENCE_S)
        before = trio.current_time()
        for _ in range(3):
            with trio.move_on_after(0.05) as scope:
                await sentinels.find()
            assert scope.cancelled_caught
        assert trio.current_time() - before < PATIENCE_S / 2
    finally:
        hanging.signal(signal.SIGCONT)
    # The one that was left behind ends, and makes room.
    assert (await sentinels.find()).port == calm.servers[0].port


async def test_hanging_sentinels_cost_at_most_the_connect_timeout(calm: SentinelSetup) -> None:
    for sentinel in calm.sentinels:
        sentinel.signal(signal.SIGSTOP)
    try:
        sentinels = asking([sentinel.port for sentinel in calm.sentinels])
        link = MasterLink(
            sentinels,
            RedisAddress(),
            on_found=lambda _: None,
            name="test",
            timeouts=replace(PATIENT, connect_s=0.1),
        )
        with trio.fail_after(PATIENCE_S / 2), pytest.raises(Exception, match="no answer") as caught:
            await link.run()
        assert loss_reason(caught.value) == "timed_out"
        assert not link.usable
    finally:
        for sentinel in calm.sentinels:
            sentinel.signal(signal.SIGCONT)


@contextmanager
def measured(players: list[Musician]) -> Iterator[list[float]]:
    """Afterwards, the longest time in seconds that any of them waited for an answer."""
    waits: list[float] = []

    def watch(player: Musician) -> None:
        ask = player.ask

        async def timed(type_: str, **fields: object) -> Any:
            before = trio.current_time()
            answer = await ask(type_, **fields)
            waits.append(trio.current_time() - before)
            return answer

        player.ask = timed  # type: ignore[method-assign]

    for player in players:
        watch(player)
    longest: list[float] = []
    yield longest
    longest.append(max(waits))


async def nothing_lost(talk: Chatter, players: list[Musician], redis: RedisServer) -> None:
    """Everybody heard everything, in order, over a connection that never broke."""
    for player in players:
        await player.ok("sync_request")
        assert heard(player) >= set(talk.texts)
        assert player.close_code is None
        assert player.all("error") == []
        in_order(player)
    last = players[0].all("snapshot")[-1]
    assert stored_chat(redis) == [chat["text"] for chat in last["chat"]]
    assert set(talk.texts[-10:]) <= set(stored_chat(redis))


FAILOVERS: dict[str, tuple[Callable[[SentinelSetup, RedisServer], None], set[str]]] = {
    "killed": (lambda watched, master: master.kill(), {"reset"}),
    "hanging": (lambda watched, master: master.stop(), {"timed_out"}),
    # Sentinel cuts all connections to the old master, unless it refuses a write, or we ask where
    # the master is, before that.
    "replaced": (
        lambda watched, master: watched.fail_over(),
        {"reset", "readonly", "demoted"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAILOVERS)
async def test_band_plays_on_while_the_master_is(
    watched: SentinelSetup, nursery: trio.Nursery, fault: str
) -> None:
    act, reasons = FAILOVERS[fault]
    server = await start_server(nursery, **QUICK, **watched.settings(), server_id="hall")
    status = await mode(server, "redis")
    old = await blocking(lambda: watched.master)
    assert f":{old.port}/0, the master {MASTER!r}" in status["redisStatus"]["address"]
    async with band(server, "Ann", "Bob", "Cid", "Dan") as players:
        ann = players[0]
        await ann.ok("play", positionMs=5000, startInMs=0)
        with measured(players) as longest:
            async with chatter(*players) as talk:
                before = trio.current_time()
                await blocking(act, watched, old)
                lost = await ann.next("storage_status", storageType="memory")
                await talk.more()
                new = await blocking(watched.wait_for_failover, old)
                failover_s = trio.current_time() - before
                await ann.next("storage_status", storageType="redis")
                back_s = trio.current_time() - before
                await talk.more(50)
        await mode(server, "redis")
        assert lost["reason"] in reasons
        await nothing_lost(talk, players, new)
        assert head(new)["transport"]["value"]["isPlaying"]
    status = await get(server, "/api/storage/status")
    assert f":{new.port}/0" in status["redisStatus"]["address"]
    print(  # noqa: T201
        f"{fault}: failover {failover_s:.2f} s, back in Redis {back_s:.2f} s, "
        f"longest wait {longest[0] * 1000:.0f} ms"
    )
    assert longest[0] < failover_s + 1


async def test_changes_missed_by_the_promoted_replica_are_written_back(
    watched: SentinelSetup, nursery: trio.Nursery
) -> None:
    master, replica = watched.servers
    proxy = await nursery.start(FaultProxy(master.port).run)
    server = await start_server(nursery, **QUICK, **watched.settings(), server_id="hall")
    await mode(server, "redis")
    async with band(server, "Ann", "Bob") as players:
        ann, bob = players
        await ann.ok("update_message", message="Verse")
        await blocking(watched.replicate, replica, proxy.port)
        await blocking(until_replicated, master, replica)
        proxy.black_hole()
        async with chatter(*players) as talk:
            await ann.ok("update_message", message="Chorus")
            await ann.ok("play", positionMs=7000, startInMs=0)
            await ann.ok("set_role", memberId=bob.you["memberId"], role="leader")
            await talk.more(20)
            missed = list(talk.texts[:20])
            assert stored_chat(master)
            assert head(replica)["message"]["value"] == "Verse"
            assert not set(stored_chat(replica)) & set(missed)
            await blocking(master.kill)
            proxy.refuse()
            proxy.reset()
            new = await blocking(watched.wait_for_failover, master)
            assert new is replica
            await ann.next("storage_status", storageType="redis")
        await mode(server, "redis")
        await nothing_lost(talk, players, replica)
        assert head(replica)["message"]["value"] == "Chorus"
        assert head(replica)["transport"]["value"]["isPlaying"]
        assert head(replica)["leader"]["memberId"] == bob.you["memberId"]


def until_replicated(master: RedisServer, replica: RedisServer) -> None:
    """Until the replica has all that the master has by now."""
    master.cli("SET", "marker", "1")
    while replica.cli("GET", "marker") is None:
        pass


async def test_absent_sentinels_matter_only_at_a_failover(
    watched: SentinelSetup, nursery: trio.Nursery
) -> None:
    server = await start_server(nursery, **QUICK, **watched.settings())
    await mode(server, "redis")
    for sentinel in watched.sentinels:
        await blocking(sentinel.close)
    async with band(server, "Ann") as (ann,):
        await ann.ok("chat_message", text="hi")
        assert stored_chat(watched.servers[0]) == ["hi"]
        await blocking(watched.servers[0].restart)
        await ann.next("storage_status", storageType="memory")

        async def told() -> bool:
            health = await get(server, "/api/health")
            return bool(health["fallbackReason"].startswith("no_master: "))

        await until(told)
        await ann.ok("chat_message", text="again")
        in_order(ann)


async def test_stale_master_is_left(
    redis_binary: None, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.redis_link.sentinel._QUERY_PERIOD_S", 0.05)
    with SentinelSetup(user="guard") as watched:
        old, new = watched.servers
        server = await start_server(nursery, **QUICK, **watched.settings())
        await mode(server, "redis")
        async with band(server, "Ann") as (ann,):
            # For the Sentinels it is as good as dead, for us it is not.
            await blocking(old.cli, "ACL", "SETUSER", "guard", "-@all")
            await ann.ok("chat_message", text="hi")
            lost = await ann.next("storage_status", storageType="memory")
            assert lost["reason"] == "demoted"
            assert (await blocking(old.cli, "ROLE"))[0] == "master"
            await ann.ok("chat_message", text="again")
            await ann.next("storage_status", storageType="redis")
            assert stored_chat(new) == ["hi", "again"]
            in_order(ann)
        nursery.cancel_scope.cancel()


async def test_outdated_sentinel_is_used_once_at_most(watched: SentinelSetup) -> None:
    await blocking(watched.fail_over)
    new = await blocking(watched.wait_for_failover, watched.servers[0])
    with RedisServer() as old, ExitStack() as stack:
        # On the wrong side of a network that is cut in two, with the old master.
        ports = [free_port() for _ in watched.sentinels]
        behind = SentinelProcess(ports, 0, [old.port], down_after_ms=500, password=None, user=None)
        stack.callback(behind.close)
        await blocking(wait_until, behind.state, "a Sentinel that answers")
        everybody = [behind.port, *(sentinel.port for sentinel in watched.sentinels)]
        sentinels = asking(everybody, password=None)
        assert (await sentinels.find()).port == old.port
        later = await sentinels.find_later()
        assert later is not None
        assert later.port == new.port
        for _ in everybody:
            # The Sentinel that answered last is asked first.
            assert (await sentinels.find()).port == new.port
            assert await sentinels.find_later() is None
        # Unless it is the only one that answers.
        for sentinel in watched.sentinels:
            await blocking(sentinel.close)
        assert (await sentinels.find()).port == old.port


async def test_new_master_is_used_before_all_replicas_follow(redis_binary: None) -> None:
    with SentinelSetup(replicas=2, user="guard") as watched:
        old, new, slow = watched.servers
        slow.cli("CONFIG", "SET", "replica-priority", 0)
        slow.cli("ACL", "SETUSER", "guard", "-slaveof")
        leader = watched.sentinels[0]
        leader.cli("SENTINEL", "DEBUG", "INFO-PERIOD", 500)

        def unfit() -> bool:
            replicas = leader.cli("SENTINEL", "REPLICAS", MASTER)
            return "0" in [str(replica["slave-priority"]) for replica in replicas]

        await blocking(wait_until, unfit, "a replica that is not to be promoted")
        sentinels = asking([leader.port], password=None)
        assert (await sentinels.find()).port == old.port
        await blocking(watched.fail_over)
        await blocking(
            wait_until, lambda: int(leader.state()["config-epoch"]) > 0, "a new configuration"
        )
        assert int(leader.state()["port"]) == old.port
        later = await sentinels.find_later()
        assert later is not None
        assert later.port == new.port
        assert (await sentinels.find()).port == new.port
        assert (await asking([leader.port], password=None).find()).port == new.port


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True], ids=["for good", "for a while"])
async def test_hanging_master_is_left_within_the_health_timeout(
    redis_binary: None, nursery: trio.Nursery, goes_on: bool
) -> None:
    # The Sentinels take it for alive while we try to connect to it again.
    with SentinelSetup(down_after_ms=2000) as watched:
        old, new = watched.servers
        settings = QUICK | watched.settings() | {"redis_connect_timeout": 600_000}
        # As slow to trust a master as by default.
        settings |= {"redis_health_interval_ms": 500, "redis_health_timeout_ms": 400}
        server = await start_server(nursery, **settings)
        await mode(server, "redis")
        async with band(server, "Ann") as (ann,):
            await blocking(old.stop)
            await ann.next("storage_status", storageType="memory")
            await ann.ok("chat_message", text="hi")
            await blocking(watched.wait_for_failover, old)
            if goes_on:
                old.resume()
            await ann.next("storage_status", storageType="redis")
            await ann.ok("chat_message", text="again")
            # The stale master accepted no write: it was demoted before the connection.
            assert stored_chat(new) == ["hi", "again"]
            in_order(ann)
        nursery.cancel_scope.cancel()
