"""How this server reaches its Redis: from settings to connections."""

import re
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.cluster.nodes import NodeLink, Seeds
from bandsync.redis_link.cluster.slots import Endpoint
from bandsync.redis_link.cluster.subscriber import ClusterSubscriber
from bandsync.redis_link.interfaces import Executor, Listener
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress, parse_address
from bandsync.redis_link.sentinel import MasterLink, Sentinels
from bandsync.redis_link.subscriber import Subscriber
from bandsync.settings import Settings, sentinel_hosts
from bandsync.storage.redis import Keys


class RedisConnector:
    """Makes the connections to one Redis. As a text it is the address, without secrets.

    Args:
        server_id: shown by CLIENT LIST, and part of the names of our probes' channels.

    Attributes:
        keys: the names of everything there.

    Raises:
        ValueError: ``REDIS_URL`` is none, or not for what it is to be used; the text does not
            quote it.
    """

    def __init__(self, settings: Settings, server_id: str) -> None:
        self.keys = Keys(settings.redis_key_prefix)
        self._settings = settings
        self._server_id = server_id
        self._address = _address(settings)
        self._connect_timeout_s = settings.redis_connect_timeout / 1000
        self._command_timeout_s = settings.redis_command_timeout / 1000
        self._silence_s = settings.redis_health_timeout_ms / 1000
        self._seeds = Seeds(self._address) if settings.redis_cluster else None
        self._sentinels = _sentinels(settings, self._address)
        self._master: RedisAddress | None = None

    def __str__(self) -> str:
        if self._sentinels is not None:
            named = str(self._sentinels)
            return named if self._master is None else f"{self._master}, {named}"
        return f"{self._address}" if self._seeds is None else f"{self._address}, a Cluster"

    def link(self) -> Executor:
        """A link for one attempt."""
        name = self._client_name("link")
        if self._seeds is not None:
            return ClusterLink(
                self._seeds,
                make_link=self._node_link,
                proof=partial(self.keys.proof, self._server_id),
                connect_timeout_s=self._connect_timeout_s,
                silence_s=self._silence_s,
            )
        if self._sentinels is not None:
            return MasterLink(
                self._sentinels,
                self._address,
                found=self._found,
                name=name,
                connect_timeout_s=self._connect_timeout_s,
                command_timeout_s=self._command_timeout_s,
                silence_s=self._silence_s,
            )
        return Link(
            self._address,
            name=name,
            connect_timeout_s=self._connect_timeout_s,
            command_timeout_s=self._command_timeout_s,
            silence_s=self._silence_s,
        )

    def subscriber(self, link: Executor, heard: Callable[[bytes, bytes], None]) -> Listener:
        """A subscriber for one attempt, that sends its probes over ``link``.

        It listens where ``link`` leads: whatever the Sentinels say by now, what this server
        commits and what it hears must be of one Redis.

        Args:
            heard: called with each channel and message.
        """
        if isinstance(link, ClusterLink) and link.publish_verb == "SPUBLISH":
            return ClusterSubscriber(link, partial(self._node_subscriber, link, heard), heard)
        # Up to Redis 6 a Cluster sends every message to every node: one of them is enough.
        return self._subscriber(link, link.address, self.keys.probe(self._server_id), heard)

    def _node_link(self, address: RedisAddress, connect_timeout_s: float) -> NodeLink:
        return NodeLink(
            address,
            name=self._client_name("link"),
            connect_timeout_s=connect_timeout_s,
            command_timeout_s=self._command_timeout_s,
            silence_s=self._silence_s,
            beat_s=self._settings.redis_health_interval_ms / 1000,
        )

    def _node_subscriber(
        self,
        link: ClusterLink,
        heard: Callable[[bytes, bytes], None],
        master: Endpoint,
        number: int,
        gone: Callable[[bytes], None],
    ) -> Subscriber:
        assert self._seeds is not None
        channel = self.keys.proof(self._server_id, number)
        return self._subscriber(link, self._seeds.at(master), channel, heard, gone)

    def _subscriber(
        self,
        link: Executor,
        address: RedisAddress,
        probe_channel: str,
        heard: Callable[[bytes, bytes], None],
        gone: Callable[[bytes], None] | None = None,
    ) -> Subscriber:
        return Subscriber(
            address,
            name=self._client_name("relay"),
            connect_timeout_s=self._connect_timeout_s,
            command_timeout_s=self._command_timeout_s,
            silence_s=self._silence_s,
            on_message=heard,
            probe_channel=probe_channel.encode(),
            probe=partial(link.execute, link.publish_verb, probe_channel),
            gone=gone,
        )

    def _found(self, master: RedisAddress) -> None:
        self._master = master

    def _client_name(self, role: str) -> str:
        # Redis takes printable ASCII without spaces.
        return re.sub(r"[^!-~]", "-", f"bandsync-{role}-{self._server_id}")


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


def _sentinels(settings: Settings, like: RedisAddress) -> Sentinels | None:
    if settings.redis_sentinels is None or settings.redis_sentinel_master is None:
        return None
    hosts = sentinel_hosts(settings.redis_sentinels)
    # Within the time for a connection one of them must be reached, and then the master.
    share_s = settings.redis_connect_timeout / 1000 / (2 * len(hosts) + 1)
    return Sentinels(
        hosts,
        settings.redis_sentinel_master,
        like,
        password=settings.redis_sentinel_password,
        timeout_s=min(settings.redis_health_timeout_ms / 1000, share_s),
    )
