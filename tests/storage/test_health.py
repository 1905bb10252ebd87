"""The health watcher on a real Redis: our presence, and whose name it is."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from bandsync.model.clock import ServerClock
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.storage.base import Presence
from bandsync.storage.health import PRESENCE_EXPIRY_MS, HealthCheck, NameTakenError
from scripts.testbed.redis_server import RedisServer
from tests.support.redis_storages import IMPATIENT, KEYS, open_link
from tests.support.states import NOW

KEY = KEYS.server("stage")


def health(boot_id: str, clock: ServerClock | None = None) -> HealthCheck:
    return HealthCheck(
        timeouts=IMPATIENT,
        clock=clock or ServerClock(NOW, 0),
        presence_key=KEY,
        presence=lambda: Presence(boot_id, NOW, f"http://{boot_id}", ["song"], 2),
        is_gone=lambda _: False,
        serving=lambda: clock is not None,
    )


async def check(checks: HealthCheck, link: Link) -> None:
    await checks._check(link, write=True)  # noqa: SLF001


async def test_check_refreshes_the_presence(shared_redis: RedisServer) -> None:
    async with open_link(shared_redis.url()) as link:
        await check(health("boot-1"), link)
        assert '"bootId":"boot-1"' in shared_redis.cli("GET", KEY)
        assert 0 < shared_redis.cli("PTTL", KEY) <= PRESENCE_EXPIRY_MS


async def test_yielding_server_keeps_the_entry_of_the_other(shared_redis: RedisServer) -> None:
    one, two = health("boot-1"), health("boot-2")
    async with open_link(shared_redis.url()) as link:
        # Neither had written when the other looked.
        await check(one, link)
        await check(two, link)
        # It goes before the other, and takes its place back.
        await check(one, link)
        with pytest.raises(NameTakenError, match="http://boot-1"):
            await check(two, link)
        assert '"bootId":"boot-1"' in shared_redis.cli("GET", KEY)
        await check(one, link)


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"bootId":7}', '{"bootId":null}'])
async def test_malformed_entry_is_overwritten(shared_redis: RedisServer, junk: str) -> None:
    one = health("boot-1")
    async with open_link(shared_redis.url()) as link:
        await check(one, link)
        shared_redis.cli("SET", KEY, junk)
        await check(one, link)
        assert '"bootId":"boot-1"' in shared_redis.cli("GET", KEY)


class Reference:
    """Nodes of a Cluster, each with a clock of its own; on virtual time.

    Attributes:
        address: who answers.
        ahead_ms: how far its clock is.
        slow_s: how long its answers take.
    """

    def __init__(self) -> None:
        self.address = RedisAddress("one")
        self.ahead_ms = 0.0
        self.slow_s = 0.001

    async def execute_all(self, commands: Sequence[tuple[Argument, ...]]) -> list[Reply]:
        assert list(commands) == [("PING",), ("TIME",)]
        await trio.sleep(self.slow_s / 2)
        now_ms = NOW + trio.current_time() * 1000 + self.ahead_ms
        await trio.sleep(self.slow_s / 2)
        return [b"PONG", [b"%d" % (now_ms // 1000), b"%d" % (now_ms % 1000 * 1000)]]


async def test_another_time_source_causes_no_step(
    autojump_clock: MockClock,
) -> None:
    clock = ServerClock(NOW, trio.current_time())
    checks = health("boot-1", clock)
    node = Reference()

    async def look() -> None:
        await checks._check(node, write=False)  # type: ignore[arg-type]  # noqa: SLF001

    for _ in range(8):
        await look()
        await trio.sleep(0.5)
    assert clock.error_ms is not None
    assert abs(clock.error_ms) < 1
    # Another master has slot 0 by now: further away, and its clock is 20 ms ahead.
    node.address, node.ahead_ms, node.slow_s = RedisAddress("two"), 20.0, 0.004
    before_ms = clock.at(trio.current_time())
    await look()
    after_ms = clock.at(trio.current_time())
    # Samples of the nearer node are discarded, and the clock does not step.
    assert after_ms - before_ms == pytest.approx(4, abs=0.1)
    assert clock.error_ms == pytest.approx(20, abs=3)
    for _ in range(100):
        await trio.sleep(0.5)
        await look()
    assert clock.error_ms == pytest.approx(0, abs=3)
