"""A server whose Redis comes later, refuses it, is required, or is lost for good."""

import json

import pytest
import trio

from bandsync.startup import StartError
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.outages import (
    QUICK,
    blocking,
    get,
    head,
    in_order,
    start,
    stored_chat,
    until,
)
from tests.support.servers import (
    band,
    start_server,
)


async def test_redis_that_starts_later_is_used(
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
async def test_refused_credentials_are_reported_without_secrets(
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


async def test_no_auto_recover_stays_in_memory(
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


async def test_required_redis_must_be_reachable(
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


async def test_required_redis_that_refuses_the_password_stops_the_start(
    redis_binary: None, nursery: trio.Nursery
) -> None:
    required = QUICK | {"redis_required": True, "redis_max_retries": 0}
    with (
        RedisServer(password="right") as redis,
        pytest.raises(StartError, match=r"^REDIS_REQUIRED=true: .*auth"),
    ):
        url = f"redis://:wrong@{HOST}:{redis.port}/0"
        await start_server(nursery, **required, redis_url=url)
