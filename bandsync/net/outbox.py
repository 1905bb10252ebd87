"""The send queue of one connection: a push never blocks, the queue is bounded in bytes.

While the peer keeps up, a push is one send. Otherwise frames wait in a backlog, which a writer
task drains. There are two high-water marks:

- Above `VOLATILE_LIMIT_BYTES`, volatile frames are dropped, and `caught_up` applies backpressure to
  the peer's requests.
- Above the limit (`OUTBOX_LIMIT_BYTES`), the peer is a slow consumer and is disconnected. The
  latest snapshot does not count towards the limit, because it may be larger.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from bandsync.counters import Counters

VOLATILE_LIMIT_BYTES = 65_536
_BATCH_BYTES = 16_384


class OutboxPolicy:
    """Limits that all outboxes of a server share.

    Args:
        limit_bytes: the most that may wait for one peer.
        write_timeout_s: how long a write may go without progress, seconds.
    """

    __slots__ = ("counters", "limit_bytes", "volatile_limit_bytes", "write_timeout_s")

    def __init__(self, limit_bytes: int, write_timeout_s: float, counters: Counters) -> None:
        self.limit_bytes = limit_bytes
        self.volatile_limit_bytes = min(VOLATILE_LIMIT_BYTES, limit_bytes)
        self.write_timeout_s = write_timeout_s
        self.counters = counters


class OutboxOwner(Protocol):
    """The connection that an outbox belongs to."""

    def on_slow_consumer(self) -> None:
        """Called once, when the limit is exceeded or a write makes no progress."""

    def on_broken(self) -> None:
        """Called once, when a send fails because the connection is gone."""


class Outbox:
    """Sends whole frames in order. Nothing else writes to its stream.

    Args:
        stream: where the frames go.
        send_nowait: sends what the kernel takes at once and returns how many bytes that was; None
            when the stream cannot (TLS).
        nursery: parent of the writer task, which exists only while there is a backlog.
    """

    __slots__ = (
        "_allowance",
        "_backlog",
        "_caught_up",
        "_dead",
        "_flushed",
        "_idle",
        "_nursery",
        "_owner",
        "_policy",
        "_rest",
        "_send_nowait",
        "_size",
        "_stopped",
        "_stream",
        "_writing",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        send_nowait: Callable[[bytes], int] | None,
        *,
        policy: OutboxPolicy,
        nursery: trio.Nursery,
        owner: OutboxOwner,
    ) -> None:
        self._stream = stream
        self._send_nowait = send_nowait or _send_nothing
        self._policy = policy
        self._nursery = nursery
        self._owner: OutboxOwner | None = owner
        # Created when first needed: most peers never have a backlog.
        self._backlog: deque[tuple[bytes, bool]] | None = None  # frames, and whether volatile
        self._flushed: trio.Event | None = None  # set when the backlog is empty
        self._caught_up: trio.Event | None = None  # set when `behind` becomes false
        self._allowance = 0  # bytes of the latest snapshot, beyond the limit
        self._rest = b""  # the end of a frame whose start the kernel has already
        self._size = 0  # bytes that wait, `_rest` included
        self._writing = False  # the writer task exists
        self._stopped = False  # `stop` was called
        self._dead = False  # nothing can be sent any more
        # None of the three. Nearly every push finds this true and reads nothing else.
        self._idle = True

    def push(self, frames: bytes) -> None:
        """Send ``frames``, or queue them. Does nothing after `stop`."""
        if self._idle:
            self._send(frames)
        elif not self._stopped and not self._dead:
            self._queue(frames, volatile=False)

    def push_volatile(self, frames: bytes) -> None:
        """Send ``frames``, or drop them when the peer is slow."""
        if self._idle:
            self._send(frames)
        elif self._size > self._policy.volatile_limit_bytes:
            self._policy.counters.dropped += 1
        elif not self._stopped and not self._dead:
            self._queue(frames, volatile=True)

    def push_snapshot(self, frames: bytes) -> None:
        """Send or queue a snapshot, which may be larger than the limit."""
        self._allowance = len(frames)
        self.push(frames)
        if self._idle:
            self._allowance = 0

    def push_last(self, frames: bytes) -> None:
        """Send or queue ``frames`` of trio-websocket, also after `stop`."""
        if self._writing:
            self._queue(frames, volatile=False)
        elif not self._dead:
            self._send(frames)

    def release(self) -> None:
        """Drop the reference to the owner: it is half of a reference cycle."""
        self._owner = None

    def stop(self) -> None:
        """Accept no more frames except by `push_last`, and drop volatile ones that wait."""
        self._stopped = True
        self._idle = False
        self._drop(volatile_only=True)

    async def flush(self) -> None:
        """Wait until the kernel has everything that was pushed. The caller sets the deadline."""
        if self._writing:
            if self._flushed is None:
                self._flushed = trio.Event()
            await self._flushed.wait()

    @property
    def behind(self) -> bool:
        """Whether the queue is above the mark at which requests of the peer must wait."""
        return self._writing and self._size > self._policy.volatile_limit_bytes

    async def caught_up(self) -> None:
        """Wait until the peer is no longer `behind`; at most until the write timeout."""
        while self.behind:
            if self._caught_up is None:
                self._caught_up = trio.Event()
            await self._caught_up.wait()

    def _send(self, frames: bytes) -> None:
        """Send at once, and leave the rest to the writer task."""
        try:
            sent = self._send_nowait(frames)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._broken()
            return
        if sent != len(frames):
            self._rest = frames[sent:]
            self._size += len(self._rest)
            self._writing = True
            self._idle = False
            self._nursery.start_soon(self._write)

    def _queue(self, frames: bytes, *, volatile: bool) -> None:
        if self._backlog is None:
            self._backlog = deque()
        limit = self._policy.limit_bytes + self._allowance
        if self._size + len(frames) > limit:
            self._drop(volatile_only=True)
            if self._size + len(frames) > limit:
                if not self._stopped:
                    # The frame that has been started is still written to its end. The stream
                    # stays intact, and a close frame can follow.
                    self._drop(volatile_only=False)
                    self.stop()
                    if self._owner is not None:
                        self._owner.on_slow_consumer()
                return
        self._backlog.append((frames, volatile))
        self._size += len(frames)

    def _drop(self, *, volatile_only: bool) -> None:
        """Drop frames that wait, and count the volatile ones."""
        kept: deque[tuple[bytes, bool]] = deque()
        for frames, volatile in self._backlog or ():
            if volatile_only and not volatile:
                kept.append((frames, volatile))
            else:
                self._size -= len(frames)
                self._policy.counters.dropped += volatile
        self._backlog = kept

    async def _write(self) -> None:
        """Drain the backlog."""
        try:
            while chunk := self._next_chunk():
                with trio.move_on_after(self._policy.write_timeout_s) as deadline:
                    await self._stream.send_all(chunk)
                if deadline.cancelled_caught:
                    # A part of a frame may have been sent, so nothing can follow it.
                    self._dead = True
                    if self._owner is not None:
                        self._owner.on_slow_consumer()
                    return
                self._size -= len(chunk)
                if self._size <= self._policy.volatile_limit_bytes:
                    self._signal_caught_up()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._broken()
        finally:
            self._writing = False
            self._idle = not self._stopped and not self._dead
            self._size = 0
            self._allowance = 0
            self._signal_caught_up()
            if self._flushed is not None:
                self._flushed.set()
                self._flushed = None

    def _next_chunk(self) -> bytes:
        """The next bytes to write: few enough that a slow peer shows progress."""
        if not self._rest:
            batch: list[bytes] = []
            size = 0
            while self._backlog and size < _BATCH_BYTES:
                frames, _ = self._backlog.popleft()
                batch.append(frames)
                size += len(frames)
            self._rest = b"".join(batch)
        chunk, self._rest = self._rest[:_BATCH_BYTES], self._rest[_BATCH_BYTES:]
        return chunk

    def _signal_caught_up(self) -> None:
        if self._caught_up is not None:
            self._caught_up.set()
            self._caught_up = None

    def _broken(self) -> None:
        if not self._dead:
            self._dead = True
            self._idle = False
            if self._owner is not None:
                self._owner.on_broken()


def _send_nothing(_: bytes) -> int:
    """`send_nowait` of a stream that cannot send without waiting."""
    return 0
