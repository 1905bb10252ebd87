"""One clock for all: servers whose machines disagree by minutes, on one Redis."""

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
from msgspec import Struct

from bandsync import app
from scripts.testbed.redis_server import RedisServer
from tests.support.outages import blocking, get, mode
from tests.support.servers import Musician, Server, band, play_along, start_server
from tests.test_cluster import QUICK, agree, current

MINUTE_MS = 60_000.0
# Faster than this no two clocks part here: those of one machine, one of them slewed.
PARTING_MS_PER_S = 1.0


class Span(Struct, frozen=True):
    """Bounds in ms on how far Redis's clock is ahead of Trio's."""

    low: float
    high: float

    def meets(self, other: "Span") -> bool:
        return self.low <= other.high and other.low <= self.high


def here() -> float:
    return trio.current_time() * 1000


async def told_by(server: Server, player: Musician) -> Span:
    """The clock of a server, with the error that it publishes."""
    started = here()
    statuses = [await get(server, "/api/storage/status")]
    before = here()
    await player.send("heartbeat")
    time = (await player.next("heartbeat"))["serverTime"]
    after = here()
    statuses.append(await get(server, "/api/storage/status"))
    parting = (here() - started) / 1000 * PARTING_MS_PER_S
    errors = [status["clockErrorMs"] for status in statuses]
    doubt = max(status["clockUncertaintyMs"] for status in statuses) + parting
    return Span(time - after + min(errors) - doubt, time - before + max(errors) + doubt)


async def told_by_redis(redis: RedisServer) -> Span:
    before = here()
    seconds, microseconds = await blocking(redis.cli, "TIME")
    time = int(seconds) * 1000 + int(microseconds) / 1000
    return Span(time - here(), time - before)


async def doubt(server: Server) -> float:
    """By how much its instants may be off."""
    status = await get(server, "/api/storage/status")
    return abs(status["clockErrorMs"]) + status["clockUncertaintyMs"]


