"""Sessions whose stored copy is deleted, set back or damaged while the band plays."""

from typing import Any

import pytest
import trio

from scripts.testbed.redis_server import RedisServer
from tests.support.outages import KEY, blocking, get, in_order, start, stored_chat, until
from tests.support.servers import (
    band,
)


async def test_flushed_session_is_restored(
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


async def test_older_stored_copy_is_merged_by_the_next_command(
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
    "command",
    [
        ("SET", KEY, "a text"),
        ("HSET", KEY, "title", "song"),
        ("HSET", KEY, "epoch", "e", "version", "7", "eventId", "i", "head", "{"),
        ("HSET", KEY, "epoch", "e", "version", "7", "eventId", "i", "head", '{"format":99}'),
    ],
    ids=["a text", "another hash", "no JSON", "a newer format"],
)
async def test_unreadable_session_stays_in_memory_until_its_key_is_removed(
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
