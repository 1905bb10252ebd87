"""The input and output of `bandsync.rules.decide`: commands, their actor, decisions."""

from collections.abc import Mapping

from msgspec import Struct

from bandsync.model.session import Member, Session
from bandsync.rules.server_context import ServerContext
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
    """The origin of a command.

    Attributes:
        server: the server that decides.
        connection_id: the connection that sent it; a command of a connection that is no longer
            bound does nothing.
        member_id: the member that this connection joined as; empty before.
        fresh_id: a random id for the member or message it creates, drawn once for this command.
        latencies_ms: round trips of the connected members by id, where known; only ``play``
            uses them.
    """

    server: ServerContext
    connection_id: str
    member_id: str = ""
    fresh_id: str = ""
    latencies_ms: Mapping[str, float] = {}


class Bind(Struct, frozen=True):
    """Join or resume: bind a member to the actor's connection.

    Attributes:
        session_id: the session to join; created if it does not exist.
        epoch_id: epoch of a session that this command creates; random, drawn for it.
        secret: secret of the resume token of a new member; random, drawn for it.
        display_name: name of a new member.
        wants_lead: claim the lead if there is no leader or it is in its grace.
        resume: resume tokens to try, in order.
        resume_only: refuse a new member; only a resume is allowed.
    """

    session_id: str
    epoch_id: str
    secret: str
    display_name: str
    wants_lead: bool = False
    resume: tuple[ResumeToken, ...] = ()
    resume_only: bool = False


class Drop(Struct, frozen=True):
    """The actor's connection or its server is gone; its member's resume grace starts."""


class Expire(Struct, frozen=True):
    """The resume grace of the actor's member has ended."""

    reason: LeaveReason


class Audit(Struct, frozen=True):
    """Assert the actor's server's own members: see `bandsync.rules.reconcile.audit`."""

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
    """The effect of a command.

    Attributes:
        session: the state afterwards; the same object when nothing changes.
        events: one per new version.
        reply: for the actor alone, after the commit.
        private: for one other member each: (member id, message).
    """

    session: Session
    events: tuple[Event, ...] = ()
    reply: Outgoing | None = None
    private: tuple[tuple[str, Outgoing], ...] = ()
