"""The members in a run with several servers: they play, disconnect, and move between servers."""

import json
import random
from contextlib import suppress
from itertools import count

import trio
import websockets.trio.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from scripts.chaos.cluster_records import (
    GRACE_S,
    PATIENCE_S,
    ResumeAttempt,
    RoamingRecord,
    ServerRun,
)
from scripts.chaos.player import HOST
from scripts.chaos.records import CommandRecord
from scripts.chaos.servers import ChaosCluster
from scripts.chaos.view import SessionReplica
from scripts.testbed.json_messages import JsonMessage, JsonYou

_LONG_PATIENCE_S = 35.0
_OPEN_TIMEOUT_S = 1.5
_VOLATILE = frozenset({"scroll_tick", "room_stats", "clock_sync"})
_TEMPI = (60, 92, 120, 138, 174)


class RoamingConnection:
    """A connection while it is open.

    Attributes:
        record: of everything sent and received.
        replica: the session as its messages describe it.
        you: the member's part of the snapshot; None before it joined.
        over: it is closed.
        close: set to close it.
    """

    def __init__(
        self, record: RoamingRecord, socket: websockets.trio.client.ClientConnection
    ) -> None:
        self.record = record
        self.replica = SessionReplica()
        self.you: JsonYou | None = None
        self.over = trio.Event()
        self.close = trio.Event()
        self._socket = socket
        self._waiting: dict[str, tuple[CommandRecord, trio.Event]] = {}
        self._requests = count(1)

    async def run(self) -> None:
        """Receive until either side closes it."""
        record = self.record
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            await self.close.wait()
            if record.left == float("inf"):
                record.closed = (trio.current_time(), self._socket.close_code or 1006)
            self.over.set()
            nursery.cancel_scope.cancel()

    async def request(self, type_: str, **fields: object) -> tuple[CommandRecord, trio.Event]:
        """Send a command; return its record, and an event that is set at the reply."""
        request_id = f"r{next(self._requests)}"
        command, answered = CommandRecord(type_, fields, trio.current_time()), trio.Event()
        self._waiting[request_id] = (command, answered)
        self.record.commands.append(command)
        text = json.dumps({"type": type_, "requestId": request_id, **fields})
        # A suspended server reads nothing. If the connection is closed, its reader detects that.
        with suppress(ConnectionClosed), trio.move_on_after(PATIENCE_S):
            await self._socket.send(text)
        return command, answered

    async def _read(self) -> None:
        try:
            async for text in self._socket:
                self._receive(trio.current_time(), json.loads(text))
        except ConnectionClosed:
            pass
        self.close.set()

    def _receive(self, at: float, message: JsonMessage) -> None:
        kind = message["type"]
        if kind in _VOLATILE:
            return
        self.record.received.append((at, message))
        difference = self.replica.apply(message)
        if difference is not None:
            self.record.replica_errors.append((at, difference))
        if kind == "snapshot" and "you" in message:
            self.you = message["you"]
        if kind in {"ack", "error"}:
            found = self._waiting.pop(message.get("requestId", ""), None)
            if found is not None:
                command, answered = found
                command.answered, command.answer = at, message
                answered.set()


