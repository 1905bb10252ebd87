"""The records that clients of a chaos run keep of their connections. No I/O.

Times are seconds on the clock of the clients' process, unless a name says `_ms`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.testbed.json_messages import JsonMessage

# PROTOCOL.md: a snapshot holds this many chat messages.
CHAT_RING = 50
# Each of these makes a version. All other messages are private, volatile or replies.
EVENTS = frozenset(
    {
        *("user_joined", "user_left", "member_connection", "role_changed", "message_updated"),
        *("play", "pause", "stop", "seek", "tempo_changed", "position_sync", "chat_message"),
    }
)
_AGREED = ("epoch", "version", "message", "transport", "leaderId")


@dataclass
class CommandRecord:
    """A command and its reply; ``answer`` is None while there is none."""

    type: str
    fields: Mapping[str, object]
    sent: float
    answered: float = float("inf")
    answer: JsonMessage | None = None

    @property
    def acked(self) -> bool:
        """Whether the server acknowledged it."""
        return self.answer is not None and self.answer["type"] == "ack"


@dataclass
class ClockSample:
    """One `clock_sync` exchange: the offset of the session clock from the client's."""

    at: float
    offset_ms: float
    round_trip_ms: float


@dataclass
class ConnectionRecord:
    """Everything that one connection sent and received.

    Attributes:
        session: id of the session.
        name: of the member.
        received: every message, with its arrival.
        commands: every command, with its reply.
        clock: the `clock_sync` exchanges.
        closed: when the server closed it, and the close code; None if it did not.
        replica_errors: differences between the client's replica and the server's snapshot.
    """

    session: str
    name: str
    received: list[tuple[float, JsonMessage]] = field(default_factory=list)
    commands: list[CommandRecord] = field(default_factory=list)
    clock: list[ClockSample] = field(default_factory=list)
    closed: tuple[float, int] | None = None
    replica_errors: list[tuple[float, str]] = field(default_factory=list)


def agreed_state(snapshot: JsonMessage) -> dict[str, object]:
    """The parts of a snapshot that must be equal everywhere."""
    members = [
        (member["memberId"], member["displayName"], member["role"], member["connected"])
        for member in snapshot["members"]
    ]
    return {
        "members": sorted(members),
        "chat": [chat["messageId"] for chat in snapshot["chat"]],
        **{name: value for name, value in snapshot.items() if name in _AGREED},
    }
