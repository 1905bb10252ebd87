"""A scripted Redis on memory streams, and multiplexers that may be lost."""

import anyio
import anyio.abc
import hiredis
import pytest
import trio
import trio.testing
from redis.exceptions import RedisError

from bandsync.redis_link.multiplexer import Multiplexer
from bandsync.redis_link.redis_address import RedisAddress
from tests.support.servers import PATIENCE_S

ADDRESS = RedisAddress(host="stage.example")


class Wire(anyio.abc.ByteStream):
    """Adapts one of Trio's memory streams to anyio."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        # The bytes of each write.
        self.writes: list[bytes] = []

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        self.writes.append(item)
        try:
            await self._stream.send_all(item)
        except trio.BrokenResourceError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class ScriptedRedis:
    """The other end of the next connection that is opened.

    Args:
        lockstep: a send waits until the data is read.

    Attributes:
        wire: the other end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lockstep: bool = False) -> None:
        pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
        stream, self.stream = pair()
        self.wire = Wire(stream)
        self._reader = hiredis.Reader()
        monkeypatch.setattr("anyio.connect_tcp", self._connect)

    async def _connect(self, host: str, port: int) -> Wire:
        return self.wire

    async def command(self) -> list[bytes]:
        """The next command."""
        while (command := self._reader.gets()) is False:
            data = await self.stream.receive_some()
            assert data, "the connection was closed"
            self._reader.feed(bytes(data))
        return command

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, *replies: bytes) -> None:
        """Read one command for each reply, and send it."""
        for reply in replies:
            await self.command()
            await self.send(reply)


class Outcome:
    """How a multiplexer ended.

    Attributes:
        error: the reason of the loss.
    """

    def __init__(self) -> None:
        self.error: RedisError | None = None
        self._ended = trio.Event()

    async def wait(self) -> RedisError:
        """Wait for the loss; returns its error."""
        with trio.fail_after(PATIENCE_S):
            await self._ended.wait()
        assert self.error is not None
        return self.error

    async def run(self, multiplexer: Multiplexer, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await multiplexer.run(task_status=task_status)
        except RedisError as error:
            self.error = error
        finally:
            self._ended.set()


async def start(
    nursery: trio.Nursery, multiplexer: Multiplexer, scripted: ScriptedRedis | None = None
) -> Outcome:
    """Run a multiplexer; a scripted Redis answers its handshake."""
    outcome = Outcome()
    if scripted is not None:
        nursery.start_soon(scripted.answer, b"+OK\r\n")
    with trio.fail_after(PATIENCE_S):
        await nursery.start(outcome.run, multiplexer)
    return outcome
