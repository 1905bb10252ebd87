"""Whole servers in this process, and a musician who plays on them with a foreign client."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
import trio
from msgspec.structs import replace
from structlog.testing import CapturingLogger
from websockets.exceptions import ConnectionClosed
from websockets.trio.client import ClientConnection, connect

from bandsync.app import Serving, serve
from bandsync.settings import Settings

Message = dict[str, Any]

# Waiting for what must come: generous, because CI shares its cores. Never asserted on.
PATIENCE_S = 20.0

# Tests are faster than musicians; those of the rate limits set their own.
TEST_SETTINGS = Settings(
    redis_enabled=False, port=0, server_id="stage", drain_timeout_ms=2000, rate_limit_factor=0
)


class Server:
    """A server that runs, with its log.

    Attributes:
        lines: what it announced on standard output.
    """

    def __init__(
        self,
        serving: Serving,
        settings: Settings,
        log: CapturingLogger,
        lines: list[str],
        done: trio.Event,
    ) -> None:
        self.serving = serving
        self.settings = settings
        self.lines = lines
        self._log = log
        self._done = done

    @property
    def port(self) -> int:
        return self.serving.port

    async def stop(self) -> None:
        """Drain, and wait until it has stopped."""
        self.serving.stop()
        with trio.fail_after(PATIENCE_S):
            await self._done.wait()

    def events(self, name: str) -> list[Message]:
        """The log events with this name."""
        return [call.kwargs for call in self._log.calls if call.kwargs["event"] == name]


async def start_server(nursery: trio.Nursery, **changes: object) -> Server:
    """Start a server with `TEST_SETTINGS` and these changes."""
    settings = replace(TEST_SETTINGS, **changes)
    done = trio.Event()
    log = CapturingLogger()
    logger = structlog.wrap_logger(
        log,
        processors=[structlog.processors.format_exc_info],
        wrapper_class=structlog.make_filtering_bound_logger("debug"),
    )
    lines: list[str] = []

    async def run(*, task_status: trio.TaskStatus[Serving]) -> None:
        try:
            await serve(settings, logger, announce=lines.append, task_status=task_status)
        finally:
            done.set()

    serving = await nursery.start(run)
    return Server(serving, settings, log, lines, done)


class Musician:
    """A member of the band, on the `websockets` library.

    Reads in the background, so that nothing is ever left unread; ``inbox`` has every message.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.inbox: list[Message] = []
        self.you: Message = {}
        self.close_code: int | None = None
        self._looked = 0
        self._news = trio.Event()
        self._requests = 0

    async def read(self) -> None:
        """Collect messages until the connection closes."""
        try:
            async for text in self.socket:
                self.inbox.append(json.loads(text))
                self._notify()
        except ConnectionClosed:
            pass
        self.close_code = self.socket.close_code
        self._notify()

    def _notify(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def until(self, wanted: Callable[[], Any]) -> Any:
        """Wait until ``wanted`` gives something true, asking after every message."""
        with trio.fail_after(PATIENCE_S):
            while not (found := wanted()):
                await self._news.wait()
        return found

    async def next(self, *types: str, **fields: object) -> Message:
        """The next message of one of these types with these fields, skipping others."""

        def look() -> Message | None:
            while self._looked < len(self.inbox):
                message = self.inbox[self._looked]
                self._looked += 1
                if message["type"] in types and fields.items() <= message.items():
                    return message
            return None

        return await self.until(look)

    async def closed(self) -> int:
        """The code that the server closed with."""
        await self.until(lambda: self.close_code is not None)
        assert self.close_code is not None
        return self.close_code

    async def send(self, type_: str, **fields: object) -> None:
        """Send a message and wait for nothing."""
        await self.socket.send(json.dumps({"type": type_, **fields}))

    async def ask(self, type_: str, **fields: object) -> Message:
        """Send a message with a ``requestId``; its ``ack`` or ``error``."""
        self._requests += 1
        request_id = f"r{self._requests}"
        await self.send(type_, requestId=request_id, **fields)

        def answered() -> Message | None:
            return next(
                (
                    message
                    for message in self.inbox
                    if message["type"] in {"ack", "error"}
                    and message.get("requestId") == request_id
                ),
                None,
            )

        return await self.until(answered)

    async def ok(self, type_: str, **fields: object) -> Message:
        """The same for a message that must be acknowledged."""
        answer = await self.ask(type_, **fields)
        assert answer["type"] == "ack", answer
        return answer

    async def join(self, session: str | None = "song", **fields: object) -> Message:
        """Join; the snapshot."""
        if session is not None:
            fields["sessionId"] = session
        before = len(self.inbox)
        await self.ok("join_session", **fields)
        snapshot = next(message for message in self.inbox[before:] if message["type"] == "snapshot")
        self.you = snapshot["you"]
        return snapshot

    def all(self, *types: str) -> list[Message]:
        """Every message of these types so far."""
        return [message for message in self.inbox if message["type"] in types]


@asynccontextmanager
async def musician(server: Server, path: str = "/ws", **options: Any) -> AsyncIterator[Musician]:
    """A connection that has been welcomed."""
    scheme = "wss" if server.settings.tls_cert else "ws"
    async with (
        connect(f"{scheme}://127.0.0.1:{server.port}{path}", compression=None, **options) as socket,
        trio.open_nursery() as nursery,
    ):
        player = Musician(socket)
        nursery.start_soon(player.read)
        await player.next("welcome")
        yield player
        await socket.aclose()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def band(server: Server, *names: str, session: str = "song") -> AsyncIterator[list[Musician]]:
    """Members who joined one after the other; the first leads."""
    async with trio.open_nursery() as nursery:
        players: list[Musician] = []
        for name in names:
            player = await nursery.start(play_along, server)
            await player.join(session, displayName=name)
            players.append(player)
        yield players
        nursery.cancel_scope.cancel()


async def play_along(server: Server, *, task_status: trio.TaskStatus[Musician]) -> None:
    """A connection that has been welcomed, for as long as the nursery lives."""
    async with musician(server) as player:
        task_status.started(player)
        await trio.sleep_forever()
