"""The nodes of a Cluster: their addresses, and a pool of links to them."""

from collections.abc import Callable, Collection, Sequence

import anyio
from anyio.abc import TaskGroup, TaskStatus
from msgspec.structs import replace
from redis.exceptions import RedisError

from bandsync.redis_link.cluster.slots import Endpoint
from bandsync.redis_link.errors import LinkLostError, again
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress

# How many nodes are queried for the topology when a link connects.
_MAX_SEEDS = 8
# A node without slots keeps its link for so long: a slot or a reply may be on its way.
_IDLE_S = 3.0


class Seeds:
    """The nodes to query for the topology. It outlives the links.

    Args:
        configured: the node of the settings; its credentials and TLS apply to all nodes.
    """

    def __init__(self, configured: RedisAddress) -> None:
        self.configured = configured
        self._known: tuple[Endpoint, ...] = ()

    def addresses(self) -> list[RedisAddress]:
        """The nodes to query, the configured one first."""
        first = Endpoint(self.configured.host, self.configured.port)
        known = (endpoint for endpoint in self._known if endpoint != first)
        return [self.configured, *(self.at(endpoint) for endpoint in known)][:_MAX_SEEDS]

    def at(self, endpoint: Endpoint) -> RedisAddress:
        """The address of a node."""
        return replace(self.configured, host=endpoint.host, port=endpoint.port)

    def learn(self, masters: Sequence[Endpoint]) -> None:
        """Remember the masters: at the next connect the configured node may be gone.

        Earlier ones are forgotten. A node that left may belong to another Cluster by then.
        """
        self._known = tuple(masters)


class NodeLink(Link):
    """A link to one node, with a heartbeat: a PING at each health interval."""

    async def _use(self, started: Callable[[], None]) -> None:
        await super()._use(started)
        while True:
            await anyio.sleep(self._timeouts.health_interval_s)
            await self.execute("PING")


class Node(TaskStatus[None]):
    """A node that has a link or is about to have one.

    Attributes:
        link: the link to it.
        scope: cancels the task of the link.
        settled: set when the link is connected, or failed.
        idle_since: when it was first seen without slots; None while it has any.
    """

    def __init__(self, link: NodeLink) -> None:
        self.link = link
        self.scope = anyio.CancelScope()
        self.settled = anyio.Event()
        self.idle_since: float | None = None

    def started(self, value: None = None) -> None:
        """Called by the link when it is connected."""
        self.settled.set()


class NodePool:
    """One link to each node, opened on demand.

    Args:
        make_link: returns an unconnected link to a node, with this many seconds to connect.
        on_lost: called when the link to a node failed or was lost.
    """

    def __init__(
        self,
        make_link: Callable[[Endpoint, float], NodeLink],
        on_lost: Callable[[Endpoint, RedisError], None],
    ) -> None:
        self._make_link = make_link
        self._on_lost = on_lost
        self._nodes: dict[Endpoint, Node] = {}

    @property
    def outstanding(self) -> int:
        """Number of commands without a reply."""
        return sum(node.link.outstanding for node in self._nodes.values())

    def connected(self, endpoint: Endpoint) -> NodeLink | None:
        """The link to a node if it is connected."""
        node = self._nodes.get(endpoint)
        return node.link if node is not None and node.link.usable else None

    def start(self, tasks: TaskGroup, endpoint: Endpoint, timeout_s: float) -> Node:
        """The node, with a link that is connected or connecting.

        Args:
            tasks: runs the link if it is new.
        """
        node = self._nodes.get(endpoint)
        if node is None:
            node = Node(self._make_link(endpoint, timeout_s))
            self._nodes[endpoint] = node
            tasks.start_soon(self._run, endpoint, node)
        return node

    async def open(self, tasks: TaskGroup, endpoint: Endpoint, timeout_s: float) -> NodeLink:
        """The link to a node, once it is connected.

        Raises:
            RedisError: it failed or was lost.
        """
        node = self.start(tasks, endpoint, timeout_s)
        await node.settled.wait()
        if not node.link.usable:
            raise again(node.link.loss or LinkLostError(f"{endpoint}: closed"))
        return node.link

    def close_idle(self, masters: Collection[Endpoint]) -> None:
        """Close the links to nodes that have had no slots for some time."""
        now = anyio.current_time()
        for endpoint, node in list(self._nodes.items()):
            if endpoint in masters:
                node.idle_since = None
            elif node.idle_since is None:
                node.idle_since = now
            elif now - node.idle_since >= _IDLE_S and not node.link.outstanding:
                del self._nodes[endpoint]
                node.scope.cancel()

    async def _run(self, endpoint: Endpoint, node: Node) -> None:
        try:
            with node.scope:
                await node.link.run(task_status=node)
        except RedisError as error:
            self._on_lost(endpoint, error)
        finally:
            node.settled.set()
            if self._nodes.get(endpoint) is node:
                del self._nodes[endpoint]
