"""Workers pass connections on to each other, so that a band is on one of them."""

import contextlib
import itertools
import math
import os
import resource
import signal
import socket
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import httpx
import pytest
import trio
import trustme
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from bandsync.handoff import channel as way
from bandsync.handoff import peers as neighbours
from bandsync.handoff.channel import ANSWER_S, SHUN_S
from bandsync.handoff.peers import HandoffPeers
from bandsync.handoff.rendezvous import preference
from bandsync.workers import supervisor as workers
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.servers import PATIENCE_S, Musician, musician
from tests.support.worker_groups import Diary, WorkerGroup, upgrade, working

SESSIONS = [f"song-{number}" for number in range(8)]
NAMES = st.text(max_size=64)


@given(NAMES, st.integers(1, 20))
def test_all_are_preferred_in_some_order(session_id: str, workers: int) -> None:
    assert sorted(preference(session_id, workers)) == list(range(1, workers + 1))


@given(NAMES, st.integers(2, 20))
def test_of_one_more_only_its_own_sessions_move(session_id: str, workers: int) -> None:
    without = [number for number in preference(session_id, workers) if number != workers]
    assert preference(session_id, workers - 1) == without


def test_sessions_are_spread_evenly() -> None:
    chosen = Counter(preference(f"song-{number}", 4)[0] for number in range(4000))
    second = Counter(
        preference(f"song-{number}", 4)[1]
        for number in range(4000)
        if preference(f"song-{number}", 4)[0] == 1
    )
    assert all(900 < chosen[number] < 1100 for number in (1, 2, 3, 4))
    assert all(chosen[1] / 4 < second[number] < chosen[1] / 2 for number in (2, 3, 4))


def session_for(worker: int, workers: int = 2) -> str:
    return next(name for name in SESSIONS if preference(name, workers)[0] == worker)


