"""A Sentinel failover under two servers that share their bands: everything is a process of its own.

For a while they may be on different masters, and both acknowledge. No change
of either may be lost, no client may see a version out of order, and all end with one state.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
from msgspec import Struct

from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_sentinels import MASTER, SentinelSetup
from scripts.testbed.redis_server import HOST, RedisServer
from scripts.testbed.server_process import ServerProcess
from tests.redis_link.test_sentinel import measured
from tests.support.outages import Chatter, blocking, head, heard, in_order, stored_chat, until
from tests.support.servers import TEST_SETTINGS, Musician, play_along
from tests.test_cluster import agree

SETTINGS = {
    "REDIS_ENABLED": "true",
    "REDIS_HEALTH_INTERVAL_MS": "50",
    "REDIS_RETRY_DELAY_ON_FAILURE": "20",
    "REDIS_SENTINEL_MASTER": MASTER,
    "RATE_LIMIT_FACTOR": "0",
    "TICK_INTERVAL_MS": "0",
}
RING = 50


class Reading(Struct, frozen=True):
    """The storage of a server at an instant.

    Attributes:
        port: of the master; None while sessions are in memory.
    """

    at: float
    port: int | None


class Side:
    """One of the servers, its part of the band, and where it kept the sessions all the time."""

    def __init__(self, name: str, process: ServerProcess, nursery: trio.Nursery) -> None:
        self.name = name
        self.process = process
        self.players: list[Musician] = []
        self.readings: list[Reading] = []
        self._nursery = nursery

    async def join(self, name: str) -> Musician:
        server: Any = SimpleNamespace(port=self.process.port, settings=TEST_SETTINGS)
        player = await self._nursery.start(play_along, server)
        await player.join(displayName=name)
        self.players.append(player)
        return player

    async def watch(self) -> None:
        """Poll its storage status for ever."""
        async with httpx.AsyncClient(base_url=self.process.url) as client:
            while True:
                status = (await client.get("/api/storage/status")).json()
                port = None
                if status["mode"] == "redis":
                    port = int(status["redisStatus"]["address"].split("/")[2].split(":")[1])
                self.readings.append(Reading(trio.current_time(), port))
                await trio.sleep(0.02)

    async def settled_on(self, redis: RedisServer) -> None:
        async def there() -> bool:
            return bool(self.readings) and self.readings[-1].port == redis.port

        await until(there)


class Scene:
    """Two servers under the same Sentinels, two members of one band on each.

    Attributes:
        proxies: between the right server and each of the Sentinels.
    """

    def __init__(
        self, watched: SentinelSetup, left: Side, right: Side, proxies: list[FaultProxy]
    ) -> None:
        self.watched = watched
        self.left = left
        self.right = right
        self.proxies = proxies
        self.old = watched.servers[0]
        self.new = watched.servers[1]

    @property
    def sides(self) -> list[Side]:
        return [self.left, self.right]

    @property
    def players(self) -> list[Musician]:
        return [*self.left.players, *self.right.players]

    def apart_s(self) -> float:
        """How long both used a Redis, and not the same one."""
        total = 0.0
        for before, after in zip(self.left.readings, self.left.readings[1:], strict=False):
            other = [each for each in self.right.readings if each.at <= after.at]
            if other and before.port and other[-1].port and before.port != other[-1].port:
                total += after.at - before.at
        return total


@pytest.fixture
def guarded(redis_binary: None) -> Iterator[SentinelSetup]:
    # Servers notice before Sentinels do: they try to connect again to a master that hangs.
    with SentinelSetup(user="guard", down_after_ms=2000) as made:
        yield made


@pytest.fixture
async def scene(guarded: SentinelSetup, nursery: trio.Nursery) -> AsyncIterator[Scene]:
    proxies = [await nursery.start(FaultProxy(sentinel.port).run) for sentinel in guarded.sentinels]
    hosts = {
        "left": guarded.hosts,
        "right": ",".join(f"{HOST}:{proxy.port}" for proxy in proxies),
    }
    with ExitStack() as stack:
        sides = []
        for name in ("left", "right"):
            process = ServerProcess(**SETTINGS, SERVER_ID=name, REDIS_SENTINELS=hosts[name])
            # In another thread: the proxies are in this one.
            await blocking(stack.enter_context, process)
            sides.append(Side(name, process, nursery))
        made = Scene(guarded, sides[0], sides[1], proxies)
        for side in sides:
            nursery.start_soon(side.watch)
            await side.settled_on(made.old)
            for name in ("Ann", "Bob"):
                await side.join(f"{name} of {side.name}")
        yield made
        nursery.cancel_scope.cancel()


class Conductor:
    """A leader who updates the message without a pause.

    Attributes:
        said: what was acknowledged last.
    """

    def __init__(self, leader: Musician) -> None:
        self.said = ""
        self._leader = leader
        self._done = trio.Event()

    async def run(self) -> None:
        number = 0
        while not self._done.is_set():
            number += 1
            await self._leader.ok("update_message", message=f"Verse {number}")
            self.said = f"Verse {number}"
            await trio.sleep(0.01)

    def stop(self) -> None:
        self._done.set()


@asynccontextmanager
async def load(scene: Scene) -> AsyncIterator[tuple[Chatter, Conductor]]:
    """All members chat and the leader updates the message until the end of the block."""
    talk, leader = Chatter(scene.players), Conductor(scene.left.players[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        nursery.start_soon(leader.run)
        await talk.more()
        yield talk, leader
        talk.stop()
        leader.stop()


async def nothing_lost(scene: Scene, talk: Chatter, leader: Conductor) -> None:
    """All clients end with one state that contains the changes of both sides."""
    players = scene.players
    shown = await agree(*players)
    ring = [chat["text"] for chat in shown["chat"]]
    assert len(ring) == RING
    oldest = shown["chat"][0]["sentAt"]
    for player in players:
        assert player.close_code is None
        assert player.all("error") == []
        in_order(player)
        heard(player)
    sent_at = {
        message["text"]: message["sentAt"]
        for player in players
        for message in player.all("chat_message")
    }
    for text in talk.texts:
        # Or fifty later ones are.
        assert text in ring or text not in sent_at or sent_at[text] <= oldest, text
    for side in scene.sides:
        # A room hears all of its own, as it happens.
        own = {text for player in side.players for text in heard(player)}
        numbers = [players.index(player) for player in side.players]
        assert own >= {text for text in talk.texts if int(text.split(":")[0]) in numbers}
    assert shown["message"] == leader.said
    assert shown["leaderId"] == players[0].you["memberId"]
    assert [member["connected"] for member in shown["members"]] == [True] * len(players)
    redis = scene.watched.master
    assert stored_chat(redis) == ring
    assert head(redis)["message"]["value"] == leader.said


async def kill(scene: Scene) -> None:
    await blocking(scene.old.kill)
    await blocking(scene.watched.wait_for_failover, scene.old)


async def hang(scene: Scene) -> None:
    """It hangs, is replaced, and goes on, as a master who does not know that yet."""
    await blocking(scene.old.stop)
    try:
        await blocking(scene.watched.wait_for_failover, scene.old)
    finally:
        scene.old.resume()


async def replace(scene: Scene) -> None:
    await blocking(scene.watched.fail_over)
    await blocking(scene.watched.wait_for_failover, scene.old)


FAULTS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "killed": kill,
    "hanging, and back": hang,
    "replaced": replace,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
async def test_two_servers_follow_and_nothing_is_lost(scene: Scene, fault: str) -> None:
    with measured(scene.players) as longest:
        async with load(scene) as (talk, leader):
            await talk.more(50)
            before = trio.current_time()
            await FAULTS[fault](scene)
            failover_s = trio.current_time() - before
            back_s = []
            for side in scene.sides:
                await side.settled_on(scene.new)
                back_s.append(trio.current_time() - before)
            await talk.more(50)
    await nothing_lost(scene, talk, leader)
    print(  # noqa: T201
        f"{fault}: failover {failover_s:.2f} s, both back after {max(back_s):.2f} s, on different "
        f"masters {scene.apart_s():.2f} s, longest wait {longest[0] * 1000:.0f} ms"
    )
    assert longest[0] < failover_s + 1


@pytest.mark.slow
async def test_late_notification_of_one_server_loses_nothing(scene: Scene) -> None:
    with measured(scene.players) as longest:
        async with load(scene) as (talk, leader):
            for proxy in scene.proxies:
                proxy.black_hole()
            # For the Sentinels it is as good as dead, for the servers it is not.
            await blocking(scene.old.cli, "ACL", "SETUSER", "guard", "-@all")
            await scene.left.settled_on(scene.new)
            apart = len(scene.right.readings)
            for side in scene.sides:
                for player in side.players:
                    await player.ok("chat_message", text=f"apart, {player.you['memberId']}")
            assert {each.port for each in scene.right.readings[apart:]} <= {scene.old.port}
            assert not set(stored_chat(scene.old)) & set(stored_chat(scene.new)[-2:])
            for proxy in scene.proxies:
                proxy.heal()
            await scene.right.settled_on(scene.new)
            await talk.more(50)
    await nothing_lost(scene, talk, leader)
    print(  # noqa: T201
        f"told later: on different masters {scene.apart_s():.2f} s, "
        f"longest wait {longest[0] * 1000:.0f} ms"
    )
    assert scene.apart_s() > 0
