"""WebSocket close codes, and whether a client reconnects after each."""

from enum import IntEnum


class CloseCode(IntEnum):
    """The codes that the server closes a connection with.

    1000 to 1015 are those of RFC 6455 section 7.4.1 and its IANA registry; 4000 and above are
    BandSync's own.

    Attributes:
        reconnect: whether a client reconnects by itself, with its resume token.
    """

    reconnect: bool

    def __new__(cls, code: int, reconnect: bool) -> "CloseCode":
        """A member with its rule."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.reconnect = reconnect
        return member

    PROTOCOL_ERROR = 1002, True  # a frame violates RFC 6455
    INVALID_PAYLOAD = 1007, True  # a text message is not UTF-8
    POLICY_VIOLATION = 1008, False  # protocol abuse: too many invalid messages
    MESSAGE_TOO_BIG = 1009, True  # over MAX_MESSAGE_BYTES; bandsync.js gives up before its join
    INTERNAL_ERROR = 1011, True  # reserved: today an internal error ends one command only
    SERVICE_RESTART = 1012, True  # the server drains; wait for `reconnectInMs` first
    TRY_AGAIN_LATER = 1013, True  # server full, or slow consumer; reconnect with a longer backoff
    CONNECTION_TIMEOUT = 4000, True  # silent for CONNECTION_TIMEOUT_MS
    SESSION_TAKEN = 4001, False  # the same member resumed on another connection


_FINAL = frozenset(code for code in CloseCode if not code.reconnect)


def may_reconnect(code: int) -> bool:
    """Whether a client reconnects after a close with ``code``: yes, if the code is unknown."""
    return code not in _FINAL
