"""The routes of a Cluster: the master for each command, corrected by redirections."""

from collections.abc import Sequence

import anyio.lowlevel
from redis.exceptions import AskError, MovedError

from bandsync.redis_link.cluster.slots import Endpoint, Topology, slot_of, slot_of_command
from bandsync.redis_link.connection import Argument

# The search for a hash tag yields to other tasks after so many numbers.
_TAGS_PER_PASS = 500


class Routes:
    """The master of each slot.

    Attributes:
        topology: the latest one, with the MOVED redirections since.
        expert: the node that the latest MOVED names: it knows the newest topology. None if there
            was none since the last query.
    """

    def __init__(self) -> None:
        self.topology = Topology()
        self.expert: Endpoint | None = None
        # Slots with an ASK redirection since the latest topology.
        self._migrating: set[int] = set()
        # A hash tag for each master.
        self._hash_tags: dict[Endpoint, int] = {}

    def endpoint(self, command: Sequence[Argument]) -> Endpoint:
        """The master that serves a command; that of slot 0 if it has no key."""
        slot = slot_of_command(command)
        return self.topology.owner(0 if slot is None else slot)

    def adopt(self, topology: Topology) -> None:
        """Use this topology from now on."""
        self.topology = topology
        self._migrating.clear()

    def migrates(self, key: str) -> bool:
        """Whether an ASK was seen for the slot of a key; outdated for a few seconds at the most."""
        return bool(self._migrating) and slot_of(key) in self._migrating

    def moved(self, error: MovedError, sender: Endpoint) -> Endpoint:
        """Apply a MOVED redirection of the node ``sender``; the new owner of the slot."""
        owner = _target(error, sender)
        self.topology = self.topology.moved(error.slot_id, owner)
        self._migrating.discard(error.slot_id)
        self.expert = owner
        return owner

    def asked(self, error: AskError, sender: Endpoint) -> Endpoint:
        """The target of an ASK redirection. It holds for one command: the slot has not moved."""
        self._migrating.add(error.slot_id)
        return _target(error, sender)

    async def hash_tag(self, master: Endpoint) -> int | None:
        """A number that, as the hash tag of a key, selects a slot of ``master``.

        For a master with one slot of 16 384 the search takes as many numbers on average.

        Returns:
            The number; None if the master has no slot.
        """
        known = self._hash_tags.get(master)
        if known is not None and self.topology.owner(_slot_of_tag(known)) == master:
            return known
        number = 0
        # Checked in each pass: the master may lose its last slot while other tasks run.
        while master in self.topology.owners:
            for _ in range(_TAGS_PER_PASS):
                if self.topology.owner(_slot_of_tag(number)) == master:
                    self._hash_tags[master] = number
                    return number
                number += 1
            await anyio.lowlevel.checkpoint()
        return None


def _target(error: AskError, sender: Endpoint) -> Endpoint:
    """The node that a redirection names; one without a host means the host of its sender."""
    return Endpoint(error.host or sender.host, error.port)


def _slot_of_tag(number: int) -> int:
    return slot_of(b"%d" % number)
