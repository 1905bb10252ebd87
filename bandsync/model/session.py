"""The state of a session, as storages keep it and servers exchange it.

A session is a CRDT. Each part that changes on its own is a last-writer-wins register with a
stamp, so that two copies can be merged: see `bandsync.model.merge`. A write never moves a stamp
backwards, even when a clock does: see `after`.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from bandsync.model.transport import Transport

# Above 2**53 an integer is no longer exact in every JSON implementation.
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Role = Literal["leader", "follower"]

# Smallest step between two stamps of one register: 1 µs. A float of milliseconds since 1970 has a
# resolution of 0.25 µs.
EPSILON_MS = 0.001
CHAT_RING = 50
TOMBSTONE_MS = 60_000.0
# Bound on tombstones: every commit that touches members writes them all.
MAX_TOMBSTONES = 64
# A larger bound during an outage: if a tombstone is pruned before Redis has it, the merge brings
# the member back.
MAX_AWAITED_TOMBSTONES = 2048


class Rank(Struct, frozen=True, order=True, rename="camel"):
    """Rank of a leader. In a merge the greater rank wins.

    Attributes:
        term: one more than that of the previous leader.
        time: instant of the change of leader, session clock, milliseconds.
        boot_id: the server process that made the change.
    """

    term: Count
    time: float
    boot_id: str


class Stamp(Struct, frozen=True, order=True, rename="camel"):
    """Stamp of a register's content: the leader's rank, the time and the writing process.

    The rank is compared first. A change made under the winning leader is therefore never lost to
    a change made under another leader.
    """

    rank: Rank
    time: float
    boot_id: str


class Epoch(Struct, frozen=True, order=True, rename="camel"):
    """The life of a session. In a merge the session created first wins."""

    created_at: float
    id: str


class Leader(Struct, frozen=True, rename="camel"):
    """The leader register. ``member_id`` is empty after the only member stepped down."""

    rank: Rank
    member_id: str


class TransportRegister(Struct, frozen=True, rename="camel"):
    """The transport and its stamp."""

    stamp: Stamp
    value: Transport


class HeadlineRegister(Struct, frozen=True, rename="camel"):
    """The session's message (its headline) and its stamp."""

    stamp: Stamp
    value: str


class SessionSettings(Struct, frozen=True, rename="camel"):
    """Settings fixed when the session was created."""

    max_members: int


class SettingsRegister(Struct, frozen=True, rename="camel"):
    """The session's settings and their stamp."""

    stamp: Stamp
    value: SessionSettings


class Member(Struct, frozen=True, rename="camel"):
    """One member, present or, once removed, a tombstone.

    Attributes:
        incarnation: number of bindings to a connection; with ``time`` and ``writer`` it orders
            two records of one member.
        time: when this record was written, session clock, milliseconds; larger than the time of
            the record it replaced.
        writer: boot id of the server process that wrote this record.
        present: False for a tombstone.
        connection_id: the connection it is bound to, or was last.
        server_id: the server of that connection.
        boot_id: the process of that server.
        connected: False during the resume grace.
        joined_at: when it first joined.
        connected_at: when its latest connection was bound; an election picks the smallest.
        display_name: as chosen at the join.
        token_hash: SHA-256 of the secret in its resume token, hexadecimal.
    """

    member_id: str
    incarnation: Count
    time: float
    writer: str
    present: bool
    connection_id: str
    server_id: str
    boot_id: str
    connected: bool
    joined_at: float
    connected_at: float
    display_name: str
    token_hash: str


class Chat(Struct, frozen=True, rename="camel"):
    """One chat message of the ring; ``slot`` is its place there."""

    message_id: str
    member_id: str
    display_name: str
    text: str
    sent_at: float
    slot: int


class Session(Struct, frozen=True):
    """A session. Immutable: a change makes a new one and shares what did not change.

    Attributes:
        epoch: this life of the session; a recreated session has another one.
        version: grows by one per event.
        event_id: id of the change that made this state; drawn per attempt to commit.
        leader: the leader register.
        transport: the transport register.
        headline: the register of the session's message.
        settings: the settings register.
        members: by id, tombstones included.
        chat: the last `CHAT_RING` messages by (``sent_at``, ``message_id``).
        last_active_at: instant of the last change.
    """

    session_id: str
    epoch: Epoch
    version: int
    event_id: str
    leader: Leader
    transport: TransportRegister
    headline: HeadlineRegister
    settings: SettingsRegister
    members: Mapping[str, Member]
    chat: tuple[Chat, ...]
    last_active_at: float


class Tip(Struct, frozen=True, rename="camel"):
    """Identity of one state of a session.

    The version alone is not enough: after a flush, Redis can be refilled up to the same number.
    """

    epoch: str
    version: int
    event_id: str


def tip(session: Session) -> Tip:
    """The tip of ``session``."""
    return Tip(session.epoch.id, session.version, session.event_id)


def after(now: float, replaced: float) -> float:
    """The time of a stamp written at ``now`` over one of time ``replaced``: always larger."""
    return max(now, replaced + EPSILON_MS)


def is_blank(session: Session) -> bool:
    """Whether the session holds nothing but joins and leaves."""
    created_at = session.epoch.created_at
    untouched = session.transport.stamp.time == session.headline.stamp.time == created_at
    return untouched and not session.chat


def present(session: Session) -> Iterator[Member]:
    """The members, tombstones left out."""
    return (member for member in session.members.values() if member.present)


def find(session: Session, member_id: str) -> Member | None:
    """The member with this id if it is present."""
    member = session.members.get(member_id)
    return member if member is not None and member.present else None


def leader_of(session: Session) -> Member | None:
    """The present member that the leader register names."""
    return find(session, session.leader.member_id)


def role_of(session: Session, member_id: str) -> Role:
    """The role of a member, derived from the leader register; roles are never stored."""
    leads = session.leader.member_id == member_id and find(session, member_id) is not None
    return "leader" if leads else "follower"


def bound(session: Session, member_id: str, connection_id: str) -> Member | None:
    """The present member with this id, if it is bound to this connection."""
    member = find(session, member_id)
    return member if member is not None and member.connection_id == connection_id else None


def without_old_tombstones(session: Session, now: float, keep: int, age_ms: float) -> Session:
    """``session`` with at most the newest ``keep`` tombstones, none older than ``age_ms``."""
    tombstones = [member for member in session.members.values() if not member.present]
    horizon = now - age_ms
    if len(tombstones) <= keep and all(stone.time >= horizon for stone in tombstones):
        return session
    tombstones.sort(key=lambda stone: stone.time)
    kept = {stone.member_id for stone in tombstones[-keep:] if stone.time >= horizon}
    members = {
        member.member_id: member
        for member in session.members.values()
        if member.present or member.member_id in kept
    }
    return replace(session, members=members)
