"""Sharded channels of a real Redis Cluster, and slots that move under them."""

from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from redis.crc import key_slot
from redis.exceptions import MovedError

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.cluster.subscriber import MISSED, ClusterSubscriber
from bandsync.redis_link.errors import LinkLostError, loss_reason
from bandsync.redis_link.redis_address import RedisAddress
from scripts.testbed.redis_cluster import RedisCluster
from tests.redis_link.test_subscriber import PROBE, Ears, subscriber_to
from tests.support.outages import blocking
from tests.support.redis_storages import cluster_access, open_cluster
from tests.support.scripted_redis import Outcome, ScriptedRedis
from tests.support.servers import PATIENCE_S

CHANNELS = [b"channel %d" % number for number in range(300)]


@pytest.fixture(scope="module")
def cluster(redis_binary: None) -> Iterator[RedisCluster]:
    """Slots move here from test to test; all nodes live."""
    with RedisCluster() as made:
        if not made.masters[0].has_shard_channels:
            pytest.skip("this Redis has no sharded channels: it is older than 7")
        yield made


class Stage:
    """A link, a subscriber beside it, and what that hears."""

    def __init__(self, cluster: RedisCluster, link: ClusterLink) -> None:
        self.cluster = cluster
        self.link = link
        self.ears = Ears()
        made = cluster_access(cluster.url()).subscriber(link, self.ears)
        assert isinstance(made, ClusterSubscriber)
        self.subscriber = made
        self.outcome = Outcome()

    async def publish(self, channel: bytes, payload: bytes) -> object:
        return await self.link.execute("SPUBLISH", channel, payload)

    async def hears(self, count: int) -> list[tuple[bytes, bytes]]:
        """All that was heard, when it is so much."""
        return list(await self.ears.wait(count))

    def channel_of(self, number: int) -> bytes:
        """A channel of this master."""
        port = self.cluster.masters[number].port
        return next(each for each in CHANNELS if self.link.owner(key_slot(each)).port == port)


@pytest.fixture
async def stage(cluster: RedisCluster, nursery: trio.Nursery) -> AsyncIterator[Stage]:
    async with open_cluster(cluster.url()) as link:
        made = Stage(cluster, link)
        await nursery.start(made.outcome.run, made.subscriber)
        yield made
        nursery.cancel_scope.cancel()


async def test_messages_of_all_masters_are_received(stage: Stage) -> None:
    assert stage.subscriber.usable
    async with trio.open_nursery() as nursery:
        for channel in CHANNELS:
            nursery.start_soon(stage.subscriber.subscribe, channel)
    for channel in CHANNELS:
        assert await stage.publish(channel, b"x" + channel) == 1
    heard = await stage.hears(len(CHANNELS))
    assert sorted(heard) == sorted((channel, b"x" + channel) for channel in CHANNELS)
    for channel in CHANNELS[:5]:
        await stage.subscriber.unsubscribe(channel)
        assert await stage.publish(channel, b"nobody") == 0
    await stage.subscriber.unsubscribe(b"never")


async def test_channel_follows_its_slot(stage: Stage) -> None:
    cluster, link = stage.cluster, stage.link
    channel, other = stage.channel_of(0), stage.channel_of(1)
    source, target, _ = cluster.masters
    for each in (channel, other):
        await stage.subscriber.subscribe(each)
    slot = key_slot(channel)
    await blocking(cluster.open_slot, slot, source, target)
    await stage.publish(channel, b"while open")
    assert await stage.hears(1) == [(channel, b"while open")]
    await blocking(cluster.close_slot, slot, target, source)
    assert (await stage.hears(2))[1] == (channel, MISSED)
    assert await stage.publish(channel, b"after") == 1
    await stage.publish(other, b"other")
    assert sorted((await stage.hears(4))[2:]) == sorted([(channel, b"after"), (other, b"other")])
    # And it can be left there.
    await stage.subscriber.unsubscribe(channel)
    assert await stage.publish(channel, b"nobody") == 0
    assert link.usable
    assert stage.subscriber.usable


async def test_slot_moved_unnoticed_is_looked_up(stage: Stage) -> None:
    cluster = stage.cluster
    source, _, target = cluster.masters
    channel = stage.channel_of(0)
    await blocking(cluster.move_slots, [key_slot(channel)], source, target)
    await stage.subscriber.subscribe(channel)
    assert await stage.publish(channel, b"x") == 1
    assert await stage.hears(1) == [(channel, b"x")]


