"""Merge of two copies of a session that changed independently (a state-based CRDT).

The merge is commutative, associative and idempotent in everything that `same_content` compares.
It depends on no server and no clock: the same copies, merged in any order, give the same session.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from bandsync.model.session import (
    CHAT_RING,
    Chat,
    HeadlineRegister,
    Leader,
    Member,
    Session,
    SettingsRegister,
    TransportRegister,
)

Value = TypeVar("Value", bound=msgspec.Struct)
Register = TypeVar("Register", TransportRegister, HeadlineRegister, SettingsRegister)


def merge(a: Session, b: Session) -> Session:
    """The union of both copies: of each register the content with the greater stamp.

    Args:
        a: one copy.
        b: the other copy; the stored one, if one of them is stored. Where the copies agree, the
            result shares the parts of ``b``, ring slots and ``event_id`` included. A write of the
            result over ``b`` is then small.

    Returns:
        The merge, with the larger of both versions.
    """
    return replace(
        b,
        epoch=min(a.epoch, b.epoch),
        version=max(a.version, b.version),
        leader=_leader(a.leader, b.leader),
        transport=_register(a.transport, b.transport),
        headline=_register(a.headline, b.headline),
        settings=_register(a.settings, b.settings),
        members=_members(a.members, b.members),
        chat=_chat(a.chat, b.chat),
        last_active_at=max(a.last_active_at, b.last_active_at),
    )


def same_content(a: Session, b: Session) -> bool:
    """Whether the copies are equal in everything that a merge combines.

    This excludes ``version``, ``event_id``, ring slots and ``last_active_at``.
    """
    return (
        a.epoch == b.epoch
        and a.leader == b.leader
        and a.transport == b.transport
        and a.headline == b.headline
        and a.settings == b.settings
        and a.members == b.members
        and (a.chat == b.chat or [_slotless(x) for x in a.chat] == [_slotless(x) for x in b.chat])
    )


def _leader(a: Leader, b: Leader) -> Leader:
    return a if (a.rank, a.member_id) > (b.rank, b.member_id) else b


def _register(a: Register, b: Register) -> Register:
    if a.stamp != b.stamp:
        return a if a.stamp > b.stamp else b
    return _greater(a, b)


def _members(a: Mapping[str, Member], b: Mapping[str, Member]) -> Mapping[str, Member]:
    if a == b:
        return b
    merged = dict(b)
    for member_id, ours in a.items():
        theirs = merged.get(member_id)
        merged[member_id] = ours if theirs is None else _member(ours, theirs)
    return merged


def _member(a: Member, b: Member) -> Member:
    order_a = (a.incarnation, a.time, a.writer)
    order_b = (b.incarnation, b.time, b.writer)
    if order_a != order_b:
        return a if order_a > order_b else b
    return _greater(a, b)


def _chat(a: tuple[Chat, ...], b: tuple[Chat, ...]) -> tuple[Chat, ...]:
    if a == b:
        return b
    stored = {chat.message_id: chat for chat in b}
    union = dict(stored)
    for ours in a:
        theirs = union.get(ours.message_id)
        if theirs is not None:
            union[ours.message_id] = _message(replace(ours, slot=theirs.slot), theirs)
        else:
            union[ours.message_id] = ours
    ring = sorted(union.values(), key=lambda chat: (chat.sent_at, chat.message_id))[-CHAT_RING:]
    kept = {chat.slot for chat in ring if chat.message_id in stored}
    free = iter([slot for slot in range(CHAT_RING) if slot not in kept])
    return tuple(
        [chat if chat.message_id in stored else replace(chat, slot=next(free)) for chat in ring]
    )


def _message(a: Chat, b: Chat) -> Chat:
    """The later one of two messages with the same id and slot."""
    if a.sent_at != b.sent_at:
        return a if a.sent_at > b.sent_at else b
    return _greater(a, b)


def _slotless(chat: Chat) -> Chat:
    return chat if chat.slot == 0 else replace(chat, slot=0)


def _greater(a: Value, b: Value) -> Value:
    """The value with the greater JSON encoding: a tie-break that is the same on every server."""
    if a == b:
        return b
    return a if _encoder.encode(a) > _encoder.encode(b) else b


_encoder = msgspec.json.Encoder()
