"""Real load balancers with the files of `scripts/deploy`, before two servers."""

import http
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
import trustme
from websockets.exceptions import ConnectionClosed, InvalidStatus

from bandsync.client.websocket import HANDSHAKE_TIMEOUT_S
from bandsync.settings import Settings
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.deployments import (
    CLIENTS_WAIT_S,
    HAPROXY_CFG,
    MANY,
    NGINX_CONF,
    POLL_S,
    ROOT,
    UPGRADE,
    changed,
    process,
    seconds,
    tool,
)
from tests.support.servers import PATIENCE_S, Musician, musician
from tests.test_serve import SCRIPT, environment


class Stage:
    """Two servers on one Redis, as processes, under the names of the examples.

    Attributes:
        ports: by name.
    """

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis
        self._running: dict[str, tuple[Any, subprocess.Popen[str]]] = {}
        self.ports = {name: free_port() for name in ("bandsync-1", "bandsync-2")}

    def start(self, name: str) -> None:
        """Start this server; returns when it listens."""
        variables = {
            "REDIS_ENABLED": "true",
            "REDIS_REQUIRED": "true",
            "REDIS_URL": self._redis.url(),
            "SERVER_ID": name,
            "PORT": str(self.ports[name]),
            "LOG_LEVEL": "error",
        }
        manager = process(
            [sys.executable, SCRIPT], env=environment(**variables), stdout=subprocess.PIPE
        )
        started = manager.__enter__()
        self._running[name] = manager, started
        assert started.stdout is not None
        assert "listening" in started.stdout.readline()

    def signal(self, name: str, number: signal.Signals) -> None:
        self._running[name][1].send_signal(number)

    def end(self, name: str) -> int:
        """Wait until it has ended; its status."""
        manager, started = self._running.pop(name)
        try:
            return started.wait(PATIENCE_S)
        finally:
            manager.__exit__(None, None, None)

    def close(self) -> None:
        for manager, _ in self._running.values():
            manager.__exit__(None, None, None)

    def health(self, name: str) -> int:
        """The status of `/api/health`, from the server itself."""
        return httpx.get(f"http://{HOST}:{self.ports[name]}/api/health").status_code

    def other(self, name: str) -> str:
        return next(each for each in self.ports if each != name)


@pytest.fixture
def stage(redis_server: RedisServer) -> Iterator[Stage]:
    made = Stage(redis_server)
    try:
        for name in made.ports:
            made.start(name)
        yield made
    finally:
        made.close()


class Balancer(SimpleNamespace):
    """The ports of a load balancer, and the TLS context that trusts it."""

    port: int
    tls_port: int
    trust: ssl.SSLContext

    async def come(
        self, nursery: trio.Nursery, path: str, *, tls: bool = False, **options: Any
    ) -> Musician:
        """A connection that stays until the nursery ends."""
        settings = SimpleNamespace(tls_cert="here" if tls else None)
        server: Any = SimpleNamespace(port=self.tls_port if tls else self.port, settings=settings)
        if tls:
            options["ssl"] = self.trust

        async def stay(*, task_status: trio.TaskStatus[Musician]) -> None:
            async with musician(server, path, **options) as player:
                task_status.started(player)
                await trio.sleep_forever()

        player: Musician = await nursery.start(stay)
        return player

    async def place(self, path: str) -> str:
        """The server that such a connection comes to."""
        async with trio.open_nursery() as nursery:
            player = await self.come(nursery, path)
            found: str = player.inbox[0]["serverId"]
            nursery.cancel_scope.cancel()
        return found


