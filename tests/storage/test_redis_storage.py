"""Sessions in a real Redis: what it is told, what is left alone, and how its loss is noticed."""

import itertools
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from msgspec.structs import replace

from bandsync.model.session import TOMBSTONE_MS, Session, tip
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import parse_address
from bandsync.rules.actions import Command
from bandsync.storage.base import (
    Committed,
    Conflict,
    Lost,
    Presence,
    Storage,
    Unreadable,
)
from bandsync.storage.records import read_session
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.wire.commands import ChatMessage, LeaveSession, Play, UpdateMessage
from bandsync.wire.messages import encode
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_storages import KEYS, PATIENT, LossList, open_link, redis_storage
from tests.support.servers import PATIENCE_S
from tests.support.states import Stage

_event_ids = itertools.count(1)
KEY = "bandsync:session:{song}"
CHANNEL = "bandsync:events:{song}"


@pytest.fixture
async def storage(shared_redis: RedisServer, nursery: trio.Nursery) -> AsyncIterator[RedisStorage]:
    async with redis_storage(shared_redis.url()) as made:
        yield made


class Band(Stage):
    """Sessions that are decided here and kept in a storage."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage

    async def enter(self, name: str) -> Session:
        before = self.session
        self.join(name)
        return await self.commit(before)

    async def play(self, name: str, command: Command) -> Session:
        before = self.session
        decision = self.do(name, command)
        return await self.commit(before, [encode(event) for event in decision.events])

    async def commit(self, before: Session | None, events: Sequence[bytes] = ()) -> Session:
        assert self.session is not None
        result = await self.storage.commit(before, self.session, events)
        assert isinstance(result, Committed), result
        self.session = result.session
        return result.session

    def next(self, name: str = "Ann", text: str = "lost?") -> Session:
        """What would be committed next; it is not."""
        before = self.session
        self.do(name, ChatMessage(text=text))
        after, self.session = self.session, before
        assert after is not None
        return after


async def band(storage: Storage) -> Band:
    """Ann and Bob, each on its own connection."""
    made = Band(storage)
    await made.enter("Ann")
    await made.enter("Bob")
    return made


def fields(server: RedisServer, key: str = KEY) -> dict[str, bytes]:
    flat = server.cli("HGETALL", key)
    return {name: value.encode() for name, value in flat.items()}


async def test_the_hash_is_the_session(storage: RedisStorage, shared_redis: RedisServer) -> None:
    song = await band(storage)
    session = await song.play("Bob", ChatMessage(text="♪"))
    assert shared_redis.cli("TYPE", KEY) == "hash"
    assert read_session("song", fields(shared_redis)) == session
    assert shared_redis.cli("KEYS", "*") == [KEY]


async def test_members_and_messages_that_are_gone_leave_no_field(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    song = await band(storage)
    await song.play("Bob", LeaveSession())
    assert f"member:{song.ids['Bob']}" in fields(shared_redis)
    song.now += TOMBSTONE_MS + 1
    session = await song.enter("Cid")
    assert f"member:{song.ids['Bob']}" not in fields(shared_redis)
    assert await storage.get_session("song") == session


async def test_each_commit_is_told_on_the_channel_of_the_session(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    with (
        redis.Redis(unix_socket_path=str(shared_redis.unix_socket)) as client,
        client.pubsub(ignore_subscribe_messages=True) as pubsub,
    ):
        pubsub.subscribe(CHANNEL)
        assert pubsub.get_message(timeout=PATIENCE_S) is None

        def told() -> dict[str, Any]:
            # Redis published it before it answered the commit.
            message = pubsub.get_message(timeout=PATIENCE_S)
            assert message is not None
            return json.loads(message["data"])

        song = Band(storage)
        opened = await song.enter("Ann")
        known = fields(shared_redis)
        message = told()
        assert message.keys() == {"prev", "version", "eventId", "serverId", "delta", "frames"}
        assert message["prev"] is None
        assert (message["version"], message["eventId"]) == (opened.version, opened.event_id)
        assert message["serverId"] == "stage"
        assert message["frames"] == []
        assert message["delta"].keys() == known.keys() - {"version", "eventId"}

        decided = song.do("Ann", Play())
        events = [encode(event) for event in decided.events]
        played = await song.commit(opened, events)
        message = told()
        assert message["prev"] == {
            "epoch": opened.epoch.id,
            "version": opened.version,
            "eventId": opened.event_id,
        }
        assert message["frames"] == [json.loads(event) for event in events]
        assert message["frames"][0]["version"] == message["version"] == played.version
        assert message["delta"].keys() == {"head"}

        # Whoever has the state before can make the state after from what is told.
        song.now += TOMBSTONE_MS / 2
        await song.enter("Bob")
        told()
        await song.play("Bob", LeaveSession())
        told()
        song.now += TOMBSTONE_MS + 1
        known = fields(shared_redis)
        last = await song.enter("Cid")
        delta = told()["delta"]
        assert delta[f"member:{song.ids['Bob']}"] is None
        for name, value in delta.items():
            if value is None:
                del known[name]
            else:
                known[name] = json.dumps(value).encode()
        known["version"] = str(last.version).encode()
        known["eventId"] = last.event_id.encode()
        assert read_session("song", known) == last


async def test_a_commit_that_is_refused_is_not_told(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    song = await band(storage)
    late = song.next()
    base = song.session
    await song.play("Ann", UpdateMessage(message="first"))
    with (
        redis.Redis(unix_socket_path=str(shared_redis.unix_socket)) as client,
        client.pubsub(ignore_subscribe_messages=True) as pubsub,
    ):
        pubsub.subscribe(CHANNEL)
        pubsub.get_message(timeout=PATIENCE_S)
        assert isinstance(await storage.commit(base, late, ()), Conflict)
        after = await song.play("Ann", UpdateMessage(message="second"))
        message = pubsub.get_message(timeout=PATIENCE_S)
        assert message is not None
        assert json.loads(message["data"])["eventId"] == after.event_id


async def test_a_commit_and_a_touch_put_off_the_expiry(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    async with redis_storage(shared_redis.url(), ttl_s=1000) as storage:

        def expires() -> bool:
            return 900 < shared_redis.cli("TTL", KEY) <= 1000

        song = await band(storage)
        assert expires()
        for spoiled in (("EXPIRE", KEY, 100), ("PERSIST", KEY)):
            shared_redis.cli(*spoiled)
            await song.play("Ann", Play())
            assert expires()
            shared_redis.cli(*spoiled)
            await storage.touch(["song", "none"])
            assert expires()
        shared_redis.cli("EXPIRE", KEY, 100)
        base = replace(song.session, event_id="of another history")
        assert isinstance(await storage.commit(base, song.next(), ()), Conflict)
        assert shared_redis.cli("TTL", KEY) <= 100


async def test_touch_tells_the_tips(storage: RedisStorage, shared_redis: RedisServer) -> None:
    song = await band(storage)
    assert song.session is not None
    shared_redis.cli("HSET", "bandsync:session:{foreign}", "version", "7")
    shared_redis.cli("SET", "bandsync:session:{text}", "song")
    found = await storage.touch(["none", "song", "foreign", "text"])
    assert isinstance(found, dict)
    assert list(found) == ["none", "song", "foreign", "text"]
    assert (found["none"], found["song"]) == (None, tip(song.session))
    assert isinstance(found["foreign"], Unreadable)
    assert isinstance(found["text"], Unreadable)
    assert shared_redis.cli("GET", "bandsync:session:{text}") == "song"
    assert await storage.touch([]) == {}


async def test_a_conflict_brings_what_is_stored_in_one_round_trip(
    storage: RedisStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = await band(storage)
    late = song.next()
    base = song.session
    stored = await song.play("Bob", ChatMessage(text="first"))
    sent: list[Argument] = []
    execute = Link.execute

    async def noting(link: Link, *args: Argument) -> Reply:
        sent.append(args[0])
        return await execute(link, *args)

    monkeypatch.setattr(Link, "execute", noting)
    assert await storage.commit(base, late, ()) == Conflict(stored)
    assert await storage.commit(None, late, ()) == Conflict(stored)
    assert sent == ["EVALSHA", "EVALSHA"]


async def test_of_many_who_commit_at_once_one_is_first(storage: RedisStorage) -> None:
    song = await band(storage)
    base = song.session
    results: list[object] = []

    async def race(number: int) -> None:
        results.append(await storage.commit(base, changes[number], ()))

    changes = [song.next("Bob", f"runner {number}") for number in range(20)]
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(race, number)
    (winner,) = [result for result in results if isinstance(result, Committed)]
    assert results.count(Conflict(winner.session)) == 19


async def test_redis_may_forget_the_script(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    song = await band(storage)
    for _ in range(2):
        shared_redis.cli("SCRIPT", "FLUSH")
        session = await song.play("Ann", Play())
        assert await storage.get_session("song") == session


UNREADABLE: list[tuple[str, list[tuple[str, ...]]]] = [
    ("a text", [("SET", KEY, "song")]),
    ("a list", [("RPUSH", KEY, "song")]),
    ("a hash of somebody else", [("HSET", KEY, "title", "song")]),
    ("half a tip", [("HSET", KEY, "version", "3", "eventId", "e")]),
    ("a tip alone", [("HSET", KEY, "epoch", "e", "version", "3", "eventId", "e")]),
    (
        "another tip and no JSON",
        [("HSET", KEY, "epoch", "e", "version", "3", "eventId", "e", "head", "{")],
    ),
    (
        "a newer version's",
        [("HSET", KEY, "epoch", "e", "version", "3", "eventId", "e", "head", '{"format":9}')],
    ),
]


@pytest.mark.parametrize("commands", [row[1] for row in UNREADABLE], ids=[x[0] for x in UNREADABLE])
async def test_what_cannot_be_read_is_left_as_it_is(
    shared_redis: RedisServer, nursery: trio.Nursery, commands: list[tuple[str, ...]]
) -> None:
    losses = LossList()
    async with redis_storage(shared_redis.url(), losses=losses) as storage:
        song = await band(storage)
        after = song.next()
        shared_redis.cli("DEL", KEY)
        for command in commands:
            shared_redis.cli(*command)
        before = dumped(shared_redis)
        for outcome in (
            await storage.get_session("song"),
            await storage.commit(None, after, ()),
            await storage.commit(song.session, after, ()),
        ):
            assert isinstance(outcome, Unreadable), outcome
            assert outcome.detail
        await storage.touch(["song"])
        assert await storage.list_sessions() == []
        assert dumped(shared_redis) == before
    assert losses == []


def dumped(server: RedisServer, key: str = KEY) -> bytes:
    """The value of a key, whatever its type."""
    with redis.Redis(unix_socket_path=str(server.unix_socket)) as client:
        value = client.dump(key)
    assert isinstance(value, bytes)
    return value


@pytest.mark.parametrize("field", ["head", "member:", "chat:"])
async def test_a_field_that_was_spoiled_is_left_as_it_is(
    storage: RedisStorage, shared_redis: RedisServer, field: str
) -> None:
    song = await band(storage)
    await song.play("Ann", ChatMessage(text="hi"))
    base = song.session
    after = song.next()
    # Somebody else's change, and not well done.
    name = min(name for name in fields(shared_redis) if name.startswith(field))
    shared_redis.cli("HSET", KEY, name, '{"what":', "eventId", "somebody else's")
    before = dumped(shared_redis)
    read = await storage.get_session("song")
    assert isinstance(read, Unreadable)
    assert read.detail.startswith(name)
    assert await storage.commit(base, after, ()) == read
    assert await storage.commit(None, after, ()) == read
    assert await storage.list_sessions() == []
    assert dumped(shared_redis) == before


async def test_foreign_fields_of_a_session_survive(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    song = await band(storage)
    shared_redis.cli("HSET", KEY, "note", "by hand")
    session = await song.play("Ann", ChatMessage(text="hi"))
    assert await storage.get_session("song") == session
    assert shared_redis.cli("HGET", KEY, "note") == "by hand"


@pytest.mark.parametrize("prefix", ["", "bandsync:", "b[a]n?d*:\\^", "Bühne:{x}:"])
async def test_a_listing_has_the_sessions_of_its_prefix_and_no_others(
    shared_redis: RedisServer, nursery: trio.Nursery, prefix: str
) -> None:
    async with open_link(shared_redis.url()) as link:
        storage = storage_on(link, Keys(prefix))
        names = ["song", "A-b.c_9", *(f"song-{number}" for number in range(250))]
        for name in names:
            song = Band(storage)
            song.join("Ann")
            assert song.session is not None
            song.session = replace(song.session, session_id=name)
            await song.commit(None)
        shared_redis.cli("SET", f"{prefix}server:stage", "{}")
        shared_redis.cli("SET", f"{prefix}session:{{text}}", "text")
        shared_redis.cli("HSET", f"{prefix}session:{{foreign}}", "a", "b")
        shared_redis.cli("HSET", f"{prefix}session:song", "a", "b")
        for other in ("xbandsync:", "bandsyn?:", "band:", "bandd:^"):
            theirs = Band(storage_on(link, Keys(other)))
            theirs.join("Ann")
            await theirs.commit(None)
        listed = await storage.list_sessions()
        assert isinstance(listed, list)
        assert sorted(session.session_id for session in listed) == sorted(names)


def storage_on(link: Link, keys: Keys, losses: LossList | None = None) -> RedisStorage:
    return RedisStorage(
        link,
        keys,
        ttl_s=3600,
        server_id="stage",
        event_ids=(f"event-{number}" for number in _event_ids),
        on_loss=(losses if losses is not None else LossList()).note,
    )


async def test_servers_that_are_alive_are_found(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    shared_redis.cli(
        "SET",
        "bandsync:server:hall",
        '{"bootId":"b","startedAt":1.5,"address":"http://hall","sessions":["song"],'
        '"connections":3,"colour":"blue"}',
    )
    shared_redis.cli("SET", "bandsync:server:broken", '{"bootId":')
    shared_redis.cli("HSET", "bandsync:server:hash", "a", "b")
    found = await storage.find_servers(["gone", "broken", "hall", "hash"])
    assert isinstance(found, dict)
    # What cannot be read is not known to be gone.
    assert all(isinstance(found[name], Unreadable) for name in ("broken", "hash"))
    assert (found["gone"], found["hall"]) == (None, Presence("b", 1.5, "http://hall", ["song"], 3))


@pytest.mark.parametrize("size", [497, 498, 1000, 4100])
async def test_a_session_of_thousands_is_written_and_read_whole(
    storage: RedisStorage, shared_redis: RedisServer, size: int
) -> None:
    song = await band(storage)
    before = song.session
    assert before is not None
    left = replace(before.members[song.ids["Bob"]], present=False, connected=False)
    crowd = {name: replace(left, member_id=name) for name in map(str, range(size))}
    song.session = replace(before, members={**before.members, **crowd}, version=before.version + 1)
    crowded = await song.commit(before)
    assert await storage.get_session("song") == crowded
    # A conflict brings all of it, too.
    assert await storage.commit(before, crowded, ()) == Conflict(crowded)
    assert await storage.delete_session("song")
    put_back = await storage.commit(None, crowded, ())
    assert isinstance(put_back, Committed)
    assert await storage.get_session("song") == put_back.session
    song.session = replace(before, version=crowded.version + 1)
    cleared = await song.commit(put_back.session)
    assert await storage.get_session("song") == cleared
    assert f"member:{size - 1}" not in fields(shared_redis)


# From here on Redis is broken on purpose: each test has its own.


@asynccontextmanager
async def impatient(
    server: RedisServer, losses: LossList, silence_s: float = PATIENCE_S
) -> AsyncIterator[RedisStorage]:
    """A storage whose link may be lost before its end."""
    link = Link(
        parse_address(server.url()),
        name="test",
        timeouts=replace(PATIENT, silence_s=silence_s),
    )

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        # What the link is lost for is for its callers to see.
        with suppress(redis.RedisError):
            await link.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield storage_on(link, KEYS, losses)
        nursery.cancel_scope.cancel()


async def lost_everywhere(song: Band, reason: str, losses: LossList) -> None:
    """All that needs Redis says why it is lost, and tells once each."""
    storage = song.storage
    asked = [
        partial(storage.commit, song.session, song.next(), ()),
        partial(storage.get_session, "song"),
        partial(storage.touch, ["song"]),
        storage.list_sessions,
        partial(storage.find_servers, ["stage"]),
        partial(storage.delete_session, "song"),
    ]
    for number, ask in enumerate(asked, 1):
        assert await ask() == Lost(reason)
        assert losses == [reason] * number
    health = await storage.health_check()
    assert not health.healthy


async def test_a_redis_that_is_killed_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.kill()
        await lost_everywhere(song, "reset", losses)


async def test_a_redis_that_is_silent_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses, silence_s=0.3) as storage:
        song = await band(storage)
        redis_server.stop()
        await lost_everywhere(song, "timed_out", losses)


async def lost_for_writing(song: Band, reason: str, losses: LossList, server: RedisServer) -> None:
    """A commit says why it is lost, and leaves nothing behind."""
    before = dumped(server)
    change = song.next()
    assert await song.storage.commit(song.session, change, ()) == Lost(reason)
    new = replace(change, session_id="new")
    assert await song.storage.commit(None, new, ()) == Lost(reason)
    assert losses == [reason, reason]
    assert dumped(server) == before
    assert server.cli("EXISTS", "bandsync:session:{new}") == 0


async def test_a_full_redis_is_lost_and_nothing_is_half_written(
    redis_server: RedisServer,
) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        await song.play("Bob", ChatMessage(text="hi"))
        redis_server.cli("CONFIG", "SET", "maxmemory", 1)
        await lost_for_writing(song, "oom", losses, redis_server)
        # It can still be read.
        assert await storage.get_session("song") == song.session


async def test_a_change_that_deletes_and_sets_is_carried_out_whole_or_not_at_all(
    redis_server: RedisServer,
) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        before = await song.play("Bob", LeaveSession())
        song.now += TOMBSTONE_MS + 1
        song.join("Cid")
        assert song.session is not None
        assert before.members.keys() - song.session.members.keys() == {song.ids["Bob"]}
        redis_server.cli("CONFIG", "SET", "maxmemory", 1)
        result = await storage.commit(before, song.session, ())
        stored = await storage.get_session("song")
        if isinstance(result, Committed):
            assert stored == result.session
        else:
            assert (result, stored) == (Lost("oom"), before)


async def test_a_replica_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("REPLICAOF", "127.0.0.1", 1)
        await lost_for_writing(song, "readonly", losses, redis_server)


async def test_a_replica_without_its_primary_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("CONFIG", "SET", "replica-serve-stale-data", "no")
        redis_server.cli("REPLICAOF", "127.0.0.1", 1)
        assert await storage.get_session("song") == Lost("masterdown")
        assert await storage.commit(song.session, song.next(), ()) == Lost("masterdown")
        assert await storage.touch(["song"]) == Lost("masterdown")
        assert losses == ["masterdown"] * 3


async def test_a_redis_that_cannot_save_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("CONFIG", "SET", "save", "3600 1")
        shutil.rmtree(Path(redis_server.cli("CONFIG", "GET", "dir")["dir"]))
        redis_server.cli("BGSAVE")
        with trio.fail_after(PATIENCE_S):
            while redis_server.cli("INFO", "persistence")["rdb_last_bgsave_status"] != "err":  # noqa: ASYNC110
                await trio.sleep(0.01)
        await lost_for_writing(song, "misconf", losses, redis_server)


async def test_a_user_who_loses_the_right_to_write_is_lost(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("ACL", "SETUSER", "default", "-hset")
        await lost_for_writing(song, "auth", losses, redis_server)
        redis_server.cli("ACL", "SETUSER", "default", "-hgetall", "-evalsha", "-expire")
        assert await storage.get_session("song") == Lost("auth")
        assert await storage.touch(["song"]) == Lost("auth")
        redis_server.cli("ACL", "SETUSER", "default", "allcommands")


async def test_a_redis_that_is_busy_with_a_script_is_lost(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("CONFIG", "SET", "lua-time-limit", 1)

        def hog() -> None:
            with pytest.raises(redis.RedisError, match=r"(?i)script killed"):
                redis_server.cli("EVAL", "while true do end", 0)

        async def hogged() -> None:
            await trio.to_thread.run_sync(hog)

        nursery.start_soon(hogged)
        try:
            # Until the script runs all is well.
            with trio.fail_after(PATIENCE_S):
                while not isinstance(await storage.get_session("song"), Lost):  # noqa: ASYNC110
                    await trio.sleep(0.001)
            assert await storage.commit(song.session, song.next(), ()) == Lost("overloaded")
            assert set(losses) == {"overloaded"}
        finally:
            redis_server.cli("SCRIPT", "KILL")
