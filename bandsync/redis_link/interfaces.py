"""What those above need of Redis, whether it is one server or a Cluster."""

from collections.abc import Sequence
from typing import Literal, Protocol

import anyio
from anyio.abc import TaskStatus
from redis.exceptions import RedisError

from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.redis_address import RedisAddress

PublishVerb = Literal["PUBLISH", "SPUBLISH"]


class Executor(Protocol):
    """Takes commands. Used once, as a `bandsync.redis_link.multiplexer.Line`."""

    @property
    def address(self) -> RedisAddress:
        """Who answers commands without a key, such as TIME; may change in a Cluster."""

    @property
    def outstanding(self) -> int:
        """How many commands wait for their reply."""

    @property
    def usable(self) -> bool:
        """Whether it is connected."""

    @property
    def publish_verb(self) -> PublishVerb:
        """By which command a message reaches those who listen."""

    def handed_over(self, key: str) -> bool:
        """Whether a key is just being handed over to another node of a Cluster.

        A script that writes it there publishes there, too, and nobody listens there yet.
        """

    def parts(self) -> "Sequence[Executor]":
        """All of which each has its own keys, as SCAN shows them."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: there is no connection, or no longer.
        """

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command; see `bandsync.redis_link.link.Link.execute`."""

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        """The replies to several; see `bandsync.redis_link.link.Link.execute_all`."""


class Listener(Protocol):
    """Hears channels. Used once, like an `Executor`."""

    @property
    def usable(self) -> bool:
        """Whether it is connected."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and listen until cancelled.

        Raises:
            RedisError: there is no connection, or nothing is heard any more.
        """

    async def subscribe(self, channel: bytes) -> None:
        """Return when every message published from now on will come, or the listener is lost."""

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will come."""
