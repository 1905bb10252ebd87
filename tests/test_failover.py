"""Whole servers, a real Redis that breaks, and bands that must not notice: design.md section 5."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from msgspec import Struct

from bandsync.app import StartError
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.servers import (
    PATIENCE_S,
    Message,
    Musician,
    Server,
    band,
    musician,
    start_server,
)

KEY = "bandsync:session:{song}"

# As the defaults, but sooner.
QUICK: dict[str, Any] = {
    "redis_enabled": True,
    "redis_health_interval_ms": 50,
    "redis_retry_delay_on_failure": 20,
    "redis_connect_timeout": 500,
    "tick_interval_ms": 0,
}

# What has no version of its own.
VOLATILE = {"room_stats", "scroll_tick", "leader_requested", "leader_denied", "drift_correction"}


async def blocking(work: Callable[..., Any], *args: object) -> Any:
    """Do what blocks, while the servers of this process go on."""
    return await trio.to_thread.run_sync(work, *args)


async def get(server: Server, path: str) -> Any:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        answer = await client.get(path)
    return answer.text if path == "/metrics" else answer.json()


async def until(wanted: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again and again, where nobody tells."""
    with trio.fail_after(PATIENCE_S):
        while not (found := await wanted()):  # noqa: ASYNC110
            await trio.sleep(0.02)
    return found


async def mode(server: Server, wanted: str) -> Message:
    """The storage status, when the mode is ``wanted``."""

    async def look() -> Message | None:
        status = await get(server, "/api/storage/status")
        return status if status["mode"] == wanted else None

    found: Message = await until(look)
    return found


async def start(nursery: trio.Nursery, url: str, **changes: object) -> Server:
    """A server that uses Redis."""
    server = await start_server(nursery, **(QUICK | {"redis_url": url} | changes))
    await mode(server, "redis")
    return server


def head(redis: RedisServer, key: str = KEY) -> Any:
    return json.loads(redis.cli("HGET", key, "head"))


def stored_chat(redis: RedisServer, key: str = KEY) -> list[str]:
    """The texts in the ring, the oldest first."""
    fields = redis.cli("HGETALL", key)
    ring = [json.loads(value) for name, value in fields.items() if name.startswith("chat:")]
    return [chat["text"] for chat in sorted(ring, key=lambda chat: chat["sentAt"])]


def in_order(player: Musician) -> None:
    """No version goes backwards within an epoch, or skips anything without a snapshot."""
    epoch, known = "", 0
    for message in player.inbox:
        kind = message["type"]
        if kind == "snapshot":
            assert message["epoch"] != epoch or message["version"] >= known, message
            epoch, known = message["epoch"], message["version"]
        elif "sessionId" in message and kind not in VOLATILE | {"sync_response"}:
            assert message["version"] == known + 1, (known, message)
            known = message["version"]


def heard(player: Musician) -> set[str]:
    """The texts that were told as an event, once at the most, or in a snapshot."""
    events = [message["text"] for message in player.all("chat_message")]
    assert len(events) == len(set(events))
    shown = [chat["text"] for message in player.all("snapshot") for chat in message["chat"]]
    return {*events, *shown}


class Chatter:
    """Members who never stop talking, and want an answer each time."""

    def __init__(self, players: Sequence[Musician]) -> None:
        self.texts: list[str] = []
        self._players = players
        self._done = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number, player in enumerate(self._players):
                nursery.start_soon(self._talk, number, player)

    async def _talk(self, number: int, player: Musician) -> None:
        count = 0
        while not self._done.is_set():
            count += 1
            text = f"{number}: {count}"
            await player.ok("chat_message", text=text)
            self.texts.append(text)
            await trio.sleep(0.002)

    async def more(self, count: int = 5) -> None:
        """Wait until so many more have been acknowledged."""
        wanted = len(self.texts) + count
        with trio.fail_after(PATIENCE_S):
            while len(self.texts) < wanted:  # noqa: ASYNC110 (they come by themselves)
                await trio.sleep(0.002)

    def stop(self) -> None:
        self._done.set()


