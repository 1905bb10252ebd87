"""Two servers, and one of them cut off from Redis: both sides play on, and agree afterwards."""

from collections.abc import AsyncIterator, Callable

import pytest
import trio

from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST, RedisServer
from tests.support.outages import heard, in_order, mode, until
from tests.support.servers import Message, Musician, Server, play_along, start_server
from tests.test_cluster import QUICK, agree, current

Cut = Callable[[FaultProxy], None]


class Side:
    """A server and its own way to Redis."""

    def __init__(self, server: Server, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy


class Split:
    """Two sides of one band.

    Attributes:
        left, right: Ann and Bob are on the left, Ann leads; Cid and Dan are on the right.
        everybody: who is, or was, connected.
    """

    def __init__(self, nursery: trio.Nursery, redis: RedisServer) -> None:
        self._nursery = nursery
        self._redis = redis
        self.everybody: list[Musician] = []

    async def begin(self) -> None:
        self.left = await self._side("left")
        self.right = await self._side("right")
        self.ann = await self.join(self.left, "Ann")
        self.bob = await self.join(self.left, "Bob")
        self.cid = await self.join(self.right, "Cid")
        self.dan = await self.join(self.right, "Dan")
        await self.ann.ok("play", positionMs=0, startInMs=0)
        await agree(*self.everybody)

    async def _side(self, name: str) -> Side:
        proxy = await self._nursery.start(FaultProxy(self._redis.port).run)
        settings = QUICK | {"redis_connect_timeout": 500, "tick_interval_ms": 0}
        url = f"redis://{HOST}:{proxy.port}/0"
        server = await start_server(self._nursery, server_id=name, redis_url=url, **settings)
        await mode(server, "redis")
        return Side(server, proxy)

    async def join(self, side: Side, name: str, **fields: object) -> Musician:
        player = await self._nursery.start(play_along, side.server)
        await player.join(displayName=name, **fields)
        self.everybody.append(player)
        return player

    async def leave(self, player: Musician) -> None:
        await player.ok("leave_session")
        self.everybody.remove(player)

    async def cut(self, side: Side, how: Cut) -> None:
        how(side.proxy)
        await mode(side.server, "memory")

    async def heal(self, *sides: Side) -> Message:
        """Both are back on Redis, and everybody sees the same: what that is."""
        for side in sides:
            side.proxy.heal()
        for side in sides:
            await mode(side.server, "redis")
        shown = await agree(*self.everybody)
        for player in self.everybody:
            in_order(player)
            assert player.close_code is None
            assert player.all("error") == []
        return shown


@pytest.fixture
async def split(nursery: trio.Nursery, redis_server: RedisServer) -> AsyncIterator[Split]:
    made = Split(nursery, redis_server)
    await made.begin()
    yield made
    nursery.cancel_scope.cancel()


def black_hole(proxy: FaultProxy) -> None:
    proxy.black_hole()


def reset(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.reset()


@pytest.fixture(params=[black_hole, reset])
def how(request: pytest.FixtureRequest) -> Cut:
    cut: Cut = request.param
    return cut


def names(snapshot: Message) -> list[str]:
    assert all(member["connected"] for member in snapshot["members"])
    return sorted(member["displayName"] for member in snapshot["members"])


def roles(player: Musician) -> list[tuple[str, str, str]]:
    changes = player.all("role_changed")
    return [(change["memberId"], change["role"], change["reason"]) for change in changes]


def merged(old: Musician, new: Musician) -> list[tuple[str, str, str]]:
    return [
        (old.you["memberId"], "follower", "merged"),
        (new.you["memberId"], "leader", "merged"),
    ]


def remembered(split: Split, *texts: str) -> None:
    for player in split.everybody:
        assert heard(player) >= set(texts)


async def test_the_lead_may_be_claimed_on_the_side_that_is_cut_off(split: Split, how: Cut) -> None:
    ann, bob, cid, dan = split.ann, split.bob, split.cid, split.dan
    await split.cut(split.right, how)
    # There the leader is out of reach.
    await cid.ok("set_role", role="leader")
    await cid.ok("set_tempo", tempoBpm=77)
    await cid.ok("update_message", message="Bridge")
    await cid.ok("chat_message", text="from the right")
    await split.leave(dan)
    fay = await split.join(split.right, "Fay")
    # Here nobody noticed.
    await ann.ok("pause")
    await ann.ok("update_message", message="Verse")
    await bob.ok("chat_message", text="from the left")
    await split.leave(bob)
    gus = await split.join(split.left, "Gus")
    before = await current(ann)
    assert before["leaderId"] == ann.you["memberId"]

    shown = await split.heal(split.right)
    assert names(shown) == ["Ann", "Cid", "Fay", "Gus"]
    assert shown["leaderId"] == cid.you["memberId"]
    # Under the leader that won: the pause was the other's.
    assert (shown["tempoBpm"], shown["isPlaying"], shown["message"]) == (77, True, "Bridge")
    assert shown["version"] > before["version"]
    remembered(split, "from the left", "from the right")
    for player in (ann, gus):
        assert roles(player) == merged(ann, cid)
    assert roles(cid)[:2] == [
        (ann.you["memberId"], "follower", "claimed"),
        (cid.you["memberId"], "leader", "claimed"),
    ]
    # And the roles are what they say.
    assert (await ann.ask("play"))["code"] == "not_leader"
    await cid.ok("pause")
    await ann.next("pause")
    await fay.next("pause")


async def test_the_leader_that_is_cut_off_leads_afterwards(split: Split, how: Cut) -> None:
    ann, bob, cid, dan = split.ann, split.bob, split.cid, split.dan
    await split.cut(split.left, how)
    await ann.ok("set_tempo", tempoBpm=90)
    await ann.ok("update_message", message="Chorus")
    await bob.ok("chat_message", text="from the left")
    # The others have not missed her yet.
    assert (await dan.ask("set_role", role="leader"))["code"] == "leader_present"
    await cid.ok("chat_message", text="from the right")
    await split.leave(dan)
    shown = await split.heal(split.left)
    assert names(shown) == ["Ann", "Bob", "Cid"]
    assert (shown["leaderId"], shown["message"]) == (ann.you["memberId"], "Chorus")
    assert (shown["tempoBpm"], shown["isPlaying"]) == (90, True)
    remembered(split, "from the left", "from the right")
    for player in split.everybody:
        assert roles(player) == []


async def test_later_of_two_new_leaders_wins(split: Split, how: Cut) -> None:
    ann, bob, cid, dan = split.ann, split.bob, split.cid, split.dan
    await split.cut(split.left, how)
    await split.cut(split.right, how)
    await cid.ok("set_role", role="leader")
    await ann.ok("set_role", role="leader", memberId=bob.you["memberId"])
    await bob.ok("set_tempo", tempoBpm=90)
    await cid.ok("set_tempo", tempoBpm=77)
    await split.leave(ann)
    await dan.ok("chat_message", text="from the right")
    shown = await split.heal(split.left, split.right)
    assert names(shown) == ["Bob", "Cid", "Dan"]
    assert (shown["leaderId"], shown["tempoBpm"]) == (bob.you["memberId"], 90)
    remembered(split, "from the right")
    assert roles(dan)[-2:] == merged(cid, bob)
    assert (await cid.ask("play"))["code"] == "not_leader"
    await bob.ok("pause")


async def test_member_that_changes_servers_is_listed_once(split: Split, how: Cut) -> None:
    ann, cid = split.ann, split.cid
    await split.cut(split.right, how)
    await cid.ok("chat_message", text="before")
    # The phone changes its network, and lands on the server that has Redis.
    again = await split.join(split.left, "Cid", resumeToken=cid.you["resumeToken"])
    assert again.you["resumed"]
    assert again.you["memberId"] == cid.you["memberId"]
    split.everybody.remove(cid)
    await again.ok("chat_message", text="after")
    shown = await split.heal(split.right)
    assert await cid.closed() == 4001
    assert names(shown) == ["Ann", "Bob", "Cid", "Dan"]
    remembered(split, "before", "after")
    assert shown["leaderId"] == ann.you["memberId"]


async def test_repeated_partitions_lose_nothing(split: Split) -> None:
    texts = []
    for number, side in enumerate((split.left, split.right, split.left)):
        await split.cut(side, reset)
        for player in split.everybody:
            texts.append(f"{number} {player.you['memberId']}")
            await player.ok("chat_message", text=texts[-1])
        shown = await split.heal(side)
        assert {chat["text"] for chat in shown["chat"]} == set(texts)
    assert names(shown) == ["Ann", "Bob", "Cid", "Dan"]
    assert shown["leaderId"] == split.ann.you["memberId"]
    remembered(split, *texts)


@pytest.mark.slow
async def test_long_partition_elects_and_merges(split: Split) -> None:
    ann, bob, cid, dan = split.ann, split.bob, split.cid, split.dan
    await split.cut(split.left, reset)
    await ann.ok("update_message", message="Chorus")
    await ann.ok("chat_message", text="from the left")
    await split.leave(bob)

    async def gone() -> bool:
        return names_of_all(await current(dan)) == ["Cid", "Dan"]

    await until(gone)
    for left in (ann, bob):
        (message,) = [
            each for each in dan.all("user_left") if each["memberId"] == left.you["memberId"]
        ]
        assert message["reason"] == "server_lost"
    assert roles(dan) == [(cid.you["memberId"], "leader", "elected")]
    await cid.ok("set_tempo", tempoBpm=77)
    await dan.ok("chat_message", text="from the right")
    shown = await split.heal(split.left)
    # Ann never left; whoever was elected leads.
    assert names(shown) == ["Ann", "Cid", "Dan"]
    assert (shown["leaderId"], shown["tempoBpm"]) == (cid.you["memberId"], 77)
    assert (shown["message"], shown["isPlaying"]) == ("Chorus", True)
    remembered(split, "from the left", "from the right")
    assert roles(ann) == merged(ann, cid)
    assert (await ann.ask("play"))["code"] == "not_leader"


def names_of_all(snapshot: Message) -> list[str]:
    return sorted(member["displayName"] for member in snapshot["members"])


async def test_idle_partition_changes_nothing(split: Split, how: Cut) -> None:
    before = await agree(*split.everybody)
    await split.cut(split.right, how)
    # The version, too, and nobody was told of any role.
    assert await split.heal(split.right) == before
    assert all(roles(player) == [] for player in split.everybody)
