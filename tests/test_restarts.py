"""Servers that stop or die and start again on the same Redis: the sessions are as before."""

import pytest
import trio

from scripts.testbed.redis_server import RedisServer
from tests.support.outages import (
    KEY,
    QUICK,
    ProxiedRedis,
    blocking,
    in_order,
    reset,
    start,
    start_process,
    stored_chat,
)
from tests.support.servers import (
    band,
    musician,
    start_server,
)

KEPT = ("epoch", "message", "transport", "chat", "leaderId", "settings", "createdAt")


@pytest.mark.parametrize("how", ["drained", "killed"])
async def test_restarted_server_restores_sessions(
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


async def test_drain_during_an_outage_migrates_to_redis(
    proxied_redis: ProxiedRedis, nursery: trio.Nursery
) -> None:
    server = await start(nursery, proxied_redis.url)
    async with band(server, "Ann") as (ann,):
        await reset(proxied_redis)
        await ann.next("storage_status", storageType="memory")
        await ann.ok("chat_message", text="from memory")
        token = ann.you["resumeToken"]
        proxied_redis.proxy.heal()
        await server.stop()
    assert stored_chat(proxied_redis.redis) == ["from memory"]
    again = await start(nursery, proxied_redis.url)
    async with musician(again) as ann:
        snapshot = await ann.join(resumeToken=token)
        assert ann.you["resumed"] is True
        assert [chat["text"] for chat in snapshot["chat"]] == ["from memory"]


async def test_session_reopened_in_an_outage_merges_into_the_older_epoch(
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
