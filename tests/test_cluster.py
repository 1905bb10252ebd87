"""Two servers, one session, one Redis: each server relays the other's changes."""

from collections.abc import AsyncIterator

import httpx
import pytest
import trio

from scripts.testbed.redis_server import RedisServer
from tests.support.servers import PATIENCE_S, Message, Musician, Server, play_along, start_server

QUICK = {
    "redis_enabled": True,
    "redis_health_interval_ms": 50,
    "redis_retry_delay_on_failure": 20,
    "resume_grace_ms": 500,
    "max_members": 64,
}
# The versioned messages: the history of a session.
HISTORY = (
    "snapshot",
    "user_joined",
    "user_left",
    "member_connection",
    "role_changed",
    "play",
    "pause",
    "seek",
    "tempo_changed",
    "message_updated",
    "chat_message",
)


class Cluster:
    """Servers on one Redis, and musicians wherever they like.

    Attributes:
        left, right: two servers.
    """

    def __init__(self, nursery: trio.Nursery, redis: RedisServer) -> None:
        self.nursery = nursery
        self.redis = redis

    async def start(self, name: str) -> Server:
        return await start_server(self.nursery, server_id=name, redis_url=self.redis.url(), **QUICK)

    async def begin(self) -> None:
        self.left = await self.start("left")
        self.right = await self.start("right")

    async def join(self, server: Server, name: str, **fields: object) -> Musician:
        player = await self.nursery.start(play_along, server)
        await player.join(displayName=name, **fields)
        return player


@pytest.fixture
async def cluster(nursery: trio.Nursery, redis_server: RedisServer) -> AsyncIterator[Cluster]:
    made = Cluster(nursery, redis_server)
    await made.begin()
    yield made
    for server in (made.left, made.right):
        await server.stop()


def history(player: Musician) -> list[tuple[str, int]]:
    return [(message["type"], message["version"]) for message in player.all(*HISTORY)]


def in_order(player: Musician) -> None:
    """Nothing is skipped or comes twice without a snapshot."""
    known = 0
    for type_, version in history(player):
        assert type_ == "snapshot" or version == known + 1, history(player)
        known = version


def state(snapshot: Message) -> Message:
    """The part of a snapshot that is equal for all clients."""
    volatile = ("you", "serverTime", "position")
    return {name: value for name, value in snapshot.items() if name not in volatile}


async def current(player: Musician) -> Message:
    before = len(player.inbox)
    await player.ok("sync_request")
    return next(message for message in player.inbox[before:] if message["type"] == "snapshot")


async def agree(*players: Musician) -> Message:
    """Wait until all see the same; what that is."""
    with trio.fail_after(PATIENCE_S):
        while True:
            states = [state(await current(player)) for player in players]
            if all(each == states[0] for each in states):
                return states[0]
            await trio.sleep(0.02)


