"""A band whose session is in a real Redis, and what is stored of it."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import redis
import trio
from msgspec.structs import replace

from bandsync.model.session import Session
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import parse_address
from bandsync.rules.actions import Command
from bandsync.storage.base import (
    Committed,
    Storage,
)
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.wire.commands import ChatMessage
from bandsync.wire.messages import encode
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_storages import KEYS, PATIENT, LossList
from tests.support.servers import PATIENCE_S
from tests.support.states import Stage

_event_ids = itertools.count(1)
KEY = "bandsync:session:{song}"
CHANNEL = "bandsync:events:{song}"


class Band(Stage):
    """Sessions that are decided here and kept in a storage."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage

    async def enter(self, name: str) -> Session:
        before = self.session
        self.join(name)
        return await self.commit(before)

    async def play(self, name: str, command: Command) -> Session:
        before = self.session
        decision = self.do(name, command)
        return await self.commit(before, [encode(event) for event in decision.events])

    async def commit(self, before: Session | None, events: Sequence[bytes] = ()) -> Session:
        assert self.session is not None
        result = await self.storage.commit(before, self.session, events)
        assert isinstance(result, Committed), result
        self.session = result.session
        return result.session

    def next(self, name: str = "Ann", text: str = "lost?") -> Session:
        """A next state that is not committed."""
        before = self.session
        self.do(name, ChatMessage(text=text))
        after, self.session = self.session, before
        assert after is not None
        return after


async def band(storage: Storage) -> Band:
    """Ann and Bob, each on its own connection."""
    made = Band(storage)
    await made.enter("Ann")
    await made.enter("Bob")
    return made


def fields(server: RedisServer, key: str = KEY) -> dict[str, bytes]:
    flat = server.cli("HGETALL", key)
    return {name: value.encode() for name, value in flat.items()}


def dumped(server: RedisServer, key: str = KEY) -> bytes:
    """The value of a key, whatever its type."""
    with redis.Redis(unix_socket_path=str(server.unix_socket)) as client:
        value = client.dump(key)
    assert isinstance(value, bytes)
    return value


def storage_on(link: Link, keys: Keys, losses: LossList | None = None) -> RedisStorage:
    return RedisStorage(
        link,
        keys,
        ttl_s=3600,
        server_id="stage",
        event_ids=(f"event-{number}" for number in _event_ids),
        on_loss=(losses if losses is not None else LossList()).note,
    )


@asynccontextmanager
async def impatient(
    server: RedisServer, losses: LossList, silence_s: float = PATIENCE_S
) -> AsyncIterator[RedisStorage]:
    """A storage whose link may be lost before its end."""
    link = Link(
        parse_address(server.url()),
        name="test",
        timeouts=replace(PATIENT, silence_s=silence_s),
    )

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        # The callers of the link see the reason of the loss.
        with suppress(redis.RedisError):
            await link.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield storage_on(link, KEYS, losses)
        nursery.cancel_scope.cancel()
