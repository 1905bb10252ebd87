"""Reconcile a stored state with the mirror: merge, audit own members, settle the leadership.

The argument ``own`` has the members that are bound to connections of this server, by member id.
Each is the record as it was bound: its connection and incarnation are those of the connection,
even if the session has others by now.
"""

from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from bandsync.model.merge import merge, same_content
from bandsync.model.session import TOMBSTONE_MS, Member, Session, after, present, role_of, tip
from bandsync.rules.leadership import settle
from bandsync.rules.server_context import ServerContext
from bandsync.wire.messages import RoleChanged

# Age from which a missing tombstone counts as pruned by another server. It is half the pruning age,
# because this clock may be behind the clock of that server.
FORGETTABLE_MS = TOMBSTONE_MS / 2


class Adopt(Struct, frozen=True):
    """Take the stored state as the mirror; nothing is written.

    Attributes:
        session: the stored state.
        shown: the same state at the version before the events; None without events.
        events: the role changes, at most as many as versions were skipped.
    """

    session: Session
    shown: Session | None = None
    events: tuple[RoleChanged, ...] = ()


class Write(Struct, frozen=True):
    """Commit ``session`` in place of the stored state.

    Attributes:
        session: the merged state.
        shown: the same state at the version before the events, for the `Snapshot` sent first.
        events: the role changes, one per version after that of ``shown``.
    """

    session: Session
    shown: Session
    events: tuple[RoleChanged, ...]


def superseded(session: Session, own: Mapping[str, Member]) -> list[str]:
    """The ids in ``own`` that are bound elsewhere by now; the caller closes their connections."""
    return [
        member_id
        for member_id, mine in own.items()
        if member_id in session.members and _supersedes(session.members[member_id], mine)
    ]


def audit(
    session: Session, own: Mapping[str, Member], server: ServerContext, now: float
) -> Session:
    """``session`` with the connection state of this server's own members corrected.

    A locally connected member is asserted again, unless it is bound elsewhere by now (see
    `superseded`). A member recorded as connected here, but without a connection, is disconnected.

    Returns:
        The same object when nothing changes.
    """
    changes: dict[str, Member] = {}
    for member_id, mine in own.items():
        record = session.members.get(member_id)
        if record is None or not (_supersedes(record, mine) or _holds(record, mine)):
            changes[member_id] = _asserted(record or mine, mine, server, now)
    for record in session.members.values():
        if record.boot_id == server.boot_id and record.connected and record.member_id not in own:
            changes[record.member_id] = replace(
                record, time=after(now, record.time), writer=server.boot_id, connected=False
            )
    return replace(session, members={**session.members, **changes}) if changes else session


def reconcile(
    mine: Session | None,
    stored: Session | None,
    own: Mapping[str, Member],
    server: ServerContext,
    now: float,
) -> Adopt | Write | None:
    """Reconcile a mirror with the stored state that was read.

    Args:
        mine: the mirror; None if there is none yet.
        stored: the stored state; None if the key is absent. The session is then written back.
        own: see the module.
        server: this server.

    Returns:
        None when there is no session at all. The stored state is adopted only if it contains
        everything in the mirror, and if no client sees a version go backwards.
    """
    if mine is None:
        return None if stored is None else Adopt(stored)
    base = mine
    if stored is not None:
        mine = _without_forgotten(mine, stored, server, now)
        base = merge(mine, stored)
    result = settle(audit(base, own, server, now), now, server.boot_id, None)
    if stored is not None and same_content(result, stored) and _ahead(stored, mine):
        return _adopt(mine, stored, now)
    shown = replace(result, version=base.version + 1)
    before = (mine,) if stored is None else (mine, stored)
    events = tuple(_merged_roles(before, shown, now))
    return Write(replace(shown, version=shown.version + len(events)), shown, events)


def _adopt(mine: Session, stored: Session, now: float) -> Adopt:
    events = tuple(_merged_roles((mine,), stored, now))
    shown = replace(stored, version=stored.version - len(events))
    if not events or (shown.version <= mine.version and shown.epoch == mine.epoch):
        return Adopt(stored)
    return Adopt(stored, shown, tuple(_merged_roles((mine,), shown, now)))


def _ahead(stored: Session, mine: Session) -> bool:
    return stored.version > mine.version or tip(stored) == tip(mine)


def _supersedes(record: Member, mine: Member) -> bool:
    if record.connection_id == mine.connection_id or record.incarnation < mine.incarnation:
        return False
    return record.incarnation > mine.incarnation or record.connected


def _holds(record: Member, mine: Member) -> bool:
    return record.connected and record.connection_id == mine.connection_id


def _asserted(record: Member, mine: Member, server: ServerContext, now: float) -> Member:
    return replace(
        mine,
        # The record may have missed the latest binding of this connection.
        incarnation=max(record.incarnation, mine.incarnation),
        time=after(now, max(record.time, mine.time)),
        writer=server.boot_id,
        present=True,
        connected=True,
        joined_at=record.joined_at,
        display_name=record.display_name,
        token_hash=record.token_hash,
    )


def _without_forgotten(
    mine: Session, stored: Session, server: ServerContext, now: float
) -> Session:
    """``mine`` without the members that the stored state has pruned.

    Old tombstones: writing them back would be a change, and another server would prune them again.
    Members of other servers that left so long ago that their tombstones are gone: if one did not
    leave, its own server asserts it.
    """
    newer = stored.epoch == mine.epoch and stored.version > mine.version
    forgotten = {
        member.member_id
        for member in mine.members.values()
        if member.member_id not in stored.members
        and (
            newer and member.boot_id != server.boot_id and member.time < now - TOMBSTONE_MS
            if member.present
            else member.time < now - FORGETTABLE_MS
        )
    }
    if not forgotten:
        return mine
    members = {key: member for key, member in mine.members.items() if key not in forgotten}
    return replace(mine, members=members)


def _merged_roles(before: tuple[Session, ...], shown: Session, now: float) -> Iterator[RoleChanged]:
    """Events for members with a changed role, the leader's last."""
    version = shown.version
    members = sorted(present(shown), key=lambda member: member.member_id == shown.leader.member_id)
    for member in members:
        role = role_of(shown, member.member_id)
        if all(role_of(session, member.member_id) == role for session in before):
            continue
        version += 1
        yield RoleChanged(
            shown.session_id,
            version,
            now,
            member.member_id,
            role,
            "follower" if role == "leader" else "leader",
            "merged",
        )