@asynccontextmanager
async def chatter(*players: Musician) -> AsyncIterator[Chatter]:
    """Talking goes on until the end of the block."""
    talk = Chatter(players)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        await talk.more()
        yield talk
        talk.stop()


class Stage(Struct):
    """A Redis, and a proxy before it."""

    redis: RedisServer
    proxy: FaultProxy

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.proxy.port}/0"


@pytest.fixture
async def stage(redis_server: RedisServer, nursery: trio.Nursery) -> Stage:
    proxy = await nursery.start(FaultProxy(redis_server.port).run)
    return Stage(redis_server, proxy)


class Fault(Struct):
    """How Redis breaks and is mended.

    Attributes:
        reason: what operators are told.
        before: done while all is well, some time before.
    """

    reason: str
    breaks: Callable[[Stage], Awaitable[object]]
    mends: Callable[[Stage], Awaitable[object]]
    before: Callable[[Stage], Awaitable[object]] | None = None
    health_timeout_ms: int = 2000


def cli(*command: str | int) -> Callable[[Stage], Awaitable[object]]:
    return lambda stage: blocking(stage.redis.cli, *command)


def kill(stage: Stage) -> Awaitable[object]:
    return blocking(stage.redis.kill)


async def heal(stage: Stage) -> None:
    stage.proxy.heal()


async def silence(stage: Stage) -> None:
    stage.proxy.black_hole()


async def reset(stage: Stage) -> None:
    stage.proxy.refuse()
    stage.proxy.reset()


async def half_close(stage: Stage) -> None:
    stage.proxy.refuse()
    stage.proxy.half_close()


