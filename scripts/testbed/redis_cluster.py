"""A real Redis Cluster of processes, with nodes to kill and slots to move."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError, ResponseError

from scripts.testbed.redis_sentinels import wait_until
from scripts.testbed.redis_server import HOST, PORTS, RedisServer, free_port, is_free


class RedisCluster:
    """Masters that share the slots evenly, and their replicas. A context manager.

    Args:
        masters: number of masters.
        replicas: number of replicas per master.
        last: number of slots of the last master, if not its even share.
        config: of each node, as for a `RedisServer`.

    Attributes:
        masters: the masters at the start.
        replicas: the replicas at the start; replica n follows master n modulo the number of
            masters.
        password: of the default user; None without one.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 0,
        *,
        last: int | None = None,
        **config: Any,  # noqa: ANN401  # the arguments of `RedisServer`
    ) -> None:
        self._last = last
        self._config = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": "1000",
            # Promote a replica no matter how long its link to the master was down.
            "cluster_replica_validity_factor": "0",
            "repl_diskless_sync_delay": "0",
        } | config
        self._hanging: list[RedisServer] = []
        self.password: str | None = config.get("password")
        self.masters = [self._make() for _ in range(masters)]
        self.replicas = [self._make() for _ in range(masters * replicas)]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def nodes(self) -> list[RedisServer]:
        """All masters and replicas."""
        return [*self.masters, *self.replicas]

    @property
    def _running(self) -> list[RedisServer]:
        return [node for node in self.nodes if node.running and node not in self._hanging]

    def settings(self) -> dict[str, str | bool]:
        """The settings of a BandSync server for this Cluster."""
        return {"redis_url": self.masters[0].url(), "redis_cluster": True}

    def url(self) -> str:
        """The value of `REDIS_URL`: the first master."""
        return self.masters[0].url()

    def owner(self, key: str) -> RedisServer:
        """The master that owns a key's slot, in the view of the running nodes."""
        slot = key_slot(key.encode())
        seen = self._running[0]
        for first, last, (_, port, *_), *_ in seen.cli("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"slot {slot} has no owner")

    def flush(self) -> None:
        """Delete all keys."""
        for node in self.masters:
            node.cli("FLUSHALL")

    def add_master(self) -> RedisServer:
        """Start another master, which owns no slots yet."""
        node = self._make()
        node.start()
        self.masters.append(node)
        self._join_nodes([node])
        self.wait_until_whole()
        return node

    def open_slot(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Mark the slot as migrating on ``source`` and importing on ``target``."""
        target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(source))
        source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(target))

    def move_keys(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Migrate all keys of the slot."""
        while keys := source.cli("CLUSTER", "GETKEYSINSLOT", slot, 100):
            auth = () if self.password is None else ("AUTH", self.password)
            source.cli("MIGRATE", HOST, target.port, "", 0, 5000, *auth, "KEYS", *keys)

    def close_slot(self, slot: int, target: RedisServer, *others: RedisServer) -> None:
        """Assign the slot to ``target`` on all given nodes, on ``target`` first."""
        for node in (target, *others):
            try:
                node.cli("CLUSTER", "SETSLOT", slot, "NODE", _id(target))
            except ResponseError as error:
                # A master that gives away its last slot becomes a replica of the slot's new owner.
                if "only with masters" not in str(error):
                    raise

    def move_slots(self, slots: Iterable[int], source: RedisServer, target: RedisServer) -> None:
        """Migrate the slots one after the other, as ``redis-cli --cluster reshard`` does."""
        others = [node for node in self.masters if node not in (source, target)]
        for slot in slots:
            self.open_slot(slot, source, target)
            self.move_keys(slot, source, target)
            self.close_slot(slot, target, source, *others)

    def wait_until_whole(self) -> None:
        """Wait until all running nodes report state ok and the same slot owners."""
        wait_until(self._is_whole, "a whole Cluster")

    def hang(self, node: RedisServer) -> None:
        """Send SIGSTOP. From now on this class sends the node no commands."""
        node.stop()
        self._hanging.append(node)

    def wait_for_takeover(self, replica: RedisServer) -> None:
        """Wait until the replica is a master and the Cluster is whole again."""
        wait_until(lambda: replica.cli("ROLE")[0] == "master", "the promotion of a replica")
        self.wait_until_whole()

    def close(self) -> None:
        """Kill all nodes and remove their files."""
        for node in self.nodes:
            node.close()

    def _make(self) -> RedisServer:
        node = RedisServer(**self._config)
        node.port = _free_port()
        return node

    def _start(self) -> None:
        for node in self.nodes:
            node.start()
        count = len(self.masters)
        starts = [round(number * REDIS_CLUSTER_HASH_SLOTS / count) for number in range(count)]
        if self._last is not None:
            starts[-1] = REDIS_CLUSTER_HASH_SLOTS - self._last
        ends = [*starts[1:], REDIS_CLUSTER_HASH_SLOTS]
        for number, node in enumerate(self.masters):
            node.cli("CLUSTER", "ADDSLOTS", *range(starts[number], ends[number]))
            node.cli("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        self._join_nodes(self.nodes[1:])
        for number, replica in enumerate(self.replicas):
            replica.cli("CLUSTER", "REPLICATE", _id(self.masters[number % len(self.masters)]))
        self.wait_until_whole()
        for replica in self.replicas:
            wait_until(lambda: replica.cli("ROLE")[3] == "connected", "a replica in step")  # noqa: B023  # called before the next turn

    def _join_nodes(self, nodes: Sequence[RedisServer]) -> None:
        for node in nodes:
            node.cli("CLUSTER", "MEET", HOST, self.masters[0].port)
        wait_until(self._nodes_joined, "Cluster nodes that all know each other")

    def _nodes_joined(self) -> bool:
        return all(
            _info(node)["cluster_known_nodes"] == str(len(self.nodes))
            and "handshake" not in node.cli("CLUSTER", "NODES")
            for node in self._running
        )

    def _is_whole(self) -> bool:
        running = self._running
        views = set()
        try:
            for node in running:
                if _info(node)["cluster_state"] != "ok":
                    return False
                views.add(
                    tuple(
                        sorted(
                            (first, last, port)
                            for first, last, (_, port, *_), *_ in node.cli("CLUSTER", "SLOTS")
                        )
                    )
                )
        except RedisError:
            return False
        return len(views) == 1 and all(
            port in {node.port for node in running} for _, _, port in next(iter(views))
        )


def _free_port() -> int:
    """A free port whose cluster bus port, 10 000 higher, is free and not ephemeral either."""
    while (port := free_port()) + 10_000 not in PORTS or not is_free(port + 10_000):
        pass
    return port


def _id(node: RedisServer) -> str:
    return str(node.cli("CLUSTER", "MYID"))


def _info(node: RedisServer) -> dict[str, str]:
    lines = node.cli("CLUSTER", "INFO")
    if isinstance(lines, dict):
        return lines
    return dict(line.split(":", 1) for line in lines.split())
