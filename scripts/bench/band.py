"""A band under load: the random actions of its members, and the comparison of what they receive."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from scripts.bench.epoll_ws import EpollLoop, TargetAddress
from scripts.bench.oracle import CHAT_RING, SessionOracle
from scripts.bench.phone import LoadMember
from scripts.bench.processes import wall_ms
from scripts.bench.score import LoadScore

_NOTES = "the bridge comes twice, then straight into the last verse, and mind the pick-up "
# Mean time between two actions of this kind in a band, seconds.
_LEADER_COMMAND_S = 2.0
_CHAT_S = 3.0
_CLOCK_S = 5.0
_CUT_S = 20.0
_PAUSE_S = 30.0
_REPLACE_S = 30.0
_HAND_OVER_S = 30.0
_REQUEST_LEAD_S = 45.0
_CHECK_S = 30.0
_LONG_PAUSE_S = 120.0
# A paused member leaves this many replies unread. Its queue overflows, and after 10 s the server
# closes the slow consumer with 1013.
_UNREAD_REQUESTS = 18
_SECOND_BURST_S = 1.2
_LONG_PAUSE_LENGTH_S = 14.0


class LoadBand:
    """The members of one session.

    Args:
        loop: runs connections and timers.
        score: counts actions, latencies and violations.
        name: id of the session.
        number: selects the server of the first connections.
        members: number of members.
        servers: members take turns on them at first, and reconnect to any of them.
        chance: draws the actions; the same seed draws the same actions.
        pace: factor on the frequency of actions.

    Attributes:
        loop: runs connections and timers.
        score: counts actions, latencies and violations.
        chance: draws the actions.
        name: id of the session.
        oracle: compares what the members receive.
        members: the present members.
    """

    def __init__(
        self,
        loop: EpollLoop,
        score: LoadScore,
        name: str,
        number: int,
        members: int,
        servers: Sequence[TargetAddress],
        *,
        chance: random.Random,
        pace: float = 1.0,
    ) -> None:
        self.loop = loop
        self.score = score
        self.chance = chance
        self.name = name
        self._number = number
        self._servers = servers
        self._pace = pace
        self._active = False
        self._closed = False
        self._clock: tuple[float, float] = (float("inf"), 0.0)
        self._counter = 0
        self._known_members: set[LoadMember] = set()
        self.oracle = SessionOracle(
            name, score, lambda: sum(member.joined for member in self.members)
        )
        self.members = [self._new_member(place, members) for place in range(members)]

    # For the driver.

    def gather(self, seconds: float) -> None:
        """Connect the members within ``seconds``, the first one at once."""
        for member in self.members:
            wait_s = self.chance.uniform(0.0, seconds) if member.place else 0.0
            self.loop.after(wait_s, partial(self._connect, member))

    def play(self, filling_s: float) -> None:
        """Start the random actions.

        Args:
            filling_s: fill the chat ring within this time; 0 to leave that to the actions.
        """
        self._active = True
        for _ in range(CHAT_RING if filling_s else 0):
            self.loop.after(self.chance.uniform(0.0, filling_s), self._send_chat)
        for every_s, action in (
            (_LEADER_COMMAND_S, self._send_leader_command),
            (_CHAT_S, self._send_chat),
            (_CLOCK_S, self._sync_clock),
            (_CUT_S, self._cut_connection),
            (_PAUSE_S, self._pause_reading),
            (_REPLACE_S, self._replace_member),
            (_HAND_OVER_S, self._hand_over_lead),
            (_REQUEST_LEAD_S, self._request_lead),
            (_CHECK_S, self._check_version),
            (_LONG_PAUSE_S, self._pause_reading_for_long),
        ):
            self._repeat(every_s / self._pace, action)

    def settle(self) -> None:
        """Stop the actions, resume paused members, and admit no new ones."""
        self._active = False
        self._closed = True
        for member in self.members:
            member.resume()

    def complete(self) -> bool:
        """Whether all members that ever connected are joined and reading."""
        return all(member.away or (member.joined and not member.paused) for member in self.members)

    def request_snapshots(self) -> None:
        """Request a snapshot for every member."""
        self.oracle.begin_comparison()
        for member in self.members:
            member.request("sync_request")

    def has_all_snapshots(self) -> bool:
        """Whether every joined member has received its snapshot."""
        return all(self.oracle.has_compared(member) for member in self.members if member.joined)

    def leave(self) -> None:
        """Let all members leave."""
        for member in self.members:
            member.leave()

    def all_closed(self) -> bool:
        """Whether all connections are closed."""
        return all(member.connection is None for member in self._known_members)

    def check_deadlines(self, now: float) -> None:
        """Check the members' deadlines for replies, and forget members that have left."""
        for member in list(self._known_members):
            member.check_deadlines(now)
        current = set(self.members)
        self._known_members = {
            member
            for member in self._known_members
            if member in current or member.connection is not None
        }

    def cut_all(self) -> None:
        """Reset all connections."""
        for member in self._known_members:
            member.away = True
            member.cut_connection()

    # For its members.

    def path(self) -> str:
        """The path of a handshake."""
        return f"/ws/{self.name}"

    def choose_server(self, member: LoadMember) -> TargetAddress:
        """The server for a member's next connection."""
        if member.member_id:
            return self.chance.choice(self._servers)
        return self._servers[(self._number + member.place) % len(self._servers)]

    def clock_ahead_ms(self) -> float:
        """The session clock minus the wall clock of this machine, ms."""
        return self._clock[1]

    def clock_sample(self, round_trip_ms: float, ahead_ms: float) -> None:
        """Keep the clock offset of an exchange, if its round trip is the shortest so far."""
        self._clock = min(self._clock, (round_trip_ms, ahead_ms))

    def leader_requested(self, member: LoadMember, member_id: str) -> None:
        """Answer a request for leadership: hand over or deny, with equal probability."""
        if self.chance.random() < 0.5:
            member.request("deny_leader", memberId=member_id)
        else:
            member.request("set_role", role="leader", memberId=member_id)

    # The random actions.

    def _repeat(self, every_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            if self._active:
                action()
                self._repeat(every_s, action)

        self.loop.after(self.chance.expovariate(1 / every_s), act)

    def _send_leader_command(self) -> None:
        leader = self._leader()
        if leader is None:
            return
        choice = self.chance.random()
        if not self.oracle.playing and choice < 0.8:
            leader.request("play", countInBeats=self.chance.choice((0, 0, 4)))
        elif choice < 0.35:
            tempo = round(self.chance.uniform(60, 180), 1)
            leader.request(
                "set_tempo", tempoBpm=tempo, at=self.chance.choice(("now", "beat", "bar"))
            )
        elif choice < 0.7:
            at = self.chance.choice(("now", "beat", "bar"))
            leader.request("seek", positionMs=self.chance.randrange(300_000), at=at)
        elif choice < 0.85:
            leader.request("update_message", message=self._text(20, 80))
        else:
            leader.request("pause" if self.oracle.playing else "stop")

    def _send_chat(self) -> None:
        member = self._random_member()
        if member is not None:
            member.request("chat_message", text=self._text(10, 200))

    def _sync_clock(self) -> None:
        member = self.members[0]
        if not member.paused:
            member.request("clock_sync", t0=wall_ms())

    def _cut_connection(self) -> None:
        member = self._random_member()
        if member is not None:
            member.cut(self.chance.uniform(0.2, 3.0))

    def _pause_reading(self) -> None:
        self._pause_slow_member(self.chance.uniform(1.0, 6.0))

    def _pause_reading_for_long(self) -> None:
        member = self._pause_slow_member(_LONG_PAUSE_LENGTH_S)
        if member is not None:
            self.score.counts["longPauses"] += 1
            self._send_requests(member)
            self.loop.after(_SECOND_BURST_S, lambda: self._send_requests(member))

    def _send_requests(self, member: LoadMember) -> None:
        for _ in range(_UNREAD_REQUESTS if member.paused else 0):
            member.request("sync_request")

    def _replace_member(self) -> None:
        """Let one member leave, and another one join a little later."""
        member = self._random_member()
        if member is None:
            return
        self.score.counts["leaves"] += 1
        member.leave()
        other = self._new_member(member.place, len(self.members))
        self.members[member.place] = other
        self.loop.after(self.chance.uniform(0.5, 3.0), partial(self._connect, other))

    def _hand_over_lead(self) -> None:
        leader, other = self._leader(), self._random_member()
        if leader is not None and other is not None and other is not leader:
            leader.request("set_role", role="leader", memberId=other.member_id)

    def _request_lead(self) -> None:
        member = self._random_member()
        if member is not None and not member.is_leader:
            member.request("request_leader")

    def _check_version(self) -> None:
        member = self._random_member()
        if member is not None:
            member.request("sync_request", version=member.version, epoch=member.epoch)

    def _connect(self, member: LoadMember) -> None:
        if not self._closed:
            member.connect()

    def _leader(self) -> LoadMember | None:
        return next((each for each in self.members if each.is_leader and not each.paused), None)

    def _random_member(self) -> LoadMember | None:
        present = [member for member in self.members if member.joined and not member.paused]
        return self.chance.choice(present) if present else None

    def _pause_slow_member(self, seconds: float) -> LoadMember | None:
        slow = [each for each in self.members if each.slow and each.joined and not each.paused]
        if not slow:
            return None
        member = self.chance.choice(slow)
        member.pause(seconds)
        return member

    def _new_member(self, place: int, members: int) -> LoadMember:
        self._counter += 1
        member = LoadMember(
            self,
            f"{self.name} {self._counter}",
            place,
            slow=members > 1 and place == members - 1,
            watches=place == 0,
        )
        self._known_members.add(member)
        return member

    def _text(self, least: int, most: int) -> str:
        self._counter += 1
        text = f"{self._counter}: {_NOTES * 3}"
        return text[: self.chance.randint(least, most)]
