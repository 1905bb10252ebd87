"""Operations on the sessions of a storage: read, decide by the rules, commit."""

from collections.abc import Callable

from bandsync.model.session import Session, find
from bandsync.rules.actions import Actor, Bind, Decision
from bandsync.rules.decide import decide
from bandsync.rules.refusals import CONFLICT, NOT_JOINED, NOT_MEMBER
from bandsync.rules.server_context import ServerContext
from bandsync.storage.base import (
    MAX_ATTEMPTS,
    Committed,
    Conflict,
    Lost,
    Storage,
    StorageHealth,
    Unusable,
)
from bandsync.wire.commands import LeaveSession, Refusal
from bandsync.wire.messages import encode


async def create_session(storage: Storage, session: Session) -> Committed | Conflict | Unusable:
    """Store a session that does not exist yet."""
    return await storage.commit(None, session, ())


async def get_session(storage: Storage, session_id: str) -> Session | Unusable | None:
    """The stored session; None if there is none."""
    return await storage.get_session(session_id)


async def update_session(
    storage: Storage, session_id: str, change: Callable[[Session | None], Decision | Refusal]
) -> Decision | Refusal | Unusable:
    """Read a session, decide a change and commit it; after a conflict, decide again.

    Args:
        change: the decision on a stored session; None if there is none.

    Returns:
        The committed decision, the refusal of ``change``, `CONFLICT` after `MAX_ATTEMPTS`, or why
        the storage cannot be used for this session.
    """
    base = await storage.get_session(session_id)
    for _ in range(MAX_ATTEMPTS):
        if isinstance(base, Unusable):
            return base
        decision = change(base)
        if isinstance(decision, Refusal) or decision.session is base:
            return decision
        events = [encode(event) for event in decision.events]
        match await storage.commit(base, decision.session, events):
            case Committed(session=session):
                return Decision(session, decision.events, decision.reply, decision.private)
            case Conflict(stored=stored):
                base = stored
            case unusable:
                return unusable
    return CONFLICT


async def delete_session(storage: Storage, session_id: str) -> bool | Lost:
    """Delete a session; False if there was none."""
    return await storage.delete_session(session_id)


async def add_member(
    storage: Storage, session_id: str, join: Bind, actor: Actor, now: float
) -> Decision | Refusal | Unusable:
    """Join or resume a member at the instant ``now``; creates the session if it does not exist."""
    return await update_session(
        storage, session_id, lambda session: decide(session, join, actor, now)
    )


async def remove_member(
    storage: Storage, session_id: str, member_id: str, server: ServerContext, now: float
) -> Decision | Refusal | Unusable:
    """Remove a member at the instant ``now``, whichever connection it is bound to."""

    def leave(session: Session | None) -> Decision | Refusal:
        if session is None:
            return NOT_JOINED
        member = find(session, member_id)
        if member is None:
            return NOT_MEMBER
        actor = Actor(server, member.connection_id, member_id)
        return decide(session, LeaveSession(), actor, now)

    return await update_session(storage, session_id, leave)


async def list_sessions(storage: Storage) -> list[Session] | Lost:
    """All readable sessions, those without members included."""
    return await storage.list_sessions()


async def health_check(storage: Storage) -> StorageHealth:
    """Whether the storage can be used, and its state."""
    return await storage.health_check()