async def test_many_slots_move_at_once(stage: Stage) -> None:
    cluster = stage.cluster
    source, target, _ = cluster.masters
    moving = [each for each in CHANNELS if stage.link.owner(key_slot(each)).port == source.port]
    # Not that of the probe, which is another test's.
    number = await stage.link.hash_tag(stage.link.owner(key_slot(moving[0])))
    probe = key_slot(b"%d" % number)
    slots = {key_slot(each) for each in moving} - {probe}
    moving = [each for each in moving if key_slot(each) in slots][:30]
    for each in moving:
        await stage.subscriber.subscribe(each)
    await blocking(cluster.move_slots, {key_slot(each) for each in moving}, source, target)
    heard = await stage.hears(len(moving))
    assert sorted(heard) == sorted((each, MISSED) for each in moving)
    for each in moving:
        assert await stage.publish(each, b"x") == 1


async def test_moved_probe_slot_is_a_loss(stage: Stage) -> None:
    cluster = stage.cluster
    channel = stage.channel_of(1)
    number = await stage.link.hash_tag(stage.link.owner(key_slot(channel)))
    _, source, target = cluster.masters
    await blocking(cluster.move_slots, [key_slot(b"%d" % number)], source, target)
    error = await stage.outcome.wait()
    assert "the slot of the probe has moved" in str(error)
    assert not stage.subscriber.usable
    with pytest.raises(type(error)):
        await stage.subscriber.subscribe(channel)
    # The next one has another.
    again = Stage(cluster, stage.link)
    async with trio.open_nursery() as nursery:
        await nursery.start(again.outcome.run, again.subscriber)
        await again.subscriber.subscribe(channel)
        await again.publish(channel, b"x")
        assert await again.hears(1) == [(channel, b"x")]
        nursery.cancel_scope.cancel()


async def test_loss_of_one_connection_is_a_loss(stage: Stage) -> None:
    for client in stage.cluster.masters[1].cli("CLIENT LIST"):
        if client["name"].startswith("bandsync-relay"):
            stage.cluster.masters[1].cli("CLIENT", "KILL", "ID", client["id"])
    assert loss_reason(await stage.outcome.wait()) == "reset"
    assert not stage.subscriber.usable
    assert stage.link.usable


async def test_loss_while_channels_move_ends_the_subscriber(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = 0

    async def follow(channel: bytes) -> None:
        nonlocal followed
        followed += 1
        # There is nothing to wait for, so nothing that could be cancelled.
        assert followed < 100
        raise LinkLostError("lost already")

    subscriber = stage.subscriber
    monkeypatch.setattr(subscriber, "_resubscribe", follow)
    subscriber._on_removed(b"a channel")  # noqa: SLF001
    subscriber._lose(LinkLostError("in the same moment"))  # noqa: SLF001
    assert "in the same moment" in str(await stage.outcome.wait())


SLOT = key_slot(b"a")


@pytest.mark.parametrize("first", [True, False])
async def test_channel_removed_during_an_unsubscribe(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, first: bool
) -> None:
    """The node's word comes before the answer, which is an error then, or after it."""
    removed: list[bytes] = []
    scripted = ScriptedRedis(monkeypatch)
    subscriber = subscriber_to(RedisAddress("stage.example"), on_removed=removed.append)

    async def begin() -> None:
        await scripted.answer(b"+OK\r\n", _push(b"ssubscribe", PROBE))

    nursery.start_soon(begin)
    outcome = Outcome()
    await nursery.start(outcome.run, subscriber)

    async def subscribe() -> None:
        await subscriber.subscribe(b"a")

    async with trio.open_nursery() as callers:
        callers.start_soon(subscribe)
        await scripted.answer(_push(b"ssubscribe", b"a"))
    moved = b"-MOVED %d 10.0.0.1:6379\r\n" % SLOT
    async with trio.open_nursery() as callers:
        callers.start_soon(subscriber.unsubscribe, b"a")
        await scripted.command()
        if first:
            await scripted.send(_push(b"sunsubscribe", b"a") + moved)
        else:
            await scripted.send(_push(b"sunsubscribe", b"a"))
    assert removed == []
    # Later calls get their own replies.
    async with trio.open_nursery() as callers:
        callers.start_soon(subscriber.subscribe, b"b")
        await scripted.answer(_push(b"ssubscribe", b"b"))
    await scripted.send(_push(b"sunsubscribe", b"b"))
    with trio.fail_after(PATIENCE_S):
        while not removed:  # noqa: ASYNC110
            await trio.sleep(0.001)
    assert removed == [b"b"]

    async def refused() -> None:
        with pytest.raises(MovedError):
            await subscriber.subscribe(b"a")

    async with trio.open_nursery() as callers:
        callers.start_soon(refused)
        await scripted.answer(moved)
    assert subscriber.usable
    nursery.cancel_scope.cancel()


def _push(verb: bytes, channel: bytes) -> bytes:
    return b"*3\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n:1\r\n" % (len(verb), verb, len(channel), channel)
