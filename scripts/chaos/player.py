"""The members of the bands of chaos.py: half of them on a foreign client, half on ours."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import msgspec
import trio
import websockets.trio.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from bandsync import client
from bandsync.wire.commands import Undecodable, decode
from scripts.chaos.judge import Asked, ClockSample, Message, Record, essence

HOST = "127.0.0.1"
PATIENCE_S = 30.0

_CLOCK_PERIOD_S = 0.2


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

    def __init__(self, record: Record, send: Callable[[Message], Awaitable[None]]) -> None:
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
        foreign: use the client of `websockets`, otherwise ours, whose view of the session must
            then be what every snapshot shows.
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
        self._url = f"ws://{HOST}:{port}"
        self._foreign = foreign
        self._notice = notice
        self._requests = count(1)
        self._asked_snapshot = False
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
            run = self._run_foreign if self._foreign else self._run_ours
            self._connection = await self._nursery.start(run)
        except (OSError, WebSocketException, client.ClientError) as error:
            raise ChaosError(f"{self.session}/{self.name} cannot join: {error!r}") from error
        if self._foreign:
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
        with trio.move_on_after(PATIENCE_S):
            await connection.send({"type": type_, "requestId": request_id, **fields})
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
        self._asked_snapshot = True
        asked = await self.ask("sync_request")
        if not asked.acked:
            raise ChaosError(f"{self.session}/{self.name}: no snapshot: {asked.answer}")
        await self.until(lambda: bool(self.snapshot))
        return self.snapshot

    async def keep_time(self) -> None:
        """Compare clocks, for ever; our client does so by itself."""
        while self._foreign:
            await self.connection.send({"type": "clock_sync", "t0": trio.current_time() * 1000})
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

    def _record(self) -> Record:
        """Of a new connection."""
        self.records.append(Record(self.session, self.name))
        self.snapshot = {}
        return self.records[-1]

    async def _run_foreign(self, *, task_status: trio.TaskStatus[Connection]) -> None:
        """One connection, from handshake to end."""
        record = self._record()
        url = f"{self._url}/ws/{self.session}"
        async with (
            websockets.trio.client.connect(url, compression=None) as socket,
            trio.open_nursery() as nursery,
        ):

            async def send(message: Message) -> None:
                # If it is closed, its reader knows.
                with suppress(ConnectionClosed):
                    await socket.send(json.dumps(message))

            async def read() -> None:
                with suppress(ConnectionClosed):
                    async for text in socket:
                        self._hear(connection, trio.current_time(), json.loads(text))
                connection.close.set()

            connection = Connection(record, send)
            task_status.started(connection)
            nursery.start_soon(read)
            await connection.close.wait()
            if not connection.ending:
                record.closed = (trio.current_time(), socket.close_code or 1006)
            nursery.cancel_scope.cancel()
        connection.ended.set()

    async def _run_ours(self, *, task_status: trio.TaskStatus[Connection]) -> None:
        """The same, joined already; it is not to come back by itself, so that we see it go."""
        record = self._record()
        bands: list[client.Band] = []

        async def send(message: Message) -> None:
            command = decode(json.dumps(message).encode())
            assert not isinstance(command, Undecodable), command
            # What became of it, `_hear` hears.
            with suppress(client.ClientError):
                await bands[0].command(command)

        def tap(at: float, text: str) -> None:
            message = json.loads(text)
            if bands and message["type"] == "snapshot":
                _compare(record, at, bands[0].session, message, answer=self._asked_snapshot)
                self._asked_snapshot = False
            self._hear(connection, at, message)

        connection = Connection(record, send)
        asked = Asked("join_session", {"displayName": self.name}, trio.current_time())
        record.asked.append(asked)
        try:
            async with client.connect(
                self._url,
                self.session,
                display_name=self.name,
                resume_token=self._token,
                ticks=True,
                give_up_after=0,
                tap=tap,
            ) as band:
                asked.answered, asked.answer = next(
                    (at, heard) for at, heard in record.heard if heard["type"] == "ack"
                )
                bands.append(band)
                task_status.started(connection)
                await connection.close.wait()
                await band.close()
        except client.Ended as lost:
            if not bands:
                raise
            if not connection.ending:
                record.closed = (trio.current_time(), close_code(lost))
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


def close_code(ended: client.Ended) -> int:
    """What a client was closed with, as far as it tells."""
    match ended:
        case client.Superseded():
            return 4001
        case client.JoinRefused(code="policy"):
            return 1008
        case client.Unreachable():
            return ended.close_code
    return 1006


def _compare(
    record: Record, at: float, view: client.SessionView, snapshot: Message, *, answer: bool
) -> None:
    """What our client knew must be what the server shows, if it is of the same version.

    Args:
        answer: it was asked for, so nothing that it shows may still be on its way: a view that is
            behind it has stopped.
    """
    if view.epoch != snapshot["epoch"]:
        return
    if view.version != snapshot["version"]:
        if answer and view.version < snapshot["version"]:
            text = f"known is version {view.version}, shown is {snapshot['version']}"
            record.wrong.append((at, text))
        return
    known = {
        **msgspec.to_builtins(view),
        "leaderId": view.leader_id,
        "members": msgspec.to_builtins([*view.members.values()]),
    }
    ours, theirs = essence(known), essence(snapshot)
    differ = [
        f"{part}: {ours[part]} / {theirs[part]}" for part in ours if ours[part] != theirs[part]
    ]
    if differ:
        record.wrong.append((at, f"known / shown at version {view.version}: {'; '.join(differ)}"))
