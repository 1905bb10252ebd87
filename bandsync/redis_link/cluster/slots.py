"""Which node of a Redis Cluster has which keys: pure."""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import InvalidResponse

from bandsync.redis_link.connection import Argument, Reply

# Any node can carry them out, about itself.
_WITHOUT_KEY = frozenset({"PING", "TIME", "SCAN", "CLUSTER", "COMMAND"})
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})
# Of a node that is to be called by its name, and whose name is not known: it has none, or has just
# joined.
_NO_NAME = b"?"


class Endpoint(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Topology(Struct, frozen=True):
    """Which master has which slot, as far as is known.

    Attributes:
        owners: one for each slot; None where there is none.
        masters: all who have a slot, in the order of their first; after a move perhaps one who
            has none any more.
    """

    owners: tuple[Endpoint | None, ...] = (None,) * REDIS_CLUSTER_HASH_SLOTS
    masters: tuple[Endpoint, ...] = ()

    @property
    def uncovered(self) -> int:
        """How many slots nobody has."""
        return self.owners.count(None)

    def owner(self, slot: int) -> Endpoint:
        """Who has a slot that somebody has."""
        owner = self.owners[slot]
        assert owner is not None
        return owner

    def moved(self, slot: int, owner: Endpoint) -> "Topology":
        """The same with another owner of one slot."""
        owners = list(self.owners)
        owners[slot] = owner
        masters = self.masters if owner in self.masters else (*self.masters, owner)
        return Topology(tuple(owners), masters)


def read_topology(reply: Reply, asked: str) -> Topology:
    """The topology in the answer to CLUSTER SLOTS.

    Args:
        asked: the host that answered, which is meant where it names none.

    Raises:
        InvalidResponse: it is none.
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
                        called = _ip(more) if host == _NO_NAME else host
                        known = called if isinstance(called, bytes) else b""
                        name = known.decode(errors="replace") or asked
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
    """The address of a node without a name: among what is told after its port and its id."""
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
    """The slot of a command's first key or its channel; None if it is about no key."""
    verb = command[0]
    if verb in _WITHOUT_KEY:
        return None
    if verb in _SCRIPTS:
        return slot_of(command[3]) if command[2] else None
    return slot_of(command[1])
