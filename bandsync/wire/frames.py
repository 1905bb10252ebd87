"""WebSocket frames (RFC 6455), sans I/O: the server's side of the stream after the handshake.

A message that passes through wsproto and a memory channel costs several times as much as the rest
of a command. So all frames are parsed here, except the close frame. It is passed on whole to
trio-websocket, which runs the closing handshake.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum

from msgspec import Struct

from bandsync.wire.close_codes import CloseCode

MAX_CONTROL_PAYLOAD = 125

_FIN = 0x80
_RSV = 0x70
_OPCODE = 0x0F
_MASKED = 0x80


class Opcode(IntEnum):
    """Frame types: RFC 6455 section 5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


_OPCODES = {int(opcode): opcode for opcode in Opcode}
_CONTROL = frozenset({Opcode.CLOSE, Opcode.PING, Opcode.PONG})
_CLEAR_TEXT = _FIN | Opcode.TEXT


class ProtocolError(Exception):
    """The peer violated RFC 6455 or a limit.

    Attributes:
        code: the close code for it.
        reason: the close reason.
    """

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Received(Struct, frozen=True):
    """One message or control frame.

    Attributes:
        payload: unmasked; for a close, the whole frame as received.
    """

    opcode: Opcode
    payload: bytes


class FrameReader:
    """Parses the bytes of a stream into messages and control frames.

    Args:
        max_message_bytes: the largest message that is accepted, all fragments together.
    """

    __slots__ = ("_at", "_buffer", "_discarding", "_max", "_opcode", "_parts", "_size", "_skip")

    def __init__(self, max_message_bytes: int) -> None:
        self._max = max_message_bytes
        self._buffer = b""
        self._at = 0
        self._parts: list[bytes] | None = None
        self._opcode = Opcode.TEXT
        self._size = 0
        self._skip = 0
        self._discarding = False

    def discard(self) -> None:
        """From now on skip messages of any size, and return control frames only."""
        self._discarding = True
        self._parts = None

    def feed(self, data: bytes) -> Iterator[Received]:
        """The messages and control frames that ``data`` completes, in order.

        Raises:
            ProtocolError: on the first error. After code 1002 the stream cannot be parsed any
                further; after another code it can, once `discard` was called.
        """
        self._buffer = self._buffer[self._at :] + data
        self._at = 0
        while self._at < len(self._buffer):
            if self._skip:
                skipped = min(self._skip, len(self._buffer) - self._at)
                self._at += skipped
                self._skip -= skipped
                continue
            frame = self._next_frame()
            if frame is None:
                return
            opcode, fin, raw, start = frame
            if opcode is Opcode.CLOSE:
                yield Received(opcode, raw)
            elif opcode in _CONTROL:
                yield Received(opcode, _unmasked(raw, start))
            elif not self._discarding:
                message = self._message(opcode, fin, _unmasked(raw, start))
                if message is not None:
                    yield message
        # Keep no bytes of the last message: thousands of clients are silent for long.
        self._buffer = b""
        self._at = 0

    def _next_frame(self) -> tuple[Opcode, bool, bytes, int] | None:
        """The next whole frame: opcode, fin, its bytes, and the offset of its payload."""
        buffer, at = self._buffer, self._at
        available = len(buffer) - at
        if available < 2:
            return None
        first, second = buffer[at], buffer[at + 1]
        opcode = _checked_opcode(first, second)
        length = second & 0x7F
        start = 6
        if length == 126:
            if available < 4:
                return None
            length = int.from_bytes(buffer[at + 2 : at + 4], "big")
            start = 8
        elif length == 127:
            if available < 10:
                return None
            length = int.from_bytes(buffer[at + 2 : at + 10], "big")
            start = 14
        end = start + length
        if opcode not in _CONTROL:
            if self._discarding:
                self._skip = end
                return opcode, True, b"", 0
            if self._size + length > self._max:
                raise ProtocolError(
                    CloseCode.MESSAGE_TOO_BIG, f"a message has more than {self._max} bytes"
                )
        if available < end:
            return None
        self._at = at + end
        return opcode, bool(first & _FIN), buffer[at : at + end], start

    def _message(self, opcode: Opcode, fin: bool, payload: bytes) -> Received | None:
        """The message that a data frame completes."""
        if opcode is Opcode.CONTINUATION:
            if self._parts is None:
                raise ProtocolError(
                    CloseCode.PROTOCOL_ERROR, "a continuation frame without a message to continue"
                )
        elif self._parts is not None:
            raise ProtocolError(
                CloseCode.PROTOCOL_ERROR, "a new message starts inside a fragmented one"
            )
        elif fin:
            return _message(opcode, payload)
        else:
            self._opcode = opcode
            self._parts = []
        if payload:  # Empty fragments must cost no memory, because their number is unlimited.
            self._parts.append(payload)
            self._size += len(payload)
        if not fin:
            return None
        whole = b"".join(self._parts)
        self._parts = None
        self._size = 0
        return _message(self._opcode, whole)


def text_frame(payload: bytes) -> bytes:
    """An unfragmented text frame of a server."""
    return _frame(_CLEAR_TEXT, payload)


def ping_frame(payload: bytes) -> bytes:
    """A ping with at most `MAX_CONTROL_PAYLOAD` bytes of payload."""
    return _frame(_FIN | Opcode.PING, payload)


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping with this payload."""
    return _frame(_FIN | Opcode.PONG, payload)


def _frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return struct.pack("!BB", first, length) + payload
    if length < 65536:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


def _checked_opcode(first: int, second: int) -> Opcode:
    if first & _RSV:
        raise ProtocolError(
            CloseCode.PROTOCOL_ERROR, "a reserved bit is set, but no extension was negotiated"
        )
    if not second & _MASKED:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a frame of a client is not masked")
    opcode = _OPCODES.get(first & _OPCODE)
    if opcode is None:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"unknown opcode {first & _OPCODE:#x}")
    if opcode in _CONTROL and (not first & _FIN or second & 0x7F > MAX_CONTROL_PAYLOAD):
        raise ProtocolError(
            CloseCode.PROTOCOL_ERROR, "a control frame is fragmented or has more than 125 bytes"
        )
    return opcode


def _message(opcode: Opcode, payload: bytes) -> Received:
    if opcode is Opcode.TEXT and not payload.isascii():
        try:
            payload.decode()
        except UnicodeDecodeError:
            raise ProtocolError(CloseCode.INVALID_PAYLOAD, "a text message is not UTF-8") from None
    return Received(opcode, payload)


def _unmasked(raw: bytes, start: int) -> bytes:
    """The payload of a frame: XOR with its mask as one big integer (section 5.3)."""
    length = len(raw) - start
    if not length:
        return b""
    key = (raw[start - 4 : start] * (length // 4 + 1))[:length]
    return (int.from_bytes(raw[start:], "little") ^ int.from_bytes(key, "little")).to_bytes(
        length, "little"
    )
