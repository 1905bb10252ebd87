"""From settings to the links and subscribers of one Redis."""

import re
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.cluster.nodes import NodeLink, Seeds
from bandsync.redis_link.cluster.slots import Endpoint
from bandsync.redis_link.cluster.subscriber import ClusterSubscriber
from bandsync.redis_link.interfaces import ChannelSubscriber, Executor
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress, parse_address
from bandsync.redis_link.sentinel import MasterLink, Sentinels
from bandsync.redis_link.subscriber import Subscriber
from bandsync.redis_link.timeouts import Timeouts
from bandsync.settings import Settings, sentinel_hosts
from bandsync.storage.redis import Keys


class RedisConnector:
    """Makes the links and subscribers of one Redis. As a text it is the address, without secrets.

    Args:
        server_id: shown by CLIENT LIST, and part of the names of the probe channels.

    Attributes:
        keys: the names of keys and channels.

    Raises:
        ValueError: ``REDIS_URL`` is no URL of Redis, or does not fit the other settings. The text
            does not quote it.
    """

    def __init__(self, settings: Settings, server_id: str) -> None:
        self.keys = Keys(settings.redis_key_prefix)
        self._server_id = server_id
        self._address = _address(settings)
        self._timeouts = read_timeouts(settings)
        self._seeds = Seeds(self._address) if settings.redis_cluster else None
        self._sentinels = _sentinels(settings, self._address)
        self._master: RedisAddress | None = None

    def __str__(self) -> str:
        if self._sentinels is not None:
            named = str(self._sentinels)
            return named if self._master is None else f"{self._master}, {named}"
        return f"{self._address}" if self._seeds is None else f"{self._address}, a Cluster"

    def link(self) -> Executor:
        """An unconnected link, for one attempt."""
        name = self._client_name("link")
        if self._seeds is not None:
            return ClusterLink(
                self._seeds,
                make_link=self._node_link,
                probe_key=partial(self.keys.node_probe, self._server_id),
                timeouts=self._timeouts,
            )
        if self._sentinels is not None:
            return MasterLink(
                self._sentinels,
                self._address,
                on_found=self._on_found,
                name=name,
                timeouts=self._timeouts,
            )
        return Link(self._address, name=name, timeouts=self._timeouts)

    def subscriber(
        self, link: Executor, on_message: Callable[[bytes, bytes], None]
    ) -> ChannelSubscriber:
        """An unconnected subscriber, for one attempt. It publishes its probes over ``link``.

        It connects to the server of ``link``, even if the Sentinels name another one by now:
        commits and messages must belong to the same Redis.

        Args:
            on_message: called with channel and payload of each message.
        """
        if isinstance(link, ClusterLink) and link.publish_verb == "SPUBLISH":
            return ClusterSubscriber(
                link, partial(self._node_subscriber, link, on_message), on_message
            )
        # Up to Redis 6 a Cluster broadcasts messages to all nodes: one subscriber is enough.
        return self._subscriber(link, link.address, self.keys.probe(self._server_id), on_message)

    def _node_link(self, address: RedisAddress, connect_timeout_s: float) -> NodeLink:
        return NodeLink(
            address,
            name=self._client_name("link"),
            timeouts=replace(self._timeouts, connect_s=connect_timeout_s),
        )

    def _node_subscriber(
        self,
        link: ClusterLink,
        on_message: Callable[[bytes, bytes], None],
        master: Endpoint,
        hash_tag: int,
        on_removed: Callable[[bytes], None],
    ) -> Subscriber:
        assert self._seeds is not None
        channel = self.keys.node_probe(self._server_id, hash_tag)
        return self._subscriber(link, self._seeds.at(master), channel, on_message, on_removed)

    def _subscriber(
        self,
        link: Executor,
        address: RedisAddress,
        probe_channel: str,
        on_message: Callable[[bytes, bytes], None],
        on_removed: Callable[[bytes], None] | None = None,
    ) -> Subscriber:
        return Subscriber(
            address,
            name=self._client_name("relay"),
            timeouts=self._timeouts,
            on_message=on_message,
            probe_channel=probe_channel.encode(),
            probe=partial(link.execute, link.publish_verb, probe_channel),
            on_removed=on_removed,
        )

    def _on_found(self, master: RedisAddress) -> None:
        self._master = master

    def _client_name(self, role: str) -> str:
        # Redis accepts printable ASCII without spaces.
        return re.sub(r"[^!-~]", "-", f"bandsync-{role}-{self._server_id}")


def read_timeouts(settings: Settings) -> Timeouts:
    """The deadlines in the settings."""
    return Timeouts(
        connect_s=settings.redis_connect_timeout / 1000,
        command_s=settings.redis_command_timeout / 1000,
        silence_s=settings.redis_health_timeout_ms / 1000,
        health_interval_s=settings.redis_health_interval_ms / 1000,
    )


def _address(settings: Settings) -> RedisAddress:
    if settings.redis_url is None:
        return RedisAddress(
            host=settings.redis_host,
            port=settings.redis_port,
            username=settings.redis_username,
            password=settings.redis_password,
            db=settings.redis_db,
        )
    address = parse_address(settings.redis_url)
    if address.path is not None and (settings.redis_cluster or settings.redis_sentinels):
        other = "REDIS_CLUSTER" if settings.redis_cluster else "REDIS_SENTINELS"
        raise ValueError(f"must not be a Unix socket together with {other}: its nodes have hosts")
    if address.db and settings.redis_cluster:
        raise ValueError("must not name a database together with REDIS_CLUSTER: it has only 0")
    return replace(
        address,
        username=address.username or settings.redis_username,
        password=address.password or settings.redis_password,
    )


def _sentinels(settings: Settings, template: RedisAddress) -> Sentinels | None:
    if settings.redis_sentinels is None or settings.redis_sentinel_master is None:
        return None
    hosts = sentinel_hosts(settings.redis_sentinels)
    # All Sentinels and then the master must be tried within the time to connect.
    share_s = settings.redis_connect_timeout / 1000 / (2 * len(hosts) + 1)
    return Sentinels(
        hosts,
        settings.redis_sentinel_master,
        template,
        password=settings.redis_sentinel_password,
        timeout_s=min(settings.redis_health_timeout_ms / 1000, share_s),
    )
