"""The musicians of `chaos.py --servers`: they play, come and go, and move between servers."""

import json
import random
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import trio
import websockets.trio.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from scripts.chaos.judge import Asked, Message, Record
from scripts.chaos.player import HOST
from scripts.chaos.servers import GRACE_S, Cast, Life
from scripts.chaos.view import View

# Of a client that is not to blame the server too early: Redis may hang for a second.
PATIENCE_S = 3.0

_LOYAL_S = 35.0
_DIAL_S = 1.5
_VOLATILE = frozenset({"scroll_tick", "room_stats", "clock_sync"})
_TEMPI = (60, 92, 120, 138, 174)


@dataclass
class Line(Record):
    """One connection.

    Attributes:
        life: the server process at its other end.
        opened: when it was.
        member_id: who came by it; empty before.
        left: when the client closed it, or asked to leave.
        deserted: when its member asked for a connection elsewhere.
        superseded: when it was given one.
        faults: snapshots that showed another state than was known.
    """

    life: Life = None  # type: ignore[assignment]
    opened: float = 0.0
    member_id: str = ""
    left: float = float("inf")
    deserted: float = float("inf")
    superseded: float = float("inf")
    faults: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Return:
    """A resume that was answered.

    Attributes:
        away: when the connection before was last seen to live.
        old: that connection.
        new: the one that asked.
    """

    name: str
    asked: Asked
    away: float
    old: Line
    new: Line
    resumed: bool


class Wire:
    """A line while it is open."""

    def __init__(self, line: Line, socket: websockets.trio.client.ClientConnection) -> None:
        self.line = line
        self.view = View()
        self.you: Message = {}
        self.over = trio.Event()
        self.close = trio.Event()
        self._socket = socket
        self._waiting: dict[str, tuple[Asked, trio.Event]] = {}
        self._requests = count(1)

    async def run(self) -> None:
        """Listen until either side closes it."""
        line = self.line
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            await self.close.wait()
            if line.left == float("inf"):
                line.closed = (trio.current_time(), self._socket.close_code or 1006)
            self.over.set()
            nursery.cancel_scope.cancel()

    async def ask(self, type_: str, **fields: object) -> tuple[Asked, trio.Event]:
        """Send a command; an event for when it is answered."""
        request_id = f"r{next(self._requests)}"
        asked, answered = Asked(type_, fields, trio.current_time()), trio.Event()
        self._waiting[request_id] = (asked, answered)
        self.line.asked.append(asked)
        text = json.dumps({"type": type_, "requestId": request_id, **fields})
        # A stopped server reads nothing. If it is closed, its reader knows.
        with suppress(ConnectionClosed), trio.move_on_after(PATIENCE_S):
            await self._socket.send(text)
        return asked, answered

    async def _read(self) -> None:
        try:
            async for text in self._socket:
                self._hear(trio.current_time(), json.loads(text))
        except ConnectionClosed:
            pass
        self.close.set()

    def _hear(self, at: float, message: Message) -> None:
        kind = message["type"]
        if kind in _VOLATILE:
            return
        self.line.heard.append((at, message))
        wrong = self.view.hear(message)
        if wrong is not None:
            self.line.faults.append((at, wrong))
        if kind == "snapshot" and "you" in message:
            self.you = message["you"]
        if kind in {"ack", "error"}:
            found = self._waiting.pop(message.get("requestId", ""), None)
            if found is not None:
                asked, answered = found
                asked.answered, asked.answer = at, message
                answered.set()


