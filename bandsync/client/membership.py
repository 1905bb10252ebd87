"""The state that a client keeps across connections."""

from collections.abc import Awaitable, Callable, Mapping

from bandsync.client.events import EventHub, Status, StatusChanged
from bandsync.client.inbound import News, UnknownMessage
from bandsync.client.session_clock import SessionClock
from bandsync.client.view import SessionView, advance, view_of
from bandsync.wire.commands import JoinSession
from bandsync.wire.messages import MemberStats, RoomStats, Snapshot, StorageStatus, Welcome, You

# A join token, or a function that returns a fresh one.
Token = str | Callable[[], str | Awaitable[str]]


class Membership:
    """A membership in a session.

    Attributes:
        join: the join message, without the tokens.
        token: the join token; a function is called at every join.
        resume_token: the latest one, a secret; None before the first join.
        clock: estimate of the session clock.
        events: broadcasts events to all streams.
        status: state of the connection.
        you: reply to the latest join.
        view: current view of the session; None before the first join.
        stats: connection statistics by member id.
        server: ``welcome`` of the latest connection.
        storage: latest ``storage_status``; None before the first one.
    """

    def __init__(self, join: JoinSession, token: Token | None, resume_token: str | None) -> None:
        self.join = join
        self.token = token
        self.resume_token = resume_token
        self.clock = SessionClock()
        self.events = EventHub()
        self.status: Status = "connecting"
        self.you: You | None = None
        self.view: SessionView | None = None
        self.stats: Mapping[str, MemberStats] = {}
        self.server: Welcome | None = None
        self.storage: StorageStatus | None = None

    @property
    def version(self) -> int:
        """Version of the view; 0 before the first join."""
        return 0 if self.view is None else self.view.version

    def become(self, status: Status, failures: int = 0, retry_in_s: float | None = None) -> None:
        """Set the status and emit `StatusChanged`."""
        self.status = status
        self.events.put(StatusChanged(status, failures, retry_in_s))

    def joined(self, snapshot: Snapshot, you: You) -> None:
        """Apply the reply to a join, whatever its version."""
        self.you = you
        self.resume_token = you.resume_token
        self.view = view_of(snapshot)
        self.events.put(snapshot)

    def apply(self, message: News | UnknownMessage) -> bool:
        """Apply a message; True if a version is missing and a snapshot is needed."""
        if isinstance(message, StorageStatus):
            self.storage = message
        elif isinstance(message, RoomStats):
            self.stats = {member.member_id: member for member in message.members}
        if self.view is None:
            return False
        step = advance(self.view, message)
        self.view = step.view
        if not step.stale:
            self.events.put(message)
        return step.gap
