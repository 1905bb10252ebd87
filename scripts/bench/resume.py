"""A server dies, its clients resume on another; bench.py starts it."""

import heapq
import itertools
import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from scripts.bench.commands import expect_no_failover
from scripts.bench.fleet import ACK, Client, Fleet, masked
from scripts.bench.load import WARM_UP_S, after, join, settle
from scripts.bench.processes import BenchError, bandsync, now_s, spread
from scripts.bench.redis import new_redis

_SURVIVOR = 1
_SNAPSHOT = b'{"type":"snapshot"'
# As the page does.
_FIRST_RETRY_S = 0.3
_LONGEST_RETRY_S = 8.0
_STEP_S = 0.002
_PATIENCE_S = 60.0


class Musician:
    """A member, over all its connections.

    Attributes:
        session: its number.
        shown: the latest snapshot that it was shown as an answer, JSON.
        connecting: when its latest connection was begun.
        shown_at: when it got that snapshot.
        attempts: connections begun since the last snapshot.
    """

    def __init__(self, client: Client, lost: "Callable[[Musician], None]") -> None:
        self.session = client.session
        self.shown = b""
        self.shown_at = 0.0
        self.attempts = 0
        self._lost = lost
        self.follow(client)

    def follow(self, client: Client) -> None:
        """Be the one at this connection."""
        self.client = client
        self.connecting = now_s()
        client.on_text = self._look
        client.on_end = lambda: self._lost(self)

    def told(self) -> dict[str, Any]:
        """What the latest snapshot said, decoded."""
        told: dict[str, Any] = json.loads(self.shown)
        return told

    def _look(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(_SNAPSHOT, start) and data.find(b'"resumeToken":', start, end) >= 0:
            self.shown = data[start:end]
            self.shown_at = now_s()
            self.attempts = 0


class Crowd:
    """All musicians; those who lose their connection come back to the server that is left."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._due: list[tuple[float, int, Musician]] = []
        self._count = itertools.count()
        self._greetings: dict[Musician, bytes] = {}
        self.musicians: list[Musician] = []
        fleet.on_connect = self._meet

    def leave_nobody_out(self) -> None:
        """Everybody is here: from now on connections are those of musicians that come back."""
        self._fleet.on_connect = None
        for musician in self.musicians:
            token = musician.told()["you"]["resumeToken"]
            self._greetings[musician] = masked({"type": "join_session", "resumeToken": token})

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Receive, and reconnect when it is time."""
        while not ended():
            while self._due and self._due[0][0] <= now_s():
                musician = heapq.heappop(self._due)[2]
                greeting = self._greetings[musician]
                musician.follow(self._fleet.connect(musician.session, greeting, _SURVIVOR))
            self._fleet.run_for(_STEP_S)

    def _meet(self, client: Client) -> None:
        self.musicians.append(Musician(client, self._lost))

    def _lost(self, musician: Musician) -> None:
        longest = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2**musician.attempts)
        musician.attempts += 1
        due = now_s() + longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        heapq.heappush(self._due, (due, next(self._count), musician))


def resume(
    connections: int, members: int, seconds: float, *, alone: bool = False
) -> dict[str, object]:
    """A server is killed: until all of its clients have resumed on the other one.

    Sessions play. For --seconds afterwards, longer than the sweep and the grace, nobody's leaving
    may be told.
    """
    sessions = connections // members * (1 if alone else 2)
    with ExitStack() as stack:
        redis = stack.enter_context(new_redis())
        doomed, survivor = (
            stack.enter_context(bandsync(2 * connections, members, redis_url=redis.url()))
            for _ in range(2)
        )
        fleet = stack.enter_context(Fleet(doomed.port, survivor.port, open_on=1 if alone else None))
        crowd = Crowd(fleet)
        leaders = [_at(crowd, client) for client in join(fleet, sessions, members)]
        crowd.leave_nobody_out()
        before = {musician: musician.told() for musician in crowd.musicians}
        victims = [musician for musician in crowd.musicians if musician.client.server == 0]
        for musician in leaders:
            musician.client.send(masked({"type": "play"}))
        settle()
        fleet.run_for(WARM_UP_S)
        known, cpu = fleet.kinds.copy(), survivor.cpu_s()
        killed = now_s()
        doomed.kill()
        crowd.run_until(
            lambda: (
                all(musician.shown_at > killed for musician in victims)
                or now_s() > killed + _PATIENCE_S
            )
        )
        took, cpu = now_s() - killed, survivor.cpu_s() - cpu
        back = [musician for musician in victims if musician.shown_at > killed]
        crowd.run_until(after(seconds))
        kinds = fleet.kinds - known
        told = {musician: musician.told() for musician in back}
        kept = [
            musician
            for musician in leaders
            if musician not in told or told[musician]["you"]["role"] == "leader"
        ]
        # Whatever was told, those who led can still do so.
        acked = fleet.kinds[ACK]
        for musician in leaders:
            musician.client.send(masked({"type": "seek", "positionMs": 0, "requestId": "c0"}))
        fleet.run_until(lambda: fleet.kinds[ACK] + fleet.kinds[b"erro"] >= acked + sessions)
        still = fleet.kinds[ACK] - acked
        expect_no_failover(survivor)
    if len(back) < len(victims):
        raise BenchError(f"{len(victims) - len(back)} did not come back")
    return {
        "bench": "resume",
        "connections": len(victims),
        "sessions": sessions,
        "members": members,
        "connectionsOnTheOther": len(crowd.musicians) - len(victims),
        "secondsUntilAll": round(took, 2),
        "sinceDeathMs": spread([(musician.shown_at - killed) * 1000 for musician in victims]),
        "sinceConnectMs": spread(
            [(musician.shown_at - musician.connecting) * 1000 for musician in victims]
        ),
        "resumed": sum(
            each["you"]["resumed"]
            and each["you"]["memberId"] == before[musician]["you"]["memberId"]
            for musician, each in told.items()
        ),
        "foundPlaying": sum(each["isPlaying"] for each in told.values()),
        "leadersKilled": sum(musician in told for musician in leaders),
        "leadersLost": len(leaders) - len(kept),
        "leadersRefusedLater": sessions - still,
        "roleChanges": kinds[b"role"],
        "joinsAndLeaves": kinds[b"user"],
        "survivorCpu": round(cpu / took, 3),
        "secondsWatched": seconds,
    }


def _at(crowd: Crowd, client: Client) -> Musician:
    return next(musician for musician in crowd.musicians if musician.client is client)
