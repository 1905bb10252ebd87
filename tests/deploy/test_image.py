"""The Dockerfile and the systemd unit."""

import configparser
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from bandsync.settings import Settings
from scripts.testbed.redis_server import HOST, free_port
from tests.support.deployments import (
    DEPLOY,
    MARGIN_S,
    PIP,
    ROOT,
    UPGRADE,
    changed,
    image_environment,
    instructions,
    process,
    settings_of,
    tool,
)
from tests.support.servers import PATIENCE_S
from tests.test_serve import SCRIPT, environment


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    result = subprocess.run(
        [tool("hadolint", PIP), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.slow
def test_the_image_has_what_it_runs(tmp_path: Path) -> None:
    """Lay out the files that the Dockerfile copies; run its commands unchanged."""
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
