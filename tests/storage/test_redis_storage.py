"""Sessions in a real Redis: hash, channel, expiry, conflicts, unreadable values."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
import trio
from msgspec.structs import replace

from bandsync.model.session import TOMBSTONE_MS, tip
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.link import Link
from bandsync.storage.base import (
    Committed,
    Conflict,
    Presence,
    Unreadable,
)
from bandsync.storage.records import read_session
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.wire.commands import ChatMessage, LeaveSession, Play, UpdateMessage
from bandsync.wire.messages import encode
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_band import CHANNEL, KEY, Band, band, dumped, fields, storage_on
from tests.support.redis_storages import LossList, open_link, redis_storage
from tests.support.servers import PATIENCE_S


@pytest.fixture
async def storage(shared_redis: RedisServer, nursery: trio.Nursery) -> AsyncIterator[RedisStorage]:
    async with redis_storage(shared_redis.url()) as made:
        yield made


async def test_hash_contains_the_session(storage: RedisStorage, shared_redis: RedisServer) -> None:
    song = await band(storage)
    session = await song.play("Bob", ChatMessage(text="♪"))
    assert shared_redis.cli("TYPE", KEY) == "hash"
    assert read_session("song", fields(shared_redis)) == session
    assert shared_redis.cli("KEYS", "*") == [KEY]


async def test_removed_members_and_messages_leave_no_field(
    storage: RedisStorage, shared_redis: RedisServer
) -> None:
    song = await band(storage)
    await song.play("Bob", LeaveSession())
    assert f"member:{song.ids['Bob']}" in fields(shared_redis)
    song.now += TOMBSTONE_MS + 1
    session = await song.enter("Cid")
    assert f"member:{song.ids['Bob']}" not in fields(shared_redis)
    assert await storage.get_session("song") == session


async def test_commit_is_published_on_the_channel(
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

        # The published change leads from the state before to the state after.
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


async def test_conflicting_commit_is_not_published(
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


async def test_commit_and_touch_refresh_the_ttl(
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


async def test_touch_returns_the_tips(storage: RedisStorage, shared_redis: RedisServer) -> None:
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


async def test_conflict_returns_the_stored_state_in_one_round_trip(
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


async def test_one_of_many_concurrent_commits_succeeds(storage: RedisStorage) -> None:
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


async def test_commit_survives_a_script_flush(
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
async def test_unreadable_session_is_not_touched(
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


@pytest.mark.parametrize("field", ["head", "member:", "chat:"])
async def test_corrupted_field_is_not_touched(
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


async def test_foreign_fields_survive(storage: RedisStorage, shared_redis: RedisServer) -> None:
    song = await band(storage)
    shared_redis.cli("HSET", KEY, "note", "by hand")
    session = await song.play("Ann", ChatMessage(text="hi"))
    assert await storage.get_session("song") == session
    assert shared_redis.cli("HGET", KEY, "note") == "by hand"


@pytest.mark.parametrize("prefix", ["", "bandsync:", "b[a]n?d*:\\^", "Bühne:{x}:"])
async def test_listing_has_only_sessions_of_the_prefix(
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


async def test_live_servers_are_found(storage: RedisStorage, shared_redis: RedisServer) -> None:
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
    # An unreadable key does not count as absent.
    assert all(isinstance(found[name], Unreadable) for name in ("broken", "hash"))
    assert (found["gone"], found["hall"]) == (None, Presence("b", 1.5, "http://hall", ["song"], 3))


@pytest.mark.parametrize("size", [497, 498, 1000, 4100])
async def test_session_with_thousands_of_members_is_stored(
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
