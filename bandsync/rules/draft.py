"""A session in the making: how a rule writes registers, so that stamps never go backwards."""

import math
from typing import Literal

from msgspec import Struct
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
    led_by,
    longest_connected,
    settle,
    without_old_tombstones,
)
from bandsync.model.transport import Transport, initial
from bandsync.wire.messages import (
    Event,
    LeaveReason,
    MemberConnection,
    RoleChanged,
    RoleReason,
    UserLeft,
)
from bandsync.wire.snapshots import member_count


class ServerContext(Struct, frozen=True):
    """What a server knows of itself when it decides.

    Attributes:
        server_id: its name.
        boot_id: names this process; new at every start.
        max_members: for the sessions it creates.
        leadership: ``open`` lets anybody claim the lead at any time.
        isolated: True in memory mode: members on other servers are out of reach.
        awaited: True while somebody out of reach must still learn who has left.
    """

    server_id: str
    boot_id: str
    max_members: int
    leadership: Literal["claim", "open"] = "claim"
    isolated: bool = True
    awaited: bool = False


def new_session(session_id: str, epoch_id: str, here: ServerContext, now: float) -> Session:
    """A session as it is before its first join, which is version 1."""
    # Made without a look at Redis, it must not take the lead of a session that is there already:
    # its leader's term is one lower than that of any other first leader.
    rank = Rank(0 if here.awaited else 1, now, here.boot_id)
    stamp = Stamp(rank, now, here.boot_id)
    return Session(
        session_id=session_id,
        epoch=Epoch(now, epoch_id),
        version=0,
        event_id="",
        leader=Leader(rank, ""),
        transport=TransportRegister(stamp, initial(now)),
        headline=HeadlineRegister(stamp, ""),
        settings=SettingsRegister(stamp, SessionSettings(here.max_members)),
        members={},
        chat=(),
        last_active_at=now,
    )


class Draft:
    """Collects the changes of one command, and the events that tell of them.

    Every write makes a new `Session` in ``session``; the base stays what it was. Every event
    counts the version up by one.
    """

    __slots__ = ("_base", "_events", "_here", "now", "session")

    def __init__(self, base: Session, here: ServerContext, now: float) -> None:
        self._base = base
        self._here = here
        self._events: list[Event] = []
        self.now = now
        self.session = base

    def head(self) -> tuple[str, int, float]:
        """What the next event starts with: session id, version, server time."""
        return self._base.session_id, self._base.version + len(self._events) + 1, self.now

    def emit(self, event: Event) -> None:
        """Add an event that was made with `head`."""
        self._events.append(event)

    def add(self, member: Member) -> None:
        """Put in a member that is written for the first time, or anew over a tombstone."""
        members = {**self.session.members, member.member_id: member}
        self.session = replace(self.session, members=members)

    def rewrite(self, member: Member, **changes: object) -> Member:
        """Put a changed copy of ``member`` in its place."""
        changed = replace(
            member,
            time=after(self.now, member.time),
            writer=self._here.boot_id,
            **changes,
        )
        self.add(changed)
        return changed

    def remove(self, member: Member, reason: LeaveReason) -> None:
        """Leave a tombstone in the member's place."""
        self.rewrite(member, present=False, connected=False)
        self.emit(UserLeft(*self.head(), member.member_id, member_count(self.session), reason))

    def disconnect(self, member: Member) -> None:
        """The member's connection is gone; it stays for its grace."""
        self.rewrite(member, connected=False)
        self.emit(MemberConnection(*self.head(), member.member_id, connected=False))

    def lead(self, member_id: str) -> None:
        """Name the leader; nobody if ``member_id`` is empty."""
        self.session = led_by(self.session, member_id, self.now, self._here.boot_id)

    def change_role(self, member_id: str, role: Role, reason: RoleReason) -> None:
        """Tell of a role that the leader register already gives."""
        previous: Role = "follower" if role == "leader" else "leader"
        self.emit(RoleChanged(*self.head(), member_id, role, previous, reason))

    def hand(self, member_id: str, reason: Literal["claimed", "handed_over"]) -> None:
        """Make a member the leader in place of the one that leads, if there is one."""
        leader = leader_of(self.session)
        self.lead(member_id)
        if leader is not None:
            self.change_role(leader.member_id, "follower", reason)
        self.change_role(member_id, "leader", reason)

    def elect(self, without: str = "") -> bool:
        """Make the longest-connected member the leader, in memory mode one of our own.

        Returns:
            False if there is nobody to elect.
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
        """Add a chat message to the ring, later than all that are in it."""
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
        """The new state, with a leader if one can be had, and the events.

        The state is the base itself when nothing was changed.
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
        """Elect a leader if there is none: see `session.settle`."""
        settled = settle(self.session, self.now, self._here.boot_id, self._reachable())
        if settled is not self.session:
            self.session = settled
            self.change_role(settled.leader.member_id, "leader", "elected")

    def _reachable(self) -> str | None:
        """Whose members can be elected: in memory mode those of this server process only."""
        return self._here.boot_id if self._here.isolated else None

    def _stamp(self, replaced: Stamp) -> Stamp:
        rank = self.session.leader.rank
        return Stamp(rank, after(self.now, replaced.time), self._here.boot_id)
