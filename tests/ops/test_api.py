"""The operators' HTTP interface of a real server, and its access control."""

import base64
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import trio

from bandsync import __version__
from bandsync.ops.recorder import KEPT
from scripts.testbed.redis_server import RedisServer
from tests.support.servers import PATIENCE_S, Message, Server, band, start_server

TOKEN = "höchst geheim: ja"  # With a colon: in Basic credentials only the first one separates.


async def get(server: Server, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        return await client.get(path, **options)


async def overview(server: Server, query: str = "") -> Message:
    answer = await get(server, f"/api/ops{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def until(server: Server, wanted: Callable[[Message], Any], query: str = "") -> Message:
    """Poll until an overview satisfies ``wanted``."""
    with trio.fail_after(PATIENCE_S):
        while True:
            found = await overview(server, query)
            if wanted(found):
                return found
            await trio.sleep(0.02)


async def stored_in(server: Server, mode: str) -> Message:
    """The overview once the storage is in this mode."""
    return await until(server, lambda found: found["storage"]["mode"] == mode)


async def sampled(server: Server, count: int) -> Message:
    """The overview once there are so many samples."""
    return await until(server, lambda found: len(found["samples"]) >= count)


def of_redis(found: Message) -> list[str]:
    """The findings about Redis: a busy machine may have others."""
    verdict = found["verdict"]
    texts = [verdict["text"], *(each["text"] for each in verdict["others"])]
    return [text for text in texts if "Redis" in text]


def basic(user: str, password: str) -> dict[str, str]:
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {credentials}"}


async def test_overview_shows_the_server_in_numbers(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play")
        before = await sampled(server, 1)
        await bob.ok("chat_message", text="hi")
        found = await sampled(server, len(before["samples"]) + 1)
    assert (found["serverId"], found["version"], found["draining"]) == (
        "stage",
        __version__,
        False,
    )
    assert len(found["bootId"]) == 16
    assert found["uptimeMs"] > 0
    assert found["keptMs"] == KEPT * found["periodMs"]
    last = found["samples"][-1]
    assert (last["connections"], last["members"]) == (2, 2)
    assert (last["rooms"], last["sessions"]) == (1, 1)
    assert (last["mode"], last["degraded"]) == ("memory (disabled)", False)
    assert last["roundTripMs"] is None
    assert last["cpu"] >= 0
    assert last["at"] <= found["now"]
    assert sum(each["receivedPerS"] for each in found["samples"]) > 0
    assert sum(each["deliveriesPerS"] for each in found["samples"]) > 0
    commands = [each["command"] for each in found["samples"] if each["command"]]
    # Two joins, play and chat.
    assert sum(each["count"] for each in commands) == 4
    assert all(0 < each["meanMs"] <= each["maxMs"] for each in commands)
    commits = [each["commit"] for each in found["samples"] if each["commit"]]
    assert sum(each["count"] for each in commits) == 4
    assert found["storage"] == (await get(server, "/api/storage/status")).json()


async def test_idle_server_in_memory_mode_is_well(server: Server) -> None:
    found = await overview(server)
    assert found["verdict"]["text"] == "All is well."
    assert [each["kind"] for each in found["events"]] == ["start"]
    assert found["events"][0]["mode"] == "memory (disabled)"


async def test_since_returns_later_samples(server: Server) -> None:
    known = (await sampled(server, 2))["samples"]
    newer = (await overview(server, f"?since={known[0]['at']!r}"))["samples"]
    assert newer[0] == known[1]
    last = newer[-1]["at"]
    more = await until(server, lambda found: found["samples"], f"?since={last!r}")
    assert more["samples"][0]["at"] > last
    # An instant in the future is of another clock: all samples are returned.
    assert (await overview(server, "?since=9e15"))["samples"][0] == known[0]
    assert (await overview(server, "?since=-1&verbose"))["samples"][0] == known[0]


@pytest.mark.parametrize(
    "query",
    [
        "since=",
        "since=now",
        "since=nan",
        "since=-inf",
        "since=1&since=2",
        "since=1%202",
        "since=1_0",
        "since=%201",
        "since=%D9%A1%D9%A2",  # 12 in Arabic digits.
        "since=1.",
        "since=1e999",
    ],
)
async def test_malformed_since_is_a_bad_query(server: Server, query: str) -> None:
    answer = await get(server, f"/api/ops?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"] == "bad_query"
    assert "since" in answer.json()["message"]


async def test_overview_must_not_be_cached(server: Server) -> None:
    assert (await get(server, "/api/ops")).headers["cache-control"] == "no-store"


async def test_screen_is_open_without_an_admin_token(server: Server) -> None:
    screen = await get(server, "/ops")
    assert screen.status_code == 200
    assert screen.headers["content-type"] == "text/html; charset=utf-8"
    policy = screen.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


async def test_operators_pages_need_the_admin_token(nursery: trio.Nursery) -> None:
    guarded = await start_server(nursery, admin_token=TOKEN)
    refused: list[Any] = [
        {},
        basic("ops", "geheim"),
        basic(TOKEN, ""),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(TOKEN.encode()).decode()},
        {"Authorization": "Bearer x"},
        [(b"Authorization", b"Digest " + TOKEN.encode())],
    ]
    for path in ("/ops", "/api/ops"):
        for headers in refused:
            answer = await get(guarded, path, headers=headers)
            assert answer.status_code == 401, headers
            challenges = answer.headers.get_list("www-authenticate")
            assert 'Basic realm="BandSync operators", charset="UTF-8"' in challenges
            assert "Bearer" in challenges
            assert "samples" not in answer.text
            assert "<html" not in answer.text
    for path in ("/ops", "/api/ops", "/api/sessions", "/metrics"):
        for user in ("", "ops", "ühm"):
            answer = await get(guarded, path, headers=basic(user, TOKEN))
            assert answer.status_code == 200, path
        bearer = [(b"Authorization", b"Bearer " + TOKEN.encode())]
        assert (await get(guarded, path, headers=bearer)).status_code == 200, path
    await guarded.stop()


async def test_documents_for_scripts_do_not_prompt(nursery: trio.Nursery) -> None:
    guarded = await start_server(nursery, admin_token=TOKEN)
    for path in ("/metrics", "/api/sessions"):
        answer = await get(guarded, path)
        assert answer.headers.get_list("www-authenticate") == ["Bearer"]
    await guarded.stop()


async def test_overview_shows_failover_and_recovery(
    nursery: trio.Nursery, redis_server: RedisServer
) -> None:
    server = await start_server(
        nursery,
        redis_enabled=True,
        redis_url=redis_server.url(),
        redis_health_interval_ms=50,
    )
    async with band(server, "Ann", "Bob") as (ann, _):
        before = await stored_in(server, "redis")
        assert of_redis(before) == []
        (connected,) = [each for each in before["events"] if each["kind"] == "recovery"]
        assert connected["outageMs"] is None

        await trio.to_thread.run_sync(redis_server.kill)
        lost = await stored_in(server, "memory")
        await ann.ok("play")
        failover = lost["events"][-1]
        assert (failover["kind"], failover["mode"]) == ("failover", "memory")
        assert failover["reason"] in {"reset", "refused"}
        assert failover["inWords"]
        assert failover["detail"]
        assert lost["storage"]["lastFailover"] == {
            name: failover[name] for name in ("at", "reason", "detail")
        }
        assert len(of_redis(lost)) == 1
        assert (await overview(server))["storage"]["keptInMemory"] == 1
        sampling = await sampled(server, len(lost["samples"]) + 1)
        assert sampling["samples"][-1]["degraded"]

        await trio.to_thread.run_sync(redis_server.start)
        back = await stored_in(server, "redis")
        # The last event: a loss during the migration would add two more before it.
        recovery = back["events"][-1]
        assert (recovery["kind"], recovery["mode"]) == ("recovery", "redis")
        assert recovery["outageMs"] == pytest.approx(recovery["at"] - failover["at"], abs=5)
        assert recovery["sessions"] == 1
        assert 0 < recovery["migrationMs"] < recovery["outageMs"]
        assert back["storage"]["lastRecovery"]["at"] == recovery["at"]
        assert back["events"][-2]["kind"] == "migration"
        assert [each["at"] for each in back["events"]] == sorted(
            each["at"] for each in back["events"]
        )
        assert of_redis(back) == []
    await server.stop()