class Taker:
    """One of a crew in this process, and what was passed on to it."""

    def __init__(self, crew: str, worker: int, workers: int = 2) -> None:
        self.diary = Diary()
        self.hosted: set[str] = set()
        self.neighbours = HandoffPeers(
            crew, worker, workers, lambda: self.hosted, self.diary.logger
        )
        self.sockets: list[socket.socket] = []
        self.taken: list[bytes] = []
        self.has_room = True
        self._news = trio.Event()
        self._stack = ExitStack()

    async def run(
        self, *, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self._stack, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.neighbours.run, self._take, lambda: self.has_room)
                task_status.started(scope)

    def _take(self, sock: socket.socket, received: bytes) -> None:
        self.sockets.append(self._stack.enter_context(sock))
        self.taken.append(received)
        self._news.set()

    async def until(self, count: int) -> None:
        with trio.fail_after(PATIENCE_S):
            while len(self.taken) < count:
                self._news = trio.Event()
                await self._news.wait()


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end, and ours."""
    client, accepted = socket.socketpair()
    client.settimeout(PATIENCE_S)
    accepted.setblocking(False)
    with client, accepted:
        yield client, accepted


async def passed(taker: Taker, session_id: str, received: bytes = b"head") -> bool:
    """Whether a new connection was passed on; its end here is closed, as it must be."""
    with connection() as (_, accepted):
        return await taker.neighbours.pass_on(session_id, accepted, received)


@pytest.fixture
def crew() -> str:
    return f"test-{os.getpid()}-{os.urandom(4).hex()}"


async def test_a_connection_arrives_with_what_was_read(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    # Both small and as large as they come.
    for number, received in enumerate((b"GET /ws/song", bytes(range(256)) * 64 + b"x"), 1):
        with connection() as (client, accepted):
            assert await one.neighbours.pass_on(session_for(2), accepted, received)
            accepted.close()
            await two.until(number)
            assert two.taken[-1] == received
            two.sockets[-1].sendall(b"hello")
            assert await trio.to_thread.run_sync(client.recv, 100) == b"hello"


async def test_who_is_the_one_keeps_it(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert not await passed(one, session_for(1))
    assert two.taken == []


async def test_the_next_one_takes_it_when_the_first_is_away(
    nursery: trio.Nursery, crew: str
) -> None:
    one, two, three = (Taker(crew, number, 3) for number in (1, 2, 3))
    await nursery.start(one.run)
    order = {tuple(preference(name, 3)): name for name in map(str, range(100))}
    assert not await passed(one, order[2, 3, 1])
    gone = await nursery.start(three.run)
    assert await passed(one, order[2, 3, 1])
    # Before those whom the session would rather have less, oneself comes.
    assert not await passed(one, order[2, 1, 3])
    await nursery.start(two.run)
    assert await passed(one, order[2, 3, 1])
    gone.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert await passed(one, order[3, 2, 1])
    await two.until(2)
    await three.until(1)
    assert (len(two.taken), len(three.taken)) == (2, 1)


async def test_who_was_replaced_is_found_at_once(nursery: trio.Nursery, crew: str) -> None:
    one = Taker(crew, 1)
    await nursery.start(one.run)
    for _ in range(3):
        two = Taker(crew, 2)
        scope = await nursery.start(two.run)
        assert await passed(one, session_for(2))
        await two.until(1)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert not await passed(one, session_for(2))


async def test_who_has_a_band_keeps_it(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    one.hosted = {session_for(2)}
    assert not await passed(one, session_for(2))
    # Unless there is no place for another.
    with connection() as (_, accepted):
        assert await one.neighbours.pass_on(session_for(2), accepted, b"head", full=True)


async def test_who_comes_back_passes_its_bands_on_to_where_they_are(
    nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    one.hosted = {session_for(1), session_for(2)}
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await passed(two, session_for(2), b"accepted")
    with connection() as (_, accepted):
        assert await two.neighbours.pass_back(session_for(2), accepted, b"passed on")
        # And no further.
        assert not await one.neighbours.pass_back(session_for(2), accepted, b"passed on")
    await one.until(2)
    assert one.taken == [b"accepted", b"passed on"]
    # The session that lives there is no other.
    assert await passed(two, session_for(1))
    # Once some of them are here, or all have left there, it is as if nothing had been.
    two.hosted = {session_for(2)}
    assert not await passed(two, session_for(2))
    two.hosted = set()
    one.hosted = set()
    assert not await passed(two, session_for(2))
    one.hosted = {session_for(2)}
    assert not await passed(two, session_for(2))


async def test_many_who_come_at_once_all_come_to_where_their_band_is(
    nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    one.hosted = {session_for(2)}
    await nursery.start(one.run)
    await nursery.start(two.run)
    results: list[bool] = []

    async def one_of_many() -> None:
        results.append(await passed(two, session_for(2)))

    async with trio.open_nursery() as many:
        # More than can wait to be let in by the neighbour.
        for _ in range(300):
            many.start_soon(one_of_many)
    assert results == [True] * 300
    await one.until(300)


async def test_silence_does_not_say_that_a_band_has_left(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    one.hosted = {session_for(2)}
    gone = await nursery.start(one.run)
    await nursery.start(two.run)
    gone.cancel()
    await trio.testing.wait_all_tasks_blocked()
    async with hanging(crew, 1):
        assert not await passed(two, session_for(2))
    again = Taker(crew, 1)
    again.hosted = one.hosted
    await nursery.start(again.run)
    await trio.sleep(SHUN_S)
    assert await passed(two, session_for(2))


async def test_a_stranger_who_answers_gets_nothing(
    nursery: trio.Nursery, crew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Taker(crew, 1)
    await nursery.start(one.run)
    monkeypatch.setattr(way, "is_ours", lambda sock: False)
    heard: list[bytes] = []

    async def answer(listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            inlet, _ = listener.accept()
            with inlet:
                with contextlib.suppress(BrokenPipeError):  # It has hung up.
                    inlet.send(b"!")
                await trio.lowlevel.wait_readable(inlet)
                heard.append(inlet.recv(100))

    async with hanging(crew, 2) as listener, trio.open_nursery() as answering:
        answering.start_soon(answer, listener)
        assert not await passed(one, session_for(2))
        await trio.testing.wait_all_tasks_blocked()
        assert set(heard) == {b""}
        answering.cancel_scope.cancel()


async def test_questions_without_meaning_end_the_way(nursery: trio.Nursery, crew: str) -> None:
    one = Taker(crew, 1)
    one.hosted = {session_for(1)}
    await nursery.start(one.run)
    for question, answer in ((b"away " + b"9" * 5000, b"[]"), (b"away x", b"[]"), (b"away", b"")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.settimeout(PATIENCE_S)
            other.connect(way.address_of(crew, 1))
            other.send(question)
            assert await trio.to_thread.run_sync(other.recv, 100) == answer


async def test_where_a_band_was_and_nobody_is_it_is_not_looked_for(
    nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    one.hosted = {session_for(2)}
    gone = await nursery.start(one.run)
    await nursery.start(two.run)
    gone.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert not await passed(two, session_for(2))


async def test_for_a_silent_one_the_start_does_not_wait_for_long(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one = Taker(crew, 1)
    async with hanging(crew, 2):
        began = trio.current_time()
        await nursery.start(one.run)
        assert trio.current_time() - began <= ANSWER_S


async def test_an_answer_without_meaning_is_none(nursery: trio.Nursery, crew: str) -> None:
    one = Taker(crew, 1)

    async def answer(listener: socket.socket) -> None:
        await trio.lowlevel.wait_readable(listener)
        inlet, _ = listener.accept()
        with inlet:
            inlet.send(b'{"no": "list"}')

    async with hanging(crew, 2) as listener:
        nursery.start_soon(answer, listener)
        await nursery.start(one.run)
        assert not await passed(one, session_for(1))


async def test_who_leaves_takes_what_was_passed_on_before(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    for number in range(5):
        assert await passed(one, session_for(2), b"%d" % number)
    # The last of them is still in the kernel: nobody else has run since.
    assert len(two.taken) < 5
    two.neighbours.leave()
    assert not await passed(one, session_for(2))
    await two.until(5)
    assert two.taken == [b"0", b"1", b"2", b"3", b"4"]
    # Its own connections it can still pass on.
    assert await passed(two, session_for(1))


@pytest.mark.parametrize("passes", range(6))
async def test_who_leaves_hangs_up_on_all_who_got_through(
    nursery: trio.Nursery, crew: str, passes: int
) -> None:
    """However far it has come with them."""
    two = Taker(crew, 2)
    await nursery.start(two.run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(way.address_of(crew, 2))
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        two.neighbours.leave()
        with pytest.raises(ConnectionError):
            other.send(b"?")


async def test_who_leaves_while_it_is_short_of_descriptors(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    two = Taker(crew, 2)
    await nursery.start(two.run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        with no_more_descriptors():
            other.connect(way.address_of(crew, 2))
            await trio.sleep(1)
            # Said once, not whenever it is tried.
            assert len(two.diary.all("accept.failed")) == 1
        two.neighbours.leave()
        with socket.socket() as closed:
            pass
        # Trio does not forget who waited for a socket that was closed before.
        with pytest.raises(ValueError, match="negative"):
            await trio.lowlevel.wait_readable(closed)
        await trio.sleep(1)


@asynccontextmanager
async def hanging(crew: str, worker: int) -> AsyncIterator[socket.socket]:
    """Listens, as the kernel does for a process that was stopped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        listener.bind(way.address_of(crew, worker))
        listener.listen(16)
        yield listener


