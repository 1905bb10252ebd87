"""The input and output of `bandsync.rules.decide`: commands, their actor, decisions."""

from collections.abc import Mapping

from msgspec import Struct

from bandsync.model.session import Member, Session
from bandsync.rules.draft import ServerContext
from bandsync.rules.tokens import ResumeToken
from bandsync.wire.commands import (
    ChatMessage,
    DenyLeader,
    LeaveSession,
    Pause,
    Play,
    PositionSync,
    RequestLeader,
    Seek,
    SetRole,
    SetTempo,
    Stop,
    SyncReport,
    SyncRequest,
    UpdateMessage,
)
from bandsync.wire.messages import (
    Event,
    LeaveReason,
    Outgoing,
)


class Actor(Struct, frozen=True):
    """Who gives a command, where.

    Attributes:
        connection_id: the connection it came by; a command of one that is no longer the bound
            one does nothing.
        member_id: the member that connection joined as; empty before.
        fresh_id: a random id, drawn once for this command, for what it creates.
        latencies_ms: round trips of the connected members, by id, where known; only ``play``
            looks at them.
    """

    here: ServerContext
    connection_id: str
    member_id: str = ""
    fresh_id: str = ""
    latencies_ms: Mapping[str, float] = {}


class Bind(Struct, frozen=True):
    """Join or resume: bind a member to the actor's connection.

    Attributes:
        epoch_id: drawn for this command, for a session that it creates.
        secret: drawn for this command; goes into the resume token of a new member.
        wants_lead: claims the lead of a leader that is absent or in its grace.
        resume: tokens to try, in order.
        resume_only: may come back, but not come anew.
    """

    session_id: str
    epoch_id: str
    secret: str
    display_name: str
    wants_lead: bool = False
    resume: tuple[ResumeToken, ...] = ()
    resume_only: bool = False


class Drop(Struct, frozen=True):
    """The actor's connection is gone, or its server is; its member's grace starts."""


class Expire(Struct, frozen=True):
    """The grace of the actor's member is over."""

    reason: LeaveReason


class Audit(Struct, frozen=True):
    """Assert what the actor's server knows of its own members: see `reconcile.audit`."""

    own: Mapping[str, Member]


Command = (
    Bind
    | Audit
    | Drop
    | Expire
    | LeaveSession
    | Play
    | Pause
    | Stop
    | Seek
    | SetTempo
    | PositionSync
    | SetRole
    | RequestLeader
    | DenyLeader
    | UpdateMessage
    | ChatMessage
    | SyncRequest
    | SyncReport
)


class Decision(Struct, frozen=True):
    """What a command does.

    Attributes:
        session: the state afterwards; the very same object when nothing changes.
        events: one for each version gained.
        reply: for the actor alone, after the commit.
        private: for one other member each: (member id, message).
    """

    session: Session
    events: tuple[Event, ...] = ()
    reply: Outgoing | None = None
    private: tuple[tuple[str, Outgoing], ...] = ()
