"""The health watcher on a real Redis: our presence, and whose name it is."""

import pytest

from bandsync.clock import SessionClock
from bandsync.redis_link.link import Link
from bandsync.storage.base import Presence
from bandsync.storage.health import PRESENCE_EXPIRY_MS, HealthCheck, NameTakenError
from tests.redis_servers import RedisServer
from tests.redis_storages import KEYS, open_link
from tests.states import NOW

KEY = KEYS.server("stage")


def health(boot_id: str) -> HealthCheck:
    return HealthCheck(
        interval_s=1,
        timeout_s=1,
        clock=SessionClock(NOW, 0),
        presence_key=KEY,
        presence=lambda: Presence(boot_id, NOW, f"http://{boot_id}", ["song"], 2),
        is_gone=lambda _: False,
        serving=lambda: False,
    )


async def check(checks: HealthCheck, link: Link) -> None:
    await checks._check(link, write=True)  # noqa: SLF001


async def test_a_check_refreshes_the_presence(shared_redis: RedisServer) -> None:
    async with open_link(shared_redis.url()) as link:
        await check(health("boot-1"), link)
        assert '"bootId":"boot-1"' in shared_redis.cli("GET", KEY)
        assert 0 < shared_redis.cli("PTTL", KEY) <= PRESENCE_EXPIRY_MS


async def test_who_yields_does_not_hide_the_one_who_stays(shared_redis: RedisServer) -> None:
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
async def test_an_entry_that_is_none_is_written_over(shared_redis: RedisServer, junk: str) -> None:
    one = health("boot-1")
    async with open_link(shared_redis.url()) as link:
        await check(one, link)
        shared_redis.cli("SET", KEY, junk)
        await check(one, link)
        assert '"bootId":"boot-1"' in shared_redis.cli("GET", KEY)
