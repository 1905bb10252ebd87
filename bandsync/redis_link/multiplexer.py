"""Multiplexing and pipelining: calls of many tasks over one connection, answered in order.

A multiplexer is used once: it connects, serves until it is lost or cancelled, and then fails all
outstanding calls. Another connection needs another multiplexer.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup, TaskStatus
from redis.exceptions import RedisError, TimeoutError  # noqa: A004 -- the name redis-py gives it

from bandsync.redis_link.connection import RedisConnection, Reply, connect
from bandsync.redis_link.errors import LinkLostError, again
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.timeouts import Timeouts


class Batch:
    """Commands that leave in one write.

    Attributes:
        commands: the packed commands; empty once they were written.
        since: when the first one was queued; after the write, when it began.
    """

    __slots__ = ("commands", "since")

    def __init__(self, since: float) -> None:
        self.commands: list[bytes] = []
        self.since = since


class Call:
    """A command without a reply yet.

    Attributes:
        batch: the write that carries the command.
        event: set when there is a reply; None if no task waits for this call.
        reply: the reply, or the loss of the connection in its place.
    """

    __slots__ = ("batch", "event", "reply")

    def __init__(self, batch: Batch, event: anyio.Event | None) -> None:
        self.batch = batch
        self.event = event
        self.reply: Reply | RedisError = None

    def answer(self, reply: Reply | RedisError) -> None:
        """Store the reply and wake the caller."""
        self.reply = reply
        if self.event is not None:
            self.event.set()


class Multiplexer(ABC):
    """Calls over one connection.

    Replies arrive in the order of the commands, so the deadline of the oldest call covers all:
    one watch task suffices instead of a timer for each call. A cancelled call stays in the queue;
    its reply is discarded.

    Args:
        name: what CLIENT LIST shows.
        max_queued: limit of outstanding calls; beyond it the connection is lost (overloaded).
    """

    def __init__(
        self, address: RedisAddress, *, name: str, timeouts: Timeouts, max_queued: int = 10_000
    ) -> None:
        self._address = address
        self._name = name
        self._timeouts = timeouts
        self._max_queued = max_queued
        # Calls without a reply, oldest first.
        self._pending: deque[Call] = deque()
        # Commands that wait for the next write; None if there are none.
        self._batch: Batch | None = None
        # When data arrived last.
        self._received_at = -math.inf
        # Whether calls are accepted.
        self._usable = False
        # Why the connection ended; None while it has not.
        self._lost: RedisError | None = None
        # The reader, the writer, the watch and the user of the connection.
        self._tasks: TaskGroup | None = None
        # Makes an event without the lookup that `anyio.Event` does at each call.
        self._new_event: Callable[[], anyio.Event] = anyio.Event
        # Events that the idle writer and the idle watch wait for.
        self._wake_writer: anyio.Event | None = None
        self._wake_watch: anyio.Event | None = None

    @property
    def address(self) -> RedisAddress:
        """The server."""
        return self._address

    @property
    def outstanding(self) -> int:
        """Number of calls without a reply."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        """Whether it is connected."""
        return self._usable

    @property
    def loss(self) -> RedisError | None:
        """Why it is lost or closed; None if it is neither."""
        return self._lost

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: the connection failed or was lost; `loss_reason` says why.
        """
        self._new_event = type(anyio.Event())
        try:
            connection = await connect(
                self._address, name=self._name, timeout_s=self._timeouts.connect_s
            )
            try:
                await self._serve(connection, task_status)
            finally:
                await connection.aclose()
        except RedisError as error:
            self._lose(error)
            raise
        finally:
            self._lose(LinkLostError(f"{self._address}: the link was closed"))

    async def _serve(self, connection: RedisConnection, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._usable = True
            tasks.start_soon(self._until_lost, lambda: self._read(connection))
            tasks.start_soon(self._until_lost, lambda: self._write(connection))
            tasks.start_soon(self._until_lost, self._watch)
            await self._until_lost(lambda: self._use(task_status.started))
        # Raised outside of the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    @abstractmethod
    async def _use(self, started: Callable[[], None]) -> None:
        """Prepare the connection, call ``started``, and run until it is lost."""

    @abstractmethod
    def _dispatch(self, replies: list[Reply | RedisError]) -> None:
        """Give replies to their calls, and messages to their receiver.

        Raises:
            InvalidResponse: a reply matches no call.
        """

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except RedisError as error:
            self._lose(error)

    def _lose(self, error: RedisError) -> None:
        """Fail all outstanding calls and end the tasks. Only the first loss counts."""
        if self._lost is not None:
            return
        self._lost = error
        self._usable = False
        pending, self._pending = self._pending, deque()
        for call in pending:
            call.answer(error)
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def _unusable(self) -> RedisError:
        if self._lost is None:
            return LinkLostError(f"{self._address}: not connected yet")
        return again(self._lost)

    def _call(self, command: bytes, event: anyio.Event | None) -> Call:
        """Queue a command.

        Raises:
            RedisError: the connection is lost, or this call exceeds the queue limit.
        """
        pending = self._pending
        if not self._usable:
            raise self._unusable()
        if len(pending) >= self._max_queued:
            self._lose(
                LinkLostError(
                    f"{self._address}: {len(pending)} commands are outstanding", "overloaded"
                )
            )
            raise self._unusable()
        batch = self._batch
        if batch is None:
            batch = self._batch = Batch(anyio.current_time())
            if self._wake_writer is not None:
                self._wake_writer.set()
            if self._wake_watch is not None:
                self._wake_watch.set()
        batch.commands.append(command)
        call = Call(batch, event)
        pending.append(call)
        return call

    async def _read(self, connection: RedisConnection) -> None:
        while True:
            replies = await connection.receive()
            self._received_at = anyio.current_time()
            self._dispatch(replies)

    async def _write(self, connection: RedisConnection) -> None:
        while True:
            batch = self._batch
            if batch is None:
                self._wake_writer = anyio.Event()
                await self._wake_writer.wait()
                continue
            self._batch = None
            batch.since = anyio.current_time()
            data = b"".join(batch.commands)
            batch.commands.clear()
            await connection.send(data)

    async def _watch(self) -> None:
        """Declare the connection lost when Redis is silent or slow.

        It wakes a few times per deadline, however many calls there are.
        """
        while True:
            if not self._pending:
                self._wake_watch = anyio.Event()
                await self._wake_watch.wait()
                continue
            deadline = self._deadline()
            await anyio.sleep_until(deadline)
            # A stall of this process must not count as silence of Redis. So the reader gets its
            # turn first, and data on its way gets as much time as the stall took.
            late = anyio.current_time() - deadline
            await anyio.sleep(min(max(late, 0), self._timeouts.silence_s))
            # Any other deadline, even one in the past, gets all of the above itself.
            if self._deadline() == deadline:
                raise TimeoutError(f"{self._address}: no reply in time")

    def _deadline(self) -> float:
        """When the connection is lost unless data arrives."""
        if not self._pending:
            return math.inf
        since = self._pending[0].batch.since
        timeouts = self._timeouts
        return min(max(since, self._received_at) + timeouts.silence_s, since + timeouts.command_s)
