"""Sharded pub/sub: a subscriber at each master of a Cluster."""

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from anyio.abc import TaskGroup, TaskStatus
from redis.exceptions import MovedError, RedisError

from bandsync.redis_link.cluster.link import REDIRECT_DELAYS_S, ClusterLink
from bandsync.redis_link.cluster.slots import Endpoint, slot_of
from bandsync.redis_link.errors import LinkLostError, UnusableError, again
from bandsync.redis_link.subscriber import Subscriber

# Delivered for a channel whose messages may have been missed. It is no message, so a gap.
MISSED = b""

_MAX_RESUBSCRIBING = 500


class _NodeSubscriber(TaskStatus[None]):
    """The subscriber at one master.

    Attributes:
        subscriber: the latest attempt; None before the first.
        settled: set when it is connected, or failed.
    """

    def __init__(self) -> None:
        self.subscriber: Subscriber | None = None
        self.settled = anyio.Event()

    def started(self, value: None = None) -> None:
        """Called by the subscriber when it is connected."""
        self.settled.set()


class ClusterSubscriber:
    """Receives the messages of sharded channels: a `ChannelSubscriber`.

    A channel whose slot moves is resubscribed at the new master. Messages published there before
    were missed, so `MISSED` is delivered.

    It is lost as a whole when one of its subscribers is.

    Args:
        cluster: supplies the masters.
        make_subscriber: returns an unconnected subscriber for a master, a hash tag of it (see
            `ClusterLink.hash_tag`) and a callback for each channel that the master removes.
        on_message: called with channel and payload of each message. Must not block.
    """

    def __init__(
        self,
        cluster: ClusterLink,
        make_subscriber: Callable[[Endpoint, int, Callable[[bytes], None]], Subscriber],
        on_message: Callable[[bytes, bytes], None],
    ) -> None:
        self._cluster = cluster
        self._make_subscriber = make_subscriber
        self._on_message = on_message
        self._nodes: dict[Endpoint, _NodeSubscriber] = {}
        self._usable = False
        self._lost: RedisError | None = None
        self._tasks: TaskGroup | None = None
        # Channels that their old master removed and that are not resubscribed yet.
        self._moving: set[bytes] = set()
        self._channel_removed = anyio.Event()

    @property
    def usable(self) -> bool:
        """Whether all of them are connected."""
        return self._usable

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect to all masters, report that as started, and receive until cancelled.

        Raises:
            RedisError: the subscriber at one of them failed or was lost.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await self._until_lost(lambda: self._serve(task_status.started))
            finally:
                # Before the group ends: once its last task has ended it accepts no new ones.
                self._lose(LinkLostError("the Cluster's subscriber was closed"))
        # Raised outside of the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    async def subscribe(self, channel: bytes) -> None:
        """Return when all later messages will be received, or `MISSED` in their place.

        Raises:
            RedisError: the subscriber is lost.
        """
        try:
            await self._subscribe_at_master(channel)
        except RedisError as error:
            # The caller relies on a loss, and on the resync after it.
            self._lose(error)
            raise

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will be received. Idempotent.

        Raises:
            RedisError: the subscriber is lost.
        """
        self._moving.discard(channel)
        node = self._nodes.get(self._cluster.owner(slot_of(channel)))
        if node is not None and node.subscriber is not None:
            # A node that lost the slot has removed the channel already.
            with contextlib.suppress(MovedError):
                await node.subscriber.unsubscribe(channel)

    async def _serve(self, started: Callable[[], None]) -> None:
        for endpoint in self._cluster.masters:
            if await self._cluster.hash_tag(endpoint) is not None:
                await self._open(endpoint)
        self._usable = True
        started()
        while True:
            await self._channel_removed.wait()
            self._channel_removed = anyio.Event()
            # After a loss nothing below waits any more, so the cancellation would never arrive.
            while self._moving and self._lost is None:
                batch = list(self._moving)[:_MAX_RESUBSCRIBING]
                async with anyio.create_task_group() as tasks:
                    for channel in batch:
                        tasks.start_soon(self._until_lost, partial(self._resubscribe, channel))

    async def _resubscribe(self, channel: bytes) -> None:
        """Subscribe a channel at the new master of its slot."""
        await self._subscribe_at_master(channel)
        if channel in self._moving:
            self._moving.discard(channel)
            self._on_message(channel, MISSED)
        else:
            # Unsubscribed meanwhile.
            await self.unsubscribe(channel)

    async def _subscribe_at_master(self, channel: bytes) -> None:
        slot = slot_of(channel)
        for delay_s in REDIRECT_DELAYS_S:
            endpoint = self._cluster.owner(slot)
            subscriber = await self._open(endpoint)
            try:
                await subscriber.subscribe(channel)
            except MovedError as error:
                self._cluster.moved(error, endpoint)
            else:
                return
            await anyio.sleep(delay_s)
        raise UnusableError(f"{channel!r} was redirected too often", "clusterdown")

    async def _open(self, endpoint: Endpoint) -> Subscriber:
        """The subscriber at a master, once it is connected.

        Raises:
            RedisError: it failed, or the cluster subscriber is lost.
        """
        if self._lost is not None:
            raise again(self._lost)
        node = self._nodes.get(endpoint)
        if node is None:
            assert self._tasks is not None
            node = self._nodes[endpoint] = _NodeSubscriber()
            self._tasks.start_soon(self._until_lost, partial(self._run_node, endpoint, node))
        await node.settled.wait()
        subscriber = node.subscriber
        if subscriber is None or not subscriber.usable:
            loss = self._lost if subscriber is None else subscriber.loss
            raise again(loss or LinkLostError(f"{endpoint}: the subscriber was closed"))
        return subscriber

    async def _run_node(self, endpoint: Endpoint, node: _NodeSubscriber) -> None:
        """Run the subscriber at a master.

        Raises:
            RedisError: it failed or was lost.
        """
        try:
            for delay_s in REDIRECT_DELAYS_S:
                tag = await self._cluster.hash_tag(endpoint)
                if tag is None:
                    raise LinkLostError(f"{endpoint} has no slots any more")
                node.subscriber = self._make_subscriber(endpoint, tag, self._on_removed)
                try:
                    await node.subscriber.run(task_status=node)
                except MovedError as error:
                    # The slot of the probe channel has moved: take one of another slot.
                    self._cluster.moved(error, endpoint)
                await anyio.sleep(delay_s)
            raise UnusableError(f"{endpoint}: no slot for the probe", "clusterdown")
        finally:
            node.settled.set()

    def _on_removed(self, channel: bytes) -> None:
        self._moving.add(channel)
        self._channel_removed.set()

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except RedisError as error:
            self._lose(error)

    def _lose(self, error: RedisError) -> None:
        """Declare it lost and end its tasks. Only the first loss counts."""
        if self._lost is None:
            self._lost = error
            self._usable = False
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()
