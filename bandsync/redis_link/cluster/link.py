"""A Redis Cluster as one executor: a link to each master, commands go where their keys are.

It is lost as a whole when any master is: a session that cannot be stored is in memory
then, and so are all others until the Cluster is whole again. A Cluster that misses a master
refuses all commands by default anyway (cluster-require-full-coverage), and one state for the whole
server is one that operators, musicians and the rules can follow.

Slots that move, masters that change places and nodes that come or go are no loss.
"""

from collections.abc import Awaitable, Callable, Sequence

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup, TaskStatus
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
    TryAgainError,
)

from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.cluster.nodes import Node, NodeLink, Seeds
from bandsync.redis_link.cluster.slots import (
    Endpoint,
    Topology,
    read_topology,
    slot_of,
    slot_of_command,
)
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.errors import LinkLostError, UnusableError, again, loss_reason
from bandsync.redis_link.interfaces import Executor, PublishVerb
from bandsync.redis_link.redis_address import RedisAddress

# How a command that is sent on waits before each further try, seconds; 1.3 in all. While a slot is
# handed over two nodes may point at each other for a moment.
REDIRECT_DELAYS_S = (0.0, 0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)

# A node that is just being told of another master may miss one for a moment, and refuse everything:
# so many tries, 0.3 s in all. It is not long, for a Cluster that is down must be known as lost.
_TRIES_WHILE_DOWN = 7
# What was not carried out, and may be elsewhere or a little later.
_PASSED_ON = (AskError, TryAgainError, ClusterDownError)

# How often the topology is looked at, and each master is written to: one that is full answers PING.
_ROUND_S = 3.0
_PROOF_EXPIRY_MS = 10_000
# The least time between two looks, however much moves.
_PAUSE_S = 0.1
# After so many numbers that are no good others have their turn.
_NUMBERS_AT_ONCE = 500


