"""Links to a Redis Cluster."""

from typing import Any

import pytest
import trio
from redis.exceptions import RedisError

from bandsync.redis_link.cluster.link import ClusterLink
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_storages import cluster_access
from tests.support.servers import PATIENCE_S

KEYS = [f"key {number}" for number in range(300)]


def open_link_to(url: str, **changes: Any) -> ClusterLink:
    made = cluster_access(url, **changes).link()
    assert isinstance(made, ClusterLink)
    return made


async def loss_of(link: ClusterLink) -> RedisError:
    """Why it cannot be used."""
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisError) as caught:
        await link.run()
    return caught.value


def asked(node: RedisServer) -> int:
    """How many times this node said MOVED or ASK."""
    counts = node.cli("INFO", "ERRORSTATS")
    return sum(
        int(counts.get(f"errorstat_{code}", {}).get("count", 0)) for code in ("MOVED", "ASK")
    )
