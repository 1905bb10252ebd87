"""Fixtures that several test modules share."""

from collections.abc import AsyncIterator

import pytest
import trio

from tests.servers import Server, start_server


@pytest.fixture
async def server(nursery: trio.Nursery) -> AsyncIterator[Server]:
    """A whole server in this process, on a free port."""
    started = await start_server(nursery)
    yield started
    await started.stop()
