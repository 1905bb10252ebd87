"""Client → server messages, their decoding, and the refusals of those that cannot be decoded.

The names and ranges of the wire are defined here only; `PROTOCOL.md` beside this file describes
them.
"""

import json
import re
from typing import Annotated, NoReturn, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from bandsync.model.session import Role
from bandsync.model.transport import MAX_POSITION_MS, MAX_TEMPO_BPM, MIN_TEMPO_BPM, At

SESSION_ID_PATTERN = r"^[A-Za-z0-9._-]{1,64}\Z"
MAX_REQUEST_ID = 64

SessionId = Annotated[str, Meta(pattern=SESSION_ID_PATTERN)]
DisplayName = Annotated[str, Meta(min_length=1, max_length=64)]
RequestId = Annotated[str, Meta(max_length=MAX_REQUEST_ID)]
PositionMs = Annotated[float, Meta(ge=0, le=MAX_POSITION_MS)]
TempoBpm = Annotated[float, Meta(ge=MIN_TEMPO_BPM, le=MAX_TEMPO_BPM)]
Version = Annotated[int, Meta(ge=0)]
# A number that is echoed unchanged: a client may count in integer nanoseconds.
Echoed = int | float


class Message(Struct, frozen=True, kw_only=True, rename="camel", tag_field="type"):
    """Base of all client messages."""

    request_id: RequestId | UnsetType = UNSET


class JoinSession(Message, frozen=True, tag="join_session"):
    session_id: SessionId | UnsetType = UNSET
    display_name: DisplayName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    resume_token: str | UnsetType = UNSET
    token: str | UnsetType = UNSET
    ticks: bool = True


class LeaveSession(Message, frozen=True, tag="leave_session"):
    pass


class Play(Message, frozen=True, tag="play"):
    position_ms: PositionMs | UnsetType = UNSET
    start_in_ms: Annotated[float, Meta(ge=0, le=10_000)] | UnsetType = UNSET
    count_in_beats: Annotated[int, Meta(ge=0, le=32)] = 0


class Pause(Message, frozen=True, tag="pause"):
    pass


class Stop(Message, frozen=True, tag="stop"):
    pass


class Seek(Message, frozen=True, tag="seek"):
    position_ms: PositionMs
    at: At = "now"


class SetTempo(Message, frozen=True, tag="set_tempo"):
    tempo_bpm: TempoBpm | UnsetType = UNSET
    tempo: TempoBpm | UnsetType = UNSET
    beats_per_bar: Annotated[int, Meta(ge=1, le=16)] | UnsetType = UNSET
    at: At = "now"

    def __post_init__(self) -> None:
        if self.tempo_bpm is UNSET and self.tempo is UNSET:
            raise ValueError("Object missing required field `tempoBpm`")

    @property
    def new_tempo(self) -> float:
        """The requested tempo, from ``tempoBpm`` or its alias ``tempo``."""
        tempo = self.tempo if self.tempo_bpm is UNSET else self.tempo_bpm
        assert tempo is not UNSET
        return tempo


class PositionSync(Message, frozen=True, tag="position_sync"):
    position_ms: PositionMs
    timestamp: float


class SetRole(Message, frozen=True, tag="set_role"):
    role: Role
    member_id: str | UnsetType = UNSET


class RequestLeader(Message, frozen=True, tag="request_leader"):
    pass


class DenyLeader(Message, frozen=True, tag="deny_leader"):
    member_id: str


class UpdateMessage(Message, frozen=True, tag="update_message"):
    message: Annotated[str, Meta(max_length=500)]


class ChatMessage(Message, frozen=True, tag="chat_message"):
    text: Annotated[str, Meta(min_length=1, max_length=1000)]


class SyncRequest(Message, frozen=True, tag="sync_request"):
    version: Version | UnsetType = UNSET
    epoch: str | UnsetType = UNSET


class LatencyProbe(Message, frozen=True, tag="latency_probe"):
    timestamp: Echoed

    def __post_init__(self) -> None:
        _check_echoed(self.timestamp, "timestamp")


class ClockSync(Message, frozen=True, tag="clock_sync"):
    t0: Echoed

    def __post_init__(self) -> None:
        _check_echoed(self.t0, "t0")


class SyncReport(Message, frozen=True, tag="sync_report"):
    error_ms: Annotated[float, Meta(ge=0)]


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    pass


ClientMessage = (
    JoinSession
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
    | LatencyProbe
    | ClockSync
    | SyncReport
    | Heartbeat
)

_KINDS: dict[type, str] = {
    struct: struct.__struct_config__.tag for struct in get_args(ClientMessage)
}
TYPES = frozenset(_KINDS.values())

MAX_TIMESTAMP_DISTANCE_MS = 10_000.0

