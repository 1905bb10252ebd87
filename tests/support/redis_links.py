"""Links to a real or scripted Redis."""

import re
from typing import Any

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from redis.exceptions import (
    RedisError,
)

from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress, parse_address
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST
from tests.support.redis_storages import PATIENT
from tests.support.servers import PATIENCE_S


def link_to(
    target: str | RedisAddress,
    *,
    name: str = "bandsync-test",
    max_queued: int = 10_000,
    **deadlines: float,
) -> Link:
    address = parse_address(target) if isinstance(target, str) else target
    timeouts = replace(PATIENT, **deadlines)
    return Link(address, name=name, timeouts=timeouts, max_queued=max_queued)


async def loss_of_connecting(target: str | RedisAddress, **changes: Any) -> RedisError:
    """The error with which a link does not come up."""
    link = link_to(target, **changes)
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisError) as raised:
        await link.run()
    assert not link.usable
    with pytest.raises(type(raised.value), match=re.escape(str(raised.value))):
        await link.execute("PING")
    return raised.value


def proxied(proxy: FaultProxy) -> RedisAddress:
    return RedisAddress(host=HOST, port=proxy.port)