FAULTS = {
    "killed": Fault("reset", kill, lambda stage: blocking(stage.redis.restart)),
    "restarted empty": Fault(
        "reset", kill, lambda stage: blocking(lambda: stage.redis.restart(empty=True))
    ),
    "restarted with an older dump": Fault(
        "reset",
        kill,
        lambda stage: blocking(stage.redis.restart_from_dump),
        lambda stage: blocking(stage.redis.dump),
    ),
    "stopped": Fault(
        "timed_out",
        lambda stage: blocking(stage.redis.stop),
        lambda stage: blocking(stage.redis.resume),
        health_timeout_ms=400,
    ),
    "black hole": Fault("timed_out", silence, heal, health_timeout_ms=400),
    "reset": Fault("reset", reset, heal),
    "half-closed": Fault("reset", half_close, heal),
    "full": Fault(
        "oom", cli("CONFIG", "SET", "maxmemory", 1), cli("CONFIG", "SET", "maxmemory", 0)
    ),
    "a replica": Fault("readonly", cli("REPLICAOF", HOST, 1), cli("REPLICAOF", "NO", "ONE")),
    "without the right to write": Fault(
        "auth",
        cli("ACL", "SETUSER", "default", "-hset", "-set"),
        cli("ACL", "SETUSER", "default", "+hset", "+set"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_band_plays_on_while_redis_is(
    stage: Stage, nursery: trio.Nursery, fault: Fault
) -> None:
    server = await start(
        nursery, stage.url, redis_health_timeout_ms=fault.health_timeout_ms, server_id="hall"
    )
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play", positionMs=5000, startInMs=0)
        await ann.ok("update_message", message="Verse")
        async with chatter(ann, bob) as talk:
            if fault.before is not None:
                await fault.before(stage)
            await talk.more()
            await fault.breaks(stage)
            lost = await ann.next("storage_status", storageType="memory")
            assert (lost["degraded"], lost["reason"]) == (True, fault.reason)
            await talk.more()

            health = await get(server, "/api/health")
            assert (health["healthy"], health["storageType"]) == (True, "memory")
            assert health["fallbackReason"]
            status = await get(server, "/api/storage/status")
            assert status["mode"] == "memory"
            assert status["lastFailover"]["reason"] == fault.reason
            assert status["lastFailover"]["detail"]
            metrics = await get(server, "/metrics")
            assert f'bandsync_storage_failovers_total{{reason="{fault.reason}"}} ' in metrics
            assert 'bandsync_storage_mode{mode="memory"} 1.0' in metrics
            await talk.more()

            await fault.mends(stage)
            found = await ann.next("storage_status", storageType="redis")
            assert (found["degraded"], found["reason"]) == (False, None)
            await talk.more()
        health = await get(server, "/api/health")
        assert (health["storageType"], health["fallbackReason"]) == ("redis", None)
        status = await mode(server, "redis")
        assert status["keptInMemory"] == 0
        assert status["lastRecovery"]["sessions"] == 1
        for player in (ann, bob):
            await player.ok("sync_request")
            last = player.all("snapshot")[-1]
            assert heard(player) >= set(talk.texts)
            assert player.close_code is None
            in_order(player)
            assert player.all("error") == []
            assert last["message"] == "Verse"
            assert last["transport"] == ann.all("play")[0]["transport"]
            assert last["leaderId"] == ann.you["memberId"]
            assert [member["connected"] for member in last["members"]] == [True, True]
        assert bob.all("storage_status") == ann.all("storage_status")
        # Everybody has the same last word, and so has Redis.
        assert stored_chat(stage.redis) == [chat["text"] for chat in last["chat"]]
        assert set(talk.texts[-10:]) <= set(stored_chat(stage.redis))


async def test_a_redis_that_comes_later_is_used_from_then_on(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    url = redis_server.url()
    redis_server.kill()
    server = await start_server(nursery, **QUICK, redis_url=url)
    assert server.lines[1].startswith("Storage: memory (refused")
    health = await get(server, "/api/health")
    assert (health["healthy"], health["storageType"]) == (True, "memory")
    assert health["initialized"] is True
    assert health["fallbackReason"].startswith("refused: ")
    assert health["redisStatus"]["connected"] is False

    async def tried_again() -> bool:
        status = (await get(server, "/api/health"))["redisStatus"]
        return status["connectionAttempts"] > 1

    await until(tried_again)
    async with band(server, "Ann", "Bob") as (ann, bob):
        assert ann.all("welcome")[0]["storageType"] == "memory"
        await ann.ok("play", startInMs=0)
        await bob.ok("chat_message", text="hi")
        await blocking(redis_server.restart)
        await ann.next("storage_status", storageType="redis", degraded=False)
        assert stored_chat(redis_server) == ["hi"]
        assert head(redis_server)["transport"]["value"]["isPlaying"]
        await bob.ok("chat_message", text="again")
        assert stored_chat(redis_server) == ["hi", "again"]
        in_order(ann)
        status = await get(server, "/api/storage/status")
        # It was never lost, it was not there.
        assert status["lastFailover"] is None
        assert status["lastRecovery"]["outageMs"] is None


async def test_what_is_flushed_behind_the_back_is_put_back(
    redis_server: RedisServer, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.rooms.anti_entropy.COMPARE_PERIOD_S", 0.05)
    server = await start(nursery, redis_server.url())
    async with band(server, "Ann", "Bob") as (ann, bob):
        for text in ("by the next command", "by the comparison"):
            await ann.ok("chat_message", text=text)
            epoch, version = redis_server.cli("HMGET", KEY, "epoch", "version")
            redis_server.cli("FLUSHALL")
            if text == "by the next command":
                await ann.ok("update_message", message="Verse")
            await until(lambda: blocking(redis_server.cli, "EXISTS", KEY))
            after = redis_server.cli("HMGET", KEY, "epoch", "version")
            assert after[0] == epoch
            assert int(after[1]) >= int(version)
            assert stored_chat(redis_server)[-1] == text
        for player in (ann, bob):
            await player.ok("chat_message", text=f"{player.you['memberId']} is still here")
            in_order(player)
            assert player.all("storage_status", "error") == []
        assert (await get(server, "/api/storage/status"))["lastFailover"] is None


async def test_what_is_set_back_behind_the_back_is_brought_forward_by_the_next_command(
    redis_server: RedisServer, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsync.rooms.anti_entropy.COMPARE_PERIOD_S", 3600.0)
    server = await start(nursery, redis_server.url())
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("chat_message", text="kept")
        redis_server.cli("COPY", KEY, "older")
        await ann.ok("chat_message", text="set back")
        redis_server.cli("COPY", "older", KEY, "REPLACE")
        assert stored_chat(redis_server) == ["kept"]
        await bob.ok("chat_message", text="next")
        assert stored_chat(redis_server) == ["kept", "set back", "next"]
        for player in (ann, bob):
            in_order(player)
            assert player.all("storage_status", "error") == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://{host}:{port}/0", "auth: "),
        ("redis://:wrong@{host}:{port}/0", "auth: "),
        ("redis://nobody:right@{host}:{port}/0", "auth: "),
        ("redis://:right@{host}:{port}/99", "refused: "),
    ],
    ids=["no password", "wrong password", "wrong user", "wrong database"],
)
async def test_a_redis_that_turns_us_away_is_named_and_the_band_plays(
    redis_binary: None, nursery: trio.Nursery, url: str, reason: str
) -> None:
    with RedisServer(password="right") as redis:
        server = await start_server(
            nursery, **QUICK, redis_url=url.format(host=HOST, port=redis.port)
        )
        health = await get(server, "/api/health")
        assert (health["healthy"], health["storageType"]) == (True, "memory")
        assert health["fallbackReason"].startswith(reason)
        shown = "".join([*server.lines, json.dumps(health), json.dumps(server.events(""))])
        assert "wrong" not in shown.replace("WRONGPASS", "")
        assert "right" not in shown
        async with band(server, "Ann") as (ann,):
            await ann.ok("chat_message", text="hi")
        assert redis.cli("KEYS", "*") == []


async def test_without_recovery_it_stays_in_memory_until_somebody_restarts_it(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    server = await start(nursery, redis_server.url(), redis_auto_recover=False)
    async with band(server, "Ann") as (ann,):
        await blocking(redis_server.kill)
        await ann.next("storage_status", storageType="memory")
        await blocking(redis_server.restart)
        await ann.ok("chat_message", text="hi")

        async def gave_up() -> bool:
            return bool(server.events("storage.gave_up"))

        await until(gave_up)
        health = await get(server, "/api/health")
        assert health["storageType"] == "memory"
        assert health["fallbackReason"].startswith("reset: ")
        clients = await blocking(redis_server.cli, "CLIENT", "LIST")
        assert "name=bandsync" not in clients
        assert stored_chat(redis_server) == []
        in_order(ann)


async def test_a_redis_that_is_required_must_be_there(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    url = redis_server.url()
    redis_server.kill()
    required = QUICK | {"redis_required": True, "redis_max_retries": 1, "port": free_port()}
    with pytest.raises(StartError, match=r"^REDIS_REQUIRED=true: .*refused"):
        await start_server(nursery, **required, redis_url=url)
    redis_server.restart()
    # The port is free again, too.
    server = await start_server(nursery, **required, redis_url=url)
    assert server.lines[1].startswith("Storage: redis (")


async def test_a_required_redis_that_refuses_the_password_is_no_redis(
    redis_binary: None, nursery: trio.Nursery
) -> None:
    required = QUICK | {"redis_required": True, "redis_max_retries": 0}
    with (
        RedisServer(password="right") as redis,
        pytest.raises(StartError, match=r"^REDIS_REQUIRED=true: .*auth"),
    ):
        url = f"redis://:wrong@{HOST}:{redis.port}/0"
        await start_server(nursery, **required, redis_url=url)


class Process:
    """A server that can be ended as a kill does: it says goodbye to nobody."""

    def __init__(self, server: Server, scope: trio.CancelScope, ended: trio.Event) -> None:
        self.server = server
        self._scope = scope
        self._ended = ended

    async def kill(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


async def start_process(nursery: trio.Nursery, url: str, **changes: object) -> Process:
    async def run(*, task_status: trio.TaskStatus[Process]) -> None:
        ended = trio.Event()
        try:
            async with trio.open_nursery() as process:
                server = await start(process, url, **changes)
                task_status.started(Process(server, process.cancel_scope, ended))
                await trio.sleep_forever()
        finally:
            ended.set()

    process: Process = await nursery.start(run)
    return process


KEPT = ("epoch", "message", "transport", "chat", "leaderId", "settings", "createdAt")


@pytest.mark.parametrize("how", ["drained", "killed"])
async def test_a_server_that_starts_again_has_everything_as_it_was(
    redis_server: RedisServer, nursery: trio.Nursery, how: str
) -> None:
    process = await start_process(nursery, redis_server.url())
    async with band(process.server, "Ann", "Bob") as (ann, bob):
        await ann.ok("set_role", role="leader", memberId=bob.you["memberId"])
        await bob.ok("set_tempo", tempoBpm=133)
        await bob.ok("play", positionMs=5000, startInMs=0)
        await bob.ok("update_message", message="Chorus")
        await ann.ok("chat_message", text="see you")
        await bob.ok("sync_request")
        before = bob.all("snapshot")[-1]
        tokens = [player.you["resumeToken"] for player in (ann, bob)]
        if how == "drained":
            await process.server.stop()
        else:
            await process.kill()
        for player in (ann, bob):
            code = await player.closed()
            assert how == "killed" or code == 1012
    again = await start(nursery, redis_server.url())
    async with musician(again) as bob_again, musician(again) as ann_again:
        after = await bob_again.join(displayName="Bob", resumeToken=tokens[1])
        assert {key: after[key] for key in KEPT} == {key: before[key] for key in KEPT}
        assert after["version"] > before["version"]
        assert bob_again.you["resumed"] is True
        assert (bob_again.you["memberId"], bob_again.you["role"]) == (before["leaderId"], "leader")
        await ann_again.join(displayName="Ann", resumeToken=tokens[0])
        assert (ann_again.you["memberId"], ann_again.you["role"]) == (
            ann.you["memberId"],
            "follower",
        )
        await bob_again.ok("pause")
        await ann_again.ok("chat_message", text="there you are")
        await bob_again.ok("sync_request")
        last = bob_again.all("snapshot")[-1]
        assert [member["connected"] for member in last["members"]] == [True, True]
        assert [chat["text"] for chat in last["chat"]] == ["see you", "there you are"]
        in_order(ann_again)
        in_order(bob_again)


async def test_a_server_that_stops_during_an_outage_loses_nothing_that_redis_can_take(
    stage: Stage, nursery: trio.Nursery
) -> None:
    server = await start(nursery, stage.url)
    async with band(server, "Ann") as (ann,):
        await reset(stage)
        await ann.next("storage_status", storageType="memory")
        await ann.ok("chat_message", text="from memory")
        token = ann.you["resumeToken"]
        stage.proxy.heal()
        await server.stop()
    assert stored_chat(stage.redis) == ["from memory"]
    again = await start(nursery, stage.url)
    async with musician(again) as ann:
        snapshot = await ann.join(resumeToken=token)
        assert ann.you["resumed"] is True
        assert [chat["text"] for chat in snapshot["chat"]] == ["from memory"]


async def test_a_loss_in_the_middle_of_a_migration_is_just_a_loss(
    stage: Stage, nursery: trio.Nursery
) -> None:
    names = [f"song-{number}" for number in range(24)]
    server = await start(nursery, stage.url)

    async def stored() -> int:
        return len(await blocking(stage.redis.cli, "KEYS", "bandsync:session:*"))

    async with trio.open_nursery() as players:
        band_of = {name: await players.start(join_alone, server, name) for name in names[:12]}
        await reset(stage)
        first = band_of[names[0]]
        await first.next("storage_status", storageType="memory")
        # Half of them were never in Redis.
        for name in names[12:]:
            band_of[name] = await players.start(join_alone, server, name)
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"one in {name}")
        assert await stored() == 12
        stage.proxy.heal()
        stage.proxy.delay_s = 0.1
        await until(lambda: more_than(stored, 12))
        stage.proxy.black_hole("down")
        await reset(stage)
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"two in {name}")
        assert 12 < await stored() < 24
        stage.proxy.heal()
        await first.next("storage_status", storageType="redis")
        for name, player in band_of.items():
            await player.ok("chat_message", text=f"three in {name}")
            key = f"bandsync:session:{{{name}}}"
            texts = [f"{count} in {name}" for count in ("one", "two", "three")]
            assert stored_chat(stage.redis, key) == texts
            assert [message["text"] for message in player.all("chat_message")] == texts
            assert player.close_code is None
            in_order(player)
        status = await mode(server, "redis")
        assert (status["keptInMemory"], status["totalSessions"]) == (0, 24)
        players.cancel_scope.cancel()


async def more_than(count: Callable[[], Awaitable[int]], least: int) -> bool:
    return await count() > least


async def join_alone(
    server: Server, session: str, *, task_status: trio.TaskStatus[Musician]
) -> None:
    async with musician(server) as player:
        await player.join(session, displayName="Ann")
        task_status.started(player)
        await trio.sleep_forever()


async def test_two_lives_of_a_session_become_the_one_that_was_born_first(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    url = redis_server.url()
    server = await start(nursery, url)
    async with band(server, "Zoe") as (zoe,):
        await zoe.ok("update_message", message="from before")
        await zoe.ok("chat_message", text="from before")
        await zoe.ok("leave_session")
        first = zoe.all("snapshot")[0]
    await server.stop()
    redis_server.kill()
    server = await start_server(nursery, **QUICK, redis_url=url, server_id="hall")
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("chat_message", text="anew")
        await ann.ok("play", startInMs=0)
        assert ann.all("snapshot")[0]["epoch"] != first["epoch"]
        await blocking(redis_server.restart)
        await ann.next("storage_status", storageType="redis")
        for player in (ann, bob):
            merged = player.all("snapshot")[-1]
            assert (merged["epoch"], merged["createdAt"]) == (first["epoch"], first["createdAt"])
            assert [chat["text"] for chat in merged["chat"]] == ["from before", "anew"]
            names = [member["displayName"] for member in merged["members"]]
            assert names == ["Ann", "Bob"]
            assert merged["leaderId"] in {ann.you["memberId"], bob.you["memberId"]}
            in_order(player)
        assert redis_server.cli("HGET", KEY, "epoch") == first["epoch"]
        await bob.ok("chat_message", text="together")
        assert stored_chat(redis_server) == ["from before", "anew", "together"]


@pytest.mark.parametrize(
    "command",
    [
        ("SET", KEY, "a text"),
        ("HSET", KEY, "title", "song"),
        ("HSET", KEY, "epoch", "e", "version", "7", "eventId", "i", "head", "{"),
        ("HSET", KEY, "epoch", "e", "version", "7", "eventId", "i", "head", '{"format":99}'),
    ],
    ids=["a text", "another hash", "no JSON", "a newer format"],
)
async def test_a_session_that_cannot_be_read_stays_in_memory_until_somebody_removes_it(
    redis_server: RedisServer,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setattr("bandsync.rooms.anti_entropy.COMPARE_PERIOD_S", 0.05)
    server = await start(nursery, redis_server.url())
    redis_server.cli(*command)

    def value() -> Any:
        return redis_server.cli("GET" if command[0] == "SET" else "HGETALL", KEY)

    before = value()
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play", startInMs=0)
        await bob.ok("chat_message", text="hi")
        # The others are as safe as ever.
        async with band(server, "Cid", session="other"):
            assert redis_server.cli("EXISTS", "bandsync:session:{other}") == 1

        async def kept() -> bool:
            status = await get(server, "/api/storage/status")
            return (status["mode"], status["keptInMemory"]) == ("redis", 1)

        assert await kept()
        assert value() == before
        (told,) = server.events("session.unreadable")
        assert told["session_id"] == "song"
        assert told["reason"]
        redis_server.cli("DEL", KEY)

        async def moved() -> bool:
            return bool(redis_server.cli("EXISTS", KEY)) and not await kept()

        await until(moved)
        assert stored_chat(redis_server) == ["hi"]
        await ann.ok("chat_message", text="at home")
        assert stored_chat(redis_server) == ["hi", "at home"]
        assert len(server.events("session.unreadable")) == 1
        for player in (ann, bob):
            in_order(player)
            assert player.all("error", "storage_status") == []
