"""Which node of a Redis Cluster has which keys: pure."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import InvalidResponse

from bandsync.redis_link.connecting import Argument, Reply

# Any node can carry them out, about itself.
_WITHOUT_KEY = frozenset({"PING", "TIME", "SCAN", "CLUSTER", "COMMAND"})
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})


class Endpoint(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Topology:
    """Which master has which slot, as far as is known.

    Args:
        owners: one for each slot; None where there is none.
    """

    __slots__ = ("_owners", "masters")

    def __init__(self, owners: Sequence[Endpoint | None]) -> None:
        assert len(owners) == REDIS_CLUSTER_HASH_SLOTS
        self._owners = tuple(owners)
        counts = Counter(owner for owner in owners if owner is not None)
        self.masters: tuple[Endpoint, ...] = tuple(counts)

    @property
    def uncovered(self) -> int:
        """How many slots nobody has."""
        return self._owners.count(None)

    def owner(self, slot: int) -> Endpoint:
        """Who has a slot that somebody has."""
        owner = self._owners[slot]
        assert owner is not None
        return owner

    def moved(self, slot: int, owner: Endpoint) -> "Topology":
        """The same with another owner of one slot."""
        owners = list(self._owners)
        owners[slot] = owner
        return Topology(owners)


NOWHERE = Topology([None] * REDIS_CLUSTER_HASH_SLOTS)


def read_topology(reply: Reply, asked: str) -> Topology:
    """The topology in the answer to CLUSTER SLOTS.

    Args:
        asked: the host that answered, which is meant where it names none.

    Raises:
        InvalidResponse: it is none.
    """
    owners: list[Endpoint | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    match reply:
        case list():
            for shard in reply:
                match shard:
                    case [int(first), int(last), [host, int(port), *_], *_] if (
                        0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS
                    ):
                        name = host.decode() if isinstance(host, bytes) and host else asked
                        owners[first : last + 1] = [Endpoint(name, port)] * (last + 1 - first)
                    case _:
                        raise InvalidResponse(f"no slots: {shard!r:.100}")
        case _:
            raise InvalidResponse(f"no topology: {reply!r:.100}")
    return Topology(owners)


def slot_of(key: Argument) -> int:
    """The slot of a key or a channel."""
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def slot_of_command(command: Sequence[Argument]) -> int | None:
    """The slot of a command's first key or its channel; None if it is about no key."""
    verb = command[0]
    if verb in _WITHOUT_KEY:
        return None
    if verb in _SCRIPTS:
        return slot_of(command[3]) if command[2] else None
    return slot_of(command[1])