class Skew:
    """Sets the wall clocks of servers that are started from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._true: Callable[[], float] = app.wall_ms

    def set(self, ms: float) -> None:
        self._monkeypatch.setattr(app, "wall_ms", lambda: self._true() + ms)


@pytest.fixture
def skew(monkeypatch: pytest.MonkeyPatch) -> Skew:
    return Skew(monkeypatch)


@pytest.fixture
async def servers(
    nursery: trio.Nursery, redis_server: RedisServer, skew: Skew
) -> tuple[Server, Server]:
    """One is seven minutes fast, the other five minutes slow."""
    started = []
    for name, minutes in (("fast", 7), ("slow", -5)):
        skew.set(minutes * MINUTE_MS)
        server = await start_server(nursery, server_id=name, redis_url=redis_server.url(), **QUICK)
        await mode(server, "redis")
        started.append(server)
    fast, slow = started
    return fast, slow


async def test_servers_on_one_redis_have_its_time(
    nursery: trio.Nursery, redis_server: RedisServer, servers: tuple[Server, Server]
) -> None:
    for server in servers:
        player = await nursery.start(play_along, server)
        for _ in range(5):
            span = await told_by(server, player)
            assert span.high - span.low < MINUTE_MS
            assert span.meets(await told_by_redis(redis_server))
    nursery.cancel_scope.cancel()


async def test_pause_on_another_server_keeps_the_position(
    nursery: trio.Nursery, servers: tuple[Server, Server]
) -> None:
    players = []
    for server in servers:
        player = await nursery.start(play_along, server)
        await player.join()
        players.append(player)
    ann, bob = players
    for leader, other in ((ann, bob), (bob, ann)):
        sent = here()
        await leader.ok("play", positionMs=0, startInMs=0)
        played = here()
        # To the last bit: the anchor is one number for all.
        anchors = [(await player.next("play"))["transport"] for player in players]
        assert anchors[0] == anchors[1]
        await leader.ok("set_role", role="leader", memberId=other.you["memberId"])
        pausing = here()
        await other.ok("pause")
        done = here()
        paused = [await player.next("pause") for player in players]
        assert paused[0] == paused[1]
        slack = sum([await doubt(server) for server in servers])
        slack += (done - sent) / 1000 * PARTING_MS_PER_S
        assert slack < MINUTE_MS
        position = paused[0]["transport"]["positionMs"]
        assert pausing - played - slack <= position <= done - sent + slack
    # Times increase over all writers.
    for player in players:
        times = [message["serverTime"] for message in player.all("play", "pause", "role_changed")]
        assert all(after > before - slack for before, after in pairwise(times))
    await agree(ann, bob)
    nursery.cancel_scope.cancel()


async def test_offset_and_error_are_published(servers: tuple[Server, Server]) -> None:
    for server, minutes in zip(servers, (7, -5), strict=True):
        status = await get(server, "/api/storage/status")
        assert abs(status["clockOffsetMs"] + minutes * MINUTE_MS) < MINUTE_MS
        assert abs(status["clockErrorMs"]) < MINUTE_MS
        assert 0 <= status["clockUncertaintyMs"] < MINUTE_MS


@pytest.mark.parametrize("what", ["offset", "error", "uncertainty"])
async def test_clock_metrics_match_the_status(servers: tuple[Server, Server], what: str) -> None:
    for server in servers:
        status = await get(server, "/api/storage/status")
        (value,) = re.findall(
            rf"^bandsync_clock_{what}_seconds (\S+)$", await get(server, "/metrics"), re.MULTILINE
        )
        key = f"clock{what.capitalize()}Ms"
        assert float(value) * 1000 == pytest.approx(status[key], abs=MINUTE_MS / 10)


@pytest.mark.parametrize("minutes", [-5, 7], ids=["slow", "fast"])
async def test_times_stay_monotonic_when_redis_is_found_later(
    nursery: trio.Nursery, redis_server: RedisServer, skew: Skew, minutes: float
) -> None:
    url = redis_server.url()
    redis_server.kill()
    skew.set(minutes * MINUTE_MS)
    server = await start_server(nursery, redis_url=url, **QUICK)
    status = await get(server, "/api/storage/status")
    assert (status["clockErrorMs"], status["clockOffsetMs"]) == (None, 0)
    async with band(server, "Ann", "Bob") as (ann, bob):
        first = here()
        await ann.ok("play", positionMs=0, startInMs=0)
        stop = trio.Event()

        async def ask(player: Musician) -> None:
            while not stop.is_set():
                await player.send("heartbeat")
                await player.next("heartbeat")
                await player.ok("chat_message", text="What's the time?")
                await trio.sleep(0.005)

        async with trio.open_nursery() as talk:
            talk.start_soon(ask, bob)
            await blocking(redis_server.restart)
            await ann.next("storage_status", storageType="redis")
            for _ in range(10):
                await ann.next("chat_message")
            stop.set()
        span = await told_by(server, bob)
        assert span.meets(await told_by_redis(redis_server))
        status = await get(server, "/api/storage/status")
        # Somebody plays: it is not set, what is wrong is published and slewed away.
        assert abs(status["clockErrorMs"] + minutes * MINUTE_MS) < MINUTE_MS
        slewed = status["clockOffsetMs"] * (1 if minutes < 0 else -1)
        assert 0 < slewed < (here() - first) * 0.001
        for player in (ann, bob):
            # Each kind by itself: a change is dated when it is decided, and told when it is kept.
            for kind in ("heartbeat", "scroll_tick", "chat_message"):
                times = [each["serverTime"] for each in player.all(kind)]
                assert times == sorted(times)
            sent = [each["sentAt"] for each in player.all("chat_message")]
            assert sent == sorted(set(sent))


@pytest.mark.parametrize("minutes", [-5, 7], ids=["slow", "fast"])
async def test_a_song_does_not_jump_when_redis_is_found(
    nursery: trio.Nursery, redis_server: RedisServer, skew: Skew, minutes: float
) -> None:
    url = redis_server.url()
    redis_server.kill()
    skew.set(minutes * MINUTE_MS)
    server = await start_server(nursery, redis_url=url, **QUICK)
    async with band(server, "Ann") as (ann,):
        before = here()
        await ann.ok("play", positionMs=0, startInMs=0)
        played = here()
        await blocking(redis_server.restart)
        await ann.next("storage_status", storageType="redis")
        asked = here()
        position = (await current(ann))["position"]
        slack = (here() - before) / 1000 * PARTING_MS_PER_S
        assert asked - played - slack <= position <= here() - before + slack


async def test_servers_with_wrong_clocks_agree_within_their_published_error(
    nursery: trio.Nursery, redis_server: RedisServer, skew: Skew
) -> None:
    url = redis_server.url()
    redis_server.kill()
    skew.set(7 * MINUTE_MS)
    fast = await start_server(nursery, server_id="fast", redis_url=url, **QUICK)
    await blocking(redis_server.restart)
    await mode(fast, "redis")
    skew.set(-5 * MINUTE_MS)
    right = await start_server(nursery, server_id="right", redis_url=url, **QUICK)
    await mode(right, "redis")
    spans = []
    for server in (fast, right):
        player = await nursery.start(play_along, server)
        spans.append(await told_by(server, player))
        assert spans[-1].high - spans[-1].low < MINUTE_MS
    assert spans[0].meets(spans[1])
    nursery.cancel_scope.cancel()
