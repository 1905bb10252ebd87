"""The write side of one connection: never blocks who pushes, bounded in bytes.

While the peer keeps up, a push is one send. When it does not, frames wait in a backlog that a
writer task empties. Past `VOLATILE_LIMIT_BYTES` volatile frames are dropped; past the limit the
peer is too slow and is let go.
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
        "_backlog",
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

    def push_last(self, frames: bytes) -> None:
        """The same as `push`, also after `stop`: for what trio-websocket sends."""
        if self._writing:
            self._queue(frames, volatile=False)
        elif not self._dead:
            self._send(frames)

    def stop(self) -> None:
        """Take no more frames but by `push_last`, and drop those that wait.

        What is being written is written to its end, so that the stream stays whole.
        """
        self._stopped = True
        self._idle = False
        if self._backlog:
            self._size -= sum(len(frames) for frames, _ in self._backlog)
            self._backlog.clear()

    async def flush(self) -> None:
        """Wait until all that was pushed is with the kernel. Who calls sets the deadline."""
        if self._writing:
            if self._flushed is None:
                self._flushed = trio.Event()
            await self._flushed.wait()

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
        if self._size + len(frames) > self._policy.limit_bytes:
            self._shed()
            if self._size + len(frames) > self._policy.limit_bytes and not self._stopped:
                self.stop()
                self._on_slow()
                return
        self._backlog.append((frames, volatile))
        self._size += len(frames)

    def _shed(self) -> None:
        """Drop what is volatile."""
        assert self._backlog is not None
        kept = deque(entry for entry in self._backlog if not entry[1])
        self._policy.counters.dropped += len(self._backlog) - len(kept)
        self._backlog = kept
        self._size = len(self._rest) + sum(len(frames) for frames, _ in kept)

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
                self._size = max(0, self._size - len(chunk))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._broken()
        finally:
            self._writing = False
            self._idle = not self._stopped and not self._dead
            if self._flushed is not None:
                self._flushed.set()
                self._flushed = None

    def _take(self) -> bytes:
        """What to write next: whole frames, as many as make a good batch."""
        if self._rest:
            chunk = self._rest
            self._rest = b""
            return chunk
        batch: list[bytes] = []
        size = 0
        while self._backlog and size < _BATCH_BYTES:
            frames, _ = self._backlog.popleft()
            batch.append(frames)
            size += len(frames)
        return b"".join(batch)

    def _broken(self) -> None:
        if not self._dead:
            self._dead = True
            self._idle = False
            self._on_broken()


def _take_nothing(_: bytes) -> int:
    """What a stream does that cannot send without waiting."""
    return 0
