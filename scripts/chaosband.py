"""The bands of chaos.py: members on foreign WebSocket clients who play, chat, come and go."""

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count

import trio
import trio_websocket
import websockets.trio.client
from chaosjudge import Asked, ClockSample, Message, Record
from websockets.exceptions import ConnectionClosed, WebSocketException

HOST = "127.0.0.1"
PATIENCE_S = 30.0

_CLOCK_PERIOD_S = 0.2
_HURRY = 10
_TEMPI = (60, 92, 120, 138, 174)


class ChaosError(Exception):
    """The run cannot go on; the message says why."""


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Wait for ``what``, but not for ever.

    Raises:
        ChaosError: it did not happen.
    """
    with trio.move_on_after(PATIENCE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise ChaosError(f"{what}: waited {PATIENCE_S} s in vain")


class Connection:
    """One WebSocket connection of a player.

    Attributes:
        record: of all that it sees.
        ending: that the other side closes it is expected from now on.
    """

    def __init__(self, record: Record, send: Callable[[str], object]) -> None:
        self.record = record
        self.ending = False
        self.ended = trio.Event()
        self.close = trio.Event()
        self.waiting: dict[str, tuple[Asked, trio.Event]] = {}
        self.news = trio.Event()
        self.send = send


class Player:
    """A member of a band, over all its connections.

    Args:
        foreign: use the client of `websockets`, otherwise that of trio-websocket.
        notice: called with (arrival, message) for each `storage_status`.

    Attributes:
        member_id: empty before it joined.
        records: one for each connection.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        port: int,
        session: str,
        name: str,
        *,
        foreign: bool = True,
        notice: Callable[[float, Message], None] = lambda at, message: None,
    ) -> None:
        self.session = session
        self.name = name
        self.member_id = ""
        self.role = ""
        self.records: list[Record] = []
        self.snapshot: Message = {}
        self._token: str | None = None
        self._nursery = nursery
        self._url = f"ws://{HOST}:{port}/ws/{session}"
        self._foreign = foreign
        self._notice = notice
        self._requests = count(1)
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """The latest."""
        assert self._connection is not None
        return self._connection

    async def join(self) -> None:
        """Connect and join, with the resume token if there is one.

        Raises:
            ChaosError: refused, or not resumed.
        """
        # The old one may still be noticing that its server is gone.
        try:
            self._connection = await self._nursery.start(self._run)
        except (OSError, WebSocketException, trio_websocket.HandshakeError) as error:
            raise ChaosError(f"{self.session}/{self.name} cannot connect: {error!r}") from error
        fields = {"displayName": self.name}
        if self._token is not None:
            fields["resumeToken"] = self._token
        asked = await self.ask("join_session", **fields)
        if not asked.acked:
            raise ChaosError(f"{self.session}/{self.name} cannot join: {asked.answer}")
        await self.until(lambda: bool(self.snapshot.get("you")))
        you = self.snapshot["you"]
        if self._token is not None and (not you["resumed"] or you["memberId"] != self.member_id):
            raise ChaosError(f"{self.session}/{self.name} was not resumed: {self.snapshot}")
        self.member_id, self.role, self._token = you["memberId"], you["role"], you["resumeToken"]

    async def ask(self, type_: str, **fields: object) -> Asked:
        """Send a command and wait for its answer, but not for ever."""
        connection = self.connection
        request_id = f"r{next(self._requests)}"
        asked = Asked(type_, fields, trio.current_time())
        answered = trio.Event()
        connection.waiting[request_id] = (asked, answered)
        connection.record.asked.append(asked)
        await self._send({"type": type_, "requestId": request_id, **fields})
        with trio.move_on_after(PATIENCE_S):
            await answered.wait()
        return asked

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait for what messages bring."""
        with patience(f"{self.session}/{self.name}: a message"):
            while not wanted():
                await self.connection.news.wait()

    async def fresh_snapshot(self) -> Message:
        """The state of the session, asked for."""
        self.snapshot = {}
        asked = await self.ask("sync_request")
        if not asked.acked:
            raise ChaosError(f"{self.session}/{self.name}: no snapshot: {asked.answer}")
        await self.until(lambda: bool(self.snapshot))
        return self.snapshot

    async def keep_time(self) -> None:
        """Compare clocks, for ever."""
        while True:
            await self._send({"type": "clock_sync", "t0": trio.current_time() * 1000})
            await trio.sleep(_CLOCK_PERIOD_S)

    async def disconnect(self) -> None:
        """Close the connection, the membership stays for the grace."""
        if self._connection is not None:
            self._connection.ending = True
            self._connection.close.set()
            await self._connection.ended.wait()

    async def ended(self) -> None:
        """Wait until the server has ended the connection, as it was told to."""
        with patience(f"{self.session}/{self.name}: the end of the connection"):
            await self.connection.ended.wait()

    async def leave(self) -> None:
        """Leave the session for good."""
        await self.ask("leave_session")
        self._token = None
        await self.disconnect()

    async def _send(self, message: Message) -> None:
        # If it is closed, its reader knows.
        with suppress(ConnectionClosed, trio_websocket.ConnectionClosed):
            await self.connection.send(json.dumps(message))

    async def _run(self, *, task_status: trio.TaskStatus[Connection]) -> None:
        """One connection, from handshake to end."""
        record = Record(self.session, self.name)
        self.records.append(record)
        self.snapshot = {}
        dial = _dial_websockets if self._foreign else _dial_trio_websocket
        async with dial(self._url) as (send, texts, code), trio.open_nursery() as nursery:
            connection = Connection(record, send)
            task_status.started(connection)

            async def read() -> None:
                async for text in texts:
                    self._hear(connection, trio.current_time(), json.loads(text))
                connection.close.set()

            nursery.start_soon(read)
            await connection.close.wait()
            if not connection.ending:
                record.closed = (trio.current_time(), code())
            nursery.cancel_scope.cancel()
        connection.ended.set()

    def _hear(self, connection: Connection, at: float, message: Message) -> None:
        connection.record.heard.append((at, message))
        kind = message["type"]
        if kind in {"ack", "error"}:
            found = connection.waiting.pop(message.get("requestId", ""), None)
            if found is not None:
                asked, answered = found
                asked.answered, asked.answer = at, message
                answered.set()
        elif kind == "snapshot":
            self.snapshot = message
        elif kind == "clock_sync":
            t0, t1, t2 = message["t0"], message["t1"], message["t2"]
            t3 = at * 1000
            sample = ClockSample(at, ((t1 - t0) + (t2 - t3)) / 2, (t3 - t0) - (t2 - t1))
            connection.record.clock.append(sample)
        elif kind == "storage_status":
            self._notice(at, message)
        connection.news.set()
        connection.news = trio.Event()


_Dialled = tuple[Callable[[str], object], AsyncIterator[str], Callable[[], int]]


@asynccontextmanager
async def _dial_websockets(url: str) -> AsyncIterator[_Dialled]:
    async with websockets.trio.client.connect(url, compression=None) as socket:

        async def texts() -> AsyncIterator[str]:
            try:
                async for text in socket:
                    yield text
            except ConnectionClosed:
                pass

        yield socket.send, texts(), lambda: socket.close_code or 1006


@asynccontextmanager
async def _dial_trio_websocket(url: str) -> AsyncIterator[_Dialled]:
    async with trio_websocket.open_websocket_url(url) as socket:

        async def texts() -> AsyncIterator[str]:
            try:
                while True:
                    yield await socket.get_message()
            except trio_websocket.ConnectionClosed:
                pass

        yield (
            socket.send_message,
            texts(),
            lambda: int(socket.closed.code) if socket.closed else 1006,
        )


class Band:
    """The members of one session, the first of whom leads at first.

    Args:
        seed: for what they play, and when.

    Attributes:
        leader: who leads now.
        storm: give commands without a break, so that some are on their way whenever a fault comes.
        guests: everybody who was here for a while, too.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        port: int,
        session: str,
        members: int,
        seed: str,
        notice: Callable[[float, Message], None],
    ) -> None:
        self.session = session
        self.players = [
            Player(nursery, port, session, f"p{n}", foreign=n % 2 == 0, notice=notice)
            for n in range(members)
        ]
        self.leader = self.players[0]
        self.storm = False
        self.guests: list[Player] = []
        self._nursery = nursery
        self._port = port
        self._random = random.Random(seed)  # noqa: S311  # a seed to repeat a run
        self._stopping = trio.Event()
        self._words = (f"{session} {number}" for number in count(1))

    @property
    def records(self) -> Iterator[Record]:
        """Of all connections that its members ever had."""
        for player in (*self.players, *self.guests):
            yield from player.records

    async def join(self) -> None:
        """Everybody joins, or comes back, one after the other."""
        for player in self.players:
            await player.join()

    async def play(self) -> None:
        """Play until `stop`; then every command has its answer."""
        self._stopping = trio.Event()
        async with trio.open_nursery() as clocks:
            for player in self.players:
                clocks.start_soon(player.keep_time)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lead)
                for player in self.players[1:]:
                    nursery.start_soon(self._chat, player)
                nursery.start_soon(self._visit)
            clocks.cancel_scope.cancel()

    def stop(self) -> None:
        """Come to an end."""
        self._stopping.set()

    async def go_home(self) -> None:
        """Close all connections."""
        for player in (*self.players, *self.guests):
            await player.disconnect()

    async def _lead(self) -> None:
        draw = self._random
        await self.leader.ask("play", positionMs=0)
        while await self._pause(0.02, 0.15):
            at = draw.choice(["now", "beat", "bar"])
            position = draw.randrange(600_000)
            match draw.choices(
                ["play", "pause", "seek", "tempo", "message", "lead"], [4, 1, 3, 3, 4, 0.3]
            )[0]:
                case "play":
                    await self.leader.ask("play")
                case "pause":
                    await self.leader.ask("pause")
                case "seek":
                    await self.leader.ask("seek", positionMs=position, at=at)
                case "tempo":
                    await self.leader.ask("set_tempo", tempoBpm=draw.choice(_TEMPI), at=at)
                case "message":
                    await self.leader.ask("update_message", message=next(self._words))
                case "lead":
                    await self._hand_over()

    async def _hand_over(self) -> None:
        heir = self._random.choice([p for p in self.players if p is not self.leader] or [None])
        if heir is None:
            return
        asked = await self.leader.ask("set_role", role="leader", memberId=heir.member_id)
        if asked.acked:
            self.leader.role, heir.role = "follower", "leader"
            self.leader = heir

    async def _chat(self, player: Player) -> None:
        while await self._pause(0.02, 0.3):
            await player.ask("chat_message", text=next(self._words))

    async def _visit(self) -> None:
        """A guest comes, loses the network, comes back and leaves, again and again."""
        for number in count(1):
            if not await self._pause(0.3, 1.0, calm=True):
                return
            guest = Player(self._nursery, self._port, self.session, f"guest{number}")
            self.guests.append(guest)
            await guest.join()
            await guest.ask("chat_message", text=next(self._words))
            await guest.disconnect()
            await self._pause(0.0, 0.5, calm=True)
            await guest.join()
            await self._pause(0.0, 0.5, calm=True)
            await guest.leave()

    async def _pause(self, least_s: float, most_s: float, *, calm: bool = False) -> bool:
        """Wait a little; False when it is time to stop.

        Args:
            calm: in a storm, too.
        """
        hurry = _HURRY if self.storm and not calm else 1
        with trio.move_on_after(self._random.uniform(least_s, most_s) / hurry):
            await self._stopping.wait()
        return not self._stopping.is_set()
