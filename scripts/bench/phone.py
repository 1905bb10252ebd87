"""A simulated phone: one member of a band under load, over all its connections.

Over 400 lines, because it is one class: a method for each action and each kind of message.
"""

import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from bandsync.model.transport import Transport, in_force, position_at
from scripts.bench.epoll_ws import EpollConnection, EpollLoop, TargetAddress
from scripts.bench.fleet import masked
from scripts.bench.oracle import MOVES, SessionOracle, read_move
from scripts.bench.processes import now_s, wall_ms
from scripts.bench.score import EVENTS, LoadScore
from scripts.testbed.json_messages import JsonMessage, JsonYou

# As the pages do.
_FIRST_RETRY_S = 0.3
_LONGEST_RETRY_S = 8.0
# A reply later than this counts as lost.
PATIENCE_S = 10.0
# A member that returns within this time must be resumed. The grace is 10 s.
_RESUME_REQUIRED_S = 6.0
_SMALL_BUFFER = 4096
_CLOCK_SAMPLES = 3
# Maximum number of commands without a reply.
_MOST_PENDING = 64


class PendingCommand(NamedTuple):
    """A command without a reply.

    Attributes:
        since: start of the wait for the reply.
        timed: whether the wait measures the server.
        command: as sent.
    """

    since: float
    timed: bool
    command: dict[str, object]


class Tick(msgspec.Struct, rename="camel"):
    """The fields of a tick that are read here."""

    server_time: float
    position_ms: float


_read_tick = msgspec.json.Decoder(Tick).decode
_read_message: Callable[[bytes], JsonMessage] = msgspec.json.decode


class BandContext(Protocol):
    """The band of a member."""

    @property
    def loop(self) -> EpollLoop:
        """Runs connections and timers."""

    @property
    def score(self) -> LoadScore:
        """Counts actions, latencies and violations."""

    @property
    def chance(self) -> random.Random:
        """Draws random actions."""

    @property
    def oracle(self) -> SessionOracle:
        """Compares what the members receive."""

    def path(self) -> str:
        """The path of a handshake."""

    def choose_server(self, member: "LoadMember") -> TargetAddress:
        """The server for a member's next connection."""

    def clock_ahead_ms(self) -> float:
        """The session clock minus the wall clock of this machine, ms."""

    def clock_sample(self, round_trip_ms: float, ahead_ms: float) -> None:
        """Handle the result of a `clock_sync` exchange."""

    def leader_requested(self, member: "LoadMember", member_id: str) -> None:
        """Handle a request for leadership that the leader received."""


