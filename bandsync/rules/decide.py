"""The rules of a session: the effect of each command, and the permission it needs.

One implementation serves every storage. It is pure: ``now`` is an argument. The caller draws ids
once per command, so that a second decision on another base is idempotent.
"""

from msgspec import UNSET

from bandsync.model import transport as arithmetic
from bandsync.model.session import Member, Session, bound, find, leader_of, role_of
from bandsync.rules.actions import Actor, Audit, Bind, Command, Decision, Drop, Expire
from bandsync.rules.draft import Draft, new_session
from bandsync.rules.reconcile import audit
from bandsync.rules.refusals import NOT_JOINED, NOT_LEADER, UNAUTHORIZED
from bandsync.rules.role_commands import deny_leader, request_leader, set_role
from bandsync.rules.server_context import ServerContext
from bandsync.rules.tokens import ResumeToken, hash_secret, proves
from bandsync.wire.commands import (
    ChatMessage,
    DenyLeader,
    LeaveSession,
    Pause,
    Play,
    PositionSync,
    Refusal,
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
    ChatSent,
    DriftCorrection,
    MemberConnection,
    MessageUpdated,
    Paused,
    Played,
    PositionSynced,
    Sought,
    Stopped,
    TempoChanged,
    UserJoined,
    You,
)
from bandsync.wire.snapshots import member_count, member_view, snapshot, sync_response

LEADER_RESYNC_MS = 20.0
FOLLOWER_DRIFT_MS = 25.0


def decide(
    session: Session | None, command: Command, actor: Actor, now: float
) -> Decision | Refusal:
    """Decide the effect of ``command``, given by ``actor``, on ``session`` at the instant ``now``.

    Args:
        session: None if there is none yet; only `Bind` creates one.

    Returns:
        The decision to commit, or the refusal to send.
    """
    if isinstance(command, Bind):
        return _bind(session, command, actor, now)
    if session is None:
        return NOT_JOINED
    if isinstance(command, Audit):
        return _audit(Draft(session, actor.server, now), command, actor.server)
    member = bound(session, actor.member_id, actor.connection_id)
    if member is None:
        return Decision(session) if isinstance(command, Drop | Expire) else NOT_JOINED
    draft = Draft(session, actor.server, now)
    match command:
        case Play() | Pause() | Stop() | Seek() | SetTempo() | UpdateMessage():
            if session.leader.member_id != member.member_id:
                return NOT_LEADER
            _conduct(draft, command, actor)
        case PositionSync():
            return _position_sync(draft, command, member)
        case ChatMessage():
            _chat(draft, command, member, actor)
        case SetRole():
            refusal = set_role(draft, command, member, actor.server)
            if refusal is not None:
                return refusal
        case RequestLeader():
            return request_leader(draft, member)
        case DenyLeader():
            return deny_leader(draft, command, member)
        case SyncRequest():
            return _sync(session, command, now)
        case SyncReport():
            return Decision(session)
        case LeaveSession():
            draft.remove(member, "left")
        case Drop():
            if member.connected:
                draft.disconnect(member)
        case Expire():
            if not member.connected:
                draft.remove(member, command.reason)
    return Decision(*draft.done())


def _audit(draft: Draft, command: Audit, server: ServerContext) -> Decision:
    known = draft.session.members
    for member in audit(draft.session, command.own, server, draft.now).members.values():
        record = known.get(member.member_id)
        if member is record:
            continue
        draft.add(member)
        if record is not None and record.present:
            connected = member.connected
            draft.emit(MemberConnection(*draft.head(), member.member_id, connected))
        else:
            view = member_view(draft.session, member)
            draft.emit(UserJoined(*draft.head(), view, member_count(draft.session)))
    draft.settle()
    return Decision(*draft.done())


def _bind(session: Session | None, command: Bind, actor: Actor, now: float) -> Decision | Refusal:
    server = actor.server
    base = session or new_session(command.session_id, command.epoch_id, server, now)
    draft = Draft(base, server, now)
    known = bound(base, actor.fresh_id, actor.connection_id)
    if known is not None:
        # Decided before, and committed although the reply of the storage was lost.
        return Decision(base, reply=snapshot(base, now, _you(base, known, command.secret)))
    token = next((token for token in command.resume if _resumable(base, token)), None)
    if token is not None:
        member = _resume(draft, base.members[token.member_id], token, actor)
        secret = token.secret
    elif command.resume_only:
        return UNAUTHORIZED
    elif member_count(base) >= base.settings.value.max_members:
        return Refusal("session_full", "The session has as many members as it takes; try later.")
    else:
        member = _join(draft, command, actor)
        secret = command.secret
    after, events = draft.done()
    you = _you(after, member, secret, resumed=token is not None)
    return Decision(after, events, snapshot(after, now, you))


def _you(session: Session, member: Member, secret: str, *, resumed: bool = False) -> You:
    return You(
        member_id=member.member_id,
        role=role_of(session, member.member_id),
        resume_token=str(ResumeToken(member.member_id, member.incarnation, secret)),
        resumed=resumed,
    )


def _resumable(session: Session, token: ResumeToken) -> bool:
    member = find(session, token.member_id)
    return member is not None and proves(token, member.token_hash)


