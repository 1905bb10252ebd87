"""Presence entries of servers in Redis, and the members of servers that fail."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import CapturingLogger

from bandsync.app import Serving
from scripts.testbed.redis_server import RedisServer
from tests.support.outages import Process, blocking, start_process, until
from tests.support.servers import (
    PATIENCE_S,
    TEST_SETTINGS,
    Musician,
    Server,
    play_along,
    start_server,
)
from tests.test_cluster import QUICK, agree, current, in_order
from tests.test_serve import run, serving

KEY = "bandsync:server:hall"
GRACE_MS = 500
ABSENCE_S = 0.5
CHANGES = ("member_connection", "user_left", "role_changed")


def arguments(redis: RedisServer, *more: str) -> list[str]:
    """Command-line arguments of a server named ``hall``."""
    return [
        "--redis-enabled=true",
        f"--redis-url={redis.url()}",
        "--server-id=hall",
        *more,
    ]


def entry(redis: RedisServer) -> dict[str, Any] | None:
    value = redis.cli("GET", KEY)
    return None if value is None else json.loads(value)


def calls(redis: RedisServer, command: str) -> int:
    """How often Redis was given a command."""
    found = redis.cli("INFO", "commandstats").get(f"cmdstat_{command}")
    return found["calls"] if found else 0


@contextmanager
def process(tmp_path: Path, redis: RedisServer, *more: str) -> Iterator[tuple[Server, Any]]:
    """A server named ``hall`` in a process of its own, as musicians reach it."""
    with serving(tmp_path, *arguments(redis, *more)) as (started, lines):
        url = lines[0].split()[-1]
        assert lines[1].startswith("Storage: redis ("), lines
        port = int(url.rpartition(":")[2])
        serve = Serving(
            url, port, "hall", stop=started.terminate, close_shared_port=started.terminate
        )
        yield Server(serve, TEST_SETTINGS, CapturingLogger(), lines, trio.Event()), started


def test_second_live_server_of_same_name_refuses_to_start(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with process(tmp_path, redis_server) as (first, started):
        before = entry(redis_server)
        result = run(tmp_path, *arguments(redis_server, "--port=0"))
        assert (result.returncode, result.stdout) == (1, "")
        assert (
            f"serve.py: SERVER_ID='hall': another server that is alive, at {first.serving.url}, "
            "has the same SERVER_ID;"
        ) in result.stderr
        assert "Traceback" not in result.stderr
        # The first server is not affected.
        assert started.poll() is None
        after = entry(redis_server)
        assert before is not None
        assert after is not None
        assert after["bootId"] == before["bootId"]


def test_restart_after_kill_reuses_name_without_waiting(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with process(tmp_path, redis_server) as (_, started):
        before = entry(redis_server)
        started.kill()
        started.wait()
    assert before is not None
    assert redis_server.cli("PTTL", KEY) > 0
    redis_server.cli("CONFIG", "RESETSTAT")
    with process(tmp_path, redis_server) as (again, _):
        after = entry(redis_server)
        # One look is enough: the dead process cannot refresh the entry.
        assert calls(redis_server, "pttl") == 1
        assert after is not None
        assert after["bootId"] != before["bootId"]
        assert after["address"] == again.serving.url


def test_presence_entry_is_deleted_on_stop(tmp_path: Path, redis_server: RedisServer) -> None:
    with process(tmp_path, redis_server) as (_, started):
        assert redis_server.cli("PTTL", KEY) > 0
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE_S) == 0
        assert entry(redis_server) is None
    assert redis_server.cli("KEYS", "*") == []


async def test_presence_entry_lists_process_address_and_sessions(
    nursery: trio.Nursery, tmp_path: Path, redis_server: RedisServer
) -> None:
    with process(tmp_path, redis_server) as (server, started):
        first = entry(redis_server)
        assert first is not None
        assert (first["sessions"], first["connections"]) == ([], 0)
        players = [await nursery.start(play_along, server) for _ in range(3)]
        for player, session in zip(players, ("song", "song", "tune"), strict=True):
            await player.join(session)

        async def listed() -> dict[str, Any] | None:
            found = await blocking(entry, redis_server)
            return found if found["connections"] == 3 else None

        found = await until(listed)
        assert found.keys() >= {"bootId", "startedAt", "address", "sessions", "connections"}
        assert sorted(found["sessions"]) == ["song", "tune"]
        assert (found["bootId"], found["address"]) == (first["bootId"], server.serving.url)
        assert found["pid"] == started.pid
        await players[0].send("heartbeat")
        now = (await players[0].next("heartbeat"))["serverTime"]
        assert found["startedAt"] <= now
        assert abs(found["startedAt"] - first["startedAt"]) < now - found["startedAt"] + 1000
        assert 0 < redis_server.cli("PTTL", KEY) <= 10_000
        nursery.cancel_scope.cancel()


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything about presence is a twentieth as long, in this process."""
    monkeypatch.setattr("bandsync.rooms.failure_detector.ABSENCE_S", ABSENCE_S)
    monkeypatch.setattr("bandsync.rooms.failure_detector.CHECK_PERIOD_S", ABSENCE_S / 5)
    monkeypatch.setattr("bandsync.storage.health.PRESENCE_PERIOD_S", 0.15)
    monkeypatch.setattr("bandsync.storage.health.PRESENCE_EXPIRY_MS", 500)


