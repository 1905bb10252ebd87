"""WebSocket close codes, and whether a client reconnects after each."""

from enum import IntEnum


class CloseCode(IntEnum):
    """The codes that the server closes a connection with.

    1000 to 1015 are those of RFC 6455 section 7.4.1 and its IANA registry; 4000 and above are
    BandSync's own.

    Attributes:
        reconnect: whether a client connects again by itself, with its resume token.
    """

    reconnect: bool

    def __new__(cls, code: int, reconnect: bool) -> "CloseCode":
        """A member with its rule."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.reconnect = reconnect
        return member

    PROTOCOL_ERROR = 1002, True
    INVALID_PAYLOAD = 1007, True
    POLICY_VIOLATION = 1008, False
    MESSAGE_TOO_BIG = 1009, True
    INTERNAL_ERROR = 1011, True
    SERVICE_RESTART = 1012, True
    TRY_AGAIN_LATER = 1013, True
    CONNECTION_TIMEOUT = 4000, True
    SESSION_TAKEN = 4001, False
