"""The command line in this process: sources of settings, exit codes, signals."""

import gc
import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import httpx
import pytest

from bandsync import __main__, __version__
from bandsync.command_line import load_settings, run
from bandsync.settings import SettingsError
from scripts.testbed.redis_server import HOST, free_port
from tests.support.servers import PATIENCE_S

MEMORY = ["--redis-enabled", "false", "--log-level", "error"]


@pytest.fixture(autouse=True)
def _process_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores everything that a program sets for its whole process."""
    monkeypatch.chdir(tmp_path)
    limits, thresholds = resource.getrlimit(resource.RLIMIT_NOFILE), gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_flags_override_the_environment_and_it_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MAX_MEMBERS=2\nTICK_INTERVAL_MS=70\nSERVER_ID=file\n")
    monkeypatch.setenv("MAX_MEMBERS", "3")
    monkeypatch.setenv("TICK_INTERVAL_MS", "")
    monkeypatch.setenv("SERVER_ID", "environment")
    settings = load_settings("bandsync", ["--server-id", "flag"])
    assert (settings.server_id, settings.max_members) == ("flag", 3)
    # An empty variable does not hide the file.
    assert settings.tick_interval_ms == 70


def test_unusable_settings_return_2_with_all_problems(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--port", "x", "--leadership", "none"]
    assert run("bandsync", arguments, command=[]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bandsync: these settings cannot be used:\n")
    assert "PORT='x'" in error
    assert "LEADERSHIP='none'" in error
    with pytest.raises(SettingsError):
        load_settings("bandsync", arguments)


def test_port_in_use_returns_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert run("bandsync", ["--port", str(port), *MEMORY], command=[]) == 1
    assert f"PORT={port}: cannot listen there" in capsys.readouterr().err


def test_sigterm_drains_and_returns_0(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()

    def terminate() -> None:
        for _ in range(1000):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://{HOST}:{port}/api/health", timeout=PATIENCE_S).is_success:
                    break
        os.kill(os.getpid(), signal.SIGTERM)

    # The signal must not end this process before the server handles it.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = Thread(target=terminate)
    thread.start()
    try:
        assert run("bandsync", ["--port", str(port), *MEMORY], command=[]) == 0
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"BandSync listening on http://{HOST}:{port}"
    assert lines[1].startswith("Storage: memory")


def test_workers_without_redis_return_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--port", "0", "--workers", "2", "--redis-url", f"redis://{HOST}:{free_port()}"]
    command = [sys.executable, "-m", "bandsync"]
    timeouts = ["--redis-connect-timeout", "200", "--redis-health-timeout-ms", "200"]
    assert run("bandsync", [*arguments, *timeouts], command=command) == 1
    assert "WORKERS=2 share their sessions: Redis cannot be used" in capsys.readouterr().err


def test_low_limit_of_file_descriptors_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    with socket.create_server((HOST, 0)) as taken:
        arguments = ["--port", str(taken.getsockname()[1]), *MEMORY]
        assert run("bandsync", arguments, command=[]) == 1
    assert raised == [(1024, 1024)]
    assert "only 1024 file descriptors for MAX_CONNECTIONS=10000" in capsys.readouterr().err


@pytest.mark.parametrize("as_module", [False, True])
def test_version_names_the_program(
    as_module: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bandsync", "--version"])
    with pytest.raises(SystemExit) as ended:
        if as_module:
            monkeypatch.delitem(sys.modules, "bandsync.__main__")
            runpy.run_module("bandsync", run_name="__main__")
        else:
            __main__.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"BandSync {__version__}\n"
