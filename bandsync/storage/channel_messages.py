"""What is said on a session's channel: protocol.md section 8."""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Raw, Struct

from bandsync.model.session import Tip

# What decoding raises for what is no JSON, not ours, or nested as only an enemy nests.
JUNK = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class CommittedChange(Struct, frozen=True, rename="camel"):
    """What the channel of a session is told of one commit.

    Attributes:
        prev: the tip it was made from; None if there was no session.
        delta: the fields of the hash that changed, as JSON; null for those deleted.
        frames: the events of the change, for members on other servers.
    """

    prev: Tip | None
    version: int
    event_id: str
    server_id: str
    delta: dict[str, Raw]
    frames: list[Raw]


class DirectMessage(Struct, frozen=True):
    """A message for one member, wherever it is: no change, and not kept.

    Attributes:
        to: member id.
        frame: the message, as JSON.
    """

    to: str
    frame: Raw


class ConnectionStats(Struct, frozen=True):
    """How well the members of one server are connected, for the others: not kept either.

    Attributes:
        stats: by member id, round trip and bound on the clock error in milliseconds, where known.
    """

    stats: dict[str, tuple[float | None, float | None]]


def write_change(
    old: Tip | None,
    new: Tip,
    server_id: str,
    fields: Mapping[str, bytes],
    gone: Sequence[str],
    events: Sequence[bytes],
) -> bytes:
    """The message for a commit that set ``fields`` and deleted those that are ``gone``."""
    delta = {name: Raw(value) for name, value in fields.items()}
    delta.update(dict.fromkeys(gone, _NULL))
    if old is None or old.epoch != new.epoch:
        delta["epoch"] = Raw(_encode(new.epoch))
    frames = [Raw(event) for event in events]
    return _encode(CommittedChange(old, new.version, new.event_id, server_id, delta, frames))


def write_whisper(to: str, frame: bytes) -> bytes:
    """The message for one member."""
    return _encode(DirectMessage(to, Raw(frame)))


def write_report(
    latencies_ms: Mapping[str, float | None], sync_errors_ms: Mapping[str, float | None]
) -> bytes:
    """The message that tells of our members."""
    known = {id_: (ms, sync_errors_ms.get(id_)) for id_, ms in latencies_ms.items()}
    return _encode(ConnectionStats(known))


def read_report(payload: bytes) -> ConnectionStats | None:
    """The report in a message; None if it is something else."""
    if not payload.startswith(_REPORT):
        return None
    try:
        return _reports.decode(payload)
    except JUNK:
        return None


def read_change(payload: bytes) -> CommittedChange | None:
    """The change in a message; None if there is none that can be read."""
    try:
        return _changes.decode(payload)
    except JUNK:
        return None


def read_whisper(payload: bytes) -> DirectMessage | None:
    """The whisper in a message; None if it is something else."""
    if not payload.startswith(_WHISPER):
        return None
    try:
        return _whispers.decode(payload)
    except JUNK:
        return None


_encode = msgspec.json.Encoder().encode
_changes = msgspec.json.Decoder(CommittedChange)
_whispers = msgspec.json.Decoder(DirectMessage)
_NULL = Raw(b"null")
_reports = msgspec.json.Decoder(ConnectionStats)
_REPORT = b'{"stats":'
_WHISPER = b'{"to":'
