"""The write side of one connection: never blocks who pushes, bounded in bytes.

While the peer keeps up, a push is one send. When it does not, frames wait in a backlog that a
writer task empties. Past `VOLATILE_LIMIT_BYTES` volatile frames are dropped, and `caught_up` makes
who asks for more wait; past the limit the peer is too slow and is let go. A snapshot may be larger
than the limit: the latest one does not count.
"""

from collections import deque
from collections.abc import Callable

import trio

from bandsync.counters import Counters

VOLATILE_LIMIT_BYTES = 65_536
_BATCH_BYTES = 16_384


class OutboxPolicy:
    """What all outboxes of a server have in common.

    Args:
        limit_bytes: how much may wait for one peer.
        write_timeout_s: how long a write may go without progress, seconds.
    """

    __slots__ = ("counters", "limit_bytes", "volatile_limit_bytes", "write_timeout_s")

    def __init__(self, limit_bytes: int, write_timeout_s: float, counters: Counters) -> None:
        self.limit_bytes = limit_bytes
        self.volatile_limit_bytes = min(VOLATILE_LIMIT_BYTES, limit_bytes)
        self.write_timeout_s = write_timeout_s
        self.counters = counters


class Outbox:
    """Takes whole frames, in order; the only one who writes to its stream.

    Args:
        stream: where the frames go.
        send_nowait: sends what the kernel takes at once and returns how much that was; None when
            the stream cannot (TLS).
        nursery: parent of the writer task, which exists only while there is a backlog.
        on_slow: called once, when the peer is too slow to be served on.
        on_broken: called once, when the connection turns out to be gone.
    """

    __slots__ = (
        "_allowance",
        "_backlog",
        "_caught_up",
        "_dead",
        "_flushed",
        "_idle",
        "_nursery",
        "_on_broken",
        "_on_slow",
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
        on_slow: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._send_nowait = send_nowait or _take_nothing
        self._policy = policy
        self._nursery = nursery
        self._on_slow = on_slow
        self._on_broken = on_broken
        # Made when first needed: most peers keep up all their life.
        self._backlog: deque[tuple[bytes, bool]] | None = None
        self._flushed: trio.Event | None = None
        self._caught_up: trio.Event | None = None
        # How much of the backlog is the latest snapshot.
        self._allowance = 0
        # The end of a frame whose beginning the kernel has already.
        self._rest = b""
        self._size = 0
        self._writing = False
        self._stopped = False
        self._dead = False
        # None of the three: what nearly every push finds, and all that it looks at.
        self._idle = True

    def push(self, frames: bytes) -> None:
        """Send ``frames``, or queue them. Does nothing after `stop`."""
        if self._idle:
            self._send(frames)
        elif not self._stopped and not self._dead:
            self._queue(frames, volatile=False)

    def push_volatile(self, frames: bytes) -> None:
        """The same for frames that nobody misses when the peer is slow."""
        if self._idle:
            self._send(frames)
        elif self._size > self._policy.volatile_limit_bytes:
            self._policy.counters.dropped += 1
        elif not self._stopped and not self._dead:
            self._queue(frames, volatile=True)

    def push_snapshot(self, frames: bytes) -> None:
        """The same as `push` for a frame that may be larger than the limit."""
        self._allowance = len(frames)
        self.push(frames)
        if self._idle:
            self._allowance = 0

    def push_last(self, frames: bytes) -> None:
        """The same as `push`, also after `stop`: for what trio-websocket sends."""
        if self._writing:
            self._queue(frames, volatile=False)
        elif not self._dead:
            self._send(frames)

    def release(self) -> None:
        """Tell nobody anything any more."""
        self._on_slow = self._on_broken = _nobody

    def stop(self) -> None:
        """Take no more frames but by `push_last`; volatile ones that wait are dropped."""
        self._stopped = True
        self._idle = False
        self._drop(volatile_only=True)

    async def flush(self) -> None:
        """Wait until all that was pushed is with the kernel. Who calls sets the deadline."""
        if self._writing:
            if self._flushed is None:
                self._flushed = trio.Event()
            await self._flushed.wait()

    @property
    def behind(self) -> bool:
        """Whether so much waits for the peer that it should not ask for more."""
        return self._writing and self._size > self._policy.volatile_limit_bytes

    async def caught_up(self) -> None:
        """Wait until the peer is no longer `behind`; the write timeout ends that at the latest."""
        while self.behind:
            if self._caught_up is None:
                self._caught_up = trio.Event()
            await self._caught_up.wait()

    def _send(self, frames: bytes) -> None:
        """Send at once; what the kernel does not take is left to the writer task."""
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
                    # What is being written is written to its end, so that the stream stays
                    # whole and a close frame can follow.
                    self._drop(volatile_only=False)
                    self.stop()
                    self._on_slow()
                return
        self._backlog.append((frames, volatile))
        self._size += len(frames)

    def _drop(self, *, volatile_only: bool) -> None:
        """Drop frames that wait, and count those that were volatile."""
        kept: deque[tuple[bytes, bool]] = deque()
        for frames, volatile in self._backlog or ():
            if volatile_only and not volatile:
                kept.append((frames, volatile))
            else:
                self._size -= len(frames)
                self._policy.counters.dropped += volatile
        self._backlog = kept

    async def _write(self) -> None:
        """Empty the backlog."""
        try:
            while chunk := self._take():
                with trio.move_on_after(self._policy.write_timeout_s) as deadline:
                    await self._stream.send_all(chunk)
                if deadline.cancelled_caught:
                    # A part of a frame may be out: nothing can follow it.
                    self._dead = True
                    self._on_slow()
                    return
                self._size -= len(chunk)
                if self._size <= self._policy.volatile_limit_bytes:
                    self._release()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._broken()
        finally:
            self._writing = False
            self._idle = not self._stopped and not self._dead
            self._size = 0
            self._allowance = 0
            self._release()
            if self._flushed is not None:
                self._flushed.set()
                self._flushed = None

    def _take(self) -> bytes:
        """What to write next: a piece small enough that a slow peer shows progress."""
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

    def _release(self) -> None:
        if self._caught_up is not None:
            self._caught_up.set()
            self._caught_up = None

    def _broken(self) -> None:
        if not self._dead:
            self._dead = True
            self._idle = False
            self._on_broken()


def _take_nothing(_: bytes) -> int:
    """What a stream does that cannot send without waiting."""
    return 0


def _nobody() -> None:
    """Nobody wants to know."""
