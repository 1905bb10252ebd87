"""Redis storages over links of their own."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from msgspec.structs import replace
from redis.exceptions import RedisError

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.interfaces import Executor
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import parse_address
from bandsync.redis_link.timeouts import Timeouts
from bandsync.settings import Settings
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.storage.redis_connector import RedisConnector
from tests.support.servers import PATIENCE_S

KEYS = Keys("bandsync:")
PATIENT = Timeouts(PATIENCE_S, PATIENCE_S, PATIENCE_S, PATIENCE_S)
IMPATIENT = Timeouts(connect_s=1, command_s=1, silence_s=1, health_interval_s=1)
_event_ids = itertools.count(1)


@asynccontextmanager
async def open_link(url: str) -> AsyncIterator[Link]:
    """A link that is closed at the end."""
    link = Link(
        parse_address(url),
        name="test",
        timeouts=PATIENT,
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
        yield storage_over(link, losses=losses, ttl_s=ttl_s)


def storage_over(
    link: Executor, *, losses: LossList | None = None, ttl_s: int = 3600
) -> RedisStorage:
    """A storage over this link."""
    return RedisStorage(
        link,
        KEYS,
        ttl_s=ttl_s,
        server_id="stage",
        event_ids=(f"event-{number}" for number in _event_ids),
        on_loss=(losses if losses is not None else LossList()).note,
    )


@asynccontextmanager
async def open_cluster(url: str) -> AsyncIterator[ClusterLink]:
    """A link to a Cluster that is closed at the end."""
    link = cluster_access(url).link()
    assert isinstance(link, ClusterLink)
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        yield link
        nursery.cancel_scope.cancel()


def cluster_access(url: str, **changes: Any) -> RedisConnector:
    """How a server reaches a Cluster; it is patient."""
    patience_ms = round(PATIENCE_S * 1000)
    patient = Settings(
        redis_url=url,
        redis_cluster=True,
        redis_connect_timeout=patience_ms,
        redis_command_timeout=patience_ms,
        redis_health_timeout_ms=patience_ms,
        redis_health_interval_ms=50,
    )
    return RedisConnector(replace(patient, **changes), "stage")
