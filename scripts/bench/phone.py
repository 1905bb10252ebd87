"""A member of a band under load, over all its connections."""

import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from bandsync.model.transport import Transport, in_force, position_at
from scripts.bench.epoll_ws import Address, Line, Loop
from scripts.bench.fleet import masked
from scripts.bench.oracle import MOVES, Document, Truth, read_move
from scripts.bench.processes import now_s, wall_ms
from scripts.bench.score import EVENTS, Score

# As the pages do.
_FIRST_RETRY_S = 0.3
_LONGEST_RETRY_S = 8.0
# A server that answers later than this has lost it.
PATIENCE_S = 10.0
# Who is back so soon must be given its place: the grace is 10 s.
_SURELY_S = 6.0
_SMALL_BUFFER = 4096
_CLOCK_SAMPLES = 3
# More questions than this are never open.
_MOST_ASKED = 64


class Asked(NamedTuple):
    """What was not answered yet.

    Attributes:
        since: from when on an answer is waited for.
        timed: whether the time it takes tells about the server.
    """

    since: float
    timed: bool
    command: Document


class Tick(msgspec.Struct, rename="camel"):
    """A tick."""

    server_time: float
    position_ms: float


_read_tick = msgspec.json.Decoder(Tick).decode


class Home(Protocol):
    """The band of a phone."""

    @property
    def loop(self) -> Loop:
        """Where its lines and timers are."""

    @property
    def score(self) -> Score:
        """What is noted."""

    @property
    def chance(self) -> random.Random:
        """What decides."""

    @property
    def truth(self) -> Truth:
        """What the band was told."""

    def target(self) -> str:
        """What is asked for in a handshake."""

    def where(self, phone: "Phone") -> Address:
        """The server to go to."""

    def clock_ahead_ms(self) -> float:
        """The session clock minus this machine's."""

    def clock_sample(self, round_trip_ms: float, ahead_ms: float) -> None:
        """An exchange was made."""

    def asked_for_lead(self, phone: "Phone", member_id: str) -> None:
        """The leader's phone is asked to hand over."""


