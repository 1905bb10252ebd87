"""A Redis Cluster as one executor: one link to each master, each command to the owner of its key.

The cluster link is lost as a whole when any master is: then all sessions are in memory, not only
those whose slots are missing. By default a Cluster without a master rejects all commands anyway
(cluster-require-full-coverage), and one storage mode per server is simpler to operate.

Slots that move, masters that change roles and nodes that join or leave are no loss.
"""

from collections.abc import Awaitable, Callable, Sequence

import anyio
from anyio.abc import TaskGroup, TaskStatus
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004 -- the name redis-py gives it
    TryAgainError,
)

from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.cluster.nodes import NodeLink, NodePool, Seeds
from bandsync.redis_link.cluster.routes import Routes
from bandsync.redis_link.cluster.slots import Endpoint, Topology, read_topology
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.errors import LinkLostError, UnusableError, again, loss_reason
from bandsync.redis_link.interfaces import Executor, PublishVerb
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.timeouts import Timeouts

# The delay before each redirected attempt of a command, seconds; 1.3 in all. While a slot migrates
# two nodes may redirect to each other for a moment.
REDIRECT_DELAYS_S = (0.0, 0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)

# A node that learns of a new master may see a slot uncovered for a moment and reject everything:
# so many attempts, 0.3 s in all. Not more, because a Cluster that is down must be detected soon.
_ATTEMPTS_WHILE_DOWN = 7
# Error replies to commands that were not executed: try elsewhere, or later.
_NOT_EXECUTED = (AskError, TryAgainError, ClusterDownError)

# Between two queries of the topology, and two write probes of each master: one that is full still
# answers PING.
_ROUND_S = 3.0
_PROBE_EXPIRY_MS = 10_000
_PAUSE_S = 0.1  # between two topology queries at the least, however many redirections arrive


