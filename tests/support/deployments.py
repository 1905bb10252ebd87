"""The files of `scripts/deploy`, and the tools that read them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bandsync.settings import OPTIONS, Settings, parse
from scripts.testbed.redis_server import reaper_of
from tests.support.servers import Message
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

POLL_S = 0.01


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


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def yaml_documents(path: Path) -> list[Message]:
    try:
        import yaml
    except ImportError:
        missing(f"no PyYAML: {PIP}")
    return list(yaml.safe_load_all(path.read_text()))


def settings_of(variables: dict[str, str]) -> Settings:
    """The settings that a server parses from these variables; unknown names fail."""
    assert set(variables) <= {option.name for option in OPTIONS}
    return parse(variables)


def seconds(text: str) -> float:
    """The seconds of a compose duration such as ``1m30s``."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0}
    parts = re.findall(r"(\d+)(ms|s|m)", text)
    assert parts, text
    return sum(int(number) * units[unit] for number, unit in parts)


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines]


def image_environment() -> dict[str, str]:
    text = next(text for name, text in instructions() if name == "ENV")
    pairs = dict(pair.split("=", 1) for pair in text.split())
    return {name: text for name, text in pairs.items() if not name.startswith(("PATH", "PYTHON"))}


def composed(*files: str) -> Message:
    """These compose files as Docker Compose understands them."""
    program = tool("docker-compose", PIP)
    named = [part for file in files for part in ("--file", DEPLOY / file)]
    result = subprocess.run(
        [program, "--env-file", os.devnull, *named, "config", "--format", "json"],
        # The environment of the tests may contain other settings.
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    document: Message = json.loads(result.stdout)
    return document


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
