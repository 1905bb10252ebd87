"""The loss of Redis as a storage sees it: killed, silent, full, read-only, busy."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import redis
import trio
from msgspec.structs import replace

from bandsync.model.session import TOMBSTONE_MS
from bandsync.storage.base import (
    Committed,
    Lost,
)
from bandsync.wire.commands import ChatMessage, LeaveSession
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_band import Band, band, dumped, impatient
from tests.support.redis_storages import LossList
from tests.support.servers import PATIENCE_S


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


async def test_killed_redis_is_a_loss(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.kill()
        await lost_everywhere(song, "reset", losses)


async def test_silent_redis_is_a_loss(redis_server: RedisServer) -> None:
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


async def test_full_redis_is_a_loss_without_partial_writes(
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


async def test_change_is_applied_atomically(
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


async def test_replica_is_a_loss(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("REPLICAOF", "127.0.0.1", 1)
        await lost_for_writing(song, "readonly", losses, redis_server)


async def test_replica_without_its_primary_is_a_loss(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("CONFIG", "SET", "replica-serve-stale-data", "no")
        redis_server.cli("REPLICAOF", "127.0.0.1", 1)
        assert await storage.get_session("song") == Lost("masterdown")
        assert await storage.commit(song.session, song.next(), ()) == Lost("masterdown")
        assert await storage.touch(["song"]) == Lost("masterdown")
        assert losses == ["masterdown"] * 3


async def test_redis_that_cannot_save_is_a_loss(redis_server: RedisServer) -> None:
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


async def test_revoked_write_permission_is_a_loss(redis_server: RedisServer) -> None:
    losses = LossList()
    async with impatient(redis_server, losses) as storage:
        song = await band(storage)
        redis_server.cli("ACL", "SETUSER", "default", "-hset")
        await lost_for_writing(song, "auth", losses, redis_server)
        redis_server.cli("ACL", "SETUSER", "default", "-hgetall", "-evalsha", "-expire")
        assert await storage.get_session("song") == Lost("auth")
        assert await storage.touch(["song"]) == Lost("auth")
        redis_server.cli("ACL", "SETUSER", "default", "allcommands")


async def test_redis_busy_with_a_script_is_a_loss(
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