async def test_every_change_is_delivered_once_and_in_order(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    assert (ann.you["role"], bob.you["role"]) == ("leader", "follower")
    await ann.next("user_joined")
    await ann.ok("play")
    for number in range(20):
        # Not at the same time: that is another test.
        await ann.ok("chat_message", text=f"left {number}")
        await bob.next("chat_message", text=f"left {number}")
        await bob.ok("chat_message", text=f"right {number}")
        await ann.next("chat_message", text=f"right {number}")
    await ann.ok("set_tempo", tempoBpm=90)
    await bob.next("tempo_changed")
    # Each starts with its own snapshot, and Bob's joining is in his.
    assert history(ann)[2:] == history(bob)[1:]
    for player in (ann, bob):
        in_order(player)
        # The deltas were enough: nobody had to be shown the whole.
        assert len(player.all("snapshot")) == 1
        assert len(player.all("chat_message")) == 40
    shown = await agree(ann, bob)
    assert shown["transport"]["tempoBpm"] == 90


async def test_concurrent_commands_on_both_servers_converge(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")

    async def talk(player: Musician, side: str) -> None:
        for number in range(40):
            await player.ok("chat_message", text=f"{side} {number}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, ann, "left")
        nursery.start_soon(talk, bob, "right")
    shown = await agree(ann, bob)
    for player in (ann, bob):
        in_order(player)
    # Fifty of the eighty are kept, each side's in its order.
    texts = [chat["text"] for chat in shown["chat"]]
    assert len(texts) == 50
    for side in ("left", "right"):
        numbers = [int(text.split()[1]) for text in texts if text.startswith(side)]
        assert numbers == sorted(numbers)
        assert numbers[-1] == 39


async def test_leader_request_crosses_servers(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    await bob.ok("request_leader")
    asked = await ann.next("leader_requested")
    assert asked["memberId"] == bob.you["memberId"]
    await ann.ok("deny_leader", memberId=bob.you["memberId"])
    await bob.next("leader_denied")
    await ann.ok("set_role", role="leader", memberId=bob.you["memberId"])
    await bob.next("role_changed", memberId=bob.you["memberId"], role="leader")
    await bob.ok("play")
    await ann.next("play")
    in_order(ann)
    in_order(bob)


async def test_resuming_elsewhere_closes_the_old_connection(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    again = await cluster.join(cluster.right, "Ann", resumeToken=ann.you["resumeToken"])
    assert again.you["resumed"]
    assert (again.you["memberId"], again.you["role"]) == (ann.you["memberId"], "leader")
    assert await ann.closed() == 4001
    await again.ok("play")
    await bob.next("play")
    shown = await agree(again, bob)
    assert [member["connected"] for member in shown["members"]] == [True, True]
    assert {member["serverId"] for member in shown["members"]} == {"right"}
    # A token of the binding before is good, too: the answer with the newer one may be lost.
    third = await cluster.join(cluster.left, "Ann", resumeToken=ann.you["resumeToken"])
    assert third.you["memberId"] == ann.you["memberId"]
    assert await again.closed() == 4001


async def test_drop_and_leave_reach_the_other_server(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    cid = await cluster.join(cluster.right, "Cid")
    await ann.socket.aclose()
    await bob.next("member_connection", memberId=ann.you["memberId"], connected=False)
    await bob.next("user_left", memberId=ann.you["memberId"], reason="timeout")
    await bob.next("role_changed", memberId=bob.you["memberId"], reason="elected")
    await cid.ok("leave_session")
    await bob.next("user_left", memberId=cid.you["memberId"], reason="left")
    in_order(bob)


async def test_lost_subscription_catches_up_without_failover(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    cluster.redis.cli("CLIENT", "KILL", "TYPE", "pubsub")
    for number in range(10):
        await ann.ok("chat_message", text=str(number))
    await bob.until(lambda: bob.inbox and seen_chat(bob) == 10)
    in_order(bob)
    assert cluster.right.events("relay.lost")
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"{cluster.right.serving.url}/metrics")).text
        status = (await client.get(f"{cluster.right.serving.url}/api/storage/status")).json()
    assert "bandsync_relay_losses_total 1.0" in metrics
    assert status["listening"]
    assert not cluster.right.events("storage.failover")
    # And then it is heard again at once.
    await ann.ok("chat_message", text="again")
    await bob.until(lambda: seen_chat(bob) == 11)


def seen_chat(player: Musician) -> int:
    """How many chat messages the player knows of, from events and snapshots."""
    known = {message["messageId"] for message in player.all("chat_message")}
    for snapshot in player.all("snapshot"):
        known |= {chat["messageId"] for chat in snapshot["chat"]}
    return len(known)


async def test_servers_without_redis_play_on_and_merge(
    cluster: Cluster,
) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    await ann.ok("play")
    await bob.next("play")
    cluster.redis.kill()
    await ann.next("storage_status", storageType="memory")
    await bob.next("storage_status", storageType="memory")
    await ann.ok("chat_message", text="from the left")
    await bob.ok("chat_message", text="from the right")
    # The leader is out of Bob's reach.
    await bob.ok("set_role", role="leader")
    await bob.ok("set_tempo", tempoBpm=77)
    cluster.redis.restart(empty=True)
    await ann.next("storage_status", storageType="redis")
    await bob.next("storage_status", storageType="redis")
    shown = await agree(ann, bob)
    assert {chat["text"] for chat in shown["chat"]} == {"from the left", "from the right"}
    assert shown["leaderId"] == bob.you["memberId"]
    assert shown["transport"]["tempoBpm"] == 77
    assert shown["isPlaying"]
    assert len(shown["members"]) == 2
    # The former and the new leader each receive a role_changed.
    heard = [(message["memberId"], message["role"]) for message in ann.all("role_changed")]
    assert heard == [(ann.you["memberId"], "follower"), (bob.you["memberId"], "leader")]
    assert {message["reason"] for message in ann.all("role_changed")} == {"merged"}
    in_order(ann)
    in_order(bob)


async def test_room_unsubscribes_after_its_last_member(cluster: Cluster) -> None:
    def channels() -> list[str]:
        return [name for name in cluster.redis.cli("PUBSUB", "CHANNELS") if "events" in name]

    assert channels() == []
    ann = await cluster.join(cluster.left, "Ann")
    assert channels() == ["bandsync:events:{song}"]
    await ann.ok("leave_session")
    with trio.fail_after(PATIENCE_S):
        while channels():  # noqa: ASYNC110 - Redis tells nobody
            await trio.sleep(0.01)
    again = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    await again.next("user_joined")
    await again.ok("play")
    await bob.next("play")


async def test_room_stats_include_remote_members(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    bob = await cluster.join(cluster.right, "Bob")
    await bob.ok("sync_report", errorMs=1.5)

    def seen() -> bool:
        stats = {each["memberId"]: each for each in ann.all("room_stats")[-1]["members"]}
        return bool(stats.get(bob.you["memberId"], {}).get("syncErrorMs") == 1.5)

    with trio.fail_after(PATIENCE_S):
        while not seen():
            # Statistics are sent when somebody comes, too.
            await cluster.join(cluster.right, "Guest")
            await cluster.join(cluster.left, "Guest")
    (stats,) = [
        each
        for each in ann.all("room_stats")[-1]["members"]
        if each["memberId"] == bob.you["memberId"]
    ]
    assert stats["latencyMs"] is not None
    assert stats["quality"] == "excellent"


async def test_remote_leave_updates_room_stats_at_once(cluster: Cluster) -> None:
    ann = await cluster.join(cluster.left, "Ann")
    others = [await cluster.join(cluster.right, name) for name in ("Bob", "Cid", "Dan")]
    await ann.next("room_stats", memberCount=4)
    # Periodic statistics, every five seconds, could report one of these at most.
    with trio.fail_after(4):
        for count, other in zip((3, 2, 1), others, strict=True):
            await other.ok("leave_session")
            stats = await ann.next("room_stats", memberCount=count)
    assert [each["memberId"] for each in stats["members"]] == [ann.you["memberId"]]