class Roamer:
    """A musician.

    Attributes:
        wire: the connection it plays on; None while there is none.
        lines: all it ever had.
        returns: how its resumes went.
        hurry: play fast, so that something is always on its way.
    """

    def __init__(
        self, nursery: trio.Nursery, cast: Cast, session: str, name: str, draw: random.Random
    ) -> None:
        self.session = session
        self.name = name
        self.member_id = ""
        self.wire: Wire | None = None
        self.lines: list[Line] = []
        self.returns: list[Return] = []
        self.hurry = False
        self._token: str | None = None
        self._nursery = nursery
        self._cast = cast
        self._draw = draw
        self._words = (f"{session} {name} {number}" for number in count(1))
        self._stopping = trio.Event()
        self._avoid: str | None = None
        # Those that are open.
        self._wires: list[Wire] = []

    def stop(self) -> None:
        """Play no more; stay."""
        self._stopping.set()

    async def play(self) -> None:
        """Play until `stop`, then come back and stay."""
        while not self._stopping.is_set():
            if self.wire is None or self.wire.over.is_set():
                if self.wire is not None:
                    self._avoid = self.wire.line.life.server
                    await self._pause(0.0, 0.6)
                await self._come()
            else:
                await self._act(self.wire)
            await self._pause(0.0, 0.04 if self.hurry else 0.4)

    async def stay(self) -> Wire:
        """Be here, for good: the connection."""
        while self.wire is None or self.wire.over.is_set():
            await self._come()
            await trio.sleep(0.1)
        return self.wire

    async def leave(self) -> None:
        """Leave for good."""
        if self.wire is not None:
            await self._ask("leave_session")
            self._forget()

    async def shown(self) -> Message | None:
        """The state as its server has it; None if it does not say."""
        wire = self.wire
        if wire is None or wire.over.is_set() or not await self._ask("sync_request"):
            return None
        return next(m for _, m in reversed(wire.line.heard) if m["type"] == "snapshot")

    async def _come(self) -> bool:
        """Try one server; True if we are in."""
        hosts = [host for host in self._cast.hosts if host.up and host.name != self._avoid]
        self._avoid = None
        if not hosts:
            return False
        host = self._draw.choice(hosts)
        wire = await self._dial(host.process.port, host.life)
        if wire is None:
            return False
        old = self.lines[-1] if self.lines else None
        fields: dict[str, object] = {"displayName": self.name}
        if self._token is not None:
            fields["resumeToken"] = self._token
            for line in self.lines:
                if line.member_id == self.member_id:
                    line.deserted = min(line.deserted, trio.current_time())
        # The token is sent, so the member may be bound to it.
        wire.line.member_id = self.member_id if self._token is not None else ""
        self.lines.append(wire.line)
        asked, answered = await wire.ask("join_session", **fields)
        with trio.move_on_after(PATIENCE_S):
            await answered.wait()
        if not asked.acked or not wire.you:
            self._hang_up(wire)
            return False
        you = wire.you
        if self._token is not None and old is not None:
            self._returned(asked, old, wire.line, resumed=you["resumed"])
        if not you["resumed"]:
            # It would go on as who we were.
            for older in self._wires:
                self._hang_up(older)
        self._wires = [*(older for older in self._wires if not older.over.is_set()), wire]
        self.member_id, self._token = you["memberId"], you["resumeToken"]
        wire.line.member_id = self.member_id
        self.wire = wire
        return True

    def _returned(self, asked: Asked, old: Line, new: Line, *, resumed: bool) -> None:
        sign = max((at for at, _ in old.heard), default=old.opened)
        away = min(old.left, old.closed[0] if old.closed else sign)
        self.returns.append(Return(self.name, asked, away, old, new, resumed))
        for line in self.lines:
            if resumed and line is not new and line.member_id == self.member_id:
                line.superseded = min(line.superseded, asked.answered)

    async def _dial(self, port: int, life: Life) -> Wire | None:
        url = f"ws://{HOST}:{port}/ws/{self.session}"
        line = Line(self.session, self.name, life=life, opened=trio.current_time())

        async def run(*, task_status: trio.TaskStatus[Wire | None]) -> None:
            # No pings of our own: they would end the line to a stopped server.
            dial = websockets.trio.client.connect(
                url, compression=None, ping_interval=None, open_timeout=_DIAL_S, close_timeout=1
            )
            try:
                async with dial as socket:
                    wire = Wire(line, socket)
                    task_status.started(wire)
                    await wire.run()
            except (OSError, WebSocketException, trio.TooSlowError, TimeoutError):
                # Before it was started; afterwards nothing is raised.
                task_status.started(None)

        return await self._nursery.start(run)

    async def _act(self, wire: Wire) -> None:
        draw, leads = self._draw, wire.view.leader == self.member_id
        match draw.choices(
            ["chat", "lead", "claim", "look", "move", "drop", "again", "vanish"],
            [5, 5 if leads else 0, 0 if leads else 0.4, 0.5, 0.35, 0.3, 0.15, 0.05],
        )[0]:
            case "chat":
                await self._ask("chat_message", text=next(self._words))
            case "lead":
                await self._lead(wire)
            case "claim":
                if draw.random() < 0.7:
                    await self._ask("set_role", role="leader")
                else:
                    await self._ask("request_leader")
            case "look":
                await self._ask("sync_request")
            case "move":
                await self._move(wire)
            case "drop":
                self._hang_up(wire)
                await self._pause(0.0, GRACE_S / 2)
            case "again":
                await self._ask("leave_session")
                self._forget()
                await self._pause(0.0, 0.5)
            case "vanish":
                self._forget()
                await self._pause(0.0, GRACE_S * 1.5)

    async def _lead(self, wire: Wire) -> None:
        draw = self._draw
        at = draw.choice(["now", "beat", "bar"])
        others = [member for member in wire.view.members if member != self.member_id]
        match draw.choices(
            ["play", "pause", "seek", "tempo", "message", "hand", "down"], [3, 1, 2, 2, 4, 0.6, 0.2]
        )[0]:
            case "play":
                await self._ask("play")
            case "pause":
                await self._ask("pause")
            case "seek":
                await self._ask("seek", positionMs=draw.randrange(600_000), at=at)
            case "tempo":
                await self._ask("set_tempo", tempoBpm=draw.choice(_TEMPI), at=at)
            case "message":
                await self._ask("update_message", message=next(self._words))
            case "hand" if others:
                await self._ask("set_role", role="leader", memberId=draw.choice(others))
            case "down":
                await self._ask("set_role", role="follower")

    async def _move(self, wire: Wire) -> None:
        """Resume elsewhere, with the old connection closed or still open."""
        if self._draw.random() < 0.5:
            self._hang_up(wire)
        self.wire, self._avoid = None, wire.line.life.server
        while not self._stopping.is_set() and not await self._come():
            await self._pause(0.05, 0.3)

    async def _ask(self, type_: str, **fields: object) -> bool:
        """Give a command; whether it was carried out.

        A server that does not answer is left, or, by the loyal, waited for.
        """
        wire = self.wire
        assert wire is not None
        asked, answered = await wire.ask(type_, **fields)
        patience_s = PATIENCE_S
        if wire.line.life.paused_now and self._draw.random() < 0.4:
            patience_s = _LOYAL_S
        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:

                async def until_over() -> None:
                    await wire.over.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_over)
                await answered.wait()
                nursery.cancel_scope.cancel()
        if asked.answer is None and not wire.over.is_set():
            self._avoid = wire.line.life.server
            if self._draw.random() < 0.5:
                self._hang_up(wire)
            self.wire = None
        elif asked.answer is not None and asked.answer.get("code") == "not_joined":
            # A server that was away for long; it may yet find out that we are here.
            await self._pause(0.2, 0.5)
        return asked.acked

    def _hang_up(self, wire: Wire) -> None:
        """Close a connection; the membership stays for the grace."""
        wire.line.left = min(wire.line.left, trio.current_time())
        wire.close.set()
        if self.wire is wire:
            self.wire = None

    def _forget(self) -> None:
        """Close all connections and be somebody else from now on."""
        for wire in self._wires:
            self._hang_up(wire)
        self._wires = []
        self.member_id, self._token = "", None

    async def _pause(self, least_s: float, most_s: float) -> None:
        with trio.move_on_after(self._draw.uniform(least_s, most_s)):
            await self._stopping.wait()
