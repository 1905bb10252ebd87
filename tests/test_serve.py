"""`scripts/serve.py` as a process: flags, settings, exit codes, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bandsync.settings import OPTIONS

SCRIPT = Path(__file__).parent.parent / "scripts" / "serve.py"
PATIENCE_S = 30
REQUIRED = ["--redis-enabled=true", "--redis-required=true"]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, without settings of BandSync and with Redis disabled."""
    ours = {option.name for option in OPTIONS}
    plain = {name: text for name, text in os.environ.items() if name not in ours}
    return {"REDIS_ENABLED": "false"} | plain | variables


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@contextmanager
def serving(
    tmp_path: Path, *arguments: str, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A running server, and the two lines it printed."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--port", "0", *arguments],
        cwd=tmp_path,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, [process.stdout.readline().strip() for _ in range(2)]
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def test_help_names_every_setting(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    words = " ".join(result.stdout.split())
    for option in OPTIONS:
        assert f"--{option.name.lower().replace('_', '-')} VALUE" in words
        assert option.meaning.split(";")[0].split(",")[0] in words


def test_unknown_flag_is_named_without_the_list_of_flags(tmp_path: Path) -> None:
    result = run(tmp_path, "--prot", "3001")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "usage: serve.py [--help] [--version] [--SETTING VALUE ...]",
        "serve.py: error: unrecognized arguments: --prot 3001",
    ]


def test_flags_override_environment_and_environment_overrides_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "SERVER_ID=file\nMAX_MEMBERS=3\nLOG_FORMAT=json\nHOST=127.0.0.1\n"
    )
    with serving(
        tmp_path, "--server-id", "flag", SERVER_ID="environment", MAX_MEMBERS="4", LOG_FORMAT=""
    ) as (process, lines):
        url = lines[0].split()[-1].replace("http", "ws")
        with connect(f"{url}/ws") as client:
            welcome = json.loads(client.recv(PATIENCE_S))
        assert (welcome["serverId"], welcome["limits"]["maxMembers"]) == ("flag", 4)
        process.terminate()
        _, logs = process.communicate(timeout=PATIENCE_S)
        events = [json.loads(line) for line in logs.splitlines()]
        assert [event["event"] for event in events] == [
            "server.started",
            "server.draining",
            "server.stopped",
        ]


def test_server_without_redis_prints_that_it_uses_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, lines):
        assert lines[0].startswith("BandSync listening on http://127.0.0.1:")
        assert lines[1].startswith("Storage: memory (")


def test_announced_line_is_one_write(tmp_path: Path) -> None:
    """Lines stay whole also without buffering and with the log in the same file."""
    # In packet mode each read returns one write: pipe(2).
    reading, writing = os.pipe2(os.O_DIRECT)
    with (
        open(reading, "rb", buffering=0) as written,
        subprocess.Popen(
            [sys.executable, SCRIPT, "--port", "0"],
            cwd=tmp_path,
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=writing,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        os.close(writing)
        try:
            first = written.read(4096)
        finally:
            process.kill()
    assert first.startswith(b"BandSync listening on http://127.0.0.1:")
    assert first.endswith(b"\n")


def test_unusable_settings_exit_with_2_and_all_problems(tmp_path: Path) -> None:
    result = run(tmp_path, "--port", "high", MAX_MEMBERS="none", TLS_KEY="key.pem")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "serve.py: these settings cannot be used:",
        "  PORT='high': must be a whole number from 0 to 65535",
        "  MAX_MEMBERS='none': must be a whole number from 1 to 1000",
        "  TLS_CERT='': must name a file when TLS_KEY does",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "203.0.113.1"], "HOST='203.0.113.1'"),
        (["--host", "no such host"], "HOST='no such host'"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "TLS_CERT='a.pem'"),
        (["--redis-url", "redis://a/b", "--redis-enabled", "true"], "REDIS_URL=(not shown)"),
        (
            [*REQUIRED, "--redis-port=1", "--redis-max-retries=0"],
            "REDIS_REQUIRED=true: Redis cannot be used: refused",
        ),
    ],
)
def test_settings_impossible_on_this_machine_exit_with_1(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    result = run(tmp_path, "--port", "0", *arguments)
    assert result.returncode == 1
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_port_in_use_exits_with_1(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, lines):
        port = lines[0].rpartition(":")[2]
        result = run(tmp_path, "--port", port)
    assert result.returncode == 1
    assert f"PORT={port}" in result.stderr
    assert "in use" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_begins_the_drain(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as (process, lines):
        url = lines[0].split()[-1].replace("http", "ws")
        with connect(f"{url}/ws/song") as client:
            client.send('{"type":"join_session","requestId":"1"}')
            while json.loads(client.recv(PATIENCE_S))["type"] != "ack":
                pass
            process.send_signal(number)
            seen = []
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    seen.append(json.loads(client.recv(PATIENCE_S)))
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        (draining,) = [message for message in seen if message["type"] == "server_draining"]
        assert draining["reconnectInMs"] >= 0
        assert process.wait(PATIENCE_S) == 0


def test_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout-ms", "60000") as (process, lines):
        url = lines[0].split()[-1].replace("http", "ws")
        # A client that does not read cannot answer the close frame: the drain waits for it.
        with connect(f"{url}/ws/song", max_queue=1) as client:
            client.recv(PATIENCE_S)
            process.terminate()
            while json.loads(client.recv(PATIENCE_S))["type"] != "server_draining":
                pass
            process.terminate()
            assert process.wait(PATIENCE_S) == 0


def test_server_recovers_when_file_descriptors_are_free_again(tmp_path: Path) -> None:
    command = f'ulimit -n 40; exec "{sys.executable}" "{SCRIPT}" --port 0 --max-connections 1000'
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=environment(LOG_FORMAT="json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        assert "file descriptors" in process.stderr.readline()
        sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        while "accept.failed" not in process.stderr.readline():
            pass
        for sock in sockets:
            sock.close()
        with connect(f"ws://127.0.0.1:{port}/ws") as client:
            assert json.loads(client.recv(PATIENCE_S))["type"] == "welcome"
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def test_server_survives_a_broken_log_pipe(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, lines):
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        url = lines[0].split()[-1].replace("http", "ws")
        with connect(f"{url}/ws/song") as client:
            for type_ in ("join_session", "play", "leave_session", "join_session"):
                client.send(json.dumps({"type": type_, "requestId": type_}))
                while json.loads(client.recv(PATIENCE_S)).get("requestId") != type_:
                    pass
        assert process.poll() is None


def test_help_names_the_script(tmp_path: Path) -> None:
    assert run(tmp_path, "--help").stdout.startswith("usage: serve.py [--help]")
