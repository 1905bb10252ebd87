"""Periodic work: graces, ticks, statistics, pings, drains. On virtual time."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import h11
import msgspec
import pytest
import structlog
import trio
from msgspec.structs import replace
from trio.testing import MockClock, memory_stream_pair
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream
from websockets.frames import Frame, Opcode

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session
from bandsync.net.connection import Connection
from bandsync.net.drain import drain
from bandsync.net.http_head import read_head
from bandsync.net.registry import ConnectionRegistry
from bandsync.rooms.hub import Hub
from bandsync.settings import Settings
from bandsync.storage.base import Committed, Conflict
from bandsync.storage.memory import MemoryStorage
from tests.support.servers import TEST_SETTINGS
from tests.support.states import HERE, NOW
from tests.support.stores import FixedStores

Message = dict[str, Any]


class Player:
    """A client on a stream in memory."""

    def __init__(self, websocket: WebSocketConnection, stream: trio.abc.SendStream) -> None:
        self.websocket = websocket
        self.stream = stream
        self.inbox: list[tuple[float, Message]] = []
        self.close_code: int | None = None

    async def read(self) -> None:
        try:
            while True:
                message = msgspec.json.decode(await self.websocket.get_message())
                self.inbox.append((trio.current_time(), message))
        except ConnectionClosed as closed:
            self.close_code = closed.reason.code if closed.reason else 1006

    async def send(self, type_: str, **fields: object) -> None:
        await self.websocket.send_message(msgspec.json.encode({"type": type_, **fields}).decode())
        # Virtual time advances only when every task waits, so the message was handled by then.
        await trio.sleep(0.001)

    def times(self, type_: str) -> list[float]:
        return [time for time, message in self.inbox if message["type"] == type_]

    def last(self, type_: str) -> Message:
        return [message for _, message in self.inbox if message["type"] == type_][-1]


class VirtualServer:
    """The connections and rooms of a server, without listener, on virtual time."""

    def __init__(self, nursery: trio.Nursery, settings: Settings) -> None:
        self.nursery = nursery
        self.stores = FixedStores()
        self.hub = Hub(
            nursery,
            stores=self.stores,
            clock=ServerClock(NOW, trio.current_time()),
            server_context=HERE,
            counters=Counters(),
            log=structlog.wrap_logger(structlog.testing.CapturingLogger()),
            grace_s=settings.resume_grace_ms / 1000,
            tick_s=settings.tick_interval_ms / 1000,
        )
        self.connections = ConnectionRegistry(self.hub, settings, self.hub.log, lambda _: None)
        nursery.start_soon(self.hub.run_ticker)
        nursery.start_soon(self.hub.run_stats)
        nursery.start_soon(self.hub.run_graces)
        nursery.start_soon(self.connections.run_pings, lambda _: None)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        head = await read_head(stream, h11.Connection(h11.SERVER))
        assert head is not None
        async with trio.open_nursery() as nursery:
            connection = Connection(self.connections, nursery, stream, None, head, "song")
            await connection.run()
        await stream.aclose()

    @asynccontextmanager
    async def player(self, name: str = "Ann", **fields: object) -> AsyncIterator[Player]:
        """A client that has joined; its network is gone at the end."""
        ours, theirs = memory_stream_pair()
        self.nursery.start_soon(self._serve, ours)
        async with trio.open_nursery() as nursery:
            websocket = await wrap_client_stream(nursery, theirs, "stage", "/ws/song")
            player = Player(websocket, theirs)
            nursery.start_soon(player.read)
            await player.send("join_session", displayName=name, **fields)
            yield player
            await theirs.aclose()
            nursery.cancel_scope.cancel()
        await trio.sleep(0.001)


@pytest.fixture
async def server(nursery: trio.Nursery) -> VirtualServer:
    return VirtualServer(nursery, TEST_SETTINGS)


async def test_member_stays_for_its_grace(server: VirtualServer, autojump_clock: MockClock) -> None:
    async with server.player("Bob") as bob:
        async with server.player("Ann"):
            pass
        dropped = trio.current_time()
        assert bob.last("member_connection")["connected"] is False
        await trio.sleep(9.9)
        assert bob.times("user_left") == []
        await trio.sleep(0.2)
        assert bob.times("user_left") == [pytest.approx(dropped + 10, abs=0.01)]
        left = bob.last("user_left")
        assert (left["reason"], left["memberCount"]) == ("timeout", 1)


async def test_resume_ends_the_grace(server: VirtualServer, autojump_clock: MockClock) -> None:
    async with server.player("Bob") as bob:
        async with server.player("Ann") as ann:
            token = ann.last("snapshot")["you"]["resumeToken"]
        await trio.sleep(9)
        async with server.player(resumeToken=token) as ann:
            assert ann.last("snapshot")["you"]["resumed"] is True
            await trio.sleep(30)
        assert bob.times("user_left") == []
        # Every disconnect starts a full grace.
        await trio.sleep(9.9)
        assert bob.times("user_left") == []
        await trio.sleep(0.2)
        assert len(bob.times("user_left")) == 1


async def test_song_plays_on_under_elected_leader(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player("Ann") as ann:
        await ann.send("play")
        async with server.player("Bob") as bob, server.player("Cid"):
            await ann.websocket._stream.aclose()  # noqa: SLF001 (the network is gone, no close)
            await trio.sleep(9.9)
            assert bob.times("role_changed") == []
            await trio.sleep(0.2)
            elected = bob.last("role_changed")
            assert elected["reason"] == "elected"
            assert elected["memberId"] == bob.last("snapshot")["you"]["memberId"]
            last = bob.times("scroll_tick")[-1]
            assert trio.current_time() - last < 0.2


async def test_ticks_arrive_ten_times_a_second_while_playing(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player() as ann, server.player("Bob", ticks=False) as bob:
        await ann.send("play", startInMs=1000)
        await trio.sleep(0.9)
        assert ann.times("scroll_tick") == []
        await trio.sleep(5)
        times = ann.times("scroll_tick")
        gaps = {round(after - before, 3) for before, after in pairwise(times)}
        assert gaps == {0.1}
        await ann.send("pause")
        count = len(ann.times("scroll_tick"))
        await trio.sleep(2)
        assert len(ann.times("scroll_tick")) == count
        assert bob.times("scroll_tick") == []


async def test_stats_arrive_on_joins_and_every_five_seconds(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player() as ann:
        joined = len(ann.times("room_stats"))
        assert joined == 1
        async with server.player("Bob"):
            assert len(ann.times("room_stats")) == 2
            await trio.sleep(20)
            assert len(ann.times("room_stats")) == 6
            stats = ann.last("room_stats")
            assert stats["connectedCount"] == 2
            assert stats["members"][0]["latencyMs"] is not None


class SlowStorage(MemoryStorage):
    """Takes half a second for every commit."""

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict:
        await trio.sleep(0.5)
        return await super().commit(base, change, events)


async def test_clock_sync_reply_has_receive_and_send_times(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    server.stores.memory = SlowStorage("boot-1", "for a test")
    async with server.player() as ann:
        await trio.sleep(1)
        asked = server.hub.now()
        both = (b'{"type":"play"}', b'{"type":"clock_sync","t0":1}')
        await ann.stream.send_all(
            b"".join(Frame(Opcode.TEXT, text).serialize(mask=True) for text in both)
        )
        await trio.sleep(1)
        reply = ann.last("clock_sync")
        # The request waited behind the command; both timestamps show it.
        assert reply["t1"] == pytest.approx(asked, abs=0.01)
        assert reply["t2"] == pytest.approx(asked + 500, abs=0.01)


async def test_silent_client_is_closed(server: VirtualServer, autojump_clock: MockClock) -> None:
    async with server.player("Bob") as bob, server.player("Ann") as ann:
        ann.websocket._pong = None  # noqa: SLF001
        heard = trio.current_time()
        # The client stops reading: it answers no pings and sends no close frame.
        ann.websocket._reader_running = False  # noqa: SLF001
        await trio.sleep(29)
        assert bob.times("member_connection") == []
        await trio.sleep(10)
        (gone,) = bob.times("member_connection")
        assert 30 <= gone - heard <= 30 + 5 + 2.1
        assert server.hub.counters.closed == {"4000": 1}


async def test_client_that_answers_pings_stays_open(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player() as ann:
        await trio.sleep(300)
        assert ann.close_code is None


async def test_drain_notifies_and_closes_every_client(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player("Ann") as ann, server.player("Bob") as bob:
        start = trio.current_time()
        await drain(server.connections, 10)
        assert trio.current_time() - start < 10
        await trio.sleep(0.01)
        assert (ann.close_code, bob.close_code) == (1012, 1012)
        waits = {player.last("server_draining")["reconnectInMs"] for player in (ann, bob)}
        assert len(waits) == 2
        # A connection whose handshake was under way is closed, too.
        async with server.player("Cid") as late:
            await trio.sleep(0.01)
            assert late.close_code == 1012
            assert late.inbox == []


async def test_drain_waits_until_disconnects_are_stored(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    server.stores.memory = SlowStorage("boot-1", "for a test")
    async with server.player("Ann"), server.player("Bob"):
        await trio.sleep(2)
        await drain(server.connections, 10)
        session = await server.stores.memory.get_session("song")
        assert session is not None
        assert [member.connected for member in session.members.values()] == [False, False]


async def test_drain_ends_at_its_deadline(server: VirtualServer, autojump_clock: MockClock) -> None:
    async with server.player("Ann") as ann:
        ann.websocket._reader_running = False  # noqa: SLF001
        start = trio.current_time()
        await drain(server.connections, 1)
        assert trio.current_time() - start <= 1


async def test_member_leaves_at_once_without_grace(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = VirtualServer(nursery, replace(TEST_SETTINGS, resume_grace_ms=0))
    async with server.player("Bob") as bob:
        async with server.player("Ann"):
            pass
        await trio.sleep(0.01)
        assert len(bob.times("user_left")) == 1


async def test_room_closes_when_the_last_member_is_gone(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with server.player() as ann:
        await ann.send("play")
        assert len(server.hub.rooms) == 1
    await trio.sleep(11)
    assert server.hub.rooms == {}
    sessions = await server.stores.memory.list_sessions()
    assert [session.session_id for session in sessions] == ["song"]
