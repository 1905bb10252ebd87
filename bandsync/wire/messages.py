"""Server → client messages; `PROTOCOL.md` beside this file describes each."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from bandsync.model.session import Role, SessionSettings
from bandsync.model.transport import Transport

LeaveReason = Literal["left", "timeout", "server_lost", "replaced", "slow_consumer"]
RoleReason = Literal["claimed", "handed_over", "elected", "stepped_down", "merged"]
Quality = Literal["excellent", "good", "fair", "poor", "unknown"]


class MemberView(Struct, frozen=True, rename="camel"):
    """A member as the band sees it."""

    member_id: str
    display_name: str
    role: Role
    joined_at: float
    connected: bool
    server_id: str


class ChatView(Struct, frozen=True, rename="camel"):
    """A chat message as the band sees it."""

    message_id: str
    member_id: str
    display_name: str
    text: str
    sent_at: float


class You(Struct, frozen=True, rename="camel"):
    """The part of a snapshot for its receiver alone. ``resume_token`` is a secret."""

    member_id: str
    role: Role
    resume_token: str
    resumed: bool


class ConnectionLimits(Struct, frozen=True, rename="camel"):
    """Limits that apply to the client's messages."""

    max_message_bytes: int
    max_members: int
    min_tempo_bpm: float
    max_tempo_bpm: float


class Outgoing(Struct, frozen=True, rename="camel", tag_field="type"):
    """Base of all messages that a server sends."""


class Welcome(Outgoing, frozen=True, tag="welcome"):
    protocol: int
    server_id: str
    connection_id: str
    server_time: float
    storage_type: str
    ping_interval_ms: int
    limits: ConnectionLimits


class Ack(Outgoing, frozen=True, tag="ack"):
    request_id: str
    version: int | UnsetType = UNSET


class Error(Outgoing, frozen=True, tag="error"):
    code: str
    message: str
    request_id: str | UnsetType = UNSET
    # Servers send strings. Clients accept any JSON, for newer servers.
    context: dict[str, Any] | UnsetType = UNSET


class LatencyResponse(Outgoing, frozen=True, tag="latency_response"):
    client_timestamp: int | float
    server_timestamp: float


class ClockSyncReply(Outgoing, frozen=True, tag="clock_sync"):
    t0: int | float
    t1: float
    t2: float


class HeartbeatReply(Outgoing, frozen=True, tag="heartbeat"):
    server_time: float


class ServerDraining(Outgoing, frozen=True, tag="server_draining"):
    reconnect_in_ms: int


class StorageStatus(Outgoing, frozen=True, tag="storage_status"):
    storage_type: str
    degraded: bool
    reason: str | None


class Event(Outgoing, frozen=True):
    """A committed change of a session; ``version`` is the version after it."""

    session_id: str
    version: int
    server_time: float


class UserJoined(Event, frozen=True, tag="user_joined"):
    member: MemberView
    member_count: int


class UserLeft(Event, frozen=True, tag="user_left"):
    member_id: str
    member_count: int
    reason: LeaveReason


class MemberConnection(Event, frozen=True, tag="member_connection"):
    member_id: str
    connected: bool


class RoleChanged(Event, frozen=True, tag="role_changed"):
    member_id: str
    role: Role
    previous_role: Role
    reason: RoleReason


class TransportEvent(Event, frozen=True):
    """A change of the transport, by the member ``by``."""

    transport: Transport
    by: str


class Played(TransportEvent, frozen=True, tag="play"):
    """The song starts, or runs on.

    Attributes:
        count_in_beats: number of count-in beats, the last ones before ``transport.next``; absent
            without a count-in. The time before them is the lead for the slowest member.
    """

    count_in_beats: int | UnsetType = UNSET


class Paused(TransportEvent, frozen=True, tag="pause"):
    pass


class Stopped(TransportEvent, frozen=True, tag="stop"):
    pass


class Sought(TransportEvent, frozen=True, tag="seek"):
    pass


class PositionSynced(TransportEvent, frozen=True, tag="position_sync"):
    pass


class TempoChanged(TransportEvent, frozen=True, tag="tempo_changed"):
    old_tempo_bpm: float
    new_tempo_bpm: float


class MessageUpdated(Event, frozen=True, tag="message_updated"):
    message: str
    by: str


class ChatSent(Event, frozen=True, tag="chat_message"):
    message_id: str
    member_id: str
    display_name: str
    text: str
    sent_at: float


class Snapshot(Outgoing, frozen=True, tag="snapshot"):
    """The whole session at ``version``."""

    session_id: str
    version: int
    server_time: float
    epoch: str
    message: str
    tempo: float
    tempo_bpm: float
    position: float
    is_playing: bool
    transport: Transport
    leader_id: str | None
    members: list[MemberView]
    chat: list[ChatView]
    settings: SessionSettings
    created_at: float
    last_active_at: float
    you: You | UnsetType = UNSET


class SyncResponse(Outgoing, frozen=True, tag="sync_response"):
    session_id: str
    version: int
    server_time: float
    epoch: str
    position_ms: float
    tempo_bpm: float
    is_playing: bool
    transport: Transport


class LeaderRequested(Outgoing, frozen=True, tag="leader_requested"):
    session_id: str
    version: int
    server_time: float
    member_id: str
    display_name: str


class LeaderDenied(Outgoing, frozen=True, tag="leader_denied"):
    session_id: str
    version: int
    server_time: float
    member_id: str
    display_name: str


class DriftCorrection(Outgoing, frozen=True, tag="drift_correction"):
    session_id: str
    version: int
    server_time: float
    position_ms: float
    drift_ms: float
    transport: Transport


class ScrollTick(Outgoing, frozen=True, tag="scroll_tick"):
    session_id: str
    server_time: float
    position_ms: float
    beat: float
    tempo_bpm: float


class MemberStats(Struct, frozen=True, rename="camel"):
    """How well one member is connected; milliseconds, null where not known."""

    member_id: str
    latency_ms: float | None
    sync_error_ms: float | None
    quality: Quality


class RoomStats(Outgoing, frozen=True, tag="room_stats"):
    session_id: str
    server_time: float
    member_count: int
    connected_count: int
    is_playing: bool
    tempo: float
    position: float
    leader_id: str | None
    uptime_ms: float
    average_latency_ms: float | None
    members: list[MemberStats]


def quality(latency_ms: float | None) -> Quality:
    """The connection quality for a round trip in milliseconds; None before the first pong."""
    if latency_ms is None:
        return "unknown"
    if latency_ms <= 50:
        return "excellent"
    if latency_ms <= 100:
        return "good"
    if latency_ms <= 200:
        return "fair"
    return "poor"


def encode(message: Outgoing) -> bytes:
    """The JSON of a message."""
    return _encoder.encode(message)


_encoder = msgspec.json.Encoder()
