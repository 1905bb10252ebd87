"""A draft of the next session state: rules write registers here, and stamps never go backwards."""

import math
from typing import Literal

from msgspec.structs import replace

from bandsync.model.session import (
    CHAT_RING,
    EPSILON_MS,
    MAX_AWAITED_TOMBSTONES,
    MAX_TOMBSTONES,
    TOMBSTONE_MS,
    Chat,
    Epoch,
    HeadlineRegister,
    Leader,
    Member,
    Rank,
    Role,
    Session,
    SessionSettings,
    SettingsRegister,
    Stamp,
    TransportRegister,
    after,
    leader_of,
    without_old_tombstones,
)
from bandsync.model.transport import Transport, initial
from bandsync.rules.leadership import led_by, longest_connected, settle
from bandsync.rules.server_context import ServerContext
from bandsync.wire.messages import (
    Event,
    LeaveReason,
    MemberConnection,
    RoleChanged,
    RoleReason,
    UserLeft,
)
from bandsync.wire.snapshots import member_count


def new_session(session_id: str, epoch_id: str, server: ServerContext, now: float) -> Session:
    """A session as it is before its first join, which is version 1."""
    # A session created while Redis is away must not take the lead of one that Redis already has.
    # Its first term is therefore one lower than that of any other new session.
    rank = Rank(0 if server.awaited else 1, now, server.boot_id)
    stamp = Stamp(rank, now, server.boot_id)
    return Session(
        session_id=session_id,
        epoch=Epoch(now, epoch_id),
        version=0,
        event_id="",
        leader=Leader(rank, ""),
        transport=TransportRegister(stamp, initial(now)),
        headline=HeadlineRegister(stamp, ""),
        settings=SettingsRegister(stamp, SessionSettings(server.max_members)),
        members={},
        chat=(),
        last_active_at=now,
    )


class Draft:
    """Collects the changes of one command and their events.

    Every write puts a new `Session` into ``session``; the base stays unchanged. Every event
    increments the version.
    """

    __slots__ = ("_base", "_events", "_here", "now", "session")

    def __init__(self, base: Session, server: ServerContext, now: float) -> None:
        self._base = base
        self._here = server
        self._events: list[Event] = []
        self.now = now
        self.session = base

    def head(self) -> tuple[str, int, float]:
        """The first fields of the next event: session id, version, server time."""
        return self._base.session_id, self._base.version + len(self._events) + 1, self.now

    def emit(self, event: Event) -> None:
        """Add an event that was made with `head`."""
        self._events.append(event)

    def add(self, member: Member) -> None:
        """Add a new member, or replace the record of one."""
        members = {**self.session.members, member.member_id: member}
        self.session = replace(self.session, members=members)

    def rewrite(self, member: Member, **changes: object) -> Member:
        """Replace ``member`` by a changed copy with a later stamp."""
        changed = replace(
            member,
            time=after(self.now, member.time),
            writer=self._here.boot_id,
            **changes,
        )
        self.add(changed)
        return changed

    def remove(self, member: Member, reason: LeaveReason) -> None:
        """Replace the member by a tombstone."""
        self.rewrite(member, present=False, connected=False)
        self.emit(UserLeft(*self.head(), member.member_id, member_count(self.session), reason))

    def disconnect(self, member: Member) -> None:
        """Mark the member as disconnected; it stays for its resume grace."""
        self.rewrite(member, connected=False)
        self.emit(MemberConnection(*self.head(), member.member_id, connected=False))

    def lead(self, member_id: str) -> None:
        """Write the leader register; an empty ``member_id`` leaves it vacant."""
        self.session = led_by(self.session, member_id, self.now, self._here.boot_id)

    def change_role(self, member_id: str, role: Role, reason: RoleReason) -> None:
        """Emit the event for a role that the leader register already gives."""
        previous: Role = "follower" if role == "leader" else "leader"
        self.emit(RoleChanged(*self.head(), member_id, role, previous, reason))

    def hand(self, member_id: str, reason: Literal["claimed", "handed_over"]) -> None:
        """Make a member the leader in place of the current one, if any."""
        leader = leader_of(self.session)
        self.lead(member_id)
        if leader is not None:
            self.change_role(leader.member_id, "follower", reason)
        self.change_role(member_id, "leader", reason)

    def elect(self, without: str = "") -> bool:
        """Elect the longest-connected member; in memory mode only members of this server.

        Returns:
            False if there is no candidate.
        """
        candidate = longest_connected(self.session, self._reachable(), without)
        if candidate is None:
            return False
        self.lead(candidate.member_id)
        return True

    def move(self, transport: Transport) -> None:
        """Write the transport register."""
        stamp = self._stamp(self.session.transport.stamp)
        self.session = replace(self.session, transport=TransportRegister(stamp, transport))

    def headline(self, message: str) -> None:
        """Write the message register."""
        stamp = self._stamp(self.session.headline.stamp)
        self.session = replace(self.session, headline=HeadlineRegister(stamp, message))

    def say(self, message_id: str, member: Member, text: str) -> Chat:
        """Add a chat message to the ring, with a later time than all others in it."""
        ring = self.session.chat
        sent_at = max(self.now, ring[-1].sent_at + EPSILON_MS) if ring else self.now
        if len(ring) < CHAT_RING:
            taken = {chat.slot for chat in ring}
            slot = next(slot for slot in range(CHAT_RING) if slot not in taken)
        else:
            slot = ring[0].slot
            ring = ring[1:]
        chat = Chat(message_id, member.member_id, member.display_name, text, sent_at, slot)
        self.session = replace(self.session, chat=(*ring, chat))
        return chat

    def done(self) -> tuple[Session, tuple[Event, ...]]:
        """The new state, with a leader if one can be elected, and the events.

        The state is the base itself when nothing changed.
        """
        if self.session is self._base:
            return self._base, ()
        self.settle()
        session = self.session
        if session.members is not self._base.members:
            keep = MAX_AWAITED_TOMBSTONES if self._here.awaited else MAX_TOMBSTONES
            age_ms = math.inf if self._here.awaited else TOMBSTONE_MS
            session = without_old_tombstones(session, self.now, keep, age_ms)
        session = replace(
            session,
            version=self._base.version + len(self._events),
            last_active_at=max(self.now, self._base.last_active_at),
        )
        return session, tuple(self._events)

    def settle(self) -> None:
        """Elect a leader if there is none: see `bandsync.rules.leadership.settle`."""
        settled = settle(self.session, self.now, self._here.boot_id, self._reachable())
        if settled is not self.session:
            self.session = settled
            self.change_role(settled.leader.member_id, "leader", "elected")

    def _reachable(self) -> str | None:
        """Boot id of the only server with eligible members; None if all are eligible."""
        return self._here.boot_id if self._here.isolated else None

    def _stamp(self, replaced: Stamp) -> Stamp:
        rank = self.session.leader.rank
        return Stamp(rank, after(self.now, replaced.time), self._here.boot_id)
