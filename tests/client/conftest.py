"""A server that follows a script, on virtual time."""

import pytest
import trio
import trio.lowlevel

from tests.support.scripted_server import ScriptedServer


@pytest.fixture
async def script(nursery: trio.Nursery) -> ScriptedServer:
    return ScriptedServer(nursery)
