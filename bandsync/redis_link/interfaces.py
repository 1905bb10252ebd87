"""The interface of a link to Redis, for one server and for a Cluster."""

from collections.abc import Sequence
from typing import Literal, Protocol

import anyio
from anyio.abc import TaskStatus
from redis.exceptions import RedisError

from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.redis_address import RedisAddress

PublishVerb = Literal["PUBLISH", "SPUBLISH"]


class Executor(Protocol):
    """Executes commands. Used once, like a `bandsync.redis_link.multiplexer.Multiplexer`."""

    @property
    def address(self) -> RedisAddress:
        """The server for commands without a key, such as TIME; may change in a Cluster."""

    @property
    def outstanding(self) -> int:
        """Number of commands without a reply."""

    @property
    def usable(self) -> bool:
        """Whether it is connected."""

    @property
    def publish_verb(self) -> PublishVerb:
        """The command that publishes to the subscribers of this Redis."""

    def migrates(self, key: str) -> bool:
        """Whether the slot of a key is being migrated to another node of a Cluster.

        A script that writes the key there publishes there, where no subscriber is connected yet.
        """

    def parts(self) -> "Sequence[Executor]":
        """One executor for each master: SCAN on each of them finds all keys."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: the connection failed or was lost.
        """

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command; see `bandsync.redis_link.link.Link.execute`."""

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        """The replies to several; see `bandsync.redis_link.link.Link.execute_all`."""


class ChannelSubscriber(Protocol):
    """Receives the messages of channels. Used once, like an `Executor`."""

    @property
    def usable(self) -> bool:
        """Whether it is connected."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that as started, and receive until cancelled.

        Raises:
            RedisError: the connection failed or was lost, or messages no longer arrive.
        """

    async def subscribe(self, channel: bytes) -> None:
        """Return when all later messages will be received, or the subscriber is lost."""

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will be received."""