class ThreeServers:
    """Two servers that observe, and one that will be killed.

    Attributes:
        ann, dan: on ``hall``, the one to be killed; Ann leads.
        bob, cid: on a server each.
    """

    def __init__(self, nursery: trio.Nursery, redis: RedisServer, grace_ms: int = GRACE_MS) -> None:
        self.nursery = nursery
        self.redis = redis
        self.settings = QUICK | {"resume_grace_ms": grace_ms}

    async def begin(self) -> None:
        url = self.redis.url()
        self.hall: Process = await start_process(
            self.nursery, url, **self.settings, server_id="hall"
        )
        self.left = await self.start("left")
        self.right = await self.start("right")
        self.ann = await self.join(self.hall.server, "Ann")
        self.bob = await self.join(self.left, "Bob")
        self.cid = await self.join(self.right, "Cid")
        self.dan = await self.join(self.hall.server, "Dan")
        for player in (self.bob, self.cid):
            await player.until(lambda player=player: {"Dan"} <= names(player))

    async def start(self, name: str) -> Server:
        return await start_server(
            self.nursery, server_id=name, redis_url=self.redis.url(), **self.settings
        )

    async def join(self, server: Server, name: str, **fields: object) -> Musician:
        player = await self.nursery.start(play_along, server)
        await player.join(displayName=name, **fields)
        return player

    async def stop(self) -> None:
        for server in (self.left, self.right):
            await server.stop()
        self.nursery.cancel_scope.cancel()


def names(player: Musician) -> set[str]:
    """The display names that a player has seen."""
    joined = {message["member"]["displayName"] for message in player.all("user_joined")}
    shown = player.all("snapshot")[0]["members"]
    return joined | {member["displayName"] for member in shown}


def about(messages: list[dict[str, Any]], member: Musician) -> list[dict[str, Any]]:
    """The messages about a member, ordered by version."""
    found = [message for message in messages if message["memberId"] == member.you["memberId"]]
    return sorted(found, key=lambda message: message["version"])


async def missed(player: Musician, member: Musician, *, absent: bool = True) -> bool:
    """Whether a player is shown that the member has no connection."""
    connected = {
        member["memberId"]: member["connected"] for member in (await current(player))["members"]
    }
    return connected.get(member.you["memberId"]) is not absent


async def left_with(player: Musician, *expected: str) -> None:
    """Wait until these are all that is left of the band."""

    async def look() -> bool:
        return {member["displayName"] for member in (await current(player))["members"]} == {
            *expected
        }

    await until(look)


async def test_members_of_killed_server_are_removed_once(
    nursery: trio.Nursery, redis_server: RedisServer, brisk: None
) -> None:
    cluster = ThreeServers(nursery, redis_server)
    await cluster.begin()
    ann, bob, cid, dan = cluster.ann, cluster.bob, cluster.cid, cluster.dan
    # While the server is alive, no check disconnects anybody.
    await trio.sleep(3 * ABSENCE_S)
    assert bob.all("member_connection") == []
    before = await current(bob)
    killed = before["serverTime"]
    await cluster.hall.kill()
    for player in (bob, cid):
        await left_with(player, "Bob", "Cid")
    # Wait until the other observer's check and grace are over, too.
    await trio.sleep(ABSENCE_S + GRACE_MS / 1000)
    shown = await agree(bob, cid)
    assert shown["leaderId"] == bob.you["memberId"]
    # The server that lost the race sent a snapshot; together the players received every event.
    heard = {
        message["version"]: message
        for message in bob.all(*CHANGES) + cid.all(*CHANGES)
        if message["version"] > before["version"]
    }
    assert sorted(heard) == list(range(before["version"] + 1, shown["version"] + 1))
    for gone in (ann, dan):
        missed, left = about(list(heard.values()), gone)
        assert (missed["type"], missed["connected"]) == ("member_connection", False)
        assert missed["serverTime"] - killed >= ABSENCE_S * 1000
        assert (left["type"], left["reason"]) == ("user_left", "server_lost")
        assert left["serverTime"] - missed["serverTime"] >= GRACE_MS
    (elected,) = about(list(heard.values()), bob)
    assert (elected["type"], elected["reason"]) == ("role_changed", "elected")
    for player in (bob, cid):
        in_order(player)
    await cluster.stop()


