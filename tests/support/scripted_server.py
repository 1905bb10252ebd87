"""A scripted server on memory streams, for clients on virtual time."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import trio
from trio.testing import memory_stream_pair
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from bandsync import client
from bandsync.client import EventStream
from bandsync.wire.rate_limits import RateLimits

Message = dict[str, Any]

# Session time when Trio's clock shows zero.
START = 1_800_000_000_000.0
TRANSPORT = {
    "isPlaying": False,
    "positionMs": 0.0,
    "anchorTime": START,
    "tempoBpm": 120.0,
    "beat": 0.0,
    "beatsPerBar": 4,
    "next": None,
}
ANN = {
    "memberId": "ann",
    "displayName": "Ann",
    "role": "leader",
    "joinedAt": START,
    "connected": True,
    "serverId": "script",
}


def session_now() -> float:
    return START + trio.current_time() * 1000


class ScriptedServer:
    """Sends welcomes, admits joins, answers clock_sync and acknowledges all else, by default.

    Attributes:
        answers: by message type, what is done instead.
        received: every message with the time it came.
        connected: when each connection was opened.
        refuse: the next connections that cannot be made.
        mute: nothing is sent any more, as if the network were gone; pings neither.
        delay: how long an answer takes, in seconds.
        version: of the session.
        limited: messages that a real server would have refused.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.answers: dict[str, Callable[[Message], Awaitable[None]]] = {}
        self.received: list[tuple[float, Message]] = []
        self.connected: list[float] = []
        self.attempts: list[float] = []
        self.refuse = 0
        self.mute = False
        self.delay: Callable[[], float] = lambda: 0.0
        self.version = 1
        self.epoch = "one"
        self.protocol = 1
        self.limited: list[Message] = []
        self.socket: WebSocketConnection | None = None
        self.streams: list[trio.StapledStream[Any, Any]] = []

    async def open_stream(self) -> trio.abc.Stream:
        """For `connect`."""
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        if self.refuse:
            self.refuse -= 1
            raise OSError("nobody there")
        ours, theirs = memory_stream_pair()
        self.connected.append(trio.current_time())
        self.streams.append(theirs)
        self._nursery.start_soon(self._serve, ours)
        return theirs

    async def send(self, type_: str, **fields: object) -> None:
        """Send a message over the latest connection."""
        await self.send_text(msgspec.json.encode({"type": type_, **fields}).decode())

    async def send_text(self, text: str | bytes) -> None:
        if not self.mute and self.socket is not None:
            with suppress(ConnectionClosed):
                await self.socket.send_message(text)

    async def event(self, type_: str, **fields: object) -> None:
        """Send an event with the next version."""
        self.version += 1
        await self.send(type_, **self.head(), **fields)

    def head(self) -> Message:
        return {"sessionId": "song", "version": self.version, "serverTime": session_now()}

    async def snapshot(self, **fields: object) -> None:
        """Send a snapshot."""
        known = {
            "epoch": self.epoch,
            "message": "",
            "tempo": 120.0,
            "tempoBpm": 120.0,
            "position": 0.0,
            "isPlaying": False,
            "transport": TRANSPORT,
            "leaderId": "ann",
            "members": [ANN],
            "chat": [],
            "settings": {"maxMembers": 8},
            "createdAt": START,
            "lastActiveAt": START,
        }
        await self.send("snapshot", **{**self.head(), **known, **fields})

    async def ack(self, message: Message, version: int | None = None) -> None:
        if "requestId" in message:
            extra = {} if version is None else {"version": version}
            await self.send("ack", requestId=message["requestId"], **extra)

    async def refusal(self, message: Message, code: str) -> None:
        await self.send("error", code=code, message="No.", requestId=message["requestId"])

    async def let_in(self, message: Message) -> None:
        you = {
            "memberId": "ann",
            "role": "leader",
            "resumeToken": f"token-{len(self.connected)}",
            "resumed": "resumeToken" in message,
        }
        await self.snapshot(you=you)
        await self.ack(message, self.version)

    def times(self, type_: str) -> list[float]:
        """When messages of this type came."""
        return [at for at, message in self.received if message["type"] == type_]

    async def close(self, code: int, reason: str = "") -> None:
        """Close the latest connection."""
        assert self.socket is not None
        # Its own reader may be gone before the answer comes.
        with trio.move_on_after(0.01):
            await self.socket.aclose(code, reason)

    async def _serve(self, stream: trio.StapledStream[Any, Any]) -> None:
        limits = RateLimits(1)
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream)
            self.socket = socket = await request.accept()
            await self.send(
                "welcome",
                protocol=self.protocol,
                serverId="script",
                connectionId=str(len(self.connected)),
                serverTime=session_now(),
                storageType="memory",
                pingIntervalMs=5000,
                limits={
                    "maxMessageBytes": 16384,
                    "maxMembers": 8,
                    "minTempoBpm": 20.0,
                    "maxTempoBpm": 300.0,
                },
            )
            try:
                while True:
                    message = msgspec.json.decode(await socket.get_message())
                    now = trio.current_time()
                    self.received.append((now, message))
                    if not limits.allow(message["type"], now):
                        self.limited.append(message)
                    nursery.start_soon(self._answer, message, session_now())
            except ConnectionClosed:
                nursery.cancel_scope.cancel()

    async def _answer(self, message: Message, received: float) -> None:
        kind = message["type"]
        if kind in self.answers:
            await self.answers[kind](message)
        elif kind == "join_session":
            await self.let_in(message)
        elif kind == "clock_sync":
            await trio.sleep(self.delay())
            await self.send("clock_sync", t0=message["t0"], t1=received, t2=received)
        elif kind != "sync_report":
            await self.ack(message)


class Clogged(trio.abc.Stream):
    """A stream whose writes block while it is clogged."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.clogged = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.clogged:
            await trio.sleep_forever()
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.stream.aclose()


class Slow(Clogged):
    """A stream whose writes are delayed."""

    delay_s = 0.0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(self.delay_s)
        await self.stream.send_all(data)


def joined(script: ScriptedServer, **options: Any) -> Any:
    """A client that joins "song" on a scripted server."""
    return client.connect("ws://script", "song", open_stream=script.open_stream, **options)


async def settle() -> None:
    """Let all tasks run: virtual time stands still until every one of them waits."""
    await trio.sleep(0.001)


async def events_so_far(stream: EventStream) -> list[client.BandEvent]:
    """The events that the stream has received by now."""
    found = []
    with trio.move_on_after(0.001):
        async for event in stream:
            found.append(event)
    return found


async def never_answer(message: Message) -> None:
    """For `ScriptedServer.answers`: the message stays unanswered."""
