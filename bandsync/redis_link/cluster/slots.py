"""The hash slots of a Redis Cluster and their masters: pure."""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import InvalidResponse

from bandsync.redis_link.connection import Argument, Reply

# Commands without a key: any node executes them.
_WITHOUT_KEY = frozenset({"PING", "TIME", "SCAN", "CLUSTER", "COMMAND"})
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})
# The host in place of a hostname that is preferred but unknown: it is unset, or the node is new.
_NO_NAME = b"?"


class Endpoint(NamedTuple):
    """Host and port of a node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Topology(Struct, frozen=True):
    """The owner of each slot.

    Attributes:
        owners: the master of each slot; None if it has none.
        masters: the owners in the order of their first slot. After `moved` one of them may own no
            slot any more.
    """

    owners: tuple[Endpoint | None, ...] = (None,) * REDIS_CLUSTER_HASH_SLOTS
    masters: tuple[Endpoint, ...] = ()

    @property
    def uncovered(self) -> int:
        """Number of slots without a master."""
        return self.owners.count(None)

    def owner(self, slot: int) -> Endpoint:
        """The master of a slot that has one."""
        owner = self.owners[slot]
        assert owner is not None
        return owner

    def moved(self, slot: int, owner: Endpoint) -> "Topology":
        """A copy with another owner of one slot."""
        owners = list(self.owners)
        owners[slot] = owner
        masters = self.masters if owner in self.masters else (*self.masters, owner)
        return Topology(tuple(owners), masters)


def read_topology(reply: Reply, sender: str) -> Topology:
    """The topology in a reply to CLUSTER SLOTS.

    Args:
        sender: the host that replied; an empty host in the reply means this one.

    Raises:
        InvalidResponse: the reply is no topology.
    """
    owners: list[Endpoint | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    ranges: list[tuple[int, Endpoint]] = []
    match reply:
        case list():
            for shard in reply:
                match shard:
                    case [int(first), int(last), [host, int(port), *more], *_] if (
                        0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS and 0 < port < 65_536
                    ):
                        named = _ip(more) if host == _NO_NAME else host
                        raw = named if isinstance(named, bytes) else b""
                        name = raw.decode(errors="replace") or sender
                        owner = Endpoint(name, port)
                        owners[first : last + 1] = [owner] * (last + 1 - first)
                        ranges.append((first, owner))
                    case _:
                        raise InvalidResponse(f"no slots: {shard!r:.100}")
        case _:
            raise InvalidResponse(f"no topology: {reply!r:.100}")
    masters = dict.fromkeys(owner for _, owner in sorted(ranges))
    return Topology(tuple(owners), tuple(masters))


def _ip(details: Sequence[object]) -> object:
    """The IP address of a node without a hostname, from the details after its port and id."""
    match details:
        case [_, [*pairs], *_]:
            named = zip(pairs[::2], pairs[1::2], strict=False)
            return next((value for name, value in named if name == b"ip"), None)
        case _:
            return None


def slot_of(key: Argument) -> int:
    """The slot of a key or a channel."""
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def slot_of_command(command: Sequence[Argument]) -> int | None:
    """The slot of a command's first key or channel; None if it has neither."""
    verb = command[0]
    if verb in _WITHOUT_KEY:
        return None
    if verb in _SCRIPTS:
        return slot_of(command[3]) if command[2] else None
    return slot_of(command[1])
