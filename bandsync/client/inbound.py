"""Decoding of server messages, also of those from newer servers."""

from typing import Any

import msgspec
from msgspec import Struct

from bandsync.wire.messages import (
    Ack,
    ChatSent,
    ClockSyncReply,
    DriftCorrection,
    Error,
    HeartbeatReply,
    LatencyResponse,
    LeaderDenied,
    LeaderRequested,
    MemberConnection,
    MessageUpdated,
    Paused,
    Played,
    PositionSynced,
    RoleChanged,
    RoomStats,
    ScrollTick,
    ServerDraining,
    Snapshot,
    Sought,
    Stopped,
    StorageStatus,
    SyncResponse,
    TempoChanged,
    UserJoined,
    UserLeft,
    Welcome,
)

# Committed changes: each is one version of the session.
SessionEvent = (
    UserJoined
    | UserLeft
    | MemberConnection
    | RoleChanged
    | Played
    | Paused
    | Stopped
    | Sought
    | PositionSynced
    | TempoChanged
    | MessageUpdated
    | ChatSent
)
# Messages that the server sends without a request.
News = (
    SessionEvent
    | Snapshot
    | LeaderRequested
    | LeaderDenied
    | DriftCorrection
    | ScrollTick
    | RoomStats
    | StorageStatus
    | ServerDraining
)
DirectReply = (
    Welcome | Ack | Error | ClockSyncReply | LatencyResponse | HeartbeatReply | SyncResponse
)
ServerMessage = News | DirectReply


class UnknownMessage(Struct, frozen=True):
    """A message that this client does not know, from a newer server.

    Attributes:
        type: its ``type``.
        fields: the whole message, with the names of the wire.
    """

    type: str
    fields: dict[str, Any]

    @property
    def version(self) -> int | None:
        """The session version in the message; None without one."""
        version = self.fields.get("version")
        return version if type(version) is int else None


def decode(text: str) -> ServerMessage | UnknownMessage | None:
    """The message in a text frame; None if it is not a message at all.

    Unknown fields are ignored. A message with an unknown type, or with invalid fields, becomes an
    `UnknownMessage`.
    """
    try:
        try:
            return _decoder.decode(text)
        except msgspec.ValidationError:
            return _unknown(msgspec.json.decode(text))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _unknown(found: object) -> UnknownMessage | None:
    if not isinstance(found, dict) or not isinstance(found.get("type"), str):
        return None
    return UnknownMessage(found["type"], found)


_decoder: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)
