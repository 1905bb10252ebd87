"""The storage in this process's memory."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from bandsync.model.session import Session, Tip, is_blank, tip
from bandsync.storage.base import (
    Committed,
    Conflict,
    Presence,
    RedisStatus,
    Storage,
    StorageHealth,
    StorageType,
    Unreadable,
)


class MemoryStorage(Storage):
    """Keeps sessions until they expire or the process ends.

    Args:
        boot_id: makes event ids unique among processes.
        reason: why sessions are kept in memory, for operators.
    """

    def __init__(self, boot_id: str, reason: str) -> None:
        self._boot_id = boot_id
        self._reason = reason
        # In the order of their last change, so that those that expire first come first.
        self._sessions: dict[str, Session] = {}
        self._commits = 0

    @property
    def storage_type(self) -> StorageType:
        return "memory"

    async def get_session(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    def find(self, session_id: str) -> Session | None:
        """The session without waiting; None if there is none."""
        return self._sessions.get(session_id)

    def keep(self, session: Session) -> None:
        """Store this state without a comparison."""
        if self._sessions.get(session.session_id) is not session:
            self._sessions.pop(session.session_id, None)
            self._sessions[session.session_id] = session

    def discard(self, session_id: str) -> None:
        """Delete a session without waiting."""
        self._sessions.pop(session_id, None)

    def ids(self) -> list[str]:
        """The ids of all sessions."""
        return list(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict:
        stored = self._sessions.get(change.session_id)
        if stored is not base and (stored is None or base is None or tip(stored) != tip(base)):
            return Conflict(stored)
        self._commits += 1
        committed = replace(change, event_id=f"{self._boot_id}-{self._commits:x}")
        self._sessions.pop(change.session_id, None)
        self._sessions[change.session_id] = committed
        return Committed(committed)

    async def delete_session(self, session_id: str) -> bool:
        return self._sessions.pop(session_id, None) is not None

    async def list_sessions(self) -> list[Session]:
        return list(self._sessions.values())

    async def touch(self, session_ids: Sequence[str]) -> dict[str, Tip | Unreadable | None]:
        found = {session_id: self._sessions.get(session_id) for session_id in session_ids}
        return {
            session_id: None if session is None else tip(session)
            for session_id, session in found.items()
        }

    async def publish(self, session_id: str, message: bytes) -> None:
        """Do nothing: memory has no other servers."""

    async def find_servers(
        self, server_ids: Sequence[str]
    ) -> dict[str, Presence | Unreadable | None]:
        return dict.fromkeys(server_ids)

    async def health_check(self) -> StorageHealth:
        return StorageHealth(
            healthy=True,
            storage_type=self.storage_type,
            initialized=True,
            fallback_reason=self._reason,
            total_sessions=len(self._sessions),
            redis_status=RedisStatus(connected=False, connection_attempts=0),
        )

    def expire(self, now: float, ttl_ms: float, hosted: Collection[str], keep: int) -> list[str]:
        """Delete sessions without members.

        Args:
            now: session clock, milliseconds.
            ttl_ms: expiry of a session after its last change, milliseconds.
            hosted: ids of the sessions with a room on this server, which never expire.
            keep: limit of the others; beyond it the longest idle are deleted first.

        Returns:
            The ids of the deleted sessions.
        """
        idle = len(self._sessions) - sum(session_id in self._sessions for session_id in hosted)
        surplus = idle - keep
        kept = [each for each in self._sessions.values() if each.session_id not in hosted]
        expired = [each.session_id for each in kept if each.last_active_at + ttl_ms <= now]
        surplus -= len(expired)
        if surplus > 0:
            # Blank sessions, in which nothing was ever done, go first.
            kept = [each for each in kept if each.last_active_at + ttl_ms > now]
            kept.sort(key=lambda each: not is_blank(each))
            expired += [each.session_id for each in kept[:surplus]]
        for session_id in expired:
            del self._sessions[session_id]
        return expired
