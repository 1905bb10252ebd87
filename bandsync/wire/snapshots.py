"""Views of a session for clients: snapshots, members, statistics."""

from collections.abc import Mapping

from msgspec import UNSET

from bandsync.model.session import Member, Session, leader_of, present, role_of
from bandsync.model.transport import in_force, position_at
from bandsync.wire.messages import (
    ChatView,
    MemberStats,
    MemberView,
    RoomStats,
    Snapshot,
    SyncResponse,
    You,
    quality,
)


def member_view(session: Session, member: Member) -> MemberView:
    """``member`` with the role it has in ``session``."""
    return MemberView(
        member_id=member.member_id,
        display_name=member.display_name,
        role=role_of(session, member.member_id),
        joined_at=member.joined_at,
        connected=member.connected,
        server_id=member.server_id,
    )


def member_count(session: Session) -> int:
    """The number of present members, those in their resume grace included."""
    return sum(1 for _ in present(session))


def leader_id(session: Session) -> str | None:
    """The id of the leader; None if there is none."""
    leader = leader_of(session)
    return None if leader is None else leader.member_id


def snapshot(session: Session, now: float, you: You | None = None) -> Snapshot:
    """The whole ``session`` at the instant ``now``.

    Args:
        you: for the member that joined or resumed; None for the others.
    """
    transport = session.transport.value
    segment = in_force(transport, now)
    members = sorted(present(session), key=lambda member: (member.joined_at, member.member_id))
    return Snapshot(
        session_id=session.session_id,
        version=session.version,
        server_time=now,
        epoch=session.epoch.id,
        message=session.headline.value,
        tempo=segment.tempo_bpm,
        tempo_bpm=segment.tempo_bpm,
        position=position_at(segment, now),
        is_playing=segment.is_playing,
        transport=transport,
        leader_id=leader_id(session),
        members=[member_view(session, member) for member in members],
        chat=[
            ChatView(chat.message_id, chat.member_id, chat.display_name, chat.text, chat.sent_at)
            for chat in session.chat
        ],
        settings=session.settings.value,
        created_at=session.epoch.created_at,
        last_active_at=session.last_active_at,
        you=UNSET if you is None else you,
    )


def sync_response(session: Session, now: float) -> SyncResponse:
    """The transport of ``session``, for a client that is current in everything else."""
    transport = session.transport.value
    segment = in_force(transport, now)
    return SyncResponse(
        session_id=session.session_id,
        version=session.version,
        server_time=now,
        epoch=session.epoch.id,
        position_ms=position_at(segment, now),
        tempo_bpm=segment.tempo_bpm,
        is_playing=segment.is_playing,
        transport=transport,
    )


def room_stats(
    session: Session,
    now: float,
    latencies_ms: Mapping[str, float | None],
    sync_errors_ms: Mapping[str, float | None],
) -> RoomStats:
    """Statistics of ``session`` at the instant ``now``.

    Args:
        latencies_ms: round trips by member id, where known, milliseconds.
        sync_errors_ms: clock error bounds that clients reported, by member id, milliseconds.
    """
    segment = in_force(session.transport.value, now)
    members = list(present(session))
    known = [latency for latency in latencies_ms.values() if latency is not None]
    return RoomStats(
        session_id=session.session_id,
        server_time=now,
        member_count=len(members),
        connected_count=sum(member.connected for member in members),
        is_playing=segment.is_playing,
        tempo=segment.tempo_bpm,
        position=position_at(segment, now),
        leader_id=leader_id(session),
        uptime_ms=now - session.epoch.created_at,
        average_latency_ms=sum(known) / len(known) if known else None,
        members=[
            MemberStats(
                member_id=member.member_id,
                latency_ms=latencies_ms.get(member.member_id),
                sync_error_ms=sync_errors_ms.get(member.member_id),
                quality=quality(latencies_ms.get(member.member_id)),
            )
            for member in members
        ],
    )
