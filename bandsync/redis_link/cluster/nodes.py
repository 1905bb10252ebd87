"""The nodes of a Cluster: where they are, and a link to one."""

from collections.abc import Callable, Sequence

import anyio
from anyio.abc import TaskStatus
from msgspec.structs import replace

from bandsync.redis_link.cluster.slots import Endpoint
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress

# Of the nodes that were known last time so many are asked where the others are.
_MAX_SEEDS = 8


class Seeds:
    """Where a Cluster can be found: outlives the links to it.

    Args:
        configured: one node; its credentials and its TLS are those of all.
    """

    def __init__(self, configured: RedisAddress) -> None:
        self.configured = configured
        self._known: tuple[Endpoint, ...] = ()

    def addresses(self) -> list[RedisAddress]:
        """Nodes to ask, the configured one first."""
        first = Endpoint(self.configured.host, self.configured.port)
        known = (endpoint for endpoint in self._known if endpoint != first)
        return [self.configured, *(self.at(endpoint) for endpoint in known)][:_MAX_SEEDS]

    def at(self, endpoint: Endpoint) -> RedisAddress:
        """The address of a node."""
        return replace(self.configured, host=endpoint.host, port=endpoint.port)

    def learn(self, masters: Sequence[Endpoint]) -> None:
        """Remember them for next time: the configured node may be gone then.

        And them only: whoever left may be of another Cluster by then.
        """
        self._known = tuple(masters)


class NodeLink(Link):
    """A link to one node, that asks it at regular intervals whether it lives.

    Args:
        beat_s: how often, seconds.
        name, connect_timeout_s, command_timeout_s, silence_s: as for a `Line`.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        name: str,
        connect_timeout_s: float,
        command_timeout_s: float,
        silence_s: float,
        beat_s: float,
    ) -> None:
        super().__init__(
            address,
            name=name,
            connect_timeout_s=connect_timeout_s,
            command_timeout_s=command_timeout_s,
            silence_s=silence_s,
        )
        self._beat_s = beat_s

    async def _attend(self, started: Callable[[], None]) -> None:
        await super()._attend(started)
        while True:
            await anyio.sleep(self._beat_s)
            await self.execute("PING")


class Node(TaskStatus[None]):
    """A link to a node, from the wish for it to its end.

    Attributes:
        settled: set when it is connected, or cannot be.
        idle_since: when it was first seen without a slot; None while it has any.
    """

    def __init__(self, link: NodeLink) -> None:
        self.link = link
        self.scope = anyio.CancelScope()
        self.settled = anyio.Event()
        self.idle_since: float | None = None

    def started(self, value: None = None) -> None:
        """Called by the link."""
        self.settled.set()
