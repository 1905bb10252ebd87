"""Redis storages over links of their own."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from redis.exceptions import RedisError

from bandsync.redis_link.address import parse_address
from bandsync.redis_link.link import Link
from bandsync.storage.redis import Keys, RedisStorage
from tests.servers import PATIENCE_S

KEYS = Keys("bandsync:")
_event_ids = itertools.count(1)


@asynccontextmanager
async def open_link(url: str) -> AsyncIterator[Link]:
    """A link that is closed at the end."""
    link = Link(
        parse_address(url),
        name="test",
        connect_timeout_s=PATIENCE_S,
        command_timeout_s=PATIENCE_S,
        silence_s=PATIENCE_S,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        yield link
        nursery.cancel_scope.cancel()


class LossList(list[str]):
    """The reasons for which a storage gave up."""

    def note(self, reason: str, error: RedisError) -> None:
        assert str(error)
        self.append(reason)


@asynccontextmanager
async def redis_storage(
    url: str, *, losses: LossList | None = None, ttl_s: int = 3600
) -> AsyncIterator[RedisStorage]:
    """A storage over a link of its own."""
    async with open_link(url) as link:
        yield RedisStorage(
            link,
            KEYS,
            ttl_s=ttl_s,
            server_id="stage",
            event_ids=(f"event-{number}" for number in _event_ids),
            on_loss=(losses if losses is not None else LossList()).note,
        )
