"""Messages on a session's Redis channel, as JSON: see `bandsync/wire/PROTOCOL.md`.

Servers of several versions share the channels during a rolling upgrade. Field names, their order
and the way in which the kinds are told apart must therefore stay as they are.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Raw, Struct

from bandsync.model.session import Tip

# Decoding raises these for text that is not JSON, not of the expected type, or nested too deeply.
JUNK = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class CommittedChange(Struct, frozen=True, rename="camel"):
    """One commit, for the other servers that host the session.

    Attributes:
        prev: the tip that the change was made from; None if there was no session.
        version: the version of the session after the change.
        event_id: names the state after the change.
        server_id: the server that made it.
        delta: the changed fields of the hash, as JSON; null for deleted fields.
        frames: the events of the change, as JSON, for members on other servers.
    """

    prev: Tip | None
    version: int
    event_id: str
    server_id: str
    delta: dict[str, Raw]
    frames: list[Raw]


class DirectMessage(Struct, frozen=True):
    """An ephemeral message for one member (at most once, not stored).

    Attributes:
        to: member id.
        frame: the message, as JSON.
    """

    to: str
    frame: Raw


class ConnectionStats(Struct, frozen=True):
    """Connection quality of one server's members (at most once, not stored).

    Attributes:
        stats: by member id, the round trip and the bound on the clock error, in milliseconds;
            None where unknown.
    """

    stats: dict[str, tuple[float | None, float | None]]


ChannelMessage = CommittedChange | DirectMessage | ConnectionStats


def read_channel_message(payload: bytes) -> ChannelMessage | None:
    """Decode one message; None if it is malformed.

    The first field tells the kinds apart, because every writer puts it first.
    """
    try:
        if payload.startswith(_DIRECT_MESSAGE):
            return _direct_messages.decode(payload)
        if payload.startswith(_CONNECTION_STATS):
            return _connection_stats.decode(payload)
        return _changes.decode(payload)
    except JUNK:
        return None


def write_change(
    old: Tip | None,
    new: Tip,
    server_id: str,
    fields: Mapping[str, bytes],
    gone: Sequence[str],
    events: Sequence[bytes],
) -> bytes:
    """Encode a `CommittedChange` that set ``fields`` and deleted the fields in ``gone``."""
    delta = {name: Raw(value) for name, value in fields.items()}
    delta.update(dict.fromkeys(gone, _NULL))
    if old is None or old.epoch != new.epoch:
        delta["epoch"] = Raw(_encode(new.epoch))
    frames = [Raw(event) for event in events]
    return _encode(CommittedChange(old, new.version, new.event_id, server_id, delta, frames))


def write_direct_message(to: str, frame: bytes) -> bytes:
    """Encode a `DirectMessage`."""
    return _encode(DirectMessage(to, Raw(frame)))


def write_connection_stats(
    latencies_ms: Mapping[str, float | None], sync_errors_ms: Mapping[str, float | None]
) -> bytes:
    """Encode the `ConnectionStats` of the members in ``latencies_ms``."""
    stats = {id_: (ms, sync_errors_ms.get(id_)) for id_, ms in latencies_ms.items()}
    return _encode(ConnectionStats(stats))


_encode = msgspec.json.Encoder().encode
_changes = msgspec.json.Decoder(CommittedChange)
_direct_messages = msgspec.json.Decoder(DirectMessage)
_connection_stats = msgspec.json.Decoder(ConnectionStats)
_DIRECT_MESSAGE = b'{"to":'
_CONNECTION_STATS = b'{"stats":'
_NULL = Raw(b"null")
