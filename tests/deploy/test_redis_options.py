"""A real redis-server with the options and probes of each deployment."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.testbed.redis_server import HOST, find_redis_server, free_port
from tests.support.deployments import POLL_S, manifests, process, tool
from tests.support.servers import PATIENCE_S, Message


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
            time.sleep(POLL_S)


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