class Phone:
    """One member.

    Args:
        slow: has a small receive buffer, and sleeps now and then.
        watches: notes how late events and ticks come, and whether ticks are right.

    Attributes:
        here: whether it is joined and its line is open.
        asleep: whether it does not read.
        leads: whether it is the leader, as far as it knows.
        away: whether it shall have no line: it has left, or not come yet.
    """

    def __init__(self, home: Home, name: str, place: int, *, slow: bool, watches: bool) -> None:
        self.home = home
        self.name = name
        self.place = place
        self.slow = slow
        self.watches = watches
        self.member_id = ""
        self.epoch = ""
        self.version = 0
        self.leads = False
        self.here = False
        self.asleep = False
        self.away = True
        self.transport: Transport | None = None
        self.line: Line | None = None
        self._token = ""
        self._must_resume_until = 0.0
        self._since = 0.0
        self._attempts = 0
        self._wait_s: float | None = None
        self._count = 0
        self._asked: dict[str, Asked] = {}
        self._trips: list[float] = []

    # What it does.

    def connect(self) -> None:
        """Open a line, and join or resume as soon as it stands."""
        self.away = False
        if self.line is not None and self.line.open:
            return
        self._since = now_s()
        self.line = Line(
            self.home.loop,
            self.home.where(self),
            self.home.target(),
            self,
            receive_buffer=_SMALL_BUFFER if self.slow else None,
        )
        self.line.all_ticks = self.watches

    def ask(self, kind: str, **fields: object) -> bool:
        """Give a command; whether it could be sent."""
        if not self.here or self.line is None or len(self._asked) >= _MOST_ASKED:
            return False
        self._send({"type": kind, **fields})
        return True

    def leave(self) -> None:
        """Leave for good."""
        self.away = True
        self._since = now_s()
        if self.ask("leave_session"):
            self.here = False
        elif self.line is not None:
            self.forget()

    def cut(self, seconds: float) -> None:
        """The network breaks, and is back after ``seconds``."""
        if self.line is None or not self.here:
            return
        self.home.score.counts["cuts"] += 1
        self.forget()
        self._must_resume_until = now_s() + _SURELY_S if self._token else 0.0
        self._come_back(seconds)

    def sleep(self, seconds: float) -> None:
        """Read nothing for so long."""
        if self.line is None or not self.here or self.asleep:
            return
        line = self.line
        self.asleep = True
        line.pause()
        self.home.loop.after(seconds, lambda: self._wake(line))

    def wake(self) -> None:
        """Take `sleep` back."""
        if self.asleep and self.line is not None:
            self._wake(self.line)

    def forget(self) -> None:
        """Cut the line."""
        line, self.line = self.line, None
        self._gone()
        if line is not None:
            line.cut()

    def overdue(self, now: float) -> None:
        """Note what should have been answered, and try again."""
        line = self.line
        if line is None or not line.open or self.asleep:
            return
        oldest = next(iter(self._asked.values()), None)
        if oldest is not None and now - oldest.since > PATIENCE_S:
            self.home.score.find("unanswered", f"{self.name}: {oldest.command}")
        elif self.here or now - self._since <= PATIENCE_S:
            return
        else:
            self.home.score.counts["slowCloses" if self.away else "slowConnects"] += 1
        self.forget()
        if not self.away:
            self._come_back(self._retry_s())

    # What it hears.

    def opened(self) -> None:
        """Join, or resume."""
        greeting: Document = {"type": "join_session", "displayName": self.name}
        if self._token:
            greeting["resumeToken"] = self._token
        self._send(greeting)

    def ended(self, how: str) -> None:
        """The server ended the line, or never opened it."""
        self.line = None
        self._gone()
        if self.away:
            return
        self.home.score.closes[how] += 1
        # Whether it is in time for the grace is not known: the server may have noticed long ago.
        self._must_resume_until = 0.0
        wait_s, self._wait_s = self._wait_s, None
        self._come_back(self._retry_s() if wait_s is None else wait_s)

    def heard(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        """A text came."""
        if kind in EVENTS:
            self._event(kind, data, start, end)
        elif kind == b"scro":
            self._tick(data[start:end])
        elif kind in _OTHERS:
            _OTHERS[kind](self, msgspec.json.decode(data[start:end]))

    def _event(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        at = data.index(b'"version":', start, end) + 10
        version = int(data[at : data.index(b",", at, end)])
        if version != self.version + 1:
            self.home.score.find("versionGap", f"{self.name}: {version} after {self.version}")
        self.version = version
        payload = data[start:end]
        self.home.truth.told(self, version, kind, payload)
        if kind == b"role":
            change = msgspec.json.decode(payload)
            if change["memberId"] == self.member_id:
                self.leads = change["role"] == "leader"
        if self.watches and not self.asleep:
            if kind in MOVES:
                self.transport = read_move(payload)
            at = data.index(b'"serverTime":', start, end) + 13
            self._note_age("event", float(data[at : data.index(b",", at, end)]))

    def _tick(self, payload: bytes) -> None:
        tick = _read_tick(payload)
        self._note_age("tick", tick.server_time)
        if self.transport is not None:
            expected = position_at(in_force(self.transport, tick.server_time), tick.server_time)
            score = self.home.score
            score.tick_error_ms = max(score.tick_error_ms, abs(expected - tick.position_ms))

    def _note_age(self, name: str, server_time: float) -> None:
        self.home.score.took(name, wall_ms() + self.home.clock_ahead_ms() - server_time)

    def _acked(self, answer: Document) -> None:
        asked = self._asked.pop(answer["requestId"], None)
        score = self.home.score
        if asked is None:
            score.find("answeredTwice", f"{self.name}: {answer}")
            return
        command = asked.command
        if command["type"] == "join_session":
            return
        if command["type"] == "leave_session" and self.line is not None:
            self.line.close()
        score.counts["acks"] += 1
        if asked.timed:
            score.took("command", (now_s() - asked.since) * 1000)
        self.home.truth.promised(self, answer.get("version"), command)

    def _refused(self, answer: Document) -> None:
        score = self.home.score
        score.errors[answer["code"]] += 1
        asked = self._asked.pop(answer.get("requestId", ""), None)
        if asked is None or answer["code"] == "internal":
            score.find("error", f"{self.name}: {answer}")
        elif asked.command["type"] == "join_session":
            # Nothing to wait for on this line.
            self.forget()
            self._come_back(self._retry_s())

    def _snapshot(self, snapshot: Document) -> None:
        version, epoch = snapshot["version"], snapshot["epoch"]
        you = snapshot.get("you")
        if you is None:
            if epoch == self.epoch and version < self.version:
                text = f"{self.name}: {version} after {self.version}"
                self.home.score.find("versionBack", text)
            self.leads = snapshot["leaderId"] == self.member_id
        else:
            self._joined(you)
        self.version, self.epoch = version, epoch
        if self.watches:
            self.transport = msgspec.convert(snapshot["transport"], Transport)
        self.home.truth.shown(self, snapshot)

    def _joined(self, you: Document) -> None:
        score, took_ms = self.home.score, (now_s() - self._since) * 1000
        if you["resumed"]:
            score.counts["resumes"] += 1
            score.took("resume", took_ms)
            if you["memberId"] != self.member_id:
                score.find("otherMember", f"{self.name}: {self.member_id} is {you['memberId']}")
        else:
            # In its grace it keeps its place; after that it may join anew.
            if self._token:
                score.counts["joinsAnew"] += 1
                if now_s() < self._must_resume_until:
                    score.find("notResumed", self.name)
            score.counts["joins"] += 1
            score.took("join", took_ms)
        self.member_id = you["memberId"]
        self.leads = you["role"] == "leader"
        self._token = you["resumeToken"]
        self._attempts = 0
        self.here = True
        if self.away:
            self.leave()

    def _request(self, request: Document) -> None:
        if request["type"] == "leader_requested":
            self.home.asked_for_lead(self, request["memberId"])

    def _clock(self, exchange: Document) -> None:
        """An exchange: t0 and now are of this machine's clock, t1 and t2 of the session's."""
        now = wall_ms()
        trip = (now - exchange["t0"]) - (exchange["t2"] - exchange["t1"])
        ahead = ((exchange["t1"] - exchange["t0"]) + (exchange["t2"] - now)) / 2
        self.home.clock_sample(trip, ahead)
        self._trips.append(trip)
        if len(self._trips) == _CLOCK_SAMPLES:
            self.ask("sync_report", errorMs=max(0.0, min(self._trips) / 2))
            self._trips.clear()

    def _draining(self, notice: Document) -> None:
        self._wait_s = notice["reconnectInMs"] / 1000

    # How it does it.

    def _send(self, message: Document) -> None:
        assert self.line is not None
        self._count += 1
        request_id = str(self._count)
        # Before it is sent: a line that breaks at that moment forgets what was asked.
        self._asked[request_id] = Asked(now_s(), True, message)
        if message["type"] != "join_session":
            self.home.score.counts["commands"] += 1
        self.line.send(masked({**message, "requestId": request_id}))

    def _wake(self, line: Line) -> None:
        if line is not self.line or not self.asleep:
            return
        self.asleep = False
        # What was asked before says nothing about the server's speed.
        now = now_s()
        for request_id, asked in self._asked.items():
            self._asked[request_id] = Asked(now, False, asked.command)
        self._since = now
        line.go_on()

    def _gone(self) -> None:
        self.here = self.asleep = self.leads = False
        self._asked.clear()
        self._trips.clear()

    def _come_back(self, seconds: float) -> None:
        self.home.loop.after(seconds, self._again)

    def _again(self) -> None:
        if not self.away:
            self.connect()

    def _retry_s(self) -> float:
        longest = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2**self._attempts)
        self._attempts = min(self._attempts + 1, 16)
        return longest * self.home.chance.uniform(0.5, 1.0)


# Of their contents all is read; they are few.
_OTHERS: dict[bytes, Callable[[Phone, Document], None]] = {
    b'ack"': Phone._acked,  # noqa: SLF001
    b"erro": Phone._refused,  # noqa: SLF001
    b"snap": Phone._snapshot,  # noqa: SLF001
    b"lead": Phone._request,  # noqa: SLF001
    b"cloc": Phone._clock,  # noqa: SLF001
    b"serv": Phone._draining,  # noqa: SLF001
}