def nginx(stage: Stage, ours: Balancer, certificate: Path, folder: Path) -> list[str | Path]:
    """How to run nginx with our file, on ports of the test."""
    program = tool("nginx", "apt install nginx-light")
    text = changed(
        NGINX_CONF.read_text(),
        *((f"{name}:3001", f"{HOST}:{port}") for name, port in stage.ports.items()),
        ("listen 80;", f"listen {HOST}:{ours.port};"),
        ("# listen 443 ssl;", f"listen {HOST}:{ours.tls_port} ssl;"),
        ("# ssl_certificate /etc/nginx/bandsync.crt;", f"ssl_certificate {certificate};"),
        ("# ssl_certificate_key /etc/nginx/bandsync.key;", f"ssl_certificate_key {certificate};"),
    )
    # Temporary folders that any user may write to.
    temporary = "".join(
        f"{kind}_temp_path {folder / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(changed(text, ("\nhttp {", f"\nhttp {{ {temporary}")))
    # One process, which ends when it is killed.
    directives = f"daemon off; master_process off; pid {folder / 'pid'};"
    return [program, "-e", folder / "error", "-c", folder / "nginx.conf", "-g", directives]


def haproxy(stage: Stage, ours: Balancer, certificate: Path, folder: Path) -> list[str | Path]:
    """How to run HAProxy with our file, on ports of the test."""
    program = tool("haproxy", "apt install haproxy")
    text = changed(
        HAPROXY_CFG.read_text(),
        *((f" {name}:3001", f" {HOST}:{port}") for name, port in stage.ports.items()),
        ("bind :80", f"bind {HOST}:{ours.port}"),
        (
            "# bind :443 ssl crt /etc/haproxy/bandsync.pem",
            f"bind {HOST}:{ours.tls_port} ssl crt {certificate}",
        ),
    )
    (folder / "haproxy.cfg").write_text(text)
    return [program, "-db", "-f", folder / "haproxy.cfg"]


@pytest.fixture(params=[nginx, haproxy], ids=["nginx", "haproxy"])
def balancer(request: pytest.FixtureRequest, stage: Stage, tmp_path: Path) -> Iterator[Balancer]:
    """One that runs, in front of the two servers."""
    authority = trustme.CA()
    ours = Balancer(port=free_port(), tls_port=free_port(), trust=ssl.create_default_context())
    authority.configure_trust(ours.trust)
    pem = tmp_path / "bandsync.pem"
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(pem)
    command = request.param(stage, ours, pem, tmp_path)
    with process(command, stderr=subprocess.PIPE) as running:
        deadline = time.perf_counter() + PATIENCE_S
        while not listens(ours.port):
            assert running.poll() is None, running.communicate()
            assert time.perf_counter() < deadline
            time.sleep(POLL_S)
        yield ours


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@pytest.mark.slow
async def test_balancer_keeps_a_session_on_one_server(
    balancer: Balancer, nursery: trio.Nursery
) -> None:
    places = set()
    for number in range(24):
        path = f"/ws/song-{number}"
        band = [await balancer.come(nursery, path) for _ in range(3)]
        (place,) = {player.inbox[0]["serverId"] for player in band}
        places.add(place)
        for player in band:
            await player.join(None)
    assert places == {"bandsync-1", "bandsync-2"}

    without = set()
    for _ in range(MANY):
        player = await balancer.come(nursery, "/ws")
        without.add(player.inbox[0]["serverId"])
    assert without == {"bandsync-1", "bandsync-2"}

    async with httpx.AsyncClient(base_url=f"http://{HOST}:{balancer.port}") as client:
        assert "BandSync" in (await client.get("/")).text
        assert (await client.get("/api/health")).json()["healthy"]
        for path in ("/metrics", "/ops", "/api/ops"):
            assert (await client.get(path)).status_code == http.HTTPStatus.NOT_FOUND


@pytest.mark.slow
async def test_pages_of_its_own_origin_may_connect_and_no_others(
    balancer: Balancer, nursery: trio.Nursery
) -> None:
    await balancer.come(nursery, "/ws/song", origin=f"http://{HOST}:{balancer.port}")
    await balancer.come(nursery, "/ws/song", tls=True, origin=f"https://{HOST}:{balancer.tls_port}")
    with pytest.raises(InvalidStatus) as refused:
        await balancer.come(nursery, "/ws/song", origin="https://elsewhere.example")
    assert refused.value.response.status_code == http.HTTPStatus.FORBIDDEN


@pytest.mark.slow
async def test_balancer_skips_draining_and_dead_servers(
    balancer: Balancer, stage: Stage, nursery: trio.Nursery
) -> None:
    ann = await balancer.come(nursery, "/ws/song")
    bob = await balancer.come(nursery, "/ws/song")
    await ann.join(None, displayName="Ann")
    await bob.join(None, displayName="Bob")
    await ann.ok("play", startInMs=0)
    first = ann.inbox[0]["serverId"]
    second = stage.other(first)

    async def back(player: Musician, place: str) -> Musician:
        again = await balancer.come(nursery, "/ws/song")
        assert again.inbox[0]["serverId"] == place
        snapshot = await again.join(None, resumeToken=player.you["resumeToken"])
        assert snapshot["you"]["resumed"]
        assert snapshot["you"]["role"] == player.you["role"]
        assert snapshot["isPlaying"]
        return again

    # A client that does not answer the close prolongs the drain.
    with socket.create_connection((HOST, stage.ports[first])) as silent:
        silent.sendall(UPGRADE)
        silent.recv(4096)
        stage.signal(first, signal.SIGTERM)
        assert await ann.closed() == await bob.closed() == 1012
        assert stage.health(first) == http.HTTPStatus.SERVICE_UNAVAILABLE
        ann = await back(ann, second)
        bob = await back(bob, second)
    assert await trio.to_thread.run_sync(stage.end, first) == 0

    await trio.to_thread.run_sync(stage.start, first)
    with trio.fail_after(PATIENCE_S):
        # It is passed over for as long as the balancer likes.
        while await balancer.place("/ws/song") != first:
            continue

    stage.signal(second, signal.SIGKILL)
    await trio.to_thread.run_sync(stage.end, second)
    await ann.closed()
    ann = await back(ann, first)
    bob = await back(bob, first)
    await ann.ok("chat_message", text="as before")
    await bob.next("chat_message", text="as before")


@pytest.mark.slow
async def test_servers_are_replaced_in_turn_and_nobody_is_turned_away(
    balancer: Balancer, stage: Stage, nursery: trio.Nursery
) -> None:
    """All come back at the first attempt, although those who stay never end their connections."""
    band = {}
    for number in range(24):
        path = f"/ws/song-{number}"
        band[path] = await balancer.come(nursery, path)
        await band[path].join(None)
    home = {player.inbox[0]["serverId"]: path for path, player in band.items()}

    async def taken(name: str) -> None:
        while True:
            player = await balancer.come(nursery, home[name])
            if player.inbox[0]["serverId"] == name:
                return
            await trio.sleep(POLL_S)

    for name in stage.ports:
        stage.signal(name, signal.SIGTERM)
        for path, player in band.items():
            if player.inbox[0]["serverId"] == name:
                assert await player.closed() == 1012
                band[path] = await balancer.come(nursery, path)
                snapshot = await band[path].join(None, resumeToken=player.you["resumeToken"])
                assert snapshot["you"]["resumed"]
        assert await trio.to_thread.run_sync(stage.end, name) == 0
        await trio.to_thread.run_sync(stage.start, name)
        with trio.fail_after(PATIENCE_S):
            await taken(name)


@pytest.mark.slow
async def test_balancer_skips_a_server_that_hangs(
    balancer: Balancer, stage: Stage, nursery: trio.Nursery
) -> None:
    """Before clients give up: who goes away is no reason for a balancer to ask another server."""
    ann = await balancer.come(nursery, "/ws/song")
    await ann.join(None)
    first = ann.inbox[0]["serverId"]
    stage.signal(first, signal.SIGSTOP)
    again = await balancer.come(nursery, "/ws/song", open_timeout=PATIENCE_S)
    assert again.inbox[0]["serverId"] == stage.other(first)
    snapshot = await again.join(None, resumeToken=ann.you["resumeToken"])
    assert snapshot["you"]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("balancer", [haproxy], indirect=True, ids=["haproxy"])
async def test_clients_of_a_server_that_hangs_are_let_go(
    balancer: Balancer, stage: Stage, nursery: trio.Nursery
) -> None:
    """Also those who talk on, whose connections no timeout of a balancer ends."""
    ann = await balancer.come(nursery, "/ws/song")
    stage.signal(ann.inbox[0]["serverId"], signal.SIGSTOP)

    async def talk() -> None:
        with suppress(ConnectionClosed):
            while True:
                await ann.send("heartbeat")
                await trio.sleep(POLL_S)

    nursery.start_soon(talk)
    await ann.closed()


def test_nginx_timeout_is_between_ping_and_client_timeout() -> None:
    """Longer than servers are silent, shorter than the clients wait that come with BandSync."""
    sessions = re.findall(r"location /ws \{.*?\}", NGINX_CONF.read_text(), re.DOTALL)[0]
    (wait,) = re.findall(r"proxy_read_timeout (\w+);", sessions)
    page = (ROOT / "bandsync" / "web" / "client" / "bandsync.js").read_text()
    (page_ms,) = re.findall(r"const MAX_CONNECT_MS = ([\d_]+);", page)
    assert int(page_ms) / 1000 == CLIENTS_WAIT_S == HANDSHAKE_TIMEOUT_S
    # A page is less patient at first, and is passed on at the second attempt.
    ((first_ms, more_ms),) = re.findall(r"\(MAX_CONNECT_MS, (\d+) \+ (\d+) \* this\.#att", page)
    second_s = (int(first_ms) + 2 * int(more_ms)) / 1000
    assert Settings().ping_interval_ms / 1000 + 1 < seconds(wait) < second_s < CLIENTS_WAIT_S


# Checks of the configuration that cannot be run here.
