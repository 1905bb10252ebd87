"""The wheel: it has every file of the package, and serves from an empty environment."""

import json
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trio
from websockets.sync.client import connect

from bandsync import __version__
from scripts.testbed.redis_server import RedisServer
from tests.test_serve import PATIENCE_S, environment

ROOT = Path(__file__).parent.parent
# The installed script, and the module.
ENTRIES = [["bandsync"], ["python", "-m", "bandsync"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository, built as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run(command, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has this wheel and its dependencies only."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    # The dependencies are those installed for the tests. Python reads no `.pth` files in folders
    # that come from one, so that an editable installation of this repository is out of reach.
    installed = [str(Path(trio.__file__).parents[1]), *site.getsitepackages()]
    (packages,) = folder.glob("lib/python*/site-packages")
    packages.joinpath("dependencies.pth").write_text("\n".join(installed))
    return folder / "bin"


def command_of(programs: Path, entry: list[str], *arguments: str) -> list[str]:
    program, *rest = entry
    return [str(programs / program), *rest, *arguments]


@contextmanager
def serving(
    command: list[str], folder: Path, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server started by this command in this folder, and its address; it drains at the end."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def join(url: str) -> str:
    """Join a session; return the id of the server."""
    with connect(f"{url.replace('http', 'ws')}/ws/song") as client:
        welcome = json.loads(client.recv(PATIENCE_S))
        client.send('{"type":"join_session","requestId":"1"}')
        while (answer := json.loads(client.recv(PATIENCE_S)))["type"] != "ack":
            assert answer["type"] != "error", answer
        return str(welcome["serverId"])


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bandsync").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in packed if name.startswith("bandsync/")} == files
    suffixes = {Path(name).suffix for name in files}
    assert {".py", ".lua", ".html", ".css", ".js", ".png", ".svg", ".webmanifest"} <= suffixes
    assert "bandsync/py.typed" in files
    metadata = {name for name in packed if not name.startswith("bandsync/")}
    assert {name.partition("/")[0] for name in metadata} == {f"bandsync-{__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in metadata)


@pytest.mark.parametrize("entry", ENTRIES)
def test_installed_program_serves_from_any_folder(
    programs: Path, tmp_path: Path, entry: list[str]
) -> None:
    with serving(command_of(programs, entry, "--port=0"), tmp_path) as (_, url):
        page = httpx.get(f"{url}/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert httpx.get(f"{url}/api/health").json()["version"] == __version__
        join(url)
    assert list(tmp_path.iterdir()) == []


def test_installed_program_is_not_the_repository(programs: Path, tmp_path: Path) -> None:
    command = [str(programs / "python"), "-c", "import bandsync; print(bandsync.__file__)"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).is_relative_to(programs.parent)


@pytest.mark.parametrize("entry", ENTRIES)
def test_installed_program_names_itself(programs: Path, tmp_path: Path, entry: list[str]) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_of(programs, entry, *arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    assert run("--help").stdout.startswith("usage: bandsync [--help]")
    assert run("--version").stdout == f"BandSync {__version__}\n"
    wrong = run("--port=high")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("bandsync: these settings cannot be used:\n  PORT='high'")
    impossible = run("--port=0", "--host=203.0.113.1")
    assert impossible.returncode == 1
    assert impossible.stderr.startswith("bandsync: HOST='203.0.113.1'")


@pytest.mark.parametrize("entry", ENTRIES)
def test_installed_program_starts_workers(
    programs: Path, tmp_path: Path, shared_redis: RedisServer, entry: list[str]
) -> None:
    # The script has not imported this folder; its workers must not either.
    if entry == ["bandsync"]:
        (tmp_path / "bandsync").mkdir()
        (tmp_path / "bandsync" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    command = command_of(programs, entry, "--port=0", "--workers=2", "--server-id=stage")
    variables = {"REDIS_ENABLED": "true", "REDIS_URL": shared_redis.url()}
    with serving(command, tmp_path, **variables) as (process, url):
        assert join(url) in {"stage-1", "stage-2"}
        commands = [
            (Path("/proc") / pid / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            for pid in children_of(process.pid)
        ]
    # The end of a worker's command, as in a list of processes.
    assert sorted(command[-4:] for command in commands) == [
        [b"-m", b"bandsync", b"--worker", name] for name in (b"stage-1", b"stage-2")
    ]


def children_of(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task")
    return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]
