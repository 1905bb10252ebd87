"""What a link and a subscriber share: calls, answered in order over one connection.

A line is used once: it connects, serves until it is lost or cancelled, and then fails whatever
waits. Whoever wants another connection makes another line.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup, TaskStatus
from redis.exceptions import RedisError, TimeoutError  # noqa: A004

from bandsync.redis_link.connection import RedisConnection, Reply, connect
from bandsync.redis_link.errors import LinkLostError, again
from bandsync.redis_link.redis_address import RedisAddress


class Batch:
    """Commands that leave in one write.

    Attributes:
        since: when the first was queued, and then when they went to the socket.
    """

    __slots__ = ("commands", "since")

    def __init__(self, since: float) -> None:
        self.commands: list[bytes] = []
        self.since = since


class Call:
    """A command that waits for its reply.

    Attributes:
        event: set when there is a reply; None if nobody waits for this very one.
        reply: also the loss, if there will be none.
    """

    __slots__ = ("batch", "event", "reply")

    def __init__(self, batch: Batch, event: anyio.Event | None) -> None:
        self.batch = batch
        self.event = event
        self.reply: Reply | RedisError = None

    def answer(self, reply: Reply | RedisError) -> None:
        """Wake up who waits."""
        self.reply = reply
        if self.event is not None:
            self.event.set()


class Multiplexer(ABC):
    """Calls over one connection.

    Replies come in order, so a deadline for the oldest call is one for all: there is a watch, and
    no timer for each call. What a caller does not wait for any more is answered, and dropped.

    Args:
        name: what CLIENT LIST shows.
        connect_timeout_s: for TCP, TLS and the introduction together.
        command_timeout_s: how old a call may grow once it is on its way.
        silence_s: how long nothing at all may arrive while a call waits.
        max_queued: how many calls may wait.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        name: str,
        connect_timeout_s: float,
        command_timeout_s: float,
        silence_s: float,
        max_queued: int = 10_000,
    ) -> None:
        self._address = address
        self._name = name
        self._connect_timeout_s = connect_timeout_s
        self._command_timeout_s = command_timeout_s
        self._silence_s = silence_s
        self._max_queued = max_queued
        self._pending: deque[Call] = deque()
        self._batch: Batch | None = None
        self._received_at = -math.inf
        self._usable = False
        self._lost: RedisError | None = None
        self._tasks: TaskGroup | None = None
        self._new_event: Callable[[], anyio.Event] = anyio.Event
        # What the writer and the watch sleep on when there is nothing to do.
        self._queued: anyio.Event | None = None
        self._awaited: anyio.Event | None = None

    @property
    def address(self) -> RedisAddress:
        """Where it leads."""
        return self._address

    @property
    def outstanding(self) -> int:
        """How many calls wait for their reply."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        """Whether it is connected."""
        return self._usable

    @property
    def loss(self) -> RedisError | None:
        """Why it is lost, or was closed; None if it is not."""
        return self._lost

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: there is no connection, or no longer; `loss_reason` says why.
        """
        # The class that anyio would look up for each call.
        self._new_event = type(anyio.Event())
        try:
            connection = await connect(
                self._address, name=self._name, timeout_s=self._connect_timeout_s
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
            await self._until_lost(lambda: self._attend(task_status.started))
        # Not raised within the group, which would wrap it.
        if self._lost is not None:
            raise self._lost

    @abstractmethod
    async def _attend(self, started: Callable[[], None]) -> None:
        """Make it ready, call ``started``, and do what is to be done while it is in use."""

    @abstractmethod
    def _take(self, replies: list[Reply | RedisError]) -> None:
        """Pass on what has arrived.

        Raises:
            InvalidResponse: it does not fit.
        """

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except RedisError as error:
            self._lose(error)

    def _lose(self, error: RedisError) -> None:
        """Fail all that waits and end the tasks. Only the first loss counts."""
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
            RedisError: the line is lost, or is so now because too much waits.
        """
        pending = self._pending
        if not self._usable:
            raise self._unusable()
        if len(pending) >= self._max_queued:
            self._lose(
                LinkLostError(f"{self._address}: {len(pending)} commands wait", "overloaded")
            )
            raise self._unusable()
        batch = self._batch
        if batch is None:
            batch = self._batch = Batch(anyio.current_time())
            if self._queued is not None:
                self._queued.set()
            if self._awaited is not None:
                self._awaited.set()
        batch.commands.append(command)
        call = Call(batch, event)
        pending.append(call)
        return call

    async def _read(self, connection: RedisConnection) -> None:
        while True:
            replies = await connection.receive()
            self._received_at = anyio.current_time()
            self._take(replies)

    async def _write(self, connection: RedisConnection) -> None:
        while True:
            batch = self._batch
            if batch is None:
                self._queued = anyio.Event()
                await self._queued.wait()
                continue
            self._batch = None
            batch.since = anyio.current_time()
            data = b"".join(batch.commands)
            batch.commands.clear()
            await connection.send(data)

    async def _watch(self) -> None:
        """Declare the line lost when Redis is silent or slow.

        Looks at most a few times per deadline, however many calls there are.
        """
        while True:
            if not self._pending:
                self._awaited = anyio.Event()
                await self._awaited.wait()
                continue
            deadline = self._deadline()
            await anyio.sleep_until(deadline)
            # We may have been away longer than Redis was silent. So what has arrived is read
            # first, and what is on its way gets as long as we were away.
            late = anyio.current_time() - deadline
            await anyio.sleep(min(max(late, 0), self._silence_s))
            # A later deadline is another matter, even if it has passed: it gets all of the above.
            if self._deadline() == deadline:
                raise TimeoutError(f"{self._address}: no reply in time")

    def _deadline(self) -> float:
        """When the line is lost unless something arrives."""
        if not self._pending:
            return math.inf
        since = self._pending[0].batch.since
        return min(max(since, self._received_at) + self._silence_s, since + self._command_timeout_s)
