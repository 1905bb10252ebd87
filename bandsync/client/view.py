"""A client's view of a session, and how messages change it. Pure."""

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from bandsync.client.inbound import ServerMessage, SessionEvent, UnknownMessage
from bandsync.model.session import CHAT_RING, Role, SessionSettings
from bandsync.model.transport import Segment, Transport, in_force
from bandsync.wire.messages import (
    ChatSent,
    ChatView,
    MemberConnection,
    MemberView,
    MessageUpdated,
    RoleChanged,
    Snapshot,
    TransportEvent,
    UserJoined,
    UserLeft,
)


class SessionView(Struct, frozen=True):
    """A session at one version. Immutable: a change creates another view.

    Attributes:
        session_id: id of the session.
        epoch: id of this life of the session; versions compare within one epoch.
        version: the version.
        message: the headline.
        transport: the transport.
        leader_id: None without a leader.
        members: by id, those in their resume grace included. A member's ``server_id`` is that of
            its join or latest snapshot; a resume on another server does not update it.
        chat: the last messages, oldest first.
        settings: the session's settings.
        created_at: session clock, milliseconds.
    """

    session_id: str
    epoch: str
    version: int
    message: str
    transport: Transport
    leader_id: str | None
    members: Mapping[str, MemberView]
    chat: tuple[ChatView, ...]
    settings: SessionSettings
    created_at: float


class Step(Struct, frozen=True):
    """The effect of a message on a view.

    Attributes:
        view: the view afterwards; the same object if nothing changed.
        stale: the view already contains this change; consumers do not get the message.
        gap: at least one version is missing: a snapshot is needed.
    """

    view: SessionView
    stale: bool = False
    gap: bool = False


def view_of(snapshot: Snapshot) -> SessionView:
    """The view of a snapshot."""
    return SessionView(
        session_id=snapshot.session_id,
        epoch=snapshot.epoch,
        version=snapshot.version,
        message=snapshot.message,
        transport=snapshot.transport,
        leader_id=snapshot.leader_id,
        members={member.member_id: member for member in snapshot.members},
        chat=tuple(snapshot.chat),
        settings=snapshot.settings,
        created_at=snapshot.created_at,
    )


def advance(view: SessionView, message: ServerMessage | UnknownMessage) -> Step:
    """Apply ``message``, received after everything in ``view``.

    Not for the snapshot that answers a join: it is applied whatever its version.
    """
    if isinstance(message, Snapshot):
        if message.epoch == view.epoch and message.version < view.version:
            return Step(view, stale=True)
        return Step(view_of(message))
    if isinstance(message, UnknownMessage):
        version = message.version
        return Step(view, gap=version is not None and version > view.version)
    if not isinstance(message, SessionEvent):
        return Step(view)
    if message.version <= view.version:
        return Step(view, stale=True)
    if message.version > view.version + 1:
        return Step(view, stale=True, gap=True)
    return Step(_follow(view, message))


def instant_of_beat(transport: Transport, beat: float, after: float) -> float | None:
    """When ``beat`` is reached, at ``after`` or later; None if that is not scheduled.

    Args:
        transport: the transport.
        beat: beats from the start of the song.
        after: session clock, milliseconds, like the result.
    """
    segment = in_force(transport, after)
    upcoming = transport.next if segment is not transport.next else None
    found = _reaches(segment, beat, after)
    if found is not None and (upcoming is None or found < upcoming.anchor_time):
        return found
    return None if upcoming is None else _reaches(upcoming, beat, upcoming.anchor_time)


def _reaches(segment: Segment, beat: float, after: float) -> float | None:
    if not segment.is_playing:
        return None
    instant = segment.anchor_time + (beat - segment.beat) * 60_000 / segment.tempo_bpm
    return instant if instant >= after else None


def _follow(view: SessionView, event: SessionEvent) -> SessionView:
    """``view`` after the event of the next version."""
    view = replace(view, version=event.version)
    match event:
        case TransportEvent():
            return replace(view, transport=event.transport)
        case UserJoined():
            return _joined(view, event.member)
        case UserLeft():
            members = {id_: m for id_, m in view.members.items() if id_ != event.member_id}
            leader = None if view.leader_id == event.member_id else view.leader_id
            return replace(view, members=members, leader_id=leader)
        case MemberConnection():
            return _with(view, event.member_id, connected=event.connected)
        case RoleChanged():
            return _led(view, event.member_id, event.role)
        case MessageUpdated():
            return replace(view, message=event.message)
        case ChatSent():
            chat = ChatView(
                event.message_id, event.member_id, event.display_name, event.text, event.sent_at
            )
            return replace(view, chat=(*view.chat, chat)[-CHAT_RING:])


def _joined(view: SessionView, member: MemberView) -> SessionView:
    view = replace(view, members={**view.members, member.member_id: member})
    return replace(view, leader_id=member.member_id) if member.role == "leader" else view


def _led(view: SessionView, member_id: str, role: Role) -> SessionView:
    leader = view.leader_id
    if role == "leader":
        leader = member_id
    elif leader == member_id:
        leader = None
    return _with(replace(view, leader_id=leader), member_id, role=role)


def _with(view: SessionView, member_id: str, **changes: object) -> SessionView:
    member = view.members.get(member_id)
    if member is None:
        return view
    return replace(view, members={**view.members, member_id: replace(member, **changes)})
