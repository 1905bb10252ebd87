"""Real Redis Sentinels, with the master and the replicas that they monitor."""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scripts.testbed.redis_server import (
    HOST,
    INSTALL,
    RedisError,
    RedisServer,
    find_redis_server,
    free_port,
    reaper_of,
)

MASTER = "band"
PATIENCE_S = 20.0
_POLL_S = 0.01
_ID = [letter * 40 for letter in "abc"]


def wait_until(wanted: Callable[[], bool], what: str) -> None:
    """Poll until ``wanted`` returns true. May be called from any thread.

    Args:
        wanted: the condition.
        what: its name in the error.

    Raises:
        RedisError: not within `PATIENCE_S`.
    """
    deadline = time.perf_counter() + PATIENCE_S
    while not wanted():
        if time.perf_counter() > deadline:
            raise RedisError(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(_POLL_S)


class SentinelProcess:
    """One Sentinel process, configured with its peers and replicas: it need not discover them.

    Args:
        ports: of all Sentinels.
        number: index of this Sentinel in ``ports``.
        servers: ports of the master and of its replicas.
        down_after_ms: silence after which the master is subjectively down.
        password: of the Sentinels; None without one.
        user: the Redis user for its connections to the servers; None for the default user.

    Attributes:
        port: of this Sentinel.
    """

    def __init__(
        self,
        ports: Sequence[int],
        number: int,
        servers: Sequence[int],
        *,
        down_after_ms: int,
        password: str | None,
        user: str | None,
    ) -> None:
        binary = find_redis_server()
        if binary is None:
            raise RedisError(INSTALL)
        self.port = ports[number]
        self._password = password
        self._directory = Path(tempfile.mkdtemp(prefix="bandsync-sentinel-"))
        config = self._directory / "sentinel.conf"
        lines = [
            f"bind {HOST}",
            f"port {self.port}",
            f"dir {self._directory}",
            f"sentinel myid {_ID[number]}",
            f"sentinel monitor {MASTER} {HOST} {servers[0]} 2",
            f"sentinel down-after-milliseconds {MASTER} {down_after_ms}",
            f"sentinel failover-timeout {MASTER} 10000",
            *(f"sentinel known-replica {MASTER} {HOST} {port}" for port in servers[1:]),
            *(
                f"sentinel known-sentinel {MASTER} {HOST} {port} {id_}"
                for port, id_ in zip(ports, _ID, strict=True)
                if port != self.port
            ),
        ]
        if user is not None:
            lines += [f"sentinel auth-user {MASTER} {user}", f"sentinel auth-pass {MASTER} guard"]
        if password is not None:
            lines += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        config.write_text("\n".join([*lines, ""]))
        self._log = (self._directory / "log").open("ab")
        self._process = subprocess.Popen(  # noqa: S603  # our own arguments
            [binary, config, "--sentinel"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._reaper = reaper_of(self._process.pid)

    def cli(self, *command: str | int) -> Any:  # noqa: ANN401  # any Redis reply
        """Send a command; return the reply with texts decoded."""
        with redis.Redis(
            host=HOST,
            port=self.port,
            password=self._password,
            decode_responses=True,
            socket_timeout=PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            return client.execute_command(*command)

    def state(self) -> dict[str, Any]:
        """The Sentinel's view of the master; empty while the Sentinel does not answer."""
        try:
            state: dict[str, Any] = self.cli("SENTINEL", "MASTER", MASTER)
        except redis.RedisError:
            return {}
        return state

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Kill the process and remove its files."""
        for process in (self._reaper, self._process):
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class SentinelSetup:
    """A master, replicas and three Sentinels that monitor them. A context manager.

    Args:
        replicas: number of replicas.
        down_after_ms: silence after which a Sentinel holds the master for down.
        password: of the Sentinels.
        user: the Redis user for the Sentinels' connections to the servers.
        config: of the servers, as for a `RedisServer`.

    Attributes:
        servers: the first is the master at the start.
        sentinels: the Sentinel processes.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        down_after_ms: int = 500,
        password: str | None = None,
        user: str | None = None,
        **config: Any,  # noqa: ANN401  # the arguments of `RedisServer`
    ) -> None:
        # Send a replica its first copy without delay.
        config = {"repl_diskless_sync_delay": "0"} | config
        self.servers = [RedisServer(**config) for _ in range(1 + replicas)]
        self.sentinels: list[SentinelProcess] = []
        self._down_after_ms = down_after_ms
        self._password = password
        self._user = user

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def hosts(self) -> str:
        """The value of `REDIS_SENTINELS`."""
        return ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)

    def settings(self) -> dict[str, str]:
        """The settings of a BandSync server for these Sentinels."""
        return {"redis_sentinels": self.hosts, "redis_sentinel_master": MASTER}

    @property
    def master(self) -> RedisServer:
        """The master that the first Sentinel reports."""
        return self._by_port(int(self.sentinels[0].state()["port"]))

    def others(self, server: RedisServer) -> list[RedisServer]:
        """All servers but this one."""
        return [each for each in self.servers if each is not server]

    def fail_over(self) -> None:
        """Make the first Sentinel start a failover; return at once."""
        self.sentinels[0].cli("SENTINEL", "FAILOVER", MASTER)

    def wait_for_failover(self, old: RedisServer) -> RedisServer:
        """Wait until all Sentinels agree on a new master; return it."""
        wait_until(
            lambda: all(
                state and int(state["port"]) != old.port and state["flags"] == "master"
                for state in (sentinel.state() for sentinel in self.sentinels)
            ),
            "a new master",
        )
        return self.master

    def wait_for_replicas(self, master: RedisServer, servers: Sequence[RedisServer]) -> None:
        """Wait until these servers replicate from ``master``."""
        for server in servers:
            wait_until(lambda: _follows(server, master), "a replica in step")  # noqa: B023  # called before the next turn

    def replicate(self, server: RedisServer, port: int) -> None:
        """Make a server a replica of the one at this port."""
        server.cli("REPLICAOF", HOST, port)

    def _start(self) -> None:
        master, *replicas = self.servers
        for server in self.servers:
            server.start()
            if self._user is not None:
                server.cli("ACL", "SETUSER", self._user, "on", ">guard", "~*", "&*", "+@all")
        for replica in replicas:
            self.replicate(replica, master.port)
        self.wait_for_replicas(master, replicas)
        ports = [free_port() for _ in _ID]
        for number in range(len(ports)):
            self.sentinels.append(
                SentinelProcess(
                    ports,
                    number,
                    [server.port for server in self.servers],
                    down_after_ms=self._down_after_ms,
                    password=self._password,
                    user=self._user,
                )
            )
        wanted = {"num-other-sentinels": 2, "num-slaves": len(replicas), "flags": "master"}
        wait_until(
            lambda: all(
                state and all(str(state[name]) == str(value) for name, value in wanted.items())
                for state in (sentinel.state() for sentinel in self.sentinels)
            ),
            "Sentinels that all know each other",
        )
        # A Sentinel promotes no replica without recent INFO of its own from it.
        wait_until(
            lambda: all(map(self._reports_all_replicas, self.sentinels)),
            "recent INFO of all replicas",
        )

    def _reports_all_replicas(self, sentinel: SentinelProcess) -> bool:
        replicas = sentinel.cli("SENTINEL", "REPLICAS", MASTER)
        return all(
            replica["flags"] == "slave" and replica["master-link-status"] == "ok"
            for replica in replicas
        )

    def _by_port(self, port: int) -> RedisServer:
        return next(server for server in self.servers if server.port == port)

    def _close(self) -> None:
        for sentinel in self.sentinels:
            sentinel.close()
        for server in self.servers:
            server.close()


def _follows(replica: RedisServer, master: RedisServer) -> bool:
    try:
        role = replica.cli("ROLE")
    except redis.RedisError:
        # A server closes all connections when its master changes.
        return False
    return bool(role[0] == "slave" and int(role[2]) == master.port and role[3] == "connected")