async def test_leader_resuming_elsewhere_in_time_keeps_the_lead(
    nursery: trio.Nursery, redis_server: RedisServer, brisk: None
) -> None:
    # A grace long enough for Ann to resume, and short enough to wait for Dan's to end.
    cluster = ThreeServers(nursery, redis_server, 5 * GRACE_MS)
    await cluster.begin()
    bob, cid = cluster.bob, cluster.cid
    await cluster.hall.kill()
    await until(lambda: missed(bob, cluster.ann))
    ann = await cluster.join(cluster.right, "Ann", resumeToken=cluster.ann.you["resumeToken"])
    assert (ann.you["resumed"], ann.you["role"]) == (True, "leader")
    # Dan does not resume. By the end of his grace Ann's would be over, too.
    await left_with(bob, "Ann", "Bob", "Cid")
    await trio.sleep(ABSENCE_S)
    shown = await agree(ann, bob, cid)
    assert shown["leaderId"] == ann.you["memberId"]
    assert about(bob.all("user_left"), ann) == []
    assert bob.all("role_changed") == []
    in_order(bob)
    await cluster.stop()


async def test_server_reusing_a_name_inherits_no_members(
    nursery: trio.Nursery, redis_server: RedisServer, brisk: None
) -> None:
    cluster = ThreeServers(nursery, redis_server)
    await cluster.begin()
    bob, cid = cluster.bob, cluster.cid
    await cluster.hall.kill()
    again = await start_process(nursery, redis_server.url(), **QUICK, server_id="hall")
    eve = await cluster.join(again.server, "Eve")
    await left_with(bob, "Bob", "Cid", "Eve")
    await trio.sleep(ABSENCE_S)
    shown = await agree(bob, cid, eve)
    assert {member["displayName"] for member in shown["members"]} == {"Bob", "Cid", "Eve"}
    assert all(member["connected"] for member in shown["members"])
    in_order(bob)
    await cluster.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how_long", ["missed", "removed"])
async def test_members_of_paused_server_come_back(
    nursery: trio.Nursery, tmp_path: Path, redis_server: RedisServer, brisk: None, how_long: str
) -> None:
    grace_ms = GRACE_MS if how_long == "removed" else int(PATIENCE_S * 1000)
    grace = f"--resume-grace-ms={grace_ms}"
    with process(tmp_path, redis_server, grace) as (hall, started):
        cluster = ThreeServers(nursery, redis_server, grace_ms)
        cluster.left, cluster.right = await cluster.start("left"), await cluster.start("right")
        ann = await cluster.join(hall, "Ann")
        bob = await cluster.join(cluster.left, "Bob")
        cid = await cluster.join(cluster.right, "Cid")
        await bob.until(lambda: {"Cid"} <= names(bob))

        async def listed() -> bool:
            return (await blocking(entry, redis_server))["sessions"] == ["song"]

        await until(listed)
        started.send_signal(signal.SIGSTOP)
        # Delete the entry now instead of waiting for its expiry.
        redis_server.cli("DEL", KEY)
        await until(lambda: missed(bob, ann))
        if how_long == "removed":
            await left_with(bob, "Bob", "Cid")
        started.send_signal(signal.SIGCONT)

        async def seen() -> bool:
            return await blocking(entry, redis_server) is not None

        # The paused server refreshes its entry at the normal period, the observers check faster:
        # until one check after the refresh they may disconnect Ann again.
        await until(seen)
        await trio.sleep(ABSENCE_S)
        # The member is back without any action of its client.
        await left_with(bob, "Ann", "Bob", "Cid")
        await until(lambda: missed(bob, ann, absent=False))
        await ann.ok("chat_message", text="What happened?")
        shown = await agree(ann, bob, cid)
        assert {member["displayName"] for member in shown["members"]} == {"Ann", "Bob", "Cid"}
        assert all(member["connected"] for member in shown["members"])
        await trio.sleep(ABSENCE_S + GRACE_MS / 1000)
        again = await agree(ann, bob, cid)
        assert again["members"] == shown["members"]
        assert [chat["text"] for chat in again["chat"]] == ["What happened?"]
        leaders = {"missed": ann, "removed": bob}
        assert again["leaderId"] == leaders[how_long].you["memberId"]
        for player in (ann, bob, cid):
            assert player.close_code is None
            in_order(player)
        await cluster.stop()
