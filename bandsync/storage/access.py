"""How this server reaches its Redis: from settings to connections."""

import re
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from bandsync.redis_link.address import Address, parse_address
from bandsync.redis_link.link import Link
from bandsync.redis_link.subscriber import Subscriber
from bandsync.settings import Settings
from bandsync.storage.redis import Keys


class Access:
    """Makes the connections to one Redis. As a text it is the address, without secrets.

    Args:
        server_id: shown by CLIENT LIST, and the name of our probe's channel.

    Attributes:
        keys: the names of everything there.

    Raises:
        ValueError: ``REDIS_URL`` is none; the text does not quote it.
    """

    def __init__(self, settings: Settings, server_id: str) -> None:
        self.keys = Keys(settings.redis_key_prefix)
        self._settings = settings
        self._server_id = server_id
        self._address = _address(settings)

    def __str__(self) -> str:
        return str(self._address)

    def link(self) -> Link:
        """A link for one attempt."""
        settings = self._settings
        return Link(
            self._address,
            name=self._client_name("link"),
            connect_timeout_s=settings.redis_connect_timeout / 1000,
            command_timeout_s=settings.redis_command_timeout / 1000,
            silence_s=settings.redis_health_timeout_ms / 1000,
        )

    def subscriber(self, link: Link, heard: Callable[[bytes, bytes], None]) -> Subscriber:
        """A subscriber for one attempt, that sends its probes over ``link``.

        Args:
            heard: called with each channel and message.
        """
        settings = self._settings
        channel = self.keys.probe(self._server_id)
        return Subscriber(
            self._address,
            name=self._client_name("relay"),
            connect_timeout_s=settings.redis_connect_timeout / 1000,
            command_timeout_s=settings.redis_command_timeout / 1000,
            silence_s=settings.redis_health_timeout_ms / 1000,
            on_message=heard,
            probe_channel=channel.encode(),
            probe=partial(link.execute, "PUBLISH", channel),
        )

    def _client_name(self, role: str) -> str:
        # Redis takes printable ASCII without spaces.
        return re.sub(r"[^!-~]", "-", f"bandsync-{role}-{self._server_id}")


def _address(settings: Settings) -> Address:
    if settings.redis_url is None:
        return Address(
            host=settings.redis_host,
            port=settings.redis_port,
            username=settings.redis_username,
            password=settings.redis_password,
            db=settings.redis_db,
        )
    address = parse_address(settings.redis_url)
    return replace(
        address,
        username=address.username or settings.redis_username,
        password=address.password or settings.redis_password,
    )
