"""The contract of a storage, and the operations that rest on its `Storage.commit`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import Struct

from bandsync.model.session import Session, Tip, find
from bandsync.rules.actions import Actor, Bind, Decision
from bandsync.rules.decide import decide
from bandsync.rules.refusals import NOT_JOINED, NOT_MEMBER
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import LeaveSession, Refusal
from bandsync.wire.messages import encode

StorageType = Literal["redis", "memory"]

# Of three servers that keep committing to one session each wins one attempt in three: with 8 of
# them one command in 25 was refused.
MAX_ATTEMPTS = 24

CONFLICT = Refusal("conflict", "Too many changes were made at the same time; try again.")


class Committed(Struct, frozen=True):
    """The change is in the storage; ``session`` is what is stored now."""

    session: Session


class Conflict(Struct, frozen=True):
    """The stored state is not the base of the change; nothing was written."""

    stored: Session | None


class Unreadable(Struct, frozen=True):
    """What is stored is no session that this server can read; it is left as it is."""

    detail: str


class Lost(Struct, frozen=True):
    """The storage cannot be used any more. A commit may have been carried out or not."""

    reason: str


Unusable = Unreadable | Lost


class RedisStatus(Struct, frozen=True, rename="camel"):
    """How the link to Redis is.

    Attributes:
        connection_attempts: since it was last in use.
        address: without secrets; None if Redis is not to be used.
        outstanding: commands that wait for their answer.
    """

    connected: bool
    connection_attempts: int
    address: str | None = None
    outstanding: int = 0


class Presence(Struct, frozen=True, rename="camel"):
    """Who is alive: one server, as it stands in Redis (protocol.md section 8).

    Attributes:
        boot_id: names the process.
        started_at: session clock, milliseconds.
        address: where it listens.
        sessions: the ids of those it hosts.
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
    """What ``/api/health`` says of the storage: the keys of the seed."""

    healthy: bool
    storage_type: StorageType
    initialized: bool
    fallback_reason: str | None
    total_sessions: int
    redis_status: RedisStatus


class Storage(ABC):
    """Keeps sessions.

    A storage knows no rule of music: it compares tips and keeps what it is given. Refusals are
    returned, exceptions are bugs.
    """

    @property
    @abstractmethod
    def storage_type(self) -> StorageType:
        """Where the sessions are kept now."""

    @abstractmethod
    async def get_session(self, session_id: str) -> Session | Unusable | None:
        """The stored session; None if there is none."""

    @abstractmethod
    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unusable:
        """Put ``change`` in the place of ``base``, if that is still what is stored.

        Args:
            base: what ``change`` was decided on; None if there was no session.
            events: the encoded events of the change, for other servers.

        Returns:
            The session with its new event id, what is stored instead of ``base``, or why this
            storage cannot be used for this session.
        """

    @abstractmethod
    async def delete_session(self, session_id: str) -> bool | Lost:
        """Forget a session; False if there was none."""

    @abstractmethod
    async def list_sessions(self) -> list[Session] | Lost:
        """All sessions that can be read, those without members included."""

    @abstractmethod
    async def touch(self, session_ids: Sequence[str]) -> dict[str, Tip | Unreadable | None] | Lost:
        """The tips that are stored, None where nothing is; what is there expires later."""

    @abstractmethod
    async def tell(self, session_id: str, message: bytes) -> None:
        """Say something that is not kept to the other servers of a session, if any are in reach.

        Args:
            message: see `bandsync.storage.channel_messages`.
        """

    @abstractmethod
    async def find_servers(
        self, server_ids: Sequence[str]
    ) -> dict[str, Presence | Unreadable | None] | Lost:
        """The entries of these servers; None for those that are not alive."""

    @abstractmethod
    async def health_check(self) -> StorageHealth:
        """Whether the storage can be used, and how it is."""

    async def create_session(self, session: Session) -> Committed | Conflict | Unusable:
        """Store a session that does not exist yet."""
        return await self.commit(None, session, ())

    async def update_session(
        self, session_id: str, change: Callable[[Session | None], Decision | Refusal]
    ) -> Decision | Refusal | Unusable:
        """Read, decide and commit, again if somebody else was faster.

        Returns:
            The committed decision, the refusal of ``change``, `CONFLICT`, or why this storage
            cannot be used for this session.
        """
        base = await self.get_session(session_id)
        for _ in range(MAX_ATTEMPTS):
            if isinstance(base, Unusable):
                return base
            decision = change(base)
            if isinstance(decision, Refusal) or decision.session is base:
                return decision
            events = [encode(event) for event in decision.events]
            match await self.commit(base, decision.session, events):
                case Committed(session=session):
                    return Decision(session, decision.events, decision.reply, decision.private)
                case Conflict(stored=stored):
                    base = stored
                case unusable:
                    return unusable
        return CONFLICT

    async def add_member(
        self, session_id: str, join: Bind, actor: Actor, now: float
    ) -> Decision | Refusal | Unusable:
        """Join or resume a member at the instant ``now``; creates the session if need be."""
        return await self.update_session(
            session_id, lambda session: decide(session, join, actor, now)
        )

    async def remove_member(
        self, session_id: str, member_id: str, here: ServerContext, now: float
    ) -> Decision | Refusal | Unusable:
        """Remove a member at the instant ``now``, whatever connection it is bound to."""

        def leave(session: Session | None) -> Decision | Refusal:
            if session is None:
                return NOT_JOINED
            member = find(session, member_id)
            if member is None:
                return NOT_MEMBER
            actor = Actor(here, member.connection_id, member_id)
            return decide(session, LeaveSession(), actor, now)

        return await self.update_session(session_id, leave)
