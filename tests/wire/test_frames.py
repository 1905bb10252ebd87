"""The frame codec, compared with those of wsproto and websockets."""

import os
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame
from websockets.frames import Opcode as Op
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage

from bandsync.wire.frames import (
    FrameReader,
    Opcode,
    ProtocolError,
    Received,
    ping_frame,
    pong_frame,
    text_frame,
)


def client_frame(opcode: Op, payload: bytes, fin: bool = True) -> bytes:
    """A frame as the `websockets` library sends it."""
    return Frame(opcode, payload, fin).serialize(mask=True)


def read(data: bytes, limit: int = 16_384) -> list[Received]:
    return list(FrameReader(limit).feed(data))


texts = st.text(max_size=200).map(str.encode)
sizes = st.integers(0, 70_000)


@given(st.lists(texts, max_size=5), st.lists(st.integers(1, 400), max_size=20))
def test_messages_are_whole_wherever_the_stream_is_split(
    messages: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(client_frame(Op.TEXT, message) for message in messages)
    reader = FrameReader(16_384)
    received: list[Received] = []
    for cut in cuts:
        received += reader.feed(stream[:cut])
        stream = stream[cut:]
    received += reader.feed(stream)
    assert received == [Received(Opcode.TEXT, message) for message in messages]


def test_reader_keeps_no_reference_to_parsed_bytes() -> None:
    data = client_frame(Op.TEXT, b"a" * 1000)
    reader = FrameReader(16_384)
    before = sys.getrefcount(data)
    assert len(list(reader.feed(data))) == 1
    assert sys.getrefcount(data) == before


@given(sizes)
def test_every_length_encoding_is_read(size: int) -> None:
    payload = os.urandom(size).hex().encode()[:size]
    assert read(client_frame(Op.TEXT, payload), 70_000) == [Received(Opcode.TEXT, payload)]


@given(sizes)
def test_wsproto_reads_our_text_frames(size: int) -> None:
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(text_frame(b"x" * size))
    events = list(client.events())
    assert "".join(event.data for event in events if isinstance(event, TextMessage)) == "x" * size
    assert events[-1].message_finished


@given(st.lists(texts, min_size=1, max_size=6), st.binary(max_size=125))
def test_fragments_are_joined_around_control_frames(parts: list[bytes], note: bytes) -> None:
    stream = b""
    for index, part in enumerate(parts):
        opcode = Op.TEXT if index == 0 else Op.CONT
        stream += client_frame(opcode, part, fin=index == len(parts) - 1)
        stream += client_frame(Op.PONG, note)
    received = read(stream)
    assert Received(Opcode.TEXT, b"".join(parts)) in received
    assert received.count(Received(Opcode.PONG, note)) == len(parts)


def test_close_frame_is_returned_whole() -> None:
    ping = client_frame(Op.PING, b"p")
    close = client_frame(Op.CLOSE, struct.pack("!H", 1000))
    assert read(ping + close) == [Received(Opcode.PING, b"p"), Received(Opcode.CLOSE, close)]


def test_control_frames_have_the_expected_bytes() -> None:
    assert ping_frame(b"12345678") == b"\x89\x0812345678"
    assert pong_frame(b"p") == b"\x8a\x01p"


def test_size_limit_counts_bytes_and_not_fragments() -> None:
    half = client_frame(Op.TEXT, b"x" * 50, fin=False) + client_frame(Op.CONT, b"", fin=False) * 9
    assert read(half + client_frame(Op.CONT, b"y" * 50), 100) == [
        Received(Opcode.TEXT, b"x" * 50 + b"y" * 50)
    ]


BROKEN = {
    "reserved bit": (bytes([0xC1, 0x80, 0, 0, 0, 0]), 1002),
    "unmasked": (b"\x81\x01x", 1002),
    "opcode": (bytes([0x83, 0x80, 0, 0, 0, 0]), 1002),
    "long ping": (bytes([0x89, 0xFE, 0, 126, 0, 0, 0, 0]), 1002),
    "fragmented ping": (bytes([0x09, 0x80, 0, 0, 0, 0]), 1002),
    "continuation of nothing": (client_frame(Op.CONT, b"x"), 1002),
    "message in a message": (
        client_frame(Op.TEXT, b"x", fin=False) + client_frame(Op.TEXT, b"y"),
        1002,
    ),
    "not UTF-8": (client_frame(Op.TEXT, b"\xff\xfe"), 1007),
    "surrogate in UTF-8": (client_frame(Op.TEXT, b"\xed\xa0\x80"), 1007),
    "too big": (client_frame(Op.TEXT, b"x" * 101), 1009),
    "announced too big": (b"\x81\xff" + struct.pack("!Q", 2**62) + b"mask", 1009),
    "too big in parts": (
        client_frame(Op.TEXT, b"x" * 60, fin=False) + client_frame(Op.CONT, b"x" * 60),
        1009,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_violation_raises_after_the_frames_before_it(name: str) -> None:
    data, code = BROKEN[name]
    good = client_frame(Op.TEXT, b"before")
    reader = FrameReader(100)
    received = []
    with pytest.raises(ProtocolError) as caught:
        for frame in reader.feed(good + data):
            received.append(frame)
    assert received == [Received(Opcode.TEXT, b"before")]
    assert caught.value.code == code


def test_close_frame_after_an_oversized_message_is_read() -> None:
    reader = FrameReader(100)
    huge = client_frame(Op.TEXT, b"x" * 100_000)
    close = client_frame(Op.CLOSE, struct.pack("!H", 1009))
    with pytest.raises(ProtocolError):
        list(reader.feed(huge[:5000]))
    reader.discard()
    assert list(reader.feed(huge[5000:50_000])) == []
    assert list(reader.feed(huge[50_000:] + client_frame(Op.TEXT, b"more") + close)) == [
        Received(Opcode.CLOSE, close)
    ]


@given(st.binary(max_size=400))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except ProtocolError as error:
        assert error.code in {1002, 1007, 1009}
