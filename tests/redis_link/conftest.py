"""Servers that the tests of Redis links share."""

from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_server import RedisServer


@pytest.fixture
async def proxy(shared_redis: RedisServer, nursery: trio.Nursery) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(shared_redis.port)
    await nursery.start(proxy.run)
    yield proxy
    nursery.cancel_scope.cancel()


@pytest.fixture
def cluster(redis_binary: None) -> Iterator[RedisCluster]:
    """For one test, which may do with it what it likes."""
    with RedisCluster() as made:
        yield made


@pytest.fixture(scope="module")
def _common(redis_binary: None) -> Iterator[RedisCluster]:
    with RedisCluster() as made:
        yield made


@pytest.fixture
def mended(_common: RedisCluster) -> RedisCluster:
    """For tests that leave all nodes alive and all slots whole."""
    _common.flush()
    _common.wait_until_whole()
    return _common
