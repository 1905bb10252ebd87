"""The records of a run with several servers: its connections and servers. No I/O."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from scripts.chaos.records import CommandRecord, ConnectionRecord

GRACE_S = 3.0
# Long enough not to blame the server too early: Redis may hang for a second.
PATIENCE_S = 3.0


@dataclass
class ServerRun:
    """A server process, from its start to its end.

    Attributes:
        server: name of the server.
        trace: file with its commits.
        begun: when it was started.
        ended: when it was sent `end_signal`.
        gone: when it had exited.
        end_signal: SIGTERM or SIGKILL; None if it was sent none.
        suspensions: pairs of the times of SIGSTOP and SIGCONT.
    """

    server: str
    trace: Path
    begun: float
    ended: float = float("inf")
    gone: float = float("inf")
    end_signal: signal.Signals | None = None
    suspensions: list[list[float]] = field(default_factory=list)

    def suspended(self, begin: float, end: float) -> bool:
        """Whether it was suspended for a part of this time."""
        return any(start <= end and stop >= begin for start, stop in self.suspensions)

    @property
    def suspended_now(self) -> bool:
        """Whether it is suspended."""
        return bool(self.suspensions) and self.suspensions[-1][1] == float("inf")


class JsonRank(TypedDict):
    """The rank of a leader, as stored."""

    term: int
    time: float
    bootId: str


class JsonStamp(TypedDict):
    """The stamp of a last-writer-wins register, as stored."""

    rank: JsonRank
    time: float
    bootId: str


class JsonLeader(TypedDict):
    """The leader register, as stored."""

    rank: JsonRank
    memberId: str


class Registers(TypedDict):
    """The rank or stamp of each register of a session."""

    leader: JsonLeader
    transport: JsonStamp
    message: JsonStamp


@dataclass(kw_only=True)
class RoamingRecord(ConnectionRecord):
    """The record of one connection.

    Attributes:
        server_run: the server process at its other end.
        opened: when it was opened.
        member_id: of the member who joined; empty before.
        left: when the client closed it, or requested to leave.
        abandoned: when its member requested another connection.
        superseded: when the server granted that.
    """

    server_run: ServerRun
    opened: float = 0.0
    member_id: str = ""
    left: float = float("inf")
    abandoned: float = float("inf")
    superseded: float = float("inf")


@dataclass
class ResumeAttempt:
    """A resume that the server answered.

    Attributes:
        name: of the member.
        command: the join with the token.
        last_seen: when the previous connection was last known to be open.
        before: the previous connection.
        after: the connection that requested the resume.
        resumed: whether the member is the same one.
    """

    name: str
    command: CommandRecord
    last_seen: float
    before: RoamingRecord
    after: RoamingRecord
    resumed: bool