class ClusterLink:
    """Commands to a whole Cluster: see `bandsync.redis_link.interfaces.Executor`.

    What a node refuses with MOVED, ASK, TRYAGAIN or CLUSTERDOWN was not carried out, and is sent
    on, or again.

    Args:
        make_link: makes a link to a node, that gets so many seconds to connect.
        proof: the name of the key that is written to a master, by a number that makes its slot one
            of that master's.
        connect_timeout_s: for finding and connecting to all masters at the start.
        silence_s: the same for one node later on, when commands wait for it.
    """

    def __init__(
        self,
        seeds: Seeds,
        *,
        make_link: Callable[[RedisAddress, float], NodeLink],
        proof: Callable[[int], str],
        connect_timeout_s: float,
        silence_s: float,
    ) -> None:
        self._seeds = seeds
        self._make_link = make_link
        self._proof = proof
        self._connect_timeout_s = connect_timeout_s
        self._silence_s = silence_s
        self._topology = Topology()
        self._nodes: dict[Endpoint, Node] = {}
        # A number for each master, see ``proof``.
        self._numbers: dict[Endpoint, int] = {}
        self._publish_verb: PublishVerb = "PUBLISH"
        self._usable = False
        self._lost: RedisError | None = None
        self._tasks: TaskGroup | None = None
        self._stale = anyio.Event()
        # Slots of which keys were across before the slot was, since the latest look.
        self._handed_over: set[int] = set()
        # Masters whose link is lost, and why. Their slots may be another's by now.
        self._missed: dict[Endpoint, RedisError] = {}
        # Who knows best of what has moved; without one they are asked in turn.
        self._expert: Endpoint | None = None
        self._turn = 0

    @property
    def address(self) -> RedisAddress:
        """Of the master of slot 0: the same for all servers, so they take the time from one."""
        return self._seeds.at(self._topology.owner(0))

    @property
    def outstanding(self) -> int:
        """How many commands wait for their reply."""
        return sum(node.link.outstanding for node in self._nodes.values())

    @property
    def usable(self) -> bool:
        """Whether all masters are connected."""
        return self._usable

    @property
    def publish_verb(self) -> PublishVerb:
        """SPUBLISH, which stays within one shard, where every master has it."""
        return self._publish_verb

    @property
    def masters(self) -> Sequence[Endpoint]:
        """Those who have slots."""
        return self._topology.masters

    def handed_over(self, key: str) -> bool:
        """Whether its slot was seen to be handed over; now and then it is, a little longer."""
        return bool(self._handed_over) and slot_of(key) in self._handed_over

    def parts(self) -> Sequence[Executor]:
        """The links to the masters."""
        nodes = [self._nodes.get(endpoint) for endpoint in self._topology.masters]
        return [node.link for node in nodes if node is not None and node.link.usable]

    def owner(self, slot: int) -> Endpoint:
        """The master of a slot."""
        return self._topology.owner(slot)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect to all masters, report that as started, and serve until cancelled.

        Raises:
            RedisError: a master cannot be reached, or not any longer, or slots have none.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await self._until_lost(lambda: self._serve(task_status.started))
            finally:
                # Not after the group: it takes no more tasks from when its last one has ended.
                self._lose(LinkLostError("the Cluster's link was closed"))
        # Not raised within the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command. May be cancelled; Redis may carry it out all the same.

        Raises:
            RedisError: as `Link.execute`; also when the command was sent on too often.
        """
        endpoint = self._endpoint(args)
        try:
            link = await self._link_to(endpoint)
            return await link.execute(*args)
        except _PASSED_ON as error:
            return await self._sent_on(args, error, endpoint)

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
                patient = True
                for index, answer in zip(indices, answers, strict=True):
                    replies[index] = answer
                    if patient and isinstance(answer, _PASSED_ON):
                        reply = await self._retried(commands[index], answer, endpoint)
                        replies[index] = reply
                        # One wait in vain is enough for all.
                        patient = not isinstance(reply, RedisError) or loss_reason(reply) is None
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

    async def number(self, master: Endpoint) -> int | None:
        """A number that makes the slot of a name with it one of ``master``'s; None if it has none.

        Who has one slot of 16 384 is found too, after as many numbers on average.
        """
        known = self._numbers.get(master)
        if known is not None and self._topology.owner(_slot_of_number(known)) == master:
            return known
        number = 0
        # It may lose its last one while others have their turn.
        while master in self._topology.owners:
            for _ in range(_NUMBERS_AT_ONCE):
                if self._topology.owner(_slot_of_number(number)) == master:
                    self._numbers[master] = number
                    return number
                number += 1
            await anyio.lowlevel.checkpoint()
        return None

    def moved(self, error: MovedError, asked: Endpoint) -> Endpoint:
        """Take note of it; who has the slot by now."""
        owner = _named(error, asked)
        self._topology = self._topology.moved(error.slot_id, owner)
        self._handed_over.discard(error.slot_id)
        self._expert = owner
        self._stale.set()
        return owner

    async def _retried(
        self, command: tuple[Argument, ...], error: RedisError, asked: Endpoint
    ) -> Reply | RedisError:
        try:
            return await self._sent_on(command, error, asked)
        except ResponseError as refusal:
            return refusal

    async def _sent_on(
        self, command: tuple[Argument, ...], error: RedisError, asked: Endpoint
    ) -> Reply:
        """Follow the redirection ``error`` of the node that was asked, and what comes after."""
        asking = False
        for number, delay_s in enumerate(REDIRECT_DELAYS_S):
            if isinstance(error, ClusterDownError) and number >= _TRIES_WHILE_DOWN:
                raise error
            if isinstance(error, MovedError):
                asked, asking = self.moved(error, asked), False
            elif isinstance(error, AskError):
                # For this command only: the slot has not moved yet.
                asked, asking = _named(error, asked), True
                self._handed_over.add(error.slot_id)
            await anyio.sleep(delay_s)
            try:
                link = await self._link_to(asked)
                if not asking:
                    return await link.execute(*command)
                # In one write over one connection: nothing comes in between.
                _, reply = await link.execute_all([("ASKING",), command])
                if not isinstance(reply, RedisError):
                    return reply
                raise reply
            except _PASSED_ON as further:
                error = further
        raise UnusableError(f"{command[0]!s} was sent on too often: {error}", "clusterdown")

    def _endpoint(self, command: Sequence[Argument]) -> Endpoint:
        if self._lost is not None:
            raise again(self._lost)
        slot = slot_of_command(command)
        return self._topology.owner(0 if slot is None else slot)

    async def _link_to(self, endpoint: Endpoint) -> NodeLink:
        node = self._nodes.get(endpoint)
        if node is not None and node.link.usable:
            return node.link
        return await self._open(endpoint, self._silence_s)

    async def _open(self, endpoint: Endpoint, timeout_s: float) -> NodeLink:
        """The link to a node, when it is connected.

        Raises:
            RedisError: it cannot be connected to, or the Cluster is lost.
        """
        if self._lost is not None:
            raise again(self._lost)
        node = self._want(endpoint, timeout_s)
        await node.settled.wait()
        if not node.link.usable:
            raise again(node.link.loss or LinkLostError(f"{endpoint}: closed"))
        return node.link

    def _want(self, endpoint: Endpoint, timeout_s: float) -> Node:
        """The link to a node, connected or about to be."""
        node = self._nodes.get(endpoint)
        if node is None:
            assert self._tasks is not None
            node = Node(self._make_link(self._seeds.at(endpoint), timeout_s))
            self._nodes[endpoint] = node
            self._tasks.start_soon(self._keep, endpoint, node)
        return node

    async def _keep(self, endpoint: Endpoint, node: Node) -> None:
        """Serve a node until it is lost or not wanted any more."""
        try:
            with node.scope:
                await node.link.run(task_status=node)
        except RedisError as error:
            # A node without slots may go; who waits for it is told.
            if endpoint in self._topology.masters:
                self._miss(endpoint, error)
        finally:
            node.settled.set()
            if self._nodes.get(endpoint) is node:
                del self._nodes[endpoint]

    def _miss(self, endpoint: Endpoint, error: RedisError) -> None:
        """Ask the others whether a node whose link is lost is still a master."""
        self._missed.setdefault(endpoint, error)
        if self._usable and self._reachable():
            self._stale.set()
        else:
            self._lose(error)

    def _reachable(self) -> list[Endpoint]:
        return [master for master in self._topology.masters if master not in self._missed]

    async def _serve(self, started: Callable[[], None]) -> None:
        with anyio.move_on_after(self._connect_timeout_s) as scope:
            await self._adopt(await self._first_look(), self._connect_timeout_s)
            await self._choose_verb()
            await self._prove()
        if scope.cancelled_caught:
            raise TimeoutError(
                f"{self._seeds.configured}: not all masters of the Cluster answered within "
                f"{self._connect_timeout_s:g} s"
            )
        self._usable = True
        started()
        proved = anyio.current_time()
        while True:
            with anyio.move_on_after(_ROUND_S):
                await self._stale.wait()
            self._stale = anyio.Event()
            topology = await self._look()
            for endpoint, error in self._missed.items():
                if endpoint in topology.masters:
                    raise error
            self._missed.clear()
            await self._adopt(topology, self._silence_s)
            if anyio.current_time() - proved >= _ROUND_S:
                proved = anyio.current_time()
                await self._prove()
            await anyio.sleep(_PAUSE_S)

    async def _first_look(self) -> Topology:
        """What the first of the seeds says that answers: one that hangs keeps nobody waiting."""
        found: list[Topology] = []
        errors: list[RedisError] = []

        async def ask(address: RedisAddress, done: anyio.CancelScope) -> None:
            link = self._make_link(address, self._connect_timeout_s)
            try:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(link.run)
                    reply = await link.execute("CLUSTER", "SLOTS")
                    found.append(_whole(read_topology(reply, address.host)))
                    done.cancel()
            except* RedisError as group:
                errors.append(first_leaf(group))

        async with anyio.create_task_group() as tasks:
            for address in self._seeds.addresses():
                tasks.start_soon(ask, address, tasks.cancel_scope)
        if not found:
            raise errors[0]
        return found[0]

    async def _look(self) -> Topology:
        """The topology as one of the masters sees it."""
        endpoint, self._expert = self._expert, None
        if endpoint is None or endpoint in self._missed:
            self._turn += 1
            reachable = self._reachable()
            endpoint = reachable[self._turn % len(reachable)]
        link = await self._link_to(endpoint)
        reply = await link.execute("CLUSTER", "SLOTS")
        return _whole(read_topology(reply, endpoint.host))

    async def _adopt(self, topology: Topology, timeout_s: float) -> None:
        """Connect to all masters of a topology, and use it from then on."""
        for endpoint in topology.masters:
            self._want(endpoint, timeout_s)
        for endpoint in topology.masters:
            await self._open(endpoint, timeout_s)
        self._topology = topology
        self._handed_over.clear()
        self._seeds.learn(topology.masters)
        now = anyio.current_time()
        for endpoint, node in list(self._nodes.items()):
            if endpoint in topology.masters:
                node.idle_since = None
            elif node.idle_since is None:
                # Not closed at once: a slot may be on its way there, or an answer on its way here.
                node.idle_since = now
            elif now - node.idle_since >= _ROUND_S and not node.link.outstanding:
                del self._nodes[endpoint]
                node.scope.cancel()

    async def _choose_verb(self) -> None:
        replies = [await part.execute("COMMAND", "INFO", "SPUBLISH") for part in self.parts()]
        known = all(isinstance(reply, list) and reply != [None] for reply in replies)
        self._publish_verb = "SPUBLISH" if known else "PUBLISH"

    async def _prove(self) -> None:
        """Write to each master.

        Raises:
            RedisError: one of them refused.
        """
        for master in self._topology.masters:
            number = await self.number(master)
            if number is not None:
                await self.execute("SET", self._proof(number), "1", "PX", _PROOF_EXPIRY_MS)

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except RedisError as error:
            self._lose(error)

    def _lose(self, error: RedisError) -> None:
        """End everything. Only the first loss counts."""
        if self._lost is None:
            self._lost = error
            self._usable = False
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()


def _whole(topology: Topology) -> Topology:
    if topology.uncovered:
        raise UnusableError(f"{topology.uncovered} slots have no master", "clusterdown")
    return topology


def _named(error: AskError, asked: Endpoint) -> Endpoint:
    """The node that a redirection names; without a host it is on that of the one who said so."""
    return Endpoint(error.host or asked.host, error.port)


def _slot_of_number(number: int) -> int:
    return slot_of(b"%d" % number)