class ClusterLink:
    """Commands to a whole Cluster: see `bandsync.redis_link.interfaces.Executor`.

    A command that a node rejects with MOVED, ASK, TRYAGAIN or CLUSTERDOWN was not executed. It is
    redirected or retried.

    Args:
        make_link: returns an unconnected link to a node, with this many seconds to connect.
        probe_key: the key of the write probe for a hash tag, see `hash_tag`.
        timeouts: ``connect_s`` covers discovery and the connections to all masters; a node that
            joins later gets ``silence_s``, because commands wait for it.
    """

    def __init__(
        self,
        seeds: Seeds,
        *,
        make_link: Callable[[RedisAddress, float], NodeLink],
        probe_key: Callable[[int], str],
        timeouts: Timeouts,
    ) -> None:
        self._seeds = seeds
        self._make_link = make_link
        self._probe_key = probe_key
        self._timeouts = timeouts
        # The master for each command.
        self._routes = Routes()
        # The links to the nodes.
        self._pool = NodePool(
            lambda endpoint, timeout_s: make_link(seeds.at(endpoint), timeout_s), self._on_lost
        )
        # How to publish; decided when connected.
        self._publish_verb: PublishVerb = "PUBLISH"
        # Whether all masters are connected.
        self._usable = False
        # Why the link ended; None while it has not.
        self._lost: RedisError | None = None
        # The tasks of all links, and the topology refresh.
        self._tasks: TaskGroup | None = None
        # Set when the topology must be queried at once.
        self._stale = anyio.Event()
        # Masters whose link is lost, and why. Their slots may have a new master by now.
        self._missing: dict[Endpoint, RedisError] = {}
        # Round-robin over the masters that answer topology queries.
        self._turn = 0

    @property
    def address(self) -> RedisAddress:
        """The master of slot 0: one and the same clock for all servers."""
        return self._seeds.at(self.owner(0))

    @property
    def outstanding(self) -> int:
        """Number of commands without a reply."""
        return self._pool.outstanding

    @property
    def usable(self) -> bool:
        """Whether all masters are connected."""
        return self._usable

    @property
    def publish_verb(self) -> PublishVerb:
        """SPUBLISH, which stays within one shard, if every master knows it (Redis 7)."""
        return self._publish_verb

    @property
    def masters(self) -> Sequence[Endpoint]:
        """The nodes that own slots."""
        return self._routes.topology.masters

    def migrates(self, key: str) -> bool:
        """Whether the slot of a key is being migrated; may be outdated for a few seconds."""
        return self._routes.migrates(key)

    def parts(self) -> Sequence[Executor]:
        """The links to the masters."""
        links = map(self._pool.connected, self.masters)
        return [link for link in links if link is not None]

    def owner(self, slot: int) -> Endpoint:
        """The master of a slot."""
        return self._routes.topology.owner(slot)

    async def hash_tag(self, master: Endpoint) -> int | None:
        """See `Routes.hash_tag`."""
        return await self._routes.hash_tag(master)

    def moved(self, error: MovedError, sender: Endpoint) -> Endpoint:
        """Apply a MOVED redirection of the node ``sender``; the new owner of the slot."""
        owner = self._routes.moved(error, sender)
        self._stale.set()
        return owner

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect to all masters, report that as started, and serve until cancelled.

        Raises:
            RedisError: the connection to a master failed or was lost, or slots have no master.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await self._until_lost(lambda: self._serve(task_status.started))
            finally:
                # Before the group ends: once its last task has ended it accepts no new ones.
                self._lose(LinkLostError("the Cluster's link was closed"))
        # Raised outside of the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command. If cancelled, Redis may still carry it out.

        Raises:
            RedisError: as `Link.execute`; also when the command was redirected too often.
        """
        endpoint = self._endpoint(args)
        try:
            link = await self._link_to(endpoint)
            return await link.execute(*args)
        except _NOT_EXECUTED as error:
            return await self._redirected(args, error, endpoint)

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        """The replies to several commands; those for one node leave together.

        Raises:
            RedisError: the link to a node is lost.
        """
        batches: dict[Endpoint, list[int]] = {}
        for index, command in enumerate(commands):
            batches.setdefault(self._endpoint(command), []).append(index)
        replies: list[Reply | RedisError] = [None] * len(commands)
        failures: list[RedisError] = []

        async def send(endpoint: Endpoint, indices: list[int]) -> None:
            try:
                link = await self._link_to(endpoint)
                answers = await link.execute_all([commands[index] for index in indices])
                retry = True
                for index, answer in zip(indices, answers, strict=True):
                    replies[index] = answer
                    if retry and isinstance(answer, _NOT_EXECUTED):
                        reply = await self._retried(commands[index], answer, endpoint)
                        replies[index] = reply
                        # After one loss the other commands would only wait for the same loss.
                        retry = not isinstance(reply, RedisError) or loss_reason(reply) is None
            except RedisError as error:
                failures.append(error)

        if len(batches) == 1:
            await send(*batches.popitem())
        else:
            async with anyio.create_task_group() as tasks:
                for endpoint, indices in batches.items():
                    tasks.start_soon(send, endpoint, indices)
        if failures:
            raise failures[0]
        return replies

    async def _retried(
        self, command: tuple[Argument, ...], error: RedisError, sender: Endpoint
    ) -> Reply | RedisError:
        try:
            return await self._redirected(command, error, sender)
        except ResponseError as refusal:
            return refusal

    async def _redirected(
        self, command: tuple[Argument, ...], error: RedisError, sender: Endpoint
    ) -> Reply:
        """Follow the redirection ``error`` of the node ``sender``, and those after it."""
        target, asking = sender, False
        for number, delay_s in enumerate(REDIRECT_DELAYS_S):
            if isinstance(error, ClusterDownError) and number >= _ATTEMPTS_WHILE_DOWN:
                raise error
            if isinstance(error, MovedError):
                target, asking = self.moved(error, target), False
            elif isinstance(error, AskError):
                target, asking = self._routes.asked(error, target), True
            await anyio.sleep(delay_s)
            try:
                link = await self._link_to(target)
                if not asking:
                    return await link.execute(*command)
                # One write over one connection: no other command comes between the two.
                _, reply = await link.execute_all([("ASKING",), command])
                if not isinstance(reply, RedisError):
                    return reply
                raise reply
            except _NOT_EXECUTED as further:
                error = further
        raise UnusableError(f"{command[0]!s} was redirected too often: {error}", "clusterdown")

    def _endpoint(self, command: Sequence[Argument]) -> Endpoint:
        if self._lost is not None:
            raise again(self._lost)
        return self._routes.endpoint(command)

    async def _link_to(self, endpoint: Endpoint) -> NodeLink:
        """The link to a node, once it is connected.

        Raises:
            RedisError: it failed or was lost, or the Cluster is lost.
        """
        link = self._pool.connected(endpoint)
        if link is not None:
            return link
        return await self._open(endpoint, self._timeouts.silence_s)

    async def _open(self, endpoint: Endpoint, timeout_s: float) -> NodeLink:
        if self._lost is not None:
            raise again(self._lost)
        assert self._tasks is not None
        return await self._pool.open(self._tasks, endpoint, timeout_s)

    def _on_lost(self, endpoint: Endpoint, error: RedisError) -> None:
        """Query the other masters whether a node whose link is lost is still a master."""
        if endpoint not in self.masters:
            return
        self._missing.setdefault(endpoint, error)
        if self._usable and self._reachable_masters():
            self._stale.set()
        else:
            self._lose(error)

    def _reachable_masters(self) -> list[Endpoint]:
        return [master for master in self.masters if master not in self._missing]

    async def _serve(self, started: Callable[[], None]) -> None:
        connect_s = self._timeouts.connect_s
        with anyio.move_on_after(connect_s) as scope:
            await self._adopt(await self._discover(), connect_s)
            await self._choose_publish_verb()
            await self._probe_writes()
        if scope.cancelled_caught:
            raise TimeoutError(
                f"{self._seeds.configured}: not all masters of the Cluster answered within "
                f"{connect_s:g} s"
            )
        self._usable = True
        started()
        await self._refresh_forever()

    async def _refresh_forever(self) -> None:
        """Keep the topology current, and probe that each master accepts writes.

        Raises:
            RedisError: a master is lost, or rejects writes.
        """
        probed = anyio.current_time()
        while True:
            with anyio.move_on_after(_ROUND_S):
                await self._stale.wait()
            self._stale = anyio.Event()
            topology = await self._query_topology()
            for endpoint, error in self._missing.items():
                if endpoint in topology.masters:
                    raise error
            self._missing.clear()
            await self._adopt(topology, self._timeouts.silence_s)
            if anyio.current_time() - probed >= _ROUND_S:
                probed = anyio.current_time()
                await self._probe_writes()
            await anyio.sleep(_PAUSE_S)

    async def _discover(self) -> Topology:
        """The topology according to the first seed that answers; all are queried at once."""
        found: list[Topology] = []
        errors: list[RedisError] = []

        async def query(address: RedisAddress, done: anyio.CancelScope) -> None:
            link = self._make_link(address, self._timeouts.connect_s)
            try:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(link.run)
                    reply = await link.execute("CLUSTER", "SLOTS")
                    found.append(_covered(read_topology(reply, address.host)))
                    done.cancel()
            except* RedisError as group:
                errors.append(first_leaf(group))

        async with anyio.create_task_group() as tasks:
            for address in self._seeds.addresses():
                tasks.start_soon(query, address, tasks.cancel_scope)
        if not found:
            raise errors[0]
        return found[0]

    async def _query_topology(self) -> Topology:
        """The topology according to one of the masters."""
        endpoint, self._routes.expert = self._routes.expert, None
        if endpoint is None or endpoint in self._missing:
            self._turn += 1
            reachable = self._reachable_masters()
            endpoint = reachable[self._turn % len(reachable)]
        link = await self._link_to(endpoint)
        reply = await link.execute("CLUSTER", "SLOTS")
        return _covered(read_topology(reply, endpoint.host))

    async def _adopt(self, topology: Topology, timeout_s: float) -> None:
        """Connect to all masters of a topology, then use it."""
        assert self._tasks is not None
        for endpoint in topology.masters:
            self._pool.start(self._tasks, endpoint, timeout_s)
        for endpoint in topology.masters:
            await self._open(endpoint, timeout_s)
        self._routes.adopt(topology)
        self._seeds.learn(topology.masters)
        self._pool.close_idle(topology.masters)

    async def _choose_publish_verb(self) -> None:
        replies = [await part.execute("COMMAND", "INFO", "SPUBLISH") for part in self.parts()]
        known = all(isinstance(reply, list) and reply != [None] for reply in replies)
        self._publish_verb = "SPUBLISH" if known else "PUBLISH"

    async def _probe_writes(self) -> None:
        """Write to each master.

        Raises:
            RedisError: one of them rejects writes.
        """
        for master in self.masters:
            tag = await self.hash_tag(master)
            if tag is not None:
                await self.execute("SET", self._probe_key(tag), "1", "PX", _PROBE_EXPIRY_MS)

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except RedisError as error:
            self._lose(error)

    def _lose(self, error: RedisError) -> None:
        """Declare the link lost and end its tasks. Only the first loss counts."""
        if self._lost is None:
            self._lost = error
            self._usable = False
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()


def _covered(topology: Topology) -> Topology:
    if topology.uncovered:
        raise UnusableError(f"{topology.uncovered} slots have no master", "clusterdown")
    return topology
