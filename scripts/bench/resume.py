"""Benchmark `resume`: a server is killed, and its clients resume on another one."""

import heapq
import itertools
import json
import random
from collections.abc import Callable
from contextlib import ExitStack

from scripts.bench.commands import expect_no_failover
from scripts.bench.fleet import ACK, Fleet, FleetClient, masked
from scripts.bench.load import WARM_UP_S, after, disable_garbage_collection, join
from scripts.bench.processes import BenchError, bandsync, now_s, spread
from scripts.bench.redis import new_redis
from scripts.testbed.json_messages import JsonMessage

_SURVIVOR = 1
_SNAPSHOT = b'{"type":"snapshot"'
# As the pages do.
_FIRST_RETRY_S = 0.3
_LONGEST_RETRY_S = 8.0
_STEP_S = 0.002
_PATIENCE_S = 60.0


class ResumingMember:
    """A member, over all its connections.

    Attributes:
        session: number of its session.
        client: its current connection.
        connecting: start of its latest connection attempt.
        latest_snapshot: the latest reply to a join, JSON.
        snapshot_at: arrival of that snapshot.
        attempts: connection attempts since then.
    """

    def __init__(self, client: FleetClient, lost: "Callable[[ResumingMember], None]") -> None:
        self.session = client.session
        self.latest_snapshot = b""
        self.snapshot_at = 0.0
        self.attempts = 0
        self._reconnect_later = lost
        self.connected(client)

    def connected(self, client: FleetClient) -> None:
        """Use another connection from now on."""
        self.client = client
        self.connecting = now_s()
        client.on_text = self._receive
        client.on_end = lambda: self._reconnect_later(self)

    def snapshot(self) -> JsonMessage:
        """The latest snapshot, decoded."""
        snapshot: JsonMessage = json.loads(self.latest_snapshot)
        return snapshot

    def _receive(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(_SNAPSHOT, start) and data.find(b'"resumeToken":', start, end) >= 0:
            self.latest_snapshot = data[start:end]
            self.snapshot_at = now_s()
            self.attempts = 0


class ResumingMembers:
    """All members. Without a connection, a member resumes on the other server."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._due: list[tuple[float, int, ResumingMember]] = []
        self._count = itertools.count()
        self._greetings: dict[ResumingMember, bytes] = {}
        self.members: list[ResumingMember] = []
        fleet.on_connect = self._add

    def start_resuming(self) -> None:
        """End the setup: from now on, connections are those of resuming members."""
        self._fleet.on_connect = None
        for member in self.members:
            token = member.snapshot()["you"]["resumeToken"]
            self._greetings[member] = masked({"type": "join_session", "resumeToken": token})

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Receive and reconnect until ``ended``."""
        while not ended():
            while self._due and self._due[0][0] <= now_s():
                member = heapq.heappop(self._due)[2]
                greeting = self._greetings[member]
                member.connected(self._fleet.connect(member.session, greeting, _SURVIVOR))
            self._fleet.run_for(_STEP_S)

    def _add(self, client: FleetClient) -> None:
        self.members.append(ResumingMember(client, self._reconnect_later))

    def _reconnect_later(self, member: ResumingMember) -> None:
        longest = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2**member.attempts)
        member.attempts += 1
        due = now_s() + longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        heapq.heappush(self._due, (due, next(self._count), member))


def resume(
    connections: int, members: int, seconds: float, *, alone: bool = False
) -> dict[str, object]:
    """Time until all clients of a killed server have resumed on the other one.

    Sessions play. For --seconds afterwards, longer than failure detector and grace, no member may
    be removed.
    """
    sessions = connections // members * (1 if alone else 2)
    with ExitStack() as stack:
        redis = stack.enter_context(new_redis())
        killed_server, survivor = (
            stack.enter_context(bandsync(2 * connections, members, redis_url=redis.url()))
            for _ in range(2)
        )
        fleet = stack.enter_context(
            Fleet(killed_server.port, survivor.port, open_on=1 if alone else None)
        )
        everyone = ResumingMembers(fleet)
        leaders = [_member_of(everyone, client) for client in join(fleet, sessions, members)]
        everyone.start_resuming()
        before = {member: member.snapshot() for member in everyone.members}
        victims = [member for member in everyone.members if member.client.server == 0]
        for member in leaders:
            member.client.send(masked({"type": "play"}))
        disable_garbage_collection()
        fleet.run_for(WARM_UP_S)
        known, cpu = fleet.kinds.copy(), survivor.cpu_s()
        killed = now_s()
        killed_server.kill()
        everyone.run_until(
            lambda: (
                all(member.snapshot_at > killed for member in victims)
                or now_s() > killed + _PATIENCE_S
            )
        )
        add_latency, cpu = now_s() - killed, survivor.cpu_s() - cpu
        back = [member for member in victims if member.snapshot_at > killed]
        everyone.run_until(after(seconds))
        kinds = fleet.kinds - known
        snapshot = {member: member.snapshot() for member in back}
        kept = [
            member
            for member in leaders
            if member not in snapshot or snapshot[member]["you"]["role"] == "leader"
        ]
        # Leaders must still be able to lead.
        acked = fleet.kinds[ACK]
        for member in leaders:
            member.client.send(masked({"type": "seek", "positionMs": 0, "requestId": "c0"}))
        fleet.run_until(lambda: fleet.kinds[ACK] + fleet.kinds[b"erro"] >= acked + sessions)
        still = fleet.kinds[ACK] - acked
        expect_no_failover(survivor)
    if len(back) < len(victims):
        raise BenchError(f"{len(victims) - len(back)} did not resume")
    return {
        "bench": "resume",
        "connections": len(victims),
        "sessions": sessions,
        "members": members,
        "connectionsOnTheOther": len(everyone.members) - len(victims),
        "secondsUntilAll": round(add_latency, 2),
        "sinceDeathMs": spread([(member.snapshot_at - killed) * 1000 for member in victims]),
        "sinceConnectMs": spread(
            [(member.snapshot_at - member.connecting) * 1000 for member in victims]
        ),
        "resumed": sum(
            each["you"]["resumed"] and each["you"]["memberId"] == before[member]["you"]["memberId"]
            for member, each in snapshot.items()
        ),
        "foundPlaying": sum(each["isPlaying"] for each in snapshot.values()),
        "leadersKilled": sum(member in snapshot for member in leaders),
        "leadersLost": len(leaders) - len(kept),
        "leadersRefusedLater": sessions - still,
        "roleChanges": kinds[b"role"],
        "joinsAndLeaves": kinds[b"user"],
        "survivorCpu": round(cpu / add_latency, 3),
        "secondsWatched": seconds,
    }


def _member_of(everyone: ResumingMembers, client: FleetClient) -> ResumingMember:
    return next(member for member in everyone.members if member.client is client)
