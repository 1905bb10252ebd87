"""From the text of a frame to a message of `bandsync.wire.messages`, whatever the server's age."""

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

# Commits: each makes the next version of the session.
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
# What a client hears without having asked.
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
    """A message that this client does not understand: the server is newer.

    Attributes:
        type: what the server calls it.
        fields: all of it, with the names of the wire.
    """

    type: str
    fields: dict[str, Any]

    @property
    def version(self) -> int | None:
        """The version of the session that it names, if it does."""
        version = self.fields.get("version")
        return version if type(version) is int else None


def decode(text: str) -> ServerMessage | UnknownMessage | None:
    """The message in a text frame; None if it is none at all.

    Unknown fields are ignored. What has an unknown type, or a known one with content that is not
    understood, is an `UnknownMessage`.
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