def _resume(draft: Draft, member: Member, token: ResumeToken, actor: Actor) -> Member:
    """Bind ``member`` to the actor's connection."""
    other = bound(draft.session, actor.member_id, actor.connection_id)
    same = member.connected and member.connection_id == actor.connection_id
    bound_member = draft.rewrite(
        member,
        incarnation=max(member.incarnation, token.incarnation) + 1,
        connection_id=actor.connection_id,
        server_id=actor.server.server_id,
        boot_id=actor.server.boot_id,
        connected=True,
        connected_at=member.connected_at if same else draft.now,
    )
    draft.emit(MemberConnection(*draft.head(), member.member_id, connected=True))
    if other is not None and other.member_id != member.member_id:
        draft.remove(other, "replaced")
    if leader_of(draft.session) is None:
        draft.lead(member.member_id)
        draft.change_role(member.member_id, "leader", "elected")
    return bound_member


def _join(draft: Draft, command: Bind, actor: Actor) -> Member:
    """Add a new member, bound to the actor's connection."""
    leader = leader_of(draft.session)
    member = Member(
        member_id=actor.fresh_id,
        incarnation=1,
        time=draft.now,
        writer=actor.server.boot_id,
        present=True,
        connection_id=actor.connection_id,
        server_id=actor.server.server_id,
        boot_id=actor.server.boot_id,
        connected=True,
        joined_at=draft.now,
        connected_at=draft.now,
        display_name=command.display_name,
        token_hash=hash_secret(command.secret),
    )
    draft.add(member)
    if leader is None:
        draft.lead(member.member_id)
    view = member_view(draft.session, member)
    draft.emit(UserJoined(*draft.head(), view, member_count(draft.session)))
    if command.wants_lead and leader is not None and not leader.connected:
        draft.hand(member.member_id, "claimed")
    return member


def _conduct(
    draft: Draft, command: Play | Pause | Stop | Seek | SetTempo | UpdateMessage, actor: Actor
) -> None:
    """Apply a command that only the leader may give."""
    now = draft.now
    by = actor.member_id
    before = draft.session.transport.value
    match command:
        case Play():
            delay = _lead_ms(draft.session, command, actor)
            delay += arithmetic.count_in_ms(command.count_in_beats, before, now)
            position = None if command.position_ms is UNSET else command.position_ms
            transport = arithmetic.play(before, now, position, delay)
            count_in = command.count_in_beats or UNSET
            draft.emit(Played(*draft.head(), transport, by, count_in))
        case Pause():
            transport = arithmetic.pause(before, now)
            draft.emit(Paused(*draft.head(), transport, by))
        case Stop():
            transport = arithmetic.stop(before, now)
            draft.emit(Stopped(*draft.head(), transport, by))
        case Seek():
            transport = arithmetic.seek(before, now, command.position_ms, command.at)
            draft.emit(Sought(*draft.head(), transport, by))
        case SetTempo():
            old = arithmetic.in_force(before, now).tempo_bpm
            new = command.new_tempo
            bar = None if command.beats_per_bar is UNSET else command.beats_per_bar
            transport = arithmetic.set_tempo(before, now, new, bar, command.at)
            draft.emit(TempoChanged(*draft.head(), transport, by, old, new))
        case UpdateMessage():
            draft.headline(command.message)
            draft.emit(MessageUpdated(*draft.head(), command.message, by))
            return
    draft.move(transport)


def _lead_ms(session: Session, command: Play, actor: Actor) -> float:
    if command.start_in_ms is not UNSET:
        return command.start_in_ms
    return arithmetic.auto_lead(
        [
            actor.latencies_ms.get(member.member_id, 0.0)
            for member in session.members.values()
            if member.connected
        ]
    )


def _position_sync(draft: Draft, command: PositionSync, member: Member) -> Decision:
    session = draft.session
    now = draft.now
    transport = session.transport.value
    then = arithmetic.in_force(transport, command.timestamp)
    difference = command.position_ms - arithmetic.position_at(then, command.timestamp)
    if session.leader.member_id != member.member_id:
        if abs(difference) <= FOLLOWER_DRIFT_MS:
            return Decision(session)
        ours = arithmetic.position_at(arithmetic.in_force(transport, now), now)
        head = (session.session_id, session.version, now)
        return Decision(session, reply=DriftCorrection(*head, ours, difference, transport))
    # Ignore a report from before the last anchor of a playing song: it crossed the leader's own
    # seek on the way.
    crossed = then.is_playing and command.timestamp < then.anchor_time
    if abs(difference) <= LEADER_RESYNC_MS or crossed:
        return Decision(session)
    shifted = arithmetic.shift(transport, now, difference)
    draft.move(shifted)
    draft.emit(PositionSynced(*draft.head(), shifted, member.member_id))
    return Decision(*draft.done())


def _chat(draft: Draft, command: ChatMessage, member: Member, actor: Actor) -> None:
    if any(chat.message_id == actor.fresh_id for chat in draft.session.chat):
        return
    chat = draft.say(actor.fresh_id, member, command.text)
    draft.emit(
        ChatSent(
            *draft.head(),
            chat.message_id,
            chat.member_id,
            chat.display_name,
            chat.text,
            chat.sent_at,
        )
    )


def _sync(session: Session, command: SyncRequest, now: float) -> Decision:
    same_epoch = command.epoch is UNSET or command.epoch == session.epoch.id
    if command.version == session.version and same_epoch:
        return Decision(session, reply=sync_response(session, now))
    return Decision(session, reply=snapshot(session, now))
