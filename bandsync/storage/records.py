"""A session as the fields of a Redis hash, readable in redis-cli (`bandsync/wire/PROTOCOL.md`)."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from bandsync.model.session import (
    CHAT_RING,
    Chat,
    Epoch,
    HeadlineRegister,
    Leader,
    Member,
    Session,
    SettingsRegister,
    Tip,
    TransportRegister,
)
from bandsync.model.transport import MAX_POSITION_MS, MAX_TEMPO_BPM, MIN_TEMPO_BPM, Segment
from bandsync.storage.base import Presence, Unreadable
from bandsync.storage.channel_messages import JUNK, CommittedChange

# Incremented by each change that an older server cannot read, or would drop when it writes.
FORMAT = 1

# Beyond it JSON numbers are not exact everywhere (RFC 8259 section 6), and sums may overflow.
_MAX_EXACT = 2**53

MEMBER = "member:"
CHAT = "chat:"

T = TypeVar("T")


class UnreadableError(ValueError):
    """The stored value is no session that this version can read; the message says why."""


class _Head(Struct, frozen=True, rename="camel"):
    """The parts of a session without a field of their own."""

    format: int
    created_at: float
    last_active_at: float
    leader: Leader
    transport: TransportRegister
    message: HeadlineRegister
    settings: SettingsRegister


class _Format(Struct):
    format: int


def changed_fields(base: Session | None, change: Session) -> tuple[dict[str, bytes], list[str]]:
    """The difference between ``base`` and ``change``, without the tip.

    Returns:
        The fields to set, and the names of the fields to delete.
    """
    head = _Head(
        FORMAT,
        change.epoch.created_at,
        change.last_active_at,
        change.leader,
        change.transport,
        change.headline,
        change.settings,
    )
    fields = {"head": _encode(head)}
    deleted: list[str] = []
    if base is None or base.members is not change.members:
        before = {} if base is None else base.members
        for member_id, member in change.members.items():
            if before.get(member_id) != member:
                fields[MEMBER + member_id] = _encode(member)
        deleted += [MEMBER + member_id for member_id in before if member_id not in change.members]
    if base is None or base.chat is not change.chat:
        slots = {} if base is None else {chat.slot: chat for chat in base.chat}
        for chat in change.chat:
            if slots.pop(chat.slot, None) != chat:
                fields[f"{CHAT}{chat.slot}"] = _encode(chat)
        deleted += [f"{CHAT}{slot}" for slot in slots]
    return fields, deleted


def read_session(session_id: str, fields: Mapping[str, bytes]) -> Session:
    """The session that is stored as ``fields``.

    Raises:
        UnreadableError: a field is missing or malformed, or a newer version wrote it.
    """
    tip = read_tip(fields.get("epoch"), fields.get("version"), fields.get("eventId"))
    head = _read_head(fields.get("head", b""))
    members: dict[str, Member] = {}
    ring: list[Chat] = []
    for name, value in fields.items():
        if name.startswith(MEMBER):
            member = _read_member(name, value)
            members[member.member_id] = member
        elif name.startswith(CHAT):
            ring.append(_read_chat(name, value))
    ring.sort(key=_chat_order)
    return Session(
        session_id=session_id,
        epoch=Epoch(head.created_at, tip.epoch),
        version=tip.version,
        event_id=tip.event_id,
        leader=head.leader,
        transport=head.transport,
        headline=head.message,
        settings=head.settings,
        members=members,
        chat=tuple(ring),
        last_active_at=head.last_active_at,
    )


def patch_session(session: Session, change: CommittedChange) -> Session:
    """Apply a change to the session that it was decided on.

    Raises:
        UnreadableError: a field is malformed, or the version does not follow.
    """
    if not session.version < change.version < _MAX_EXACT:
        raise UnreadableError(f"a change to version {change.version}")
    changes: dict[str, object] = {"version": change.version, "event_id": change.event_id}
    members: dict[str, Member] | None = None
    ring: dict[int, Chat] | None = None
    epoch = session.epoch
    for name, raw in change.delta.items():
        value = None if (text := bytes(raw)) == b"null" else text
        if name.startswith(MEMBER):
            members = dict(session.members) if members is None else members
            if value is None:
                members.pop(name.removeprefix(MEMBER), None)
            else:
                member = _read_member(name, value)
                members[member.member_id] = member
        elif name.startswith(CHAT):
            ring = {chat.slot: chat for chat in session.chat} if ring is None else ring
            if value is None:
                ring = {slot: chat for slot, chat in ring.items() if f"{CHAT}{slot}" != name}
            else:
                chat = _read_chat(name, value)
                ring[chat.slot] = chat
        elif name == "head" and value is not None:
            head = _read_head(value)
            epoch = Epoch(head.created_at, epoch.id)
            changes |= {
                "leader": head.leader,
                "transport": head.transport,
                "headline": head.message,
                "settings": head.settings,
                "last_active_at": head.last_active_at,
            }
        elif name == "epoch" and value is not None:
            epoch = Epoch(epoch.created_at, _read(name, value, _texts))
    if members is not None:
        changes["members"] = members
    if ring is not None:
        changes["chat"] = tuple(sorted(ring.values(), key=_chat_order))
    return replace(session, epoch=epoch, **changes)


def read_tip(epoch: bytes | None, version: bytes | None, event_id: bytes | None) -> Tip:
    """The tip in its three fields.

    Raises:
        UnreadableError: a field is missing or malformed.
    """
    if epoch is None or version is None or event_id is None:
        raise UnreadableError("epoch, version or eventId is missing")
    try:
        number = int(version)
        # commit.lua compares texts: another spelling of the number would always conflict.
        if not 0 < number < _MAX_EXACT or version != b"%d" % number:
            raise ValueError
        return Tip(epoch.decode(), number, event_id.decode())
    except ValueError as error:
        raise UnreadableError("epoch, version or eventId is no text or no number") from error


def write_presence(presence: Presence) -> bytes:
    """The presence entry of a server, as stored in Redis."""
    return _encode(presence)


def read_presence(value: object) -> Presence | Unreadable:
    """The presence entry in a value from Redis."""
    if not isinstance(value, bytes):
        return Unreadable(f"no text: {value!r:.100}")
    try:
        return _presences.decode(value)
    except JUNK as error:
        return Unreadable(str(error))


def _read_head(value: bytes) -> _Head:
    written = _read("head", value, _formats).format
    if written > FORMAT:
        raise UnreadableError(f"head: format {written} of a newer version, this one reads {FORMAT}")
    head = _read("head", value, _heads)
    transport = head.transport.value
    for segment in (transport, transport.next):
        if segment is not None and not _playable(segment):
            raise UnreadableError("head: transport out of range")
    if head.settings.value.max_members < 1:
        raise UnreadableError("head: settings out of range")
    return head


def _read_member(name: str, value: bytes) -> Member:
    member = _read(name, value, _members)
    if MEMBER + member.member_id != name:
        raise UnreadableError(f"{name}: contains the member {member.member_id!r}")
    return member


def _read_chat(name: str, value: bytes) -> Chat:
    chat = _read(name, value, _chats)
    if f"{CHAT}{chat.slot}" != name or not 0 <= chat.slot < CHAT_RING:
        raise UnreadableError(f"{name}: contains the message of slot {chat.slot}")
    return chat


def _chat_order(chat: Chat) -> tuple[float, str]:
    return chat.sent_at, chat.message_id


def _playable(segment: Segment) -> bool:
    return (
        MIN_TEMPO_BPM <= segment.tempo_bpm <= MAX_TEMPO_BPM
        and 0 <= segment.position_ms <= MAX_POSITION_MS
        and segment.beats_per_bar >= 1
        and max(abs(segment.anchor_time), abs(segment.beat)) < _MAX_EXACT
    )


def _read(name: str, value: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(value)
    except JUNK as error:
        raise UnreadableError(f"{name}: {error}") from error


_encode = msgspec.json.Encoder().encode
_formats = msgspec.json.Decoder(_Format)
_heads = msgspec.json.Decoder(_Head)
_members = msgspec.json.Decoder(Member)
_chats = msgspec.json.Decoder(Chat)
_presences = msgspec.json.Decoder(Presence)
_texts = msgspec.json.Decoder(str)
