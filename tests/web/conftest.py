"""Servers in processes of their own, for pages."""

import pytest

from scripts.testbed.redis_server import RedisServer
from scripts.testbed.server_process import ServerProcess
from tests.support.stage_pages import Start


@pytest.fixture
def server_process(start_process: Start) -> ServerProcess:
    """A server without Redis."""
    return start_process()


@pytest.fixture
def redis_server_process(start_process: Start, redis_server: RedisServer) -> ServerProcess:
    """A server with a Redis of its own."""
    return start_process(REDIS_ENABLED="true", REDIS_URL=redis_server.url())
