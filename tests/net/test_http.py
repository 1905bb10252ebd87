"""HTTP on the port of the WebSockets, with raw bytes and with a foreign client."""

import json
from typing import Any

import httpx
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.trio.client import connect

from bandsync import __version__
from bandsync.wire.http_messages import HttpRequest, origin_allowed
from tests.support.servers import PATIENCE_S, Server, band, musician, start_server


async def get(server: Server, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        return await client.request(method, path, headers=headers)


async def raw(server: Server, data: bytes) -> bytes:
    """Send bytes, and return what the server sends until it closes."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        with trio.fail_after(PATIENCE_S):
            await stream.send_all(data)
            return b"".join([part async for part in stream])


async def test_health_has_the_fields_of_the_seed_and_more(server: Server) -> None:
    async with band(server, "Ann", "Bob"):
        response = await get(server, "/api/health")
    assert response.status_code == 200
    health = response.json()
    assert health.pop("uptimeMs") > 0
    assert health == {
        "healthy": True,
        "storageType": "memory",
        "initialized": True,
        "fallbackReason": "REDIS_ENABLED=false",
        "totalSessions": 1,
        "redisStatus": {
            "connected": False,
            "connectionAttempts": 0,
            "address": None,
            "outstanding": 0,
        },
        "serverId": "stage",
        "version": __version__,
        "connections": 2,
        "rooms": 1,
        "draining": False,
    }


async def test_storage_status_names_the_mode(server: Server) -> None:
    status = (await get(server, "/api/storage/status")).json()
    assert (status["mode"], status["degraded"]) == ("memory (disabled)", False)
    assert status["lastFailover"] is None


async def test_sessions_and_metrics_require_the_admin_token(
    nursery: trio.Nursery, server: Server
) -> None:
    assert (await get(server, "/api/sessions")).status_code == 403
    assert (await get(server, "/metrics")).status_code == 200
    guarded = await start_server(nursery, admin_token="häsh")
    for path in ("/api/sessions", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic hash"}):
            response = await get(guarded, path, **headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
    async with band(guarded, "Ann", session="our-song") as (ann,):
        await ann.ok("play")
        async with httpx.AsyncClient() as client:
            response = await client.get(
                f"{guarded.serving.url}/api/sessions",
                headers=[(b"Authorization", b"bearer " + "häsh".encode())],
            )
    assert response.json() == {
        "sessions": [
            {"sessionId": "our-song", "memberCount": 1, "connectedCount": 1, "isPlaying": True}
        ]
    }
    await guarded.stop()


async def test_task_count_follows_the_connections(server: Server) -> None:
    async def tasks() -> float:
        text = (await get(server, "/metrics")).text
        (family,) = [
            each for each in text_string_to_metric_families(text) if each.name == "bandsync_tasks"
        ]
        return family.samples[0].value

    alone = await tasks()
    async with band(server, "Ann", "Bob"):
        # Each connection has its own task and the reader of trio-websocket. The clients of this
        # test are counted, too.
        assert await tasks() >= alone + 4
    with trio.fail_after(PATIENCE_S):
        while await tasks() > alone:
            await wait_all_tasks_blocked(0.01)


async def test_metrics_have_names_help_and_values(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play")
        await bob.ask("play")
        text = (await get(server, "/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("bandsync_") for name in families)
    assert all(family.documentation for family in families.values())
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["bandsync_connections",] == 2
    assert values["bandsync_rooms",] == 1
    assert values["bandsync_members",] == 2
    assert values["bandsync_storage_mode", "memory"] == 1
    assert values["bandsync_errors_total", "not_leader"] == 1
    assert values["bandsync_joins_total", "joined"] == 2
    assert values["bandsync_received_total",] == 4
    assert values["bandsync_command_seconds_count",] == 4
    assert values["bandsync_deliveries_total",] >= 3


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nowhere"),
        ("GET", "/api"),
        ("POST", "/api/health"),
        ("GET", "/ws"),
        ("GET", "/../etc/passwd"),
        ("OPTIONS", "*"),
        ("GET", "//"),
        ("DELETE", "/"),
    ],
)
async def test_unknown_path_or_method_is_404_in_json(
    server: Server, method: str, path: str
) -> None:
    answer = await raw(
        server, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 404")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "not_found"


async def test_head_request_has_no_body_and_ignores_the_query(server: Server) -> None:
    response = await get(server, "/api/health?verbose=1", "HEAD")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 100


async def test_connection_serves_several_requests(server: Server) -> None:
    one = b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await raw(server, one + one + last)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b"HTTP/1.1 404") == 1


async def test_request_body_is_discarded(server: Server) -> None:
    head = b"POST /api/health HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
    assert (await raw(server, head + b"x" * 500_000)).startswith(b"HTTP/1.1 404")


async def test_malformed_head_is_400(server: Server) -> None:
    for head in (
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n bad\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        assert (await raw(server, head)).startswith(b"HTTP/1.1 400"), head


async def test_head_over_the_limit_is_431(server: Server) -> None:
    shortest = len(b"GET / HTTP/1.1\r\nHost: x\r\nX-Padding: \r\n\r\n")
    for size in (16_385 - shortest, 17_000, 1_000_000):
        padding = b"X-Padding: " + b"x" * size
        head = b"GET / HTTP/1.1\r\nHost: x\r\n" + padding + b"\r\n\r\n"
        assert (await raw(server, head)).startswith(b"HTTP/1.1 431"), size
    fits = b"X-Padding: " + b"x" * 15_000
    head = b"GET /api/health HTTP/1.1\r\nHost: x\r\n" + fits + b"\r\nConnection: close\r\n\r\n"
    assert (await raw(server, head)).startswith(b"HTTP/1.1 200")


async def test_page_has_a_strict_content_security_policy(server: Server) -> None:
    page = await get(server, "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for asset in ("/stage.js", "/stage.css", "/theme.css"):
        assert asset in page.text
        assert (await get(server, asset)).status_code == 200


async def status_of_upgrade(server: Server, path: str = "/ws", **options: Any) -> int:
    try:
        async with connect(f"ws://127.0.0.1:{server.port}{path}", **options):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


async def test_upgrade_with_two_connection_headers_is_accepted(server: Server) -> None:
    answer = await raw(
        server,
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Connection: keep-alive\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
        + Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True),
    )
    assert answer.startswith(b"HTTP/1.1 101")


async def test_upgrade_of_another_path_is_404(server: Server) -> None:
    assert await status_of_upgrade(server, "/wsx") == 404
    assert await status_of_upgrade(server, "/") == 404


async def test_upgrade_of_a_foreign_origin_is_403(nursery: trio.Nursery, server: Server) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert await status_of_upgrade(server, origin=own) == 101
    assert await status_of_upgrade(server, origin="https://evil.example") == 403
    listed = await start_server(nursery, allowed_origins="https://a.example, https://B.example/")
    assert await status_of_upgrade(listed, origin="https://b.example") == 101
    assert await status_of_upgrade(listed, origin="https://c.example") == 403
    assert await status_of_upgrade(listed) == 101
    await listed.stop()


def test_origin_is_compared_with_the_host_and_the_list() -> None:
    def request(**headers: str) -> HttpRequest:
        return HttpRequest("GET", "/ws", headers)

    assert origin_allowed(request(origin="https://X.example", host="x.example"), ())
    assert not origin_allowed(request(origin="null", host="x.example"), ())
    assert not origin_allowed(request(origin="https://[", host="x.example"), ())
    assert origin_allowed(request(origin="null", host="x.example"), {"*"})


async def test_draining_server_answers_http_and_refuses_upgrades(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, drain_timeout_ms=60_000)
    # A client that never answers the close frame prolongs the drain.
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    await stream.send_all(
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await stream.receive_some()
    server.serving.stop()
    with trio.fail_after(PATIENCE_S):
        while (health := await get(server, "/api/health")).status_code != 503:
            pass
    assert health.json()["draining"] is True
    assert await status_of_upgrade(server) == 503
    await stream.aclose()
    await server.stop()
    assert server.events("server.stopped")


async def test_server_announces_address_and_storage(server: Server) -> None:
    assert server.lines == [
        f"BandSync listening on http://127.0.0.1:{server.port}",
        "Storage: memory (REDIS_ENABLED=false)",
    ]


async def test_frames_that_arrive_with_the_head_are_served(server: Server) -> None:
    """The client sends them before it has the answer to its handshake."""
    join = json.dumps({"type": "join_session", "sessionId": "song"}).encode()
    head = (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    close = Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True)
    answer = await raw(server, head + Frame(Opcode.TEXT, join).serialize(mask=True) + close)
    assert answer.startswith(b"HTTP/1.1 101")
    assert b'"type":"welcome"' in answer
    assert b'"type":"snapshot"' in answer
    assert answer.endswith(b"\x88\x02\x03\xe8")
    async with musician(server) as player:
        await player.ok("heartbeat")


@pytest.mark.parametrize(
    ("sent", "counted"),
    [(b"", 1), (b"GET / HTTP/1.1\r\nHos", 1), (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 0)],
)
async def test_incomplete_head_is_dropped_after_ten_seconds(
    nursery: trio.Nursery, mock_clock: MockClock, sent: bytes, counted: int
) -> None:
    server = await start_server(nursery)
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    await stream.send_all(sent)
    if not counted:
        assert b"404" in await stream.receive_some()
    await wait_all_tasks_blocked()
    mock_clock.jump(9.9)
    with trio.move_on_after(0):
        assert await stream.receive_some() == b"nothing yet"
    await wait_all_tasks_blocked()
    mock_clock.jump(0.2)
    assert await stream.receive_some() == b""
    await stream.aclose()
    mock_clock.rate = 1
    timeouts = 'bandsync_handshakes_refused_total{reason="timeout"} 1.0'
    assert ((await get(server, "/metrics")).text.count(timeouts)) == counted
    await server.stop()
