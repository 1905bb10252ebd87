"""The send queue: a push never blocks, limits hold, frames stay whole and in order."""

from collections.abc import Callable

import trio
from trio.testing import MockClock

from bandsync.counters import Counters
from bandsync.net.outbox import Outbox, OutboxPolicy

FRAME = b"f" * 1000


class Pipe(trio.abc.SendStream):
    """The stream of a peer that accepts a limited number of bytes.

    Attributes:
        sent: the bytes that it has accepted.
        room: how many more bytes it accepts.
        gone: whether sends fail.
    """

    def __init__(self, room: int) -> None:
        self.sent = b""
        self.room = room
        self.gone = False
        self._changed = trio.Event()

    def add_room(self, room: int) -> None:
        self.room += room
        self._changed.set()
        self._changed = trio.Event()

    def send_nowait(self, data: bytes) -> int:
        if self.gone:
            raise BrokenPipeError
        if not self.room:
            raise BlockingIOError
        sent = min(self.room, len(data))
        self.sent += data[:sent]
        self.room -= sent
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = bytes(data)
        while rest:
            if self.gone:
                raise trio.BrokenResourceError
            if self.room:
                rest = rest[self.send_nowait(rest) :]
            else:
                await self._changed.wait()

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("not used")

    async def aclose(self) -> None:
        self.gone = True
        self.add_room(0)


class Box:
    """The owner of an outbox that sends into a `Pipe`."""

    def __init__(
        self, nursery: trio.Nursery, room: int, *, limit: int = 100_000, direct: bool = True
    ) -> None:
        self.pipe = Pipe(room)
        self.counters = Counters()
        self.reports: list[str] = []
        send: Callable[[bytes], int] | None = self.pipe.send_nowait if direct else None
        self.outbox = Outbox(
            self.pipe,
            send,
            policy=OutboxPolicy(limit, 10, self.counters),
            nursery=nursery,
            owner=self,
        )

    def on_slow_consumer(self) -> None:
        self.reports.append("slow")

    def on_broken(self) -> None:
        self.reports.append("broken")


def numbered(count: int) -> list[bytes]:
    return [f"<{number:>8}>".encode() * 100 for number in range(count)]


async def test_peer_that_keeps_up_needs_no_writer_task(nursery: trio.Nursery) -> None:
    box = Box(nursery, 10**9)
    for frame in numbered(50):
        box.outbox.push(frame)
    assert box.pipe.sent == b"".join(numbered(50))
    assert len(nursery.child_tasks) == 0


async def test_backlog_is_sent_whole_and_in_order(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    for direct in (True, False):
        box = Box(nursery, 1234, direct=direct)
        frames = numbered(60)
        for frame in frames:
            box.outbox.push(frame)
        for _ in range(100):
            box.pipe.add_room(777)
            await trio.sleep(0.01)
        await box.outbox.flush()
        assert box.pipe.sent == b"".join(frames)
        assert box.reports == []
        box.outbox.push(b"more")
        await box.outbox.flush()
        assert box.pipe.sent.endswith(b"more")


async def test_volatile_frame_is_dropped_above_its_mark(nursery: trio.Nursery) -> None:
    box = Box(nursery, 0, limit=200_000)
    for _ in range(70):
        box.outbox.push(FRAME)
    box.outbox.push_volatile(b"tick")
    assert box.counters.dropped == 1
    assert box.reports == []


async def test_waiting_volatile_frames_are_dropped_for_others_at_the_limit(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 0, limit=66_000)
    for _ in range(60):
        box.outbox.push_volatile(b"v" * 1000)
    for _ in range(60):
        box.outbox.push(FRAME)
    # The writer task has the first one already; a frame that was started is written to its end.
    assert box.counters.dropped == 59
    assert box.reports == []
    box.pipe.add_room(10**6)
    await box.outbox.flush()
    assert box.pipe.sent == b"v" * 1000 + FRAME * 60


async def test_queue_over_the_limit_reports_a_slow_consumer_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 500, limit=100_000)
    for _ in range(150):
        box.outbox.push(FRAME)
    assert box.reports == ["slow"]
    # Only the close frame follows the frame that was started.
    box.outbox.push_last(b"close")
    box.pipe.add_room(10**6)
    await box.outbox.flush()
    assert box.pipe.sent == FRAME + b"close"


async def test_write_without_progress_times_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 500)
    box.outbox.push(FRAME)
    start = trio.current_time()
    await box.outbox.flush()
    assert trio.current_time() - start == 10
    assert box.reports == ["slow"]
    # Half a frame was sent, so nothing may follow it.
    box.pipe.add_room(10**6)
    box.outbox.push_last(b"close")
    assert box.pipe.sent == FRAME[:500]


async def test_push_to_a_broken_stream_reports_once(nursery: trio.Nursery) -> None:
    box = Box(nursery, 10**6)
    box.pipe.gone = True
    box.outbox.push(FRAME)
    box.outbox.push(FRAME)
    assert box.reports == ["broken"]


async def test_stream_that_breaks_during_a_write_is_reported(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 0)
    box.outbox.push(FRAME)
    await trio.testing.wait_all_tasks_blocked()
    await box.pipe.aclose()
    await box.outbox.flush()
    assert box.reports == ["broken"]
