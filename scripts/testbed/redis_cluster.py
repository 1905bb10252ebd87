"""A real Redis Cluster: nodes that tests may kill, and slots they may move."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError, ResponseError

from scripts.testbed.redis_sentinels import wait_until
from scripts.testbed.redis_server import HOST, PORTS, RedisServer, free_port, is_free


class RedisCluster:
    """Masters that share the slots evenly, and replicas, from start to end.

    Args:
        replicas: how many each master has.
        last: how many slots the last master has, if not its share.
        config: of the nodes, as for a `RedisServer`.

    Attributes:
        masters: as they were at the start.
        replicas: the same; replica n is that of master n modulo the number of masters.
    """

    def __init__(
        self, masters: int = 3, replicas: int = 0, *, last: int | None = None, **config: Any
    ) -> None:
        self._last = last
        self._config = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": "1000",
            # A replica is promoted however long it did not hear from its master.
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
        return [*self.masters, *self.replicas]

    @property
    def _running(self) -> list[RedisServer]:
        return [node for node in self.nodes if node.running and node not in self._hanging]

    def settings(self) -> dict[str, Any]:
        """For a server of ours."""
        return {"redis_url": self.masters[0].url(), "redis_cluster": True}

    def url(self) -> str:
        return self.masters[0].url()

    def owner(self, key: str) -> RedisServer:
        """Who has the slot of a key, as the running nodes see it."""
        slot = key_slot(key.encode())
        seen = self._running[0]
        for first, last, (_, port, *_), *_ in seen.cli("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"slot {slot} has no owner")

    def flush(self) -> None:
        for node in self.masters:
            node.cli("FLUSHALL")

    def add_master(self) -> RedisServer:
        """A node without slots."""
        node = self._make()
        node.start()
        self.masters.append(node)
        self._meet([node])
        self.wait_until_whole()
        return node

    def open_slot(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Begin to hand it over."""
        target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(source))
        source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(target))

    def move_keys(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Hand over its keys."""
        while keys := source.cli("CLUSTER", "GETKEYSINSLOT", slot, 100):
            auth = () if self.password is None else ("AUTH", self.password)
            source.cli("MIGRATE", HOST, target.port, "", 0, 5000, *auth, "KEYS", *keys)

    def close_slot(self, slot: int, target: RedisServer, *others: RedisServer) -> None:
        """Have everybody know who has it, the new one first."""
        for node in (target, *others):
            try:
                node.cli("CLUSTER", "SETSLOT", slot, "NODE", _id(target))
            except ResponseError as error:
                # Whoever gives its last slot away becomes a replica of the new one.
                if "only with masters" not in str(error):
                    raise

    def move_slots(self, slots: Iterable[int], source: RedisServer, target: RedisServer) -> None:
        """Hand them over one after the other, as ``redis-cli --cluster reshard`` does."""
        others = [node for node in self.masters if node not in (source, target)]
        for slot in slots:
            self.open_slot(slot, source, target)
            self.move_keys(slot, source, target)
            self.close_slot(slot, target, source, *others)

    def wait_until_whole(self) -> None:
        """Until all that run agree on who has which slot, and that all is well."""
        wait_until(self._whole, "a whole Cluster")

    def hang(self, node: RedisServer) -> None:
        """SIGSTOP; it is not asked any more."""
        node.stop()
        self._hanging.append(node)

    def wait_for_takeover(self, replica: RedisServer) -> None:
        """Until it is a master, and all is well again."""
        wait_until(lambda: replica.cli("ROLE")[0] == "master", "a replica that takes over")
        self.wait_until_whole()

    def close(self) -> None:
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
        self._meet(self.nodes[1:])
        for number, replica in enumerate(self.replicas):
            replica.cli("CLUSTER", "REPLICATE", _id(self.masters[number % len(self.masters)]))
        self.wait_until_whole()
        for replica in self.replicas:
            wait_until(lambda: replica.cli("ROLE")[3] == "connected", "a replica in step")  # noqa: B023

    def _meet(self, nodes: Sequence[RedisServer]) -> None:
        for node in nodes:
            node.cli("CLUSTER", "MEET", HOST, self.masters[0].port)
        wait_until(self._acquainted, "nodes that know each other")

    def _acquainted(self) -> bool:
        return all(
            _info(node)["cluster_known_nodes"] == str(len(self.nodes))
            and "handshake" not in node.cli("CLUSTER", "NODES")
            for node in self._running
        )

    def _whole(self) -> bool:
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
    """A port whose bus, 10 000 higher, is none that outgoing connections get."""
    while (port := free_port()) + 10_000 not in PORTS or not is_free(port + 10_000):
        pass
    return port


def _id(node: RedisServer) -> Any:
    return node.cli("CLUSTER", "MYID")


def _info(node: RedisServer) -> dict[str, str]:
    lines = node.cli("CLUSTER", "INFO")
    if isinstance(lines, dict):
        return lines
    return dict(line.split(":", 1) for line in lines.split())