_HINTS = {
    "type": "a string that names the message, such as `join_session`",
    "requestId": f"a string of at most {MAX_REQUEST_ID} characters",
    "sessionId": "1 to 64 of the characters A-Z a-z 0-9 . _ -",
    "displayName": "a string of 1 to 64 characters",
    "role": "`leader` or `follower`",
    "resumeToken": "a string, the latest that this member was given",
    "token": "a string, the join token (a JWT)",
    "ticks": "true or false",
    "positionMs": f"a number from 0 to {MAX_POSITION_MS:.0f} (milliseconds)",
    "startInMs": "a number from 0 to 10000 (milliseconds)",
    "countInBeats": "a whole number from 0 to 32",
    "at": "`now`, `beat` or `bar`",
    "tempoBpm": f"a number from {MIN_TEMPO_BPM:.0f} to {MAX_TEMPO_BPM:.0f}",
    "tempo": f"a number from {MIN_TEMPO_BPM:.0f} to {MAX_TEMPO_BPM:.0f}",
    "beatsPerBar": "a whole number from 1 to 16",
    "timestamp": "a number; that of a position at most 10 s from the session clock (milliseconds)",
    "memberId": "a string, the id of a member",
    "message": "a string of at most 500 characters",
    "text": "a string of 1 to 1000 characters",
    "version": "a whole number, 0 or more",
    "epoch": "a string",
    "t0": "a number, the client's clock",
    "errorMs": "a number, 0 or more (milliseconds)",
}
_FIELD = re.compile(r"`(?:\$\.)?(\w+)`$")


class Refusal(Struct, frozen=True):
    """Why a message was refused: the fields of an ``error``."""

    code: str
    message: str
    context: dict[str, str] | None = None


class Undecodable(Struct, frozen=True):
    """A frame that is not a valid message.

    Attributes:
        refusal: the error to send.
        kind: its ``type``, if that names a message.
        request_id: its ``requestId``, if it has a valid one.
    """

    refusal: Refusal
    kind: str | None = None
    request_id: str | UnsetType = UNSET


def echoed(number: float) -> int | float:
    """``number`` as msgspec can encode it: as a float if it does not fit 64 bits."""
    return number if -(2**63) <= number < 2**64 else float(number)


def _check_echoed(number: float, field: str) -> None:
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"Number out of range - at `$.{field}`") from None


def kind_of(message: ClientMessage) -> str:
    """The ``type`` of a message, as on the wire."""
    return _KINDS[type(message)]


def is_session_id(text: str) -> bool:
    """Whether ``text`` can name a session."""
    return re.match(SESSION_ID_PATTERN, text) is not None


def invalid_field(field: str) -> Refusal:
    """The refusal of a message whose ``field`` is missing, of the wrong type or out of range."""
    return Refusal("invalid_field", f"`{field}` must be {_HINTS[field]}.", {"field": field})


def out_of_range(message: ClientMessage, now: float) -> Refusal | None:
    """The one range that depends on the instant: a position's ``timestamp``."""
    if (
        isinstance(message, PositionSync)
        and abs(message.timestamp - now) > MAX_TIMESTAMP_DISTANCE_MS
    ):
        return invalid_field("timestamp")
    return None


def decode(payload: bytes) -> ClientMessage | Undecodable:
    """Decode the payload of a text frame, which must be valid UTF-8."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return _diagnosis(payload, str(error))


_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_BAD_MESSAGE = Undecodable(
    Refusal("bad_message", "Send one JSON object per text frame, with a `type` field.")
)


def _diagnosis(payload: bytes, complaint: str) -> Undecodable:
    """Find what is wrong with ``payload``, with a decoder that checks one field at a time."""
    try:
        # Parse integers as floats: one of 5000 digits is then out of range, not a ValueError.
        found = json.loads(payload.decode(), parse_int=float, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _BAD_MESSAGE
    if not isinstance(found, dict):
        return _BAD_MESSAGE
    request_id = _request_id(found.get("requestId"))
    kind = found.get("type")
    if not isinstance(kind, str):
        return Undecodable(invalid_field("type"), None, request_id)
    if kind not in TYPES:
        names = ", ".join(sorted(TYPES))
        return Undecodable(
            Refusal("unknown_type", f"No such `type`; there are {names}."), None, request_id
        )
    match = _FIELD.search(complaint)
    field = match.group(1) if match else _unreadable_string(found)
    if field not in _HINTS:
        return _BAD_MESSAGE
    return Undecodable(invalid_field(field), kind, request_id)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _request_id(value: object) -> str | UnsetType:
    if isinstance(value, str) and len(value) <= MAX_REQUEST_ID and _is_unicode(value):
        return value
    return UNSET


def _unreadable_string(found: dict[str, object]) -> str:
    """The first field with text that is not Unicode: half of a surrogate pair, escaped."""
    for name, value in found.items():
        if isinstance(value, str) and not _is_unicode(value):
            return name
    return ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