async def test_for_a_silent_one_nobody_waits_long(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    async with hanging(crew, 2) as listener:
        began = trio.current_time()
        results: list[bool] = []

        async def one_of_many() -> None:
            results.append(await passed(one, session_for(2)))

        async with trio.open_nursery() as many:
            for _ in range(100):
                many.start_soon(one_of_many)
        assert results == [False] * 100
        assert trio.current_time() - began == pytest.approx(ANSWER_S)
        assert len(one.diary.all("neighbour.silent", neighbour=2)) == 1
        # For a while nobody asks.
        assert not await passed(one, session_for(2))
        assert trio.current_time() - began == pytest.approx(ANSWER_S)
        waiting, _ = listener.accept()
        waiting.close()
        with pytest.raises(BlockingIOError):
            listener.accept()
    await nursery.start(two.run)
    await trio.sleep(SHUN_S)
    assert await passed(one, session_for(2))


async def test_however_many_come_at_once_all_are_passed_on(
    mock_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)

    async def be_busy() -> None:
        """Each pass of the loop takes longer than an answer is good for."""
        while True:
            mock_clock.jump(1.5 * way.FRESH_S)
            await trio.lowlevel.checkpoint()

    nursery.start_soon(be_busy)
    results: list[bool] = []

    async def one_of_many() -> None:
        results.append(await passed(one, session_for(2)))

    # More than fit into the socket between the two.
    async with trio.open_nursery() as many:
        for _ in range(500):
            many.start_soon(one_of_many)
    assert results == [True] * 500
    await two.until(500)
    assert not one.diary.all("neighbour.silent")


async def test_who_is_full_is_left_alone_until_it_has_room(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await passed(one, session_for(2))
    two.has_room = False
    await trio.sleep(way.FRESH_S)
    assert not await passed(one, session_for(2))
    two.has_room = True
    assert not await passed(one, session_for(2))
    await trio.sleep(way.FRESH_S)
    assert await passed(one, session_for(2))
    await two.until(2)
    assert not one.diary.all("neighbour.silent")


async def test_who_is_full_itself_passes_on_to_any(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with connection() as (_, accepted):
        assert await one.neighbours.pass_on(session_for(1), accepted, b"head", full=True)
        await two.until(1)
        two.neighbours.leave()
        assert not await one.neighbours.pass_on(session_for(1), accepted, b"head", full=True)


async def test_out_of_descriptors_is_full(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with connection() as (_, accepted):
        # The ways are there, and then nothing more.
        assert await one.neighbours.pass_on(session_for(2), accepted, b"head")
        await two.until(1)
        await trio.sleep(way.FRESH_S)
        with no_more_descriptors():
            assert not await one.neighbours.pass_on(session_for(2), accepted, b"head")
        await trio.sleep(way.FRESH_S)
        assert await one.neighbours.pass_on(session_for(2), accepted, b"head")
        # What was on its way is lost, and said.
        with no_more_descriptors():
            await trio.testing.wait_all_tasks_blocked()
        (lost,) = two.diary.all("accept.failed")
        assert lost["connections"] == 1
    assert len(two.taken) == 1


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_an_answer_is_not_good_for_ever(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one = Taker(crew, 1)
    await nursery.start(one.run)
    async with hanging(crew, 2) as listener:
        asked: list[bytes] = []

        async def answer_once() -> None:
            await trio.lowlevel.wait_readable(listener)
            inlet, _ = listener.accept()
            await trio.lowlevel.wait_readable(inlet)
            asked.append(inlet.recv(100))
            inlet.send(b"!")
            nursery.start_soon(hold, inlet)

        async def hold(inlet: socket.socket) -> None:
            with inlet:
                await trio.sleep_forever()

        nursery.start_soon(answer_once)
        assert await passed(one, session_for(2))
        assert await passed(one, session_for(2))
        await trio.sleep(way.FRESH_S)
        assert not await passed(one, session_for(2))
        nursery.cancel_scope.cancel()


async def test_strangers_are_not_trusted(
    nursery: trio.Nursery, crew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    uid = os.geteuid()
    monkeypatch.setattr(way.os, "geteuid", lambda: uid + 1)
    # Whoever passes on sees who took the name,
    assert not await passed(one, session_for(2))
    # and whoever takes, who comes.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(PATIENCE_S)
        stranger.connect(way.address_of(crew, 2))
        assert await trio.to_thread.run_sync(stranger.recv, 10) == b""
    monkeypatch.undo()
    assert await passed(one, session_for(2))
    await two.until(1)


async def test_junk_ends_the_way_and_nothing_else(nursery: trio.Nursery, crew: str) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(PATIENCE_S)
        other.connect(way.address_of(crew, 2))
        other.send(b"what?")
        assert await trio.to_thread.run_sync(other.recv, 10) == b""
    assert await passed(one, session_for(2))


async def test_what_is_no_socket_ends_the_way_and_nothing_else(
    nursery: trio.Nursery, crew: str
) -> None:
    one, two = Taker(crew, 1), Taker(crew, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(PATIENCE_S)
        other.connect(way.address_of(crew, 2))
        before = len(os.listdir("/proc/self/fd"))
        inner, outer = os.pipe()
        socket.send_fds(other, [b"head"], [inner])
        os.close(inner)
        assert await trio.to_thread.run_sync(other.recv, 10) == b""
        # Nobody has the end that was passed on.
        with pytest.raises(BrokenPipeError):
            os.write(outer, b"x")
        os.close(outer)
        assert len(os.listdir("/proc/self/fd")) <= before
    assert await passed(one, session_for(2))


async def test_where_nobody_can_listen_it_does_without_until_it_can(
    autojump_clock: MockClock, nursery: trio.Nursery, crew: str
) -> None:
    one, two, late = Taker(crew, 1), Taker(crew, 2), Taker(crew, 2)
    await nursery.start(one.run)
    async with hanging(crew, 2):
        await nursery.start(two.run)
        await nursery.start(late.run)
        await trio.sleep(10 * neighbours.REBIND_S)
        assert len(two.diary.all("neighbours.unreachable")) == 1
        late.neighbours.leave()
    await trio.sleep(2 * neighbours.REBIND_S)
    assert await passed(one, session_for(2))
    await two.until(1)
    # Who has left does not come back.
    two.neighbours.leave()
    await trio.sleep(2 * neighbours.REBIND_S)
    assert not await passed(one, session_for(2))


def path_of(session_id: str) -> str:
    return f"/ws/{session_id}"


async def member(
    crew: WorkerGroup,
    nursery: trio.Nursery,
    session_id: str,
    context: ssl.SSLContext | None = None,
    **fields: object,
) -> Musician:
    """Somebody who joined the session that the path names."""

    async def stay(*, task_status: trio.TaskStatus[Musician]) -> None:
        options = {"ssl": context} if context else {}
        async with musician(crew, path_of(session_id), **options) as player:
            task_status.started(player)
            await trio.sleep_forever()

    player = await nursery.start(stay)
    await player.join(None, **fields)
    return player


def server_of(player: Musician) -> str:
    return player.inbox[0]["serverId"]


async def test_a_band_is_on_one_worker(redis_server: RedisServer) -> None:
    ports = free_port()
    async with working(redis_server.url(), worker_ports=ports) as (crew, nursery):
        passed_on = 0
        for session_id in SESSIONS:
            home = f"stage-{preference(session_id, 2)[0]}"
            players = [await member(crew, nursery, session_id) for _ in range(4)]
            assert {server_of(player) for player in players} == {home}
            await players[0].ok("chat_message", text="all here?")
            for player in players:
                await player.next("chat_message", text="all here?")
        async with httpx.AsyncClient() as client:
            for number in (1, 2):
                text = (await client.get(f"http://{HOST}:{ports + number - 1}/metrics")).text
                (line,) = [
                    line for line in text.splitlines() if line.startswith("bandsync_passed_on_t")
                ]
                passed_on += float(line.split()[1])
        # That the kernel hit on the right one 32 times has odds of one to 10^9.
        assert 0 < passed_on < len(SESSIONS) * 4


async def test_who_comes_to_a_port_of_its_own_stays(redis_server: RedisServer) -> None:
    ports = free_port()
    async with working(redis_server.url(), worker_ports=ports):
        for number in (1, 2):
            with socket.create_connection((HOST, ports + number - 1), PATIENCE_S) as client:
                client.sendall(upgrade(path_of(session_for(3 - number))))
                welcome = await trio.to_thread.run_sync(read_until, client, b'"welcome"')
                assert f'"serverId":"stage-{number}"'.encode() in welcome


def read_until(client: socket.socket, wanted: bytes) -> bytes:
    """What came, up to and with what ends after these bytes."""
    heard = b""
    while b"}" not in heard.partition(wanted)[2]:
        data = client.recv(4096)
        assert data, heard
        heard += data
    return heard


async def test_nobody_is_turned_away_while_a_worker_has_room(redis_server: RedisServer) -> None:
    ports = free_port()
    settings = {"worker_ports": ports, "max_connections": 4}
    async with working(redis_server.url(), **settings) as (crew, nursery):
        for _ in range(4):
            await nursery.start(hear, ports, "/ws", b'"welcome"')
        players = [await member(crew, nursery, session_for(1)) for _ in range(4)]
        assert {server_of(player) for player in players} == {"stage-2"}
        # Now all are full.
        path = path_of(session_for(1))
        await nursery.start(hear, crew.port, path, struct.pack("!H", 1013) + b"the server is full")


async def hear(
    port: int,
    path: str,
    wanted: bytes,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Somebody who connects, is told this, and stays."""
    stream = await trio.open_tcp_stream(HOST, port)
    async with stream:
        await stream.send_all(upgrade(path))
        heard = b""
        while wanted not in heard:
            data = await stream.receive_some()
            assert data, heard
            heard += data
        task_status.started()
        async for _ in stream:
            pass


async def test_what_comes_with_the_head_comes_along(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (crew, _):
        for session_id in SESSIONS:
            client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
            head = client.send(wsproto.events.Request("stage", path_of(session_id)))
            client = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
            join = client.send(wsproto.events.TextMessage('{"type":"join_session"}'))
            with socket.create_connection((HOST, crew.port), PATIENCE_S) as sock:
                # Asked before on the same connection, and in pieces.
                sock.sendall(b"GET /api/health HTTP/1.1\r\nHost: stage\r\n\r\n")
                await trio.to_thread.run_sync(read_until, sock, b"serverId")
                sock.sendall(head[:30])
                sock.sendall(head[30:] + join[:9])
                sock.sendall(join[9:])
                heard = await trio.to_thread.run_sync(read_until, sock, b'"resumeToken"')
                home = f"stage-{preference(session_id, 2)[0]}".encode()
                assert heard.count(b'"serverId":"' + home) == 2
                assert b'"sessionId":"' + session_id.encode() in heard


async def test_of_a_killed_worker_the_bands_go_on_together(redis_server: RedisServer) -> None:
    session_id = session_for(1)
    async with working(redis_server.url()) as (crew, nursery):
        players = [await member(crew, nursery, session_id) for _ in range(3)]
        await players[0].ok("play", startInMs=0)
        os.kill(crew.pid("stage-1"), signal.SIGKILL)
        for player in players:
            await player.closed()
        ended = await crew.diary.until("worker.exited", server_id="stage-1")
        assert "Killed" in ended["how"]
        tokens = [player.you["resumeToken"] for player in players]
        back = [await member(crew, nursery, session_id, resumeToken=token) for token in tokens]
        assert [player.you["resumed"] for player in back] == [True] * 3
        assert [player.you["role"] for player in back] == ["leader", "follower", "follower"]

        await crew.diary.until("worker.started", 2, server_id="stage-1")
        # Whoever comes to the band comes to where it is by now.
        late = await member(crew, nursery, session_id)
        assert server_of(late) == "stage-2"
        await back[0].ok("chat_message", text="welcome back")
        await late.next("chat_message", text="welcome back")
        for player in (*back, late):
            await player.ok("leave_session")
        # And once it has left, comes home.
        assert server_of(await member(crew, nursery, session_id)) == "stage-1"


async def test_of_a_hanging_worker_the_bands_find_another(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However often the kernel chooses the one that hangs, it is not replaced meanwhile.
    monkeypatch.setattr(workers, "SILENCE_S", math.inf)
    session_id = session_for(1)
    async with working(redis_server.url()) as (crew, nursery):
        ann = await member(crew, nursery, session_id)
        os.kill(crew.pid("stage-1"), signal.SIGSTOP)
        try:
            # Whom the kernel gives to the one that hangs, it has: clients try again.
            while True:
                with trio.move_on_after(3 * ANSWER_S):
                    back = await member(
                        crew, nursery, session_id, resumeToken=ann.you["resumeToken"]
                    )
                    break
        finally:
            os.kill(crew.pid("stage-1"), signal.SIGCONT)
        assert server_of(back) == "stage-2"
        assert back.you["resumed"]


async def test_while_redis_is_away_a_band_is_whole(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (crew, nursery):
        bands = {
            session_id: [await member(crew, nursery, session_id) for _ in range(4)]
            for session_id in (session_for(1), session_for(2))
        }
        redis_server.kill()
        for session_id, players in bands.items():
            await players[0].next("storage_status", storageType="memory")
            # Who comes now is one of them too.
            players.append(await member(crew, nursery, session_id))
            await players[0].ok("chat_message", text="still here?")
            for player in players:
                await player.next("chat_message", text="still here?")
        redis_server.start()


async def test_nothing_of_what_was_passed_on_stays_behind(redis_server: RedisServer) -> None:
    async with working(redis_server.url()) as (crew, _):
        pids = [crew.pid(f"stage-{number}") for number in (1, 2)]
        evenings = itertools.count()

        async def rehearse() -> list[int]:
            async with trio.open_nursery() as evening:
                for session_id in SESSIONS * 2:
                    # Of the last evening there may be some whose places are kept.
                    await member(crew, evening, f"{session_id}-{next(evenings)}")
                evening.cancel_scope.cancel()
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

        before = await rehearse()
        with trio.fail_after(PATIENCE_S):
            while any(now > then for now, then in zip(await rehearse(), before, strict=True)):
                await trio.lowlevel.checkpoint()


async def test_with_tls_the_kernel_deals_them_out(
    redis_server: RedisServer, certificate: tuple[trustme.CA, str, str]
) -> None:
    authority, cert, key = certificate
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with working(redis_server.url(), tls_cert=cert, tls_key=key) as (crew, nursery):
        players = [await member(crew, nursery, "song", context) for _ in range(4)]
        await players[0].ok("chat_message", text="hello")
        for player in players:
            await player.next("chat_message", text="hello")
