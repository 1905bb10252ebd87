"""Messages on a session's channel: the bytes that servers of several versions exchange."""

import pytest
from msgspec import Raw

from bandsync.model.session import Tip
from bandsync.storage.channel_messages import (
    ChannelMessage,
    CommittedChange,
    ConnectionStats,
    DirectMessage,
    read_channel_message,
    write_change,
    write_connection_stats,
    write_direct_message,
)

# Each payload is what the version before `ChannelMessage` wrote, byte for byte.
OLD = Tip("e1", 3, "boot-1-r3")
NEW = Tip("e1", 4, "boot-1-r4")
HEAD = b'{"format":1}'
CHAT = '{"text":"hé"}'.encode()
PLAY = b'{"type":"play","version":4}'

CHANGE = (
    b'{"prev":{"epoch":"e1","version":3,"eventId":"boot-1-r3"},"version":4,"eventId":"boot-1-r4",'
    b'"serverId":"hall","delta":{"head":{"format":1},"chat:3":{"text":"h\xc3\xa9"},'
    b'"member:X":null},"frames":[{"type":"play","version":4}]}'
)
FIRST_CHANGE = (
    b'{"prev":null,"version":4,"eventId":"boot-1-r4","serverId":"hall","delta":{"head":'
    b'{"format":1},"epoch":"e1"},"frames":[]}'
)
CHANGE_OF_EPOCH = (
    b'{"prev":{"epoch":"e0","version":9,"eventId":"x"},"version":4,"eventId":"boot-1-r4",'
    b'"serverId":"hall","delta":{"epoch":"e1"},"frames":[]}'
)
DIRECT_MESSAGE = b'{"to":"member \\"A\\"","frame":{"type":"leader_requested"}}'
STATS = b'{"stats":{"Ann":[12.5,3.0],"Bob":[null,null]}}'

PAYLOADS: dict[str, tuple[bytes, ChannelMessage]] = {
    "change": (
        CHANGE,
        CommittedChange(
            OLD,
            4,
            "boot-1-r4",
            "hall",
            {"head": Raw(HEAD), "chat:3": Raw(CHAT), "member:X": Raw(b"null")},
            [Raw(PLAY)],
        ),
    ),
    "first change": (
        FIRST_CHANGE,
        CommittedChange(
            None, 4, "boot-1-r4", "hall", {"head": Raw(HEAD), "epoch": Raw(b'"e1"')}, []
        ),
    ),
    "change of epoch": (
        CHANGE_OF_EPOCH,
        CommittedChange(Tip("e0", 9, "x"), 4, "boot-1-r4", "hall", {"epoch": Raw(b'"e1"')}, []),
    ),
    "direct message": (
        DIRECT_MESSAGE,
        DirectMessage('member "A"', Raw(b'{"type":"leader_requested"}')),
    ),
    "stats": (STATS, ConnectionStats({"Ann": (12.5, 3.0), "Bob": (None, None)})),
    "no stats": (b'{"stats":{}}', ConnectionStats({})),
    "a field of a later version": (
        b'{"to":"Ann","frame":{},"later":[1]}',
        DirectMessage("Ann", Raw(b"{}")),
    ),
}


@pytest.mark.parametrize(("payload", "message"), PAYLOADS.values(), ids=PAYLOADS)
def test_reader_decodes_payload_of_the_previous_version(
    payload: bytes, message: ChannelMessage
) -> None:
    assert read_channel_message(payload) == message


@pytest.mark.parametrize(
    ("written", "payload"),
    [
        (
            write_change(OLD, NEW, "hall", {"head": HEAD, "chat:3": CHAT}, ["member:X"], [PLAY]),
            CHANGE,
        ),
        (write_change(None, NEW, "hall", {"head": HEAD}, [], []), FIRST_CHANGE),
        (write_change(Tip("e0", 9, "x"), NEW, "hall", {}, [], []), CHANGE_OF_EPOCH),
        (write_direct_message('member "A"', b'{"type":"leader_requested"}'), DIRECT_MESSAGE),
        (write_connection_stats({"Ann": 12.5, "Bob": None}, {"Ann": 3.0}), STATS),
        (write_connection_stats({}, {"Ann": 3.0}), b'{"stats":{}}'),
    ],
    ids=["change", "first change", "change of epoch", "direct message", "stats", "no stats"],
)
def test_writer_produces_bytes_of_the_previous_version(written: bytes, payload: bytes) -> None:
    assert written == payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b'{"stats":{"Ann":[1]}}',
        b'{"stats":',
        b'{"to":1,"frame":{}}',
        b'{"to":"Ann"}',
        b'{"version":1}',
        b'{"prev":null,"version":1,"eventId":"\xff"}',
    ],
    ids=repr,
)
def test_reader_returns_none_for_malformed_payload(payload: bytes) -> None:
    assert read_channel_message(payload) is None
