"""The contract of a storage: optimistic concurrency on immutable sessions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from bandsync.model.session import Session, Tip

StorageType = Literal["redis", "memory"]

# Bound on compare-and-set attempts per change. With 8 attempts and three servers that keep
# committing to one session, one command in 25 was refused.
MAX_ATTEMPTS = 24


class Committed(Struct, frozen=True):
    """The change is stored.

    Attributes:
        session: the stored session, with its new event id.
    """

    session: Session


class Conflict(Struct, frozen=True):
    """The stored session is not the base of the change; nothing was written.

    Attributes:
        stored: the stored session; None if there is none.
    """

    stored: Session | None


class Unreadable(Struct, frozen=True):
    """The stored value cannot be read by this version; it is left as it is."""

    detail: str


class Lost(Struct, frozen=True):
    """The storage cannot be used any more. A commit may have been carried out or not."""

    reason: str


Unusable = Unreadable | Lost


class RedisStatus(Struct, frozen=True, rename="camel"):
    """The state of the link to Redis.

    Attributes:
        connected: whether the link is connected.
        connection_attempts: attempts since Redis was last in use.
        address: without secrets; None if Redis is disabled.
        outstanding: number of commands without a reply.
    """

    connected: bool
    connection_attempts: int
    address: str | None = None
    outstanding: int = 0


class Presence(Struct, frozen=True, rename="camel"):
    """The presence entry of one server in Redis (`bandsync/wire/PROTOCOL.md`).

    Attributes:
        boot_id: identifies the process.
        started_at: session clock, milliseconds.
        address: the URL of the server.
        sessions: the ids of the sessions that it hosts.
        connections: number of WebSocket connections.
        machine, pid: where the process runs, see `bandsync.ops.process`.
    """

    boot_id: str
    started_at: float
    address: str
    sessions: list[str]
    connections: int
    machine: str = ""
    pid: int = 0


class StorageHealth(Struct, frozen=True, rename="camel"):
    """The storage in ``/api/health``.

    Attributes:
        healthy: whether sessions can be read and written.
        storage_type: where sessions are kept.
        initialized: whether the first attempt to use the storage has ended.
        fallback_reason: why sessions are in memory; None if they are in Redis.
        total_sessions: number of sessions.
        redis_status: the link to Redis.
    """

    healthy: bool
    storage_type: StorageType
    initialized: bool
    fallback_reason: str | None
    total_sessions: int
    redis_status: RedisStatus


class Storage(ABC):
    """Keeps sessions.

    A storage knows no rule about sessions: it compares tips and stores what it is given. Failures
    are returned; an exception is a bug. `bandsync.storage.operations` decides and commits.
    """

    @property
    @abstractmethod
    def storage_type(self) -> StorageType:
        """Where the sessions are kept."""

    @abstractmethod
    async def get_session(self, session_id: str) -> Session | Unusable | None:
        """The stored session; None if there is none."""

    @abstractmethod
    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unusable:
        """Compare-and-set: replace ``base`` by ``change``. Atomic per session.

        Args:
            base: the session that ``change`` was decided on; None if there was none.
            change: the new session, without its event id.
            events: the encoded events of the change, published to other servers at most once.

        Returns:
            The stored session, the session stored instead of ``base``, or why this storage cannot
            be used for this session.
        """

    @abstractmethod
    async def delete_session(self, session_id: str) -> bool | Lost:
        """Delete a session; False if there was none."""

    @abstractmethod
    async def list_sessions(self) -> list[Session] | Lost:
        """All readable sessions, those without members included."""

    @abstractmethod
    async def touch(self, session_ids: Sequence[str]) -> dict[str, Tip | Unreadable | None] | Lost:
        """The stored tips, None for absent sessions. Restarts the expiry of those present."""

    @abstractmethod
    async def publish(self, session_id: str, message: bytes) -> None:
        """Publish an ephemeral message to the session's other servers (at most once, not stored).

        Args:
            message: see `bandsync.storage.channel_messages`.
        """

    @abstractmethod
    async def find_servers(
        self, server_ids: Sequence[str]
    ) -> dict[str, Presence | Unreadable | None] | Lost:
        """The presence entries of these servers; None for a server without one."""

    @abstractmethod
    async def health_check(self) -> StorageHealth:
        """Whether the storage can be used, and its state."""