class LoadMember:
    """One member.

    Args:
        band: its band.
        name: display name.
        place: index in the band.
        slow: use a small receive buffer; such a member pauses its reading now and then.
        watches: measure the latency of events and ticks, and check the positions in ticks.

    Attributes:
        band: its band.
        name: display name.
        place: index in the band.
        slow: whether it has a small receive buffer.
        watches: whether it measures events and ticks.
        member_id: empty before the first join.
        epoch: of the last snapshot.
        version: of the last event.
        is_leader: whether it leads, as far as it knows.
        joined: whether it has joined on an open connection.
        paused: whether it does not read.
        away: whether it shall have no connection: it has left, or not joined yet.
        transport: the latest one received; None before.
        connection: the open one; None while there is none.
    """

    def __init__(
        self, band: BandContext, name: str, place: int, *, slow: bool, watches: bool
    ) -> None:
        self.band = band
        self.name = name
        self.place = place
        self.slow = slow
        self.watches = watches
        self.member_id = ""
        self.epoch = ""
        self.version = 0
        self.is_leader = False
        self.joined = False
        self.paused = False
        self.away = True
        self.transport: Transport | None = None
        self.connection: EpollConnection | None = None
        self._token = ""
        self._resume_required_until = 0.0
        self._connecting_since = 0.0
        self._attempts = 0
        self._wait_s: float | None = None
        self._count = 0
        self._pending: dict[str, PendingCommand] = {}
        self._round_trips: list[float] = []

    # Actions.

    def connect(self) -> None:
        """Open a connection, and join or resume after the handshake."""
        self.away = False
        if self.connection is not None and self.connection.open:
            return
        self._connecting_since = now_s()
        self.connection = EpollConnection(
            self.band.loop,
            self.band.choose_server(self),
            self.band.path(),
            self,
            receive_buffer=_SMALL_BUFFER if self.slow else None,
        )
        self.connection.report_ticks = self.watches

    def request(self, kind: str, **fields: object) -> bool:
        """Send a command; return whether it could be sent."""
        if not self.joined or self.connection is None or len(self._pending) >= _MOST_PENDING:
            return False
        self._send({"type": kind, **fields})
        return True

    def leave(self) -> None:
        """Leave for good."""
        self.away = True
        self._connecting_since = now_s()
        if self.request("leave_session"):
            self.joined = False
        elif self.connection is not None:
            self.cut_connection()

    def cut(self, seconds: float) -> None:
        """Lose the connection, and reconnect after ``seconds``."""
        if self.connection is None or not self.joined:
            return
        self.band.score.counts["cuts"] += 1
        self.cut_connection()
        self._resume_required_until = now_s() + _RESUME_REQUIRED_S if self._token else 0.0
        self._reconnect_after(seconds)

    def pause(self, seconds: float) -> None:
        """Stop reading for ``seconds``."""
        if self.connection is None or not self.joined or self.paused:
            return
        connection = self.connection
        self.paused = True
        connection.pause()
        self.band.loop.after(seconds, lambda: self._resume(connection))

    def resume(self) -> None:
        """Undo `pause`."""
        if self.paused and self.connection is not None:
            self._resume(self.connection)

    def cut_connection(self) -> None:
        """Reset the connection."""
        connection, self.connection = self.connection, None
        self._reset()
        if connection is not None:
            connection.cut()

    def check_deadlines(self, now: float) -> None:
        """Report an overdue reply as a violation, and reconnect."""
        connection = self.connection
        if connection is None or not connection.open or self.paused:
            return
        oldest = next(iter(self._pending.values()), None)
        if oldest is not None and now - oldest.since > PATIENCE_S:
            self.band.score.add_finding("unanswered", f"{self.name}: {oldest.command}")
        elif self.joined or now - self._connecting_since <= PATIENCE_S:
            return
        else:
            self.band.score.counts["slowCloses" if self.away else "slowConnects"] += 1
        self.cut_connection()
        if not self.away:
            self._reconnect_after(self._retry_s())

    # Received messages.

    def opened(self) -> None:
        """Join, or resume."""
        greeting: dict[str, object] = {"type": "join_session", "displayName": self.name}
        if self._token:
            greeting["resumeToken"] = self._token
        self._send(greeting)

    def ended(self, reason: str) -> None:
        """Handle the end of a connection, or the failure to open one."""
        self.connection = None
        self._reset()
        if self.away:
            return
        self.band.score.closes[reason] += 1
        # The grace may already be over: the server may have detected the end long ago.
        self._resume_required_until = 0.0
        wait_s, self._wait_s = self._wait_s, None
        self._reconnect_after(self._retry_s() if wait_s is None else wait_s)

    def received(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        """Handle a text frame."""
        if kind in EVENTS:
            self._on_event(kind, data, start, end)
        elif kind == b"scro":
            self._on_tick(data[start:end])
        elif kind in _HANDLERS:
            _HANDLERS[kind](self, _read_message(data[start:end]))

    def _on_event(self, kind: bytes, data: bytes, start: int, end: int) -> None:
        at = data.index(b'"version":', start, end) + 10
        version = int(data[at : data.index(b",", at, end)])
        if version != self.version + 1:
            self.band.score.add_finding(
                "versionGap", f"{self.name}: {version} after {self.version}"
            )
        self.version = version
        payload = data[start:end]
        self.band.oracle.event_received(self, version, kind, payload)
        if kind == b"role":
            change = _read_message(payload)
            if change["memberId"] == self.member_id:
                self.is_leader = change["role"] == "leader"
        if self.watches and not self.paused:
            if kind in MOVES:
                self.transport = read_move(payload)
            at = data.index(b'"serverTime":', start, end) + 13
            self._note_age("event", float(data[at : data.index(b",", at, end)]))

    def _on_tick(self, payload: bytes) -> None:
        tick = _read_tick(payload)
        self._note_age("tick", tick.server_time)
        if self.transport is not None:
            expected = position_at(in_force(self.transport, tick.server_time), tick.server_time)
            score = self.band.score
            score.tick_error_ms = max(score.tick_error_ms, abs(expected - tick.position_ms))

    def _note_age(self, name: str, server_time: float) -> None:
        self.band.score.add_latency(name, wall_ms() + self.band.clock_ahead_ms() - server_time)

    def on_ack(self, answer: JsonMessage) -> None:
        """Match an acknowledgement to its command and record the round trip."""
        pending = self._pending.pop(answer["requestId"], None)
        score = self.band.score
        if pending is None:
            score.add_finding("answeredTwice", f"{self.name}: {answer}")
            return
        command = pending.command
        if command["type"] == "join_session":
            return
        if command["type"] == "leave_session" and self.connection is not None:
            self.connection.close()
        score.counts["acks"] += 1
        if pending.timed:
            score.add_latency("command", (now_s() - pending.since) * 1000)
        self.band.oracle.acked(self, answer.get("version"), command)

    def on_error(self, answer: JsonMessage) -> None:
        """Count a refusal."""
        score = self.band.score
        score.errors[answer["code"]] += 1
        pending = self._pending.pop(answer.get("requestId", ""), None)
        if pending is None or answer["code"] == "internal":
            score.add_finding("error", f"{self.name}: {answer}")
        elif pending.command["type"] == "join_session":
            # No further message will arrive on this connection.
            self.cut_connection()
            self._reconnect_after(self._retry_s())

    def on_snapshot(self, snapshot: JsonMessage) -> None:
        """Check the state, and finish the join that it answers."""
        version, epoch = snapshot["version"], snapshot["epoch"]
        you = snapshot.get("you")
        if you is None:
            if epoch == self.epoch and version < self.version:
                text = f"{self.name}: {version} after {self.version}"
                self.band.score.add_finding("versionBack", text)
            self.is_leader = snapshot["leaderId"] == self.member_id
        else:
            self._on_joined(you)
        self.version, self.epoch = version, epoch
        if self.watches:
            self.transport = msgspec.convert(snapshot["transport"], Transport)
        self.band.oracle.snapshot_received(self, snapshot)

    def _on_joined(self, you: JsonYou) -> None:
        score, took_ms = self.band.score, (now_s() - self._connecting_since) * 1000
        if you["resumed"]:
            score.counts["resumes"] += 1
            score.add_latency("resume", took_ms)
            if you["memberId"] != self.member_id:
                score.add_finding(
                    "otherMember", f"{self.name}: {self.member_id} is {you['memberId']}"
                )
        else:
            # A member keeps its place during the grace. After that it may join anew.
            if self._token:
                score.counts["joinsAnew"] += 1
                if now_s() < self._resume_required_until:
                    score.add_finding("notResumed", self.name)
            score.counts["joins"] += 1
            score.add_latency("join", took_ms)
        self.member_id = you["memberId"]
        self.is_leader = you["role"] == "leader"
        self._token = you["resumeToken"]
        self._attempts = 0
        self.joined = True
        if self.away:
            self.leave()

    def on_leader_requested(self, request: JsonMessage) -> None:
        """Answer a request for the lead."""
        if request["type"] == "leader_requested":
            self.band.leader_requested(self, request["memberId"])

    def on_clock_sync(self, exchange: JsonMessage) -> None:
        """Handle a clock exchange: t0 and now are wall times here, t1 and t2 session times."""
        now = wall_ms()
        round_trip_ms = (now - exchange["t0"]) - (exchange["t2"] - exchange["t1"])
        ahead_ms = ((exchange["t1"] - exchange["t0"]) + (exchange["t2"] - now)) / 2
        self.band.clock_sample(round_trip_ms, ahead_ms)
        self._round_trips.append(round_trip_ms)
        if len(self._round_trips) == _CLOCK_SAMPLES:
            self.request("sync_report", errorMs=max(0.0, min(self._round_trips) / 2))
            self._round_trips.clear()

    def on_draining(self, notice: JsonMessage) -> None:
        """Note when the server wants the reconnect."""
        self._wait_s = notice["reconnectInMs"] / 1000

    # Implementation.

    def _send(self, message: dict[str, object]) -> None:
        assert self.connection is not None
        self._count += 1
        request_id = str(self._count)
        # Before the send: a connection that breaks at that moment clears the pending commands.
        self._pending[request_id] = PendingCommand(now_s(), True, message)
        if message["type"] != "join_session":
            self.band.score.counts["commands"] += 1
        self.connection.send(masked({**message, "requestId": request_id}))

    def _resume(self, connection: EpollConnection) -> None:
        if connection is not self.connection or not self.paused:
            return
        self.paused = False
        # The wait for earlier commands does not measure the server.
        now = now_s()
        for request_id, pending in self._pending.items():
            self._pending[request_id] = PendingCommand(now, False, pending.command)
        self._connecting_since = now
        connection.resume()

    def _reset(self) -> None:
        self.joined = self.paused = self.is_leader = False
        self._pending.clear()
        self._round_trips.clear()

    def _reconnect_after(self, seconds: float) -> None:
        self.band.loop.after(seconds, self._reconnect)

    def _reconnect(self) -> None:
        if not self.away:
            self.connect()

    def _retry_s(self) -> float:
        longest = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2.0**self._attempts)
        self._attempts = min(self._attempts + 1, 16)
        return longest * self.band.chance.uniform(0.5, 1.0)


# Rare messages, which are decoded completely.
_HANDLERS: dict[bytes, Callable[[LoadMember, JsonMessage], None]] = {
    b'ack"': LoadMember.on_ack,
    b"erro": LoadMember.on_error,
    b"snap": LoadMember.on_snapshot,
    b"lead": LoadMember.on_leader_requested,
    b"cloc": LoadMember.on_clock_sync,
    b"serv": LoadMember.on_draining,
}
