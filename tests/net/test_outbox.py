"""The outbox: never blocks, stays within its bounds, keeps frames whole and in order."""

from collections.abc import Callable

import trio
from trio.testing import MockClock

from bandsync.counters import Counters
from bandsync.net.outbox import Outbox, OutboxPolicy

FRAME = b"f" * 1000


class Pipe(trio.abc.SendStream):
    """A peer that takes as many bytes as it is told to.

    Attributes:
        taken: what it took.
        room: how many bytes it takes more.
    """

    def __init__(self, room: int) -> None:
        self.taken = b""
        self.room = room
        self.gone = False
        self._changed = trio.Event()

    def open_up(self, room: int) -> None:
        self.room += room
        self._changed.set()
        self._changed = trio.Event()

    def send_nowait(self, data: bytes) -> int:
        if self.gone:
            raise BrokenPipeError
        if not self.room:
            raise BlockingIOError
        sent = min(self.room, len(data))
        self.taken += data[:sent]
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
        self.open_up(0)


class Box:
    """An outbox into a `Pipe`, and what it reported."""

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


async def test_a_peer_that_keeps_up_costs_no_task(nursery: trio.Nursery) -> None:
    box = Box(nursery, 10**9)
    for frame in numbered(50):
        box.outbox.push(frame)
    assert box.pipe.taken == b"".join(numbered(50))
    assert len(nursery.child_tasks) == 0


async def test_the_backlog_comes_out_whole_and_in_order(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    for direct in (True, False):
        box = Box(nursery, 1234, direct=direct)
        frames = numbered(60)
        for frame in frames:
            box.outbox.push(frame)
        for _ in range(100):
            box.pipe.open_up(777)
            await trio.sleep(0.01)
        await box.outbox.flush()
        assert box.pipe.taken == b"".join(frames)
        assert box.reports == []
        box.outbox.push(b"more")
        await box.outbox.flush()
        assert box.pipe.taken.endswith(b"more")


async def test_volatile_frames_go_first(nursery: trio.Nursery) -> None:
    box = Box(nursery, 0, limit=200_000)
    for _ in range(70):
        box.outbox.push(FRAME)
    box.outbox.push_volatile(b"tick")
    assert box.counters.dropped == 1
    assert box.reports == []


async def test_what_is_volatile_makes_room_for_what_is_not(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 0, limit=66_000)
    for _ in range(60):
        box.outbox.push_volatile(b"v" * 1000)
    for _ in range(60):
        box.outbox.push(FRAME)
    # The first is with the writer already; a frame that was begun is written to its end.
    assert box.counters.dropped == 59
    assert box.reports == []
    box.pipe.open_up(10**6)
    await box.outbox.flush()
    assert box.pipe.taken == b"v" * 1000 + FRAME * 60


async def test_over_the_limit_the_peer_is_let_go_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 500, limit=100_000)
    for _ in range(150):
        box.outbox.push(FRAME)
    assert box.reports == ["slow"]
    # The close frame follows the frame that was begun, and nothing else.
    box.outbox.push_last(b"close")
    box.pipe.open_up(10**6)
    await box.outbox.flush()
    assert box.pipe.taken == FRAME + b"close"


async def test_a_write_without_progress_has_a_deadline(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 500)
    box.outbox.push(FRAME)
    start = trio.current_time()
    await box.outbox.flush()
    assert trio.current_time() - start == 10
    assert box.reports == ["slow"]
    # Half a frame is out: nothing may follow it.
    box.pipe.open_up(10**6)
    box.outbox.push_last(b"close")
    assert box.pipe.taken == FRAME[:500]


async def test_a_peer_that_is_gone(nursery: trio.Nursery) -> None:
    box = Box(nursery, 10**6)
    box.pipe.gone = True
    box.outbox.push(FRAME)
    box.outbox.push(FRAME)
    assert box.reports == ["broken"]


async def test_a_peer_that_goes_while_it_is_written_to(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    box = Box(nursery, 0)
    box.outbox.push(FRAME)
    await trio.testing.wait_all_tasks_blocked()
    await box.pipe.aclose()
    await box.outbox.flush()
    assert box.reports == ["broken"]
