"""`scripts/deploy/`: what can be run here is run, the rest is read by its own tools."""

import configparser
import http
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
import trustme
from websockets.exceptions import ConnectionClosed, InvalidStatus

from bandsync.client.websocket import HANDSHAKE_TIMEOUT_S
from bandsync.settings import OPTIONS, Settings, parse
from scripts.testbed.redis_server import HOST, RedisServer, find_redis_server, free_port, reaper_of
from tests.support.servers import PATIENCE_S, Message, Musician, musician
from tests.test_serve import SCRIPT, environment
from tests.support.worker_groups import upgrade

UPGRADE = upgrade("/ws")
# Enough connections that both servers get some, whichever way they are spread.
MANY = 64

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
NGINX_CONF = DEPLOY / "nginx.conf"
HAPROXY_CFG = DEPLOY / "haproxy.cfg"
MARGIN_S = 5.0
# How long clients wait for a welcome, at the most.
CLIENTS_WAIT_S = 10.0
_POLL_S = 0.01


def tool(name: str, install: str) -> str:
    """The path of a program; without it the test is skipped, or fails if it must not be."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        missing(f"no {name}: {install}")
    return found or ""


def missing(what: str) -> None:
    if os.environ.get("REQUIRE_DEPLOY"):
        pytest.fail(what)
    pytest.skip(what)


PIP = "pip install -e '.[deploy]'"


@contextmanager
def process(command: list[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test."""
    started = subprocess.Popen(command, text=True, **options)
    reaper = reaper_of(started.pid)
    try:
        yield started
    finally:
        for each in (reaper, started):
            each.kill()
            with each:
                each.wait()


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
    """What clients see: a port, a port with TLS, and whom to trust there."""

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


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


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
    # Where it may write, whoever runs the test.
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
            time.sleep(_POLL_S)
        yield ours


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@pytest.mark.slow
async def test_a_session_is_on_one_server_and_the_rest_is_spread(
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
async def test_a_server_that_drains_and_one_that_dies_are_passed_over(
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

    # Who does not answer the goodbye makes the drain last.
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
            await trio.sleep(_POLL_S)

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
async def test_a_server_that_hangs_is_passed_over(
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
                await trio.sleep(_POLL_S)

    nursery.start_soon(talk)
    await ann.closed()


def test_how_long_nginx_waits_for_a_server() -> None:
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


# What cannot be run here.


def yaml_documents(path: Path) -> list[Message]:
    try:
        import yaml
    except ImportError:
        missing(f"no PyYAML: {PIP}")
    return list(yaml.safe_load_all(path.read_text()))


def settings_of(variables: dict[str, str]) -> Settings:
    """What a server makes of these; all of them must be settings."""
    assert set(variables) <= {option.name for option in OPTIONS}
    return parse(variables)


def seconds(text: str) -> float:
    """Of a duration of compose."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0}
    parts = re.findall(r"(\d+)(ms|s|m)", text)
    assert parts, text
    return sum(int(number) * units[unit] for number, unit in parts)


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines]


def image_environment() -> dict[str, str]:
    text = next(text for name, text in instructions() if name == "ENV")
    pairs = dict(pair.split("=", 1) for pair in text.split())
    return {name: text for name, text in pairs.items() if not name.startswith(("PATH", "PYTHON"))}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    result = subprocess.run(
        [tool("hadolint", PIP), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.slow
def test_the_image_has_what_it_runs(tmp_path: Path) -> None:
    """What the Dockerfile copies is laid out as it says; its commands are run as they stand."""
    kept = {
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    commands = {}
    stages = 0
    for name, text in instructions():
        stages += name == "FROM"
        if name == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            folder = tmp_path / str(stages) / target.lstrip("/")
            for source in sources:
                assert source in kept
                path = ROOT / source
                goal = folder if path.is_dir() else folder / path.name
                if path.is_dir():
                    shutil.copytree(path, goal, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, goal)
        commands[name] = text
    assert commands["USER"].split(":")[0].isdigit()
    assert int(commands["USER"].split(":")[0]) > 0
    assert commands["STOPSIGNAL"] == "SIGTERM"

    def command(text: str) -> list[str]:
        # The exec form, or a shell would be process 1.
        program, *rest = json.loads(text)
        assert program == "python"
        return [sys.executable, *(part.replace("/app/", f"{tmp_path}/2/app/") for part in rest)]

    given = image_environment()
    assert settings_of(given).host == "0.0.0.0"  # noqa: S104
    assert int(commands["EXPOSE"]) == settings_of(given).port
    port = str(free_port())
    given |= {"HOST": HOST, "PORT": port, "PYTHONPATH": f"{tmp_path}/1"}
    variables = environment(**given)

    def healthy() -> bool:
        check = command(commands["HEALTHCHECK"].partition("CMD ")[2])
        return subprocess.run(check, env=variables, check=False).returncode == 0

    run: list[str | Path] = [*command(commands["ENTRYPOINT"])]
    with process(run, cwd=tmp_path, env=variables, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert "listening" in server.stdout.readline()
        assert healthy()
        with socket.create_connection((HOST, int(port))) as silent:
            silent.sendall(UPGRADE)
            silent.recv(4096)
            server.terminate()
            while json.loads(httpx.get(f"http://{HOST}:{port}/api/health").text)["healthy"]:
                pass
            assert not healthy()
        assert server.wait(PATIENCE_S) == 0
        assert not healthy()


def composed(*files: str) -> Message:
    """These compose files as Docker Compose understands them."""
    program = tool("docker-compose", PIP)
    named = [part for file in files for part in ("--file", DEPLOY / file)]
    result = subprocess.run(
        [program, "--env-file", os.devnull, *named, "config", "--format", "json"],
        # Whoever runs the tests may have settings of their own.
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    document: Message = json.loads(result.stdout)
    return document


@pytest.fixture(scope="module")
def compose() -> Message:
    return composed("compose.yaml")


@pytest.fixture(scope="module")
def compose_haproxy() -> Message:
    return composed("compose.yaml", "compose.haproxy.yaml")


def test_the_servers_of_compose(compose: Message) -> None:
    services = compose["services"]
    names = ["bandsync-1", "bandsync-2"]
    for name in names:
        service = services[name]
        given = {key: text for key, text in service["environment"].items() if text}
        settings = settings_of(image_environment() | given)
        assert settings.server_id == name
        assert settings.redis_host == "redis"
        grace_s = seconds(service["stop_grace_period"])
        assert grace_s >= settings.drain_timeout_ms / 1000 + MARGIN_S
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    # Builds of one image at a time: the second finds that it exists already, and fails.
    assert len({services[name]["image"] for name in names}) == 1
    (build,) = [services[name]["build"] for name in names if "build" in services[name]]
    assert (Path(build["context"]) / build["dockerfile"]).is_file()


def check_balancer(services: Message, image: str, mounts: dict[Path, str]) -> None:
    """It finds the servers under the names of its file, also while they are down."""
    service = services["balancer"]
    assert service["image"].startswith(f"{image}:")
    networks = {name: each["networks"]["default"] for name, each in services.items()}
    addresses = {name: each["ipv4_address"] for name, each in networks.items() if each}
    assert dict(entry.split("=", 1) for entry in service["extra_hosts"]) == addresses
    assert {Path(each["source"]): each["target"] for each in service["volumes"]} == mounts
    assert all(each["read_only"] for each in service["volumes"])
    (path,) = mounts
    text = path.read_text()
    named = re.findall(r"^\s+server .*?(bandsync-\d:\d+)", text, re.MULTILINE)
    assert set(named) == {f"{name}:{image_environment()['PORT']}" for name in addresses}
    (published,) = service["ports"]
    (port,) = re.findall(r"^\s+(?:listen |bind :)(\d+);?$", text, re.MULTILINE)
    assert published["target"] == int(port)
    assert published["published"] == "8080"
    # A stop that waits for those who play would let nobody in until it is killed.
    assert service["stop_signal"] == "SIGTERM"
    # Where it may write belongs to it.
    uid, gid = service["user"].split(":")
    for place in service.get("tmpfs", []):
        assert place.endswith(f":uid={uid},gid={gid}")


def test_the_balancer_of_compose_is_nginx(compose: Message) -> None:
    services = compose["services"]
    check_balancer(services, "nginx", {NGINX_CONF: "/etc/nginx/nginx.conf"})
    # Its temporary files and its pid, as the image is built.
    places = {place.partition(":")[0] for place in services["balancer"]["tmpfs"]}
    assert places == {"/var/cache/nginx", "/run"}


def test_one_more_file_puts_haproxy_in_its_place(
    compose: Message, compose_haproxy: Message
) -> None:
    services = compose_haproxy["services"]
    check_balancer(services, "haproxy", {HAPROXY_CFG: "/usr/local/etc/haproxy/haproxy.cfg"})
    assert "tmpfs" not in services["balancer"]
    # And nothing else in another's.
    replaced = {**compose["services"], "balancer": services["balancer"]}
    assert {**compose, "services": replaced} == compose_haproxy


@pytest.mark.parametrize("balancer_of", ["compose", "compose_haproxy"])
def test_no_part_of_compose_can_hurt_its_machine(
    balancer_of: str, request: pytest.FixtureRequest
) -> None:
    services = request.getfixturevalue(balancer_of)["services"]
    assert set(services) == {"balancer", "bandsync-1", "bandsync-2", "redis"}
    image = dict(instructions())
    for name, service in services.items():
        user = service.get("user") or (image["USER"] if service["image"] == "bandsync" else "")
        assert int(user.partition(":")[0]) > 0, name
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        assert int(service["mem_limit"]) > 0
        assert not service.get("privileged")


KUBERNETES = DEPLOY / "kubernetes"
SECRETS = "REDIS_PASSWORD=hush\nADMIN_TOKEN=hush too\n"


def kustomization() -> Message:
    (document,) = yaml_documents(KUBERNETES / "kustomization.yaml")
    return document


def manifests() -> dict[tuple[str, str], Message]:
    """All of them, by kind and name, as the kustomization has them, names without their hashes."""
    ours = kustomization()
    found = {}
    for name in ours["resources"]:
        for document in yaml_documents(KUBERNETES / name):
            found[document["kind"], document["metadata"]["name"]] = document
    settings = (KUBERNETES / "settings.env").read_text()
    for kind, field, text in (("configMap", "data", settings), ("secret", "stringData", SECRETS)):
        (generated,) = ours[f"{kind}Generator"]
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        document = {
            "apiVersion": "v1",
            "kind": kind[0].upper() + kind[1:],
            "metadata": {"name": generated["name"], "labels": ours["generatorOptions"]["labels"]},
            field: dict(line.split("=", 1) for line in lines),
        }
        found[document["kind"], generated["name"]] = document
    return found


def test_the_kustomization_names_every_manifest() -> None:
    files = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert {*kustomization()["resources"], "kustomization.yaml"} == files


def test_the_kustomization_has_no_secret_and_needs_one() -> None:
    """A password that all the world knows is none; one that is forgotten stops the deployment."""
    assert not [
        kind for path in KUBERNETES.glob("*.yaml") for kind in kinds(path) if kind == "Secret"
    ]
    (generated,) = kustomization()["secretGenerator"]
    assert generated["envs"] == ["secrets.env"]
    assert (KUBERNETES / ".gitignore").read_text().split() == ["secrets.env"]
    assert "literals" not in generated
    (image,) = kustomization()["images"]
    # A tag that stays the same replaces no pods.
    assert image["newTag"] != "latest"
    container = manifests()["Deployment", "bandsync"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == image["name"]


def kinds(path: Path) -> list[str]:
    return [document["kind"] for document in yaml_documents(path)]


def test_kubectl_makes_of_it_what_is_read_here(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder, ignore=shutil.ignore_patterns("secrets.env"))
    made = [shutil.which("kubectl") or "", "kustomize", str(folder)]
    assert "secrets.env" in subprocess.run(made, capture_output=True, text=True, check=False).stderr
    (folder / "secrets.env").write_text(SECRETS)
    result = subprocess.run(made, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (tmp_path / "made.yaml").write_text(result.stdout)
    documents = yaml_documents(tmp_path / "made.yaml")
    names = {(each["kind"], each["metadata"]["name"]) for each in documents}
    bare = {(kind, re.sub(r"-[a-z0-9]{10}$", "", name)) for kind, name in names}
    assert bare == set(manifests())
    # Whoever names them names them with their hashes.
    (name,) = [name for kind, name in names if kind == "Secret"]
    stateful = next(each for each in documents if each["kind"] == "StatefulSet")
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        assert variable["valueFrom"]["secretKeyRef"]["name"] == name


@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_manifests_are_what_kubernetes_accepts(version: str) -> None:
    try:
        import kubernetes_validate
    except ImportError:
        missing(f"no kubernetes-validate: {PIP}")
    for document in manifests().values():
        kubernetes_validate.validate(document, version, strict=True)


def test_manifests_agree_with_each_other_and_with_the_server() -> None:
    found = manifests()
    deployment = found["Deployment", "bandsync"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(image_environment())
    for source in container["envFrom"]:
        ((kind, reference),) = source.items()
        key = {"configMapRef": ("ConfigMap", "data"), "secretRef": ("Secret", "stringData")}[kind]
        given |= found[key[0], reference["name"]][key[1]]
    assert {entry["name"] for entry in container["env"]} == {"SERVER_ID"}
    settings = settings_of(given | {"SERVER_ID": "bandsync-7d9c"})
    # A Service of the same namespace would otherwise be a setting: REDIS_PORT=tcp://10.0.0.1:6379.
    assert pod["enableServiceLinks"] is False

    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = settings.drain_timeout_ms / 1000
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + MARGIN_S
    assert container["readinessProbe"]["httpGet"]["path"] == "/api/health"
    # That of the liveness has to be good while it drains.
    assert container["livenessProbe"]["httpGet"]["path"] == "/api/storage/status"
    # Who hangs is not waited for as one who drains.
    assert container["livenessProbe"]["terminationGracePeriodSeconds"] < drain_s
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port}

    labels = deployment["template"]["metadata"]["labels"]
    for each in (
        deployment["selector"],
        found["PodDisruptionBudget", "bandsync"]["spec"]["selector"],
    ):
        assert each["matchLabels"] == labels
    service = found["Service", "bandsync"]["spec"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] in ports
    (rule,) = found["Ingress", "bandsync"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "bandsync", "port": {"name": "http"}}
    said = found["Ingress", "bandsync"]["metadata"]["annotations"]
    assert said["nginx.org/max-fails"] == "0"
    for wait in ("nginx.org/proxy-read-timeout", "nginx.ingress.kubernetes.io/proxy-read-timeout"):
        assert settings.ping_interval_ms / 1000 < int(said[wait].rstrip("s")) < CLIENTS_WAIT_S

    policy = found["NetworkPolicy", "bandsync-redis"]["spec"]
    ((rule,),) = [policy["ingress"]]
    assert rule["from"] == [{"podSelector": {"matchLabels": labels}}]

    redis = found["StatefulSet", "bandsync-redis"]["spec"]
    labels = redis["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    service = found["Service", "bandsync-redis"]["spec"]
    assert redis["selector"]["matchLabels"] == service["selector"] == labels
    assert settings.redis_host == "bandsync-redis" == redis["serviceName"]
    (container,) = redis["template"]["spec"]["containers"]
    assert rule["ports"] == [{"port": container["ports"][0]["name"]}]
    for variable in container["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference["key"] in found["Secret", reference["name"]]["stringData"]
    assert container["ports"][0]["containerPort"] == service["ports"][0]["port"]
    assert service["ports"][0]["port"] == settings.redis_port
    (claim,) = redis["volumeClaimTemplates"]
    (mount,) = container["volumeMounts"]
    assert claim["metadata"]["name"] == mount["name"]
    assert container["args"][container["args"].index("--dir") + 1] == mount["mountPath"]


class Ask:
    """A redis-cli, told where, and the password if there is one."""

    def __init__(self, port: str, password: str | None) -> None:
        self._port = port
        self._password = password

    def __call__(self, *question: str, password: str | None = None) -> tuple[bool, str]:
        """Whether that ended well, and what it printed."""
        given = password or self._password
        result = subprocess.run(
            [tool("redis-cli", "apt install redis-tools"), "-p", self._port, *question],
            env=os.environ | ({"REDISCLI_AUTH": given} if given else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        return result.returncode == 0, result.stdout

    def until(self, good: bool, *question: str) -> None:
        deadline = time.perf_counter() + PATIENCE_S
        while self(*question)[0] is not good:
            assert time.perf_counter() < deadline
            time.sleep(_POLL_S)


@contextmanager
def redis_as_told(arguments: list[str], folder: Path) -> Iterator[Ask]:
    """A real redis-server with these options, on a port and in a folder of the test."""
    options = [part.replace("$(REDIS_PASSWORD)", "hush") for part in arguments]
    options[options.index("--dir") + 1] = str(folder)
    port = str(free_port())
    binary = find_redis_server()
    assert binary is not None
    with process([binary, *options, "--port", port, "--bind", HOST], stdout=subprocess.DEVNULL):
        yield Ask(port, "hush" if "--requirepass" in options else None)


def redis_of_compose(compose: Message) -> tuple[list[str], list[str], int]:
    """Its options, what asks after its health, and the memory that its container has."""
    service = compose["services"]["redis"]
    program, *options = service["command"]
    assert program == "redis-server"
    assert [(each["source"], each["target"]) for each in service["volumes"]] == [
        ("redis-data", "/data")
    ]
    # The image's own folder, where it starts.
    return [*options, "--dir", "/data"], service["healthcheck"]["test"][1:], service["mem_limit"]


def redis_container() -> Message:
    (container,) = manifests()["StatefulSet", "bandsync-redis"]["spec"]["template"]["spec"][
        "containers"
    ]
    return container


def redis_of_the_manifests(compose: Message) -> tuple[list[str], list[str], int]:
    container = redis_container()
    memory = container["resources"]["limits"]["memory"]
    ping = container["readinessProbe"]["exec"]["command"]
    return container["args"], ping, int(memory.removesuffix("Mi")) << 20


@pytest.mark.parametrize("described", [redis_of_compose, redis_of_the_manifests])
def test_redis_starts_as_it_says(
    described: Any, tmp_path: Path, redis_binary: None, request: pytest.FixtureRequest
) -> None:
    """Its options are those of a real redis-server, and so is what asks after its health."""
    given = described is redis_of_compose and request.getfixturevalue("compose")
    arguments, (client, *ping), memory = described(given)
    assert client == "redis-cli"
    with redis_as_told(arguments, tmp_path) as ask:
        ask.until(True, *ping)
        assert "--requirepass" not in arguments or not ask(*ping, password="wrong")[0]

        def setting(name: str) -> str:
            return ask("config", "get", name)[1].split()[-1]

        assert setting("appendonly") == "yes"
        # It refuses before the kernel kills it; a rewrite of its file takes as much again.
        assert setting("maxmemory-policy") == "noeviction"
        assert 0 < int(setting("maxmemory")) <= int(memory) // 2


def test_a_redis_that_cannot_write_is_not_ready_and_not_killed(
    tmp_path: Path, redis_binary: None
) -> None:
    container = redis_container()
    ready, alive = (
        container[f"{kind}Probe"]["exec"]["command"][1:] for kind in ("readiness", "liveness")
    )
    folder = tmp_path / "data"
    folder.mkdir()
    with redis_as_told(container["args"], folder) as ask:
        ask.until(True, *ready)
        assert ask(*alive)[0]
        shutil.rmtree(folder)
        ask("bgsave")
        ask.until(False, *ready)
        assert ask(*alive)[0]
    assert not ask(*alive)[0]


def test_systemd_reads_its_unit(tmp_path: Path) -> None:
    program = tool("systemd-analyze", "apt install systemd")
    text = changed(
        (DEPLOY / "bandsync.service").read_text(),
        (
            "ExecStart=/opt/bandsync/.venv/bin/python /opt/bandsync/scripts/serve.py",
            f"ExecStart={sys.executable} {SCRIPT}",
        ),
    )
    unit = tmp_path / "bandsync.service"
    unit.write_text(text)
    result = subprocess.run([program, "verify", unit], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    service = configparser.RawConfigParser(strict=False)
    service.read_string(text)
    stop_s = float(service["Service"]["TimeoutStopSec"])
    assert stop_s >= Settings().drain_timeout_ms / 1000 + MARGIN_S
    # Workers end at once while there is no Redis: systemd must not give up on them.
    assert service["Unit"]["StartLimitIntervalSec"] == "0"
    # From 0 to 100, where a unit that says nothing has more than 90.
    confined = [program, "security", "--offline=yes", "--threshold=20", "--no-pager", unit]
    result = subprocess.run(confined, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
