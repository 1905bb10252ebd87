"""A player: one member over all its connections. Half of them use another library's client."""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import cast

import msgspec
import trio
import websockets.trio.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from bandsync import client
from bandsync.wire.commands import Undecodable, decode
from scripts.chaos.records import ClockSample, CommandRecord, ConnectionRecord, agreed_state
from scripts.testbed.json_messages import JsonMessage

HOST = "127.0.0.1"
PATIENCE_S = 30.0

_CLOCK_PERIOD_S = 0.2


class ChaosError(Exception):
    """The run cannot go on; the message gives the reason."""


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Bound the wait for ``what``.

    Raises:
        ChaosError: the block took longer than `PATIENCE_S`.
    """
    with trio.move_on_after(PATIENCE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise ChaosError(f"{what}: waited {PATIENCE_S} s in vain")


class PlayerConnection:
    """One WebSocket connection of a player.

    Attributes:
        record: of everything sent and received.
        ending: the server is expected to close it from now on.
        ended: it is closed.
        close: set to close it.
        waiting: commands without a reply, by request id.
        changed: set at each message, then replaced.
        send: sends a command.
    """

    def __init__(
        self, record: ConnectionRecord, send: Callable[[Mapping[str, object]], Awaitable[None]]
    ) -> None:
        self.record = record
        self.ending = False
        self.ended = trio.Event()
        self.close = trio.Event()
        self.waiting: dict[str, tuple[CommandRecord, trio.Event]] = {}
        self.changed = trio.Event()
        self.send = send


class Player:
    """A member of a band, over all its connections.

    Args:
        nursery: runs its connections.
        port: of the server.
        session: id of the session.
        name: display name.
        foreign: use the client of `websockets`. Otherwise use ours, whose replica must then equal
            every snapshot.
        notice: called with (arrival, message) for each `storage_status`.

    Attributes:
        session: id of the session.
        name: display name.
        member_id: empty before the first join.
        role: at the last join, or after a handover.
        records: one for each connection.
        snapshot: the last one received.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        port: int,
        session: str,
        name: str,
        *,
        foreign: bool = True,
        notice: Callable[[float, JsonMessage], None] = lambda at, message: None,
    ) -> None:
        self.session = session
        self.name = name
        self.member_id = ""
        self.role = ""
        self.records: list[ConnectionRecord] = []
        self.snapshot: JsonMessage = {}
        self._token: str | None = None
        self._nursery = nursery
        self._url = f"ws://{HOST}:{port}"
        self._foreign = foreign
        self._notice = notice
        self._requests = count(1)
        self._asked_snapshot = False
        self._connection: PlayerConnection | None = None

    @property
    def connection(self) -> PlayerConnection:
        """The latest connection."""
        assert self._connection is not None
        return self._connection

    async def join(self) -> None:
        """Connect and join, with the resume token if there is one.

        Raises:
            ChaosError: the server refused the join, or did not resume the member.
        """
        # The previous connection may not have detected its end yet.
        try:
            run = self._run_foreign if self._foreign else self._run_ours
            self._connection = await self._nursery.start(run)
        except (OSError, WebSocketException, client.ClientError) as error:
            raise ChaosError(f"{self.session}/{self.name} cannot join: {error!r}") from error
        if self._foreign:
            fields = {"displayName": self.name}
            if self._token is not None:
                fields["resumeToken"] = self._token
            command = await self.request("join_session", **fields)
            if not command.acked:
                raise ChaosError(f"{self.session}/{self.name} cannot join: {command.answer}")
        await self.until(lambda: bool(self.snapshot.get("you")))
        you = self.snapshot["you"]
        if self._token is not None and (not you["resumed"] or you["memberId"] != self.member_id):
            raise ChaosError(f"{self.session}/{self.name} was not resumed: {self.snapshot}")
        self.member_id, self.role, self._token = you["memberId"], you["role"], you["resumeToken"]

    async def request(self, type_: str, **fields: object) -> CommandRecord:
        """Send a command and wait for its reply, at most `PATIENCE_S`."""
        connection = self.connection
        request_id = f"r{next(self._requests)}"
        command = CommandRecord(type_, fields, trio.current_time())
        answered = trio.Event()
        connection.waiting[request_id] = (command, answered)
        connection.record.commands.append(command)
        with trio.move_on_after(PATIENCE_S):
            await connection.send({**fields, "type": type_, "requestId": request_id})
            await answered.wait()
        return command

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait until messages have made a condition true."""
        with patience(f"{self.session}/{self.name}: a message"):
            while not wanted():
                await self.connection.changed.wait()

    async def fresh_snapshot(self) -> JsonMessage:
        """Request the state of the session."""
        self.snapshot = {}
        self._asked_snapshot = True
        command = await self.request("sync_request")
        if not command.acked:
            raise ChaosError(f"{self.session}/{self.name}: no snapshot: {command.answer}")
        await self.until(lambda: bool(self.snapshot))
        return self.snapshot

    async def keep_time(self) -> None:
        """Exchange `clock_sync` until cancelled. Our client does so by itself."""
        while self._foreign:
            await self.connection.send({"type": "clock_sync", "t0": trio.current_time() * 1000})
            await trio.sleep(_CLOCK_PERIOD_S)

    async def disconnect(self) -> None:
        """Close the connection. The membership lasts for the grace."""
        if self._connection is not None:
            self._connection.ending = True
            self._connection.close.set()
            await self._connection.ended.wait()

    async def ended(self) -> None:
        """Wait until the server has closed the connection, as expected."""
        with patience(f"{self.session}/{self.name}: the end of the connection"):
            await self.connection.ended.wait()

    async def leave(self) -> None:
        """Leave the session for good."""
        await self.request("leave_session")
        self._token = None
        await self.disconnect()

    def _record(self) -> ConnectionRecord:
        """Begin the record of a new connection."""
        self.records.append(ConnectionRecord(self.session, self.name))
        self.snapshot = {}
        return self.records[-1]

    async def _run_foreign(self, *, task_status: trio.TaskStatus[PlayerConnection]) -> None:
        """Run one connection of the `websockets` client, from handshake to end."""
        record = self._record()
        url = f"{self._url}/ws/{self.session}"
        async with (
            websockets.trio.client.connect(url, compression=None) as socket,
            trio.open_nursery() as nursery,
        ):

            async def send(message: Mapping[str, object]) -> None:
                # If it is closed, its reader detects that.
                with suppress(ConnectionClosed):
                    await socket.send(json.dumps(message))

            async def read() -> None:
                with suppress(ConnectionClosed):
                    async for text in socket:
                        self._receive(connection, trio.current_time(), json.loads(text))
                connection.close.set()

            connection = PlayerConnection(record, send)
            task_status.started(connection)
            nursery.start_soon(read)
            await connection.close.wait()
            if not connection.ending:
                record.closed = (trio.current_time(), socket.close_code or 1006)
            nursery.cancel_scope.cancel()
        connection.ended.set()

    async def _run_ours(self, *, task_status: trio.TaskStatus[PlayerConnection]) -> None:
        """Run one connection of our client, which joins by itself.

        It must not reconnect, so that the end of the connection is recorded.
        """
        record = self._record()
        bands: list[client.Band] = []

        async def send(message: Mapping[str, object]) -> None:
            command = decode(json.dumps(message).encode())
            assert not isinstance(command, Undecodable), command
            # `_receive` records the reply, also when it is an error.
            with suppress(client.ClientError):
                await bands[0].command(command)

        def tap(at: float, text: str) -> None:
            message = json.loads(text)
            if bands and message["type"] == "snapshot":
                _compare_replica(record, at, bands[0].session, message, answer=self._asked_snapshot)
                self._asked_snapshot = False
            self._receive(connection, at, message)

        connection = PlayerConnection(record, send)
        command = CommandRecord("join_session", {"displayName": self.name}, trio.current_time())
        record.commands.append(command)
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
                command.answered, command.answer = next(
                    (at, received) for at, received in record.received if received["type"] == "ack"
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

    def _receive(self, connection: PlayerConnection, at: float, message: JsonMessage) -> None:
        connection.record.received.append((at, message))
        kind = message["type"]
        if kind in {"ack", "error"}:
            found = connection.waiting.pop(message.get("requestId", ""), None)
            if found is not None:
                command, answered = found
                command.answered, command.answer = at, message
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
        connection.changed.set()
        connection.changed = trio.Event()


def close_code(ended: client.Ended) -> int:
    """The close code behind the end of our client's connection, as far as it is known."""
    match ended:
        case client.Superseded():
            return 4001
        case client.JoinRefused(code="policy"):
            return 1008
        case client.Unreachable():
            return ended.close_code
    return 1006


def _compare_replica(
    record: ConnectionRecord,
    at: float,
    view: client.SessionView,
    snapshot: JsonMessage,
    *,
    answer: bool,
) -> None:
    """Record a difference between our client's replica and a snapshot of the same version.

    Args:
        record: where to.
        at: arrival of the snapshot.
        view: the client's replica.
        snapshot: what the server sent.
        answer: the snapshot was requested, so that no earlier event may still be on its way. A
            replica with a lower version has then stopped.
    """
    if view.epoch != snapshot["epoch"]:
        return
    if view.version != snapshot["version"]:
        if answer and view.version < snapshot["version"]:
            text = f"the replica has version {view.version}, the snapshot {snapshot['version']}"
            record.replica_errors.append((at, text))
        return
    known = dict(msgspec.to_builtins(view))
    known |= {"leaderId": view.leader_id, "members": [*known["members"].values()]}
    replica = cast("JsonMessage", known)
    ours, servers = agreed_state(replica), agreed_state(snapshot)
    differences = [
        f"{part}: {ours[part]} / {servers[part]}" for part in ours if ours[part] != servers[part]
    ]
    if differences:
        text = f"replica / snapshot at version {view.version}: {'; '.join(differences)}"
        record.replica_errors.append((at, text))