class RoamingPlayer:
    """A member, over all its connections.

    Args:
        nursery: runs its connections.
        cluster: the servers to choose from.
        session: id of the session.
        name: display name.
        draw: for the commands and their times.

    Attributes:
        session: id of the session.
        name: display name.
        member_id: empty before the first join, and after a leave.
        connection: the connection that it plays on; None while there is none.
        records: of all connections it ever had.
        resumes: all answered attempts to resume.
        fast: send commands ten times as fast, so that some are always in flight.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        cluster: ChaosCluster,
        session: str,
        name: str,
        draw: random.Random,
    ) -> None:
        self.session = session
        self.name = name
        self.member_id = ""
        self.connection: RoamingConnection | None = None
        self.records: list[RoamingRecord] = []
        self.resumes: list[ResumeAttempt] = []
        self.fast = False
        self._token: str | None = None
        self._nursery = nursery
        self._cluster = cluster
        self._draw = draw
        self._words = (f"{session} {name} {number}" for number in count(1))
        self._stopping = trio.Event()
        self._avoid: str | None = None
        # Connections that are still open.
        self._connections: list[RoamingConnection] = []

    def stop(self) -> None:
        """End `play`. The member stays."""
        self._stopping.set()

    async def play(self) -> None:
        """Send commands and change connections until `stop`."""
        while not self._stopping.is_set():
            if self.connection is None or self.connection.over.is_set():
                if self.connection is not None:
                    self._avoid = self.connection.record.server_run.server
                    await self._pause(0.0, 0.6)
                await self._connect()
            else:
                await self._act_once(self.connection)
            await self._pause(0.0, 0.04 if self.fast else 0.4)

    async def stay_connected(self) -> RoamingConnection:
        """Connect if necessary, and keep the connection; return it."""
        while self.connection is None or self.connection.over.is_set():
            await self._connect()
            await trio.sleep(0.1)
        return self.connection

    async def leave(self) -> None:
        """Leave the session for good."""
        if self.connection is not None:
            await self._request("leave_session")
            self._start_anew()

    async def fresh_snapshot(self) -> JsonMessage | None:
        """Request the state from its server; None if the server does not answer."""
        connection = self.connection
        if (
            connection is None
            or connection.over.is_set()
            or not await self._request("sync_request")
        ):
            return None
        return next(m for _, m in reversed(connection.record.received) if m["type"] == "snapshot")

    async def _connect(self) -> bool:
        """Try to join on one server; return whether that succeeded."""
        servers = [
            server
            for server in self._cluster.servers
            if server.serving and server.name != self._avoid
        ]
        self._avoid = None
        if not servers:
            return False
        server = self._draw.choice(servers)
        connection = await self._open(server.process.port, server.latest_run)
        if connection is None:
            return False
        before = self.records[-1] if self.records else None
        fields: dict[str, object] = {"displayName": self.name}
        if self._token is not None:
            fields["resumeToken"] = self._token
            for record in self.records:
                if record.member_id == self.member_id:
                    record.abandoned = min(record.abandoned, trio.current_time())
        # The token is sent, so the server may bind the member to this connection.
        connection.record.member_id = self.member_id if self._token is not None else ""
        self.records.append(connection.record)
        command, answered = await connection.request("join_session", **fields)
        with trio.move_on_after(PATIENCE_S):
            await answered.wait()
        you = connection.you
        if not command.acked or you is None:
            self._close(connection)
            return False
        if self._token is not None and before is not None:
            self._record_resume(command, before, connection.record, resumed=you["resumed"])
        if not you["resumed"]:
            # Earlier connections belong to the previous membership.
            for earlier in self._connections:
                self._close(earlier)
        self._connections = [
            *(earlier for earlier in self._connections if not earlier.over.is_set()),
            connection,
        ]
        self.member_id, self._token = you["memberId"], you["resumeToken"]
        connection.record.member_id = self.member_id
        self.connection = connection
        return True

    def _record_resume(
        self, command: CommandRecord, before: RoamingRecord, after: RoamingRecord, *, resumed: bool
    ) -> None:
        last_received = max((at for at, _ in before.received), default=before.opened)
        last_seen = min(before.left, before.closed[0] if before.closed else last_received)
        self.resumes.append(ResumeAttempt(self.name, command, last_seen, before, after, resumed))
        for record in self.records:
            if resumed and record is not after and record.member_id == self.member_id:
                record.superseded = min(record.superseded, command.answered)

    async def _open(self, port: int, server_run: ServerRun) -> RoamingConnection | None:
        url = f"ws://{HOST}:{port}/ws/{self.session}"
        record = RoamingRecord(
            self.session, self.name, server_run=server_run, opened=trio.current_time()
        )

        async def run(*, task_status: trio.TaskStatus[RoamingConnection | None]) -> None:
            # No pings of the client: they would end the connection to a suspended server.
            opening = websockets.trio.client.connect(
                url,
                compression=None,
                ping_interval=None,
                open_timeout=_OPEN_TIMEOUT_S,
                close_timeout=1,
            )
            try:
                async with opening as socket:
                    connection = RoamingConnection(record, socket)
                    task_status.started(connection)
                    await connection.run()
            except (OSError, WebSocketException, trio.TooSlowError, TimeoutError):
                # Raised before the task has started. Later errors end up in the record.
                task_status.started(None)

        connection: RoamingConnection | None = await self._nursery.start(run)
        return connection

    async def _act_once(self, connection: RoamingConnection) -> None:
        draw, leads = self._draw, connection.replica.leader == self.member_id
        match draw.choices(
            ["chat", "lead", "claim", "look", "move", "drop", "again", "vanish"],
            [5, 5 if leads else 0, 0 if leads else 0.4, 0.5, 0.35, 0.3, 0.15, 0.05],
        )[0]:
            case "chat":
                await self._request("chat_message", text=next(self._words))
            case "lead":
                await self._lead(connection)
            case "claim":
                if draw.random() < 0.7:
                    await self._request("set_role", role="leader")
                else:
                    await self._request("request_leader")
            case "look":
                await self._request("sync_request")
            case "move":
                await self._move(connection)
            case "drop":
                self._close(connection)
                await self._pause(0.0, GRACE_S / 2)
            case "again":
                await self._request("leave_session")
                self._start_anew()
                await self._pause(0.0, 0.5)
            case "vanish":
                self._start_anew()
                await self._pause(0.0, GRACE_S * 1.5)

    async def _lead(self, connection: RoamingConnection) -> None:
        draw = self._draw
        at = draw.choice(["now", "beat", "bar"])
        others = [member for member in connection.replica.members if member != self.member_id]
        match draw.choices(
            ["play", "pause", "seek", "tempo", "message", "hand", "down"], [3, 1, 2, 2, 4, 0.6, 0.2]
        )[0]:
            case "play":
                await self._request("play")
            case "pause":
                await self._request("pause")
            case "seek":
                await self._request("seek", positionMs=draw.randrange(600_000), at=at)
            case "tempo":
                await self._request("set_tempo", tempoBpm=draw.choice(_TEMPI), at=at)
            case "message":
                await self._request("update_message", message=next(self._words))
            case "hand" if others:
                await self._request("set_role", role="leader", memberId=draw.choice(others))
            case "down":
                await self._request("set_role", role="follower")

    async def _move(self, connection: RoamingConnection) -> None:
        """Resume on another server, with the old connection closed or still open."""
        if self._draw.random() < 0.5:
            self._close(connection)
        self.connection, self._avoid = None, connection.record.server_run.server
        while not self._stopping.is_set() and not await self._connect():
            await self._pause(0.05, 0.3)

    async def _request(self, type_: str, **fields: object) -> bool:
        """Send a command; return whether it was acknowledged.

        A server that does not answer is left. With some probability a suspended one is waited for.
        """
        connection = self.connection
        assert connection is not None
        command, answered = await connection.request(type_, **fields)
        patience_s = PATIENCE_S
        if connection.record.server_run.suspended_now and self._draw.random() < 0.4:
            patience_s = _LONG_PATIENCE_S
        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:

                async def until_over() -> None:
                    await connection.over.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_over)
                await answered.wait()
                nursery.cancel_scope.cancel()
        if command.answer is None and not connection.over.is_set():
            self._avoid = connection.record.server_run.server
            if self._draw.random() < 0.5:
                self._close(connection)
            self.connection = None
        elif command.answer is not None and command.answer.get("code") == "not_joined":
            # A server that was suspended for long may yet learn that the member is connected.
            await self._pause(0.2, 0.5)
        return command.acked

    def _close(self, connection: RoamingConnection) -> None:
        """Close a connection. The membership lasts for the grace."""
        connection.record.left = min(connection.record.left, trio.current_time())
        connection.close.set()
        if self.connection is connection:
            self.connection = None

    def _start_anew(self) -> None:
        """Close all connections and become a new member."""
        for connection in self._connections:
            self._close(connection)
        self._connections = []
        self.member_id, self._token = "", None

    async def _pause(self, least_s: float, most_s: float) -> None:
        with trio.move_on_after(self._draw.uniform(least_s, most_s)):
            await self._stopping.wait()
