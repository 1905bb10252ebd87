"""Dependencies of the storage manager: Redis, and the rooms of this server."""

from collections.abc import Callable, Mapping
from typing import Protocol

from bandsync.redis_link.interfaces import ChannelSubscriber, Executor
from bandsync.storage.era import Era
from bandsync.storage.redis import Keys


class Redis(Protocol):
    """Makes links and subscribers of one Redis. As a text it is the address, without secrets."""

    @property
    def keys(self) -> Keys:
        """The names of keys and channels."""

    def link(self) -> Executor:
        """An unconnected link, for one attempt."""

    def subscriber(
        self, link: Executor, on_message: Callable[[bytes, bytes], None]
    ) -> ChannelSubscriber:
        """An unconnected subscriber to the server of ``link``.

        Args:
            on_message: called with channel and payload of each message.
        """


class Host(Protocol):
    """The rooms of this server."""

    @property
    def rooms(self) -> Mapping[str, object]:
        """The hosted sessions, by id."""

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        """Migrate all sessions of this server to Redis.

        Args:
            moved: called after each session.
        """

    async def compare(self, era: Era) -> None:
        """Anti-entropy: compare all hosted sessions with the stored ones, and resync."""

    def receive(self, session_id: str, payload: bytes) -> None:
        """Receive a message of a session's channel. Never blocks."""
