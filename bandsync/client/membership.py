"""What a client knows and keeps across its connections."""

from collections.abc import Awaitable, Callable, Mapping

from bandsync.client.events import EventHub, Status, StatusChanged
from bandsync.client.inbound import News, UnknownMessage
from bandsync.client.session_clock import SessionClock
from bandsync.client.view import SessionView, advance, view_of
from bandsync.wire.commands import JoinSession
from bandsync.wire.messages import MemberStats, RoomStats, Snapshot, StorageStatus, Welcome, You

# A join token, or what gets a fresh one.
Token = str | Callable[[], str | Awaitable[str]]


class Membership:
    """A place in a session.

    Attributes:
        join: what is asked for at every join, the tokens left out.
        token: the join token; a function is called at every join.
        resume_token: the latest, a secret; None before the first join.
        you: what the latest join was answered with.
        view: the session as it is known; None before the first join.
        stats: how well each member is connected, by id.
        server: what the server said at the latest connection.
        storage: where the server keeps sessions; None until it says so.
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
        """That of the view."""
        return 0 if self.view is None else self.view.version

    def become(self, status: Status, failures: int = 0, retry_in_s: float | None = None) -> None:
        """Change the status, and tell."""
        self.status = status
        self.events.put(StatusChanged(status, failures, retry_in_s))

    def joined(self, snapshot: Snapshot, you: You) -> None:
        """Take the answer to a join, whatever its version."""
        self.you = you
        self.resume_token = you.resume_token
        self.view = view_of(snapshot)
        self.events.put(snapshot)

    def hear(self, message: News | UnknownMessage) -> bool:
        """Take a message; True if a version is missing, so that only a snapshot can help."""
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
