"""What all rooms of a server share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.session import Member, Session
from bandsync.rules.server_context import ServerContext
from bandsync.storage.base import (
    StorageType,
)
from bandsync.storage.era import Era
from bandsync.storage.memory import MemoryStorage
from bandsync.wire.messages import RoleChanged


class Stores(Protocol):
    """Where sessions are kept.

    Attributes:
        memory: what is not in Redis, or not yet.
    """

    memory: MemoryStorage

    @property
    def era(self) -> Era | None:
        """The era of Redis that sessions are opened in; None in memory mode."""

    @property
    def awaited(self) -> bool:
        """Whether Redis is to be used, sooner or later."""

    @property
    def storage_type(self) -> StorageType:
        """Where the sessions are kept."""


class Audience(Protocol):
    """Those for whom a mirror is held."""

    async def catch_up(self) -> None:
        """`Mirror.catch_up` under the room's lock, for a commit whose caller is cancelled."""

    def own(self) -> Mapping[str, Member]:
        """The members bound to connections of this server: see `bandsync.rules.reconcile`."""

    def listen(self) -> None:
        """Take what the relay has brought meanwhile; see `Mirror.hear`."""

    def changed(self, session: Session) -> None:
        """The mirror is another one; whoever is to be told is told by others."""

    def jumped(self, shown: Session, events: Sequence[RoleChanged]) -> None:
        """The mirror is one that did not come from a command: show it, then tell ``events``."""


class RoomContext(Struct, frozen=True):
    """What all mirrors of a server have in common.

    Attributes:
        isolated: what the rules need to know of this server in memory mode.
        connected: the same for sessions that are in Redis.
        unreadable: why, by the id of each session in Redis that could not be read.
        finish: runs what must be finished although its caller is cancelled.
        commit_seconds: told how long each commit took.
    """

    stores: Stores
    isolated: ServerContext
    connected: ServerContext
    now: Callable[[], float]
    timer: Callable[[], float]
    finish: Callable[[Callable[[], Awaitable[None]]], None]
    unreadable: dict[str, str]
    counters: Counters
    commit_seconds: Callable[[float], None]
    log: FilteringBoundLogger
