"""Sessions and commands for tests of the rules."""

from collections.abc import Sequence

from hypothesis import strategies as st
from msgspec.structs import replace

from bandsync.model.session import Session
from bandsync.rules.actions import Actor, Bind, Command, Decision, Drop, Expire
from bandsync.rules.decide import decide
from bandsync.rules.server_context import ServerContext
from bandsync.rules.tokens import parse_resume_token
from bandsync.wire.commands import (
    ChatMessage,
    DenyLeader,
    LeaveSession,
    Pause,
    Play,
    PositionSync,
    Refusal,
    RequestLeader,
    Seek,
    SetRole,
    SetTempo,
    Stop,
    UpdateMessage,
)
from bandsync.wire.messages import Event, Snapshot, You

NOW = 1_800_000_000_000.0
HERE = ServerContext(server_id="stage", boot_id="boot-1", max_members=8)


class Stage:
    """One session and the rules, driven by name: every member has its own connection.

    Attributes:
        prefix: what its ids begin with, where there are other stages.
        session: the state after the last command.
        tokens: the latest resume token of each name.
        ids: the member id of each name.
        connections: the connection of each name.
        events: all there ever were; that of version n is at n - 1.
    """

    def __init__(self, here: ServerContext = HERE, now: float = NOW, prefix: str = "") -> None:
        self.prefix = prefix
        self.here = here
        self.now = now
        self.session: Session | None = None
        self.ids: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.connections: dict[str, str] = {}
        self.events: list[Event] = []
        self._drawn = 0

    def draw(self, kind: str) -> str:
        """A fresh id."""
        self._drawn += 1
        return f"{self.prefix}{kind}{self._drawn}"

    def actor(self, name: str, **more: object) -> Actor:
        """The member ``name`` on its connection."""
        return Actor(
            self.here,
            self.connections.get(name, "nowhere"),
            self.ids.get(name, ""),
            self.draw("id"),
            **more,
        )

    def do(self, name: str, command: Command, **more: object) -> Decision:
        """Carry out a command that must be allowed."""
        decision = self.attempt(name, command, **more)
        assert isinstance(decision, Decision), decision
        return decision

    def attempt(self, name: str, command: Command, **more: object) -> Decision | Refusal:
        """Carry out a command, if the rules allow it."""
        decision = decide(self.session, command, self.actor(name, **more), self.now)
        if isinstance(decision, Decision):
            self._take(decision)
        return decision

    def join(self, name: str, *, lead: bool = False, resume: bool = False) -> You:
        """Join, or resume with the latest token, on a new connection."""
        outcome = self.attempt_join(name, lead=lead, resume=resume)
        assert isinstance(outcome, You), outcome
        return outcome

    def attempt_join(self, name: str, *, lead: bool = False, resume: bool = False) -> You | Refusal:
        """Join if the rules allow it."""
        token = parse_resume_token(self.tokens[name]) if resume else None
        before = self.connections.get(name)
        self.connections[name] = self.draw("connection")
        bind = Bind(
            "song", self.draw("epoch"), self.draw("secret"), name, lead, (token,) if token else ()
        )
        decision = decide(
            self.session,
            bind,
            Actor(self.here, self.connections[name], "", self.draw("member")),
            self.now,
        )
        if isinstance(decision, Refusal):
            if before is not None:
                self.connections[name] = before
            return decision
        self._take(decision)
        assert isinstance(decision.reply, Snapshot)
        you = decision.reply.you
        assert isinstance(you, You)
        self.ids[name] = you.member_id
        self.tokens[name] = you.resume_token
        return you

    def _take(self, decision: Decision) -> None:
        self.session = replace(decision.session, event_id=self.draw("event"))
        self.events += decision.events

    @property
    def leader(self) -> str | None:
        """The name of the leader."""
        assert self.session is not None
        member_id = self.session.leader.member_id
        member = self.session.members.get(member_id)
        if member is None or not member.present:
            return None
        return next(name for name, known in self.ids.items() if known == member_id)


NAMES = ["Ann", "Bob", "Cid", "Dan"]

WHAT = [
    "join",
    "lead",
    "resume",
    "leave",
    "drop",
    "expire",
    "claim",
    "down",
    "hand",
    "ask",
    "play",
    "pause",
    "stop",
    "seek",
    "tempo",
    "sync",
    "headline",
    "chat",
    "deny",
]

# Steps of members: (name, action, argument, milliseconds passed before).
steps = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(WHAT),
        st.integers(0, 3),
        # Clocks of several servers may disagree: time may run backwards, too.
        st.floats(-50, 70_000),
    ),
    max_size=40,
)


def command_for(stage: Stage, what: str, number: int) -> Command:
    other = stage.ids.get(NAMES[number], "nobody")
    match what:
        case "leave":
            return LeaveSession()
        case "drop":
            return Drop()
        case "expire":
            return Expire("timeout")
        case "claim":
            return SetRole(role="leader")
        case "down":
            return SetRole(role="follower")
        case "hand":
            return SetRole(role="leader", member_id=other)
        case "ask":
            return RequestLeader()
        case "deny":
            return DenyLeader(member_id=other)
        case "play":
            return Play(count_in_beats=number)
        case "pause":
            return Pause()
        case "stop":
            return Stop()
        case "seek":
            return Seek(position_ms=number * 1000, at=("now", "beat", "bar", "bar")[number])
        case "tempo":
            return SetTempo(tempo=60 + number * 30)
        case "sync":
            return PositionSync(position_ms=number * 100, timestamp=stage.now)
        case "headline":
            return UpdateMessage(message=str(number))
        case _:
            return ChatMessage(text=str(number))


def step(stage: Stage, name: str, what: str, number: int) -> Decision | Refusal | None:
    """Do it; None for a join, whose decision the stage keeps to itself."""
    if what in {"join", "lead", "resume"}:
        stage.attempt_join(
            name, lead=what == "lead", resume=what == "resume" and name in stage.tokens
        )
        return None
    if stage.session is None:
        return None
    return stage.attempt(name, command_for(stage, what, number))


def kinds(events: Sequence[Event]) -> list[str]:
    """The types of the events, in order."""
    return [type(event).__name__ for event in events]
