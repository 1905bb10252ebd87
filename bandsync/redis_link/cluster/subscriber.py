"""The channels of a Cluster that publishes within shards: a subscriber at each master."""

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

# What is heard of a channel when messages may have been missed: no message, so a gap.
MISSED = b""

_MOVED_AT_ONCE = 500


class _Post(TaskStatus[None]):
    """A subscriber at one master, from the wish for it to its end.

    Attributes:
        settled: set when it is connected, or cannot be.
    """

    def __init__(self) -> None:
        self.subscriber: Subscriber | None = None
        self.settled = anyio.Event()

    def started(self, value: None = None) -> None:
        """Called by the subscriber."""
        self.settled.set()


class ClusterSubscriber:
    """Messages of sharded channels, for as long as they come: a `Listener`.

    A channel whose slot moves is followed to its new node. What was published there before was not
    heard, so `MISSED` is.

    Lost as a whole when one of its subscribers is.

    Args:
        cluster: knows the masters.
        make_subscriber: for a master and a number, see `ClusterLink.number`; calls the last
            argument with each channel that is taken away.
        on_message: called with each message's channel and payload. Must not block.
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
        self._posts: dict[Endpoint, _Post] = {}
        self._usable = False
        self._lost: RedisError | None = None
        self._tasks: TaskGroup | None = None
        # Taken away, and not subscribed again yet.
        self._moving: set[bytes] = set()
        self._some_moved = anyio.Event()

    @property
    def usable(self) -> bool:
        """Whether all of them are connected."""
        return self._usable

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect to all masters, report that as started, and listen until cancelled.

        Raises:
            RedisError: one of them cannot be heard, or not any longer.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await self._until_lost(lambda: self._serve(task_status.started))
            finally:
                # Not after the group: it takes no more tasks from when its last one has ended.
                self._lose(LinkLostError("the Cluster's subscriber was closed"))
        # Not raised within the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    async def subscribe(self, channel: bytes) -> None:
        """Return when every message published from now on will come, or `MISSED`.

        Raises:
            RedisError: the subscriber is lost.
        """
        try:
            await self._at_its_master(channel)
        except RedisError as error:
            # Who asked counts on a loss, and the catch-up after it.
            self._lose(error)
            raise

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will come; for a channel that is not subscribed too.

        Raises:
            RedisError: the subscriber is lost.
        """
        self._moving.discard(channel)
        post = self._posts.get(self._cluster.owner(slot_of(channel)))
        if post is not None and post.subscriber is not None:
            # A node that has not got the slot any more has taken the channel away itself.
            with contextlib.suppress(MovedError):
                await post.subscriber.unsubscribe(channel)

    async def _serve(self, started: Callable[[], None]) -> None:
        for endpoint in self._cluster.masters:
            if await self._cluster.number(endpoint) is not None:
                await self._at(endpoint)
        self._usable = True
        started()
        while True:
            await self._some_moved.wait()
            self._some_moved = anyio.Event()
            # Once lost, nothing of this waits any more, and so nothing would ever end it.
            while self._moving and self._lost is None:
                batch = list(self._moving)[:_MOVED_AT_ONCE]
                async with anyio.create_task_group() as tasks:
                    for channel in batch:
                        tasks.start_soon(self._until_lost, partial(self._follow, channel))

    async def _follow(self, channel: bytes) -> None:
        """Subscribe a channel at its new master."""
        await self._at_its_master(channel)
        if channel in self._moving:
            self._moving.discard(channel)
            self._on_message(channel, MISSED)
        else:
            # Not wanted any more.
            await self.unsubscribe(channel)

    async def _at_its_master(self, channel: bytes) -> None:
        slot = slot_of(channel)
        for delay_s in REDIRECT_DELAYS_S:
            endpoint = self._cluster.owner(slot)
            subscriber = await self._at(endpoint)
            try:
                await subscriber.subscribe(channel)
            except MovedError as error:
                self._cluster.moved(error, endpoint)
            else:
                return
            await anyio.sleep(delay_s)
        raise UnusableError(f"{channel!r} was sent on too often", "clusterdown")

    async def _at(self, endpoint: Endpoint) -> Subscriber:
        """The subscriber at a master, when it is connected.

        Raises:
            RedisError: it cannot be connected to, or all is lost.
        """
        if self._lost is not None:
            raise again(self._lost)
        post = self._posts.get(endpoint)
        if post is None:
            assert self._tasks is not None
            post = self._posts[endpoint] = _Post()
            self._tasks.start_soon(self._until_lost, partial(self._keep, endpoint, post))
        await post.settled.wait()
        subscriber = post.subscriber
        if subscriber is None or not subscriber.usable:
            loss = self._lost if subscriber is None else subscriber.loss
            raise again(loss or LinkLostError(f"{endpoint}: the subscriber was closed"))
        return subscriber

    async def _keep(self, endpoint: Endpoint, post: _Post) -> None:
        """Listen at a master.

        Raises:
            RedisError: that is not possible, or not any longer.
        """
        try:
            for delay_s in REDIRECT_DELAYS_S:
                number = await self._cluster.number(endpoint)
                if number is None:
                    raise LinkLostError(f"{endpoint} has no slots any more")
                post.subscriber = self._make_subscriber(endpoint, number, self._gone)
                try:
                    await post.subscriber.run(task_status=post)
                except MovedError as error:
                    # The slot of the probe is not its any more: with another one, then.
                    self._cluster.moved(error, endpoint)
                await anyio.sleep(delay_s)
            raise UnusableError(f"{endpoint}: no slot for the probe", "clusterdown")
        finally:
            post.settled.set()

    def _gone(self, channel: bytes) -> None:
        self._moving.add(channel)
        self._some_moved.set()

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
