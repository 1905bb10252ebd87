"""Two servers are restarted one after the other while bands play; bench.py starts it."""

import statistics
from pathlib import Path
from random import Random

import trio

from bandsync import client
from bandsync.client import Band
from scripts.bench.processes import BenchError, spread
from scripts.testbed.redis_server import RedisServer
from scripts.testbed.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]


_SETTLE_S = 8.0
_LOOK_S = 0.05
_PATIENCE_S = 60.0
_TEMPO_BPM = 120.0


class Player:
    """A member whose beat is watched.

    Attributes:
        url: of its server.
        moved_ms: how far its beat was from where it had been before anything was restarted.
    """

    def __init__(self, band: Band, url: str) -> None:
        self.band = band
        self.url = url
        self.led = band.is_leader
        self.member_id = band.member_id
        self.connection_id = band.server.connection_id
        self.moved_ms: list[float] = []
        self._still_ms: float | None = None

    def beat_zero_ms(self) -> float:
        """When the song's first beat was, on this process's clock, as this member knows it."""
        segment = self.band.transport_at()
        instant = segment.anchor_time - segment.beat * 60_000 / segment.tempo_bpm
        return self.band.clock.to_local(instant) * 1000

    def hold(self, seen_ms: list[float]) -> None:
        """From now on the beat must stay where it was seen."""
        self._still_ms = statistics.median(seen_ms)

    def look(self) -> None:
        """Note how far the beat is from there now."""
        if self._still_ms is not None:
            self.moved_ms.append(self.beat_zero_ms() - self._still_ms)


def rolling(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Two servers restart in turn under load: who comes back, and how far beats move."""
    return trio.run(_rolling, sessions, members, seconds)


async def _rolling(sessions: int, members: int, seconds: float) -> dict[str, object]:
    with RedisServer() as redis:
        servers = [
            ServerProcess(
                REDIS_ENABLED="true",
                REDIS_URL=redis.url(),
                SERVER_ID=f"server-{number}",
                MAX_MEMBERS=str(members),
                RATE_LIMIT_FACTOR="0",
                LOG_LEVEL="warning",
            )
            for number in (1, 2)
        ]
        try:
            for server in servers:
                await trio.to_thread.run_sync(server.start)
            async with trio.open_nursery() as nursery:
                result = await _measure(nursery, servers, sessions, members, seconds)
                nursery.cancel_scope.cancel()
        finally:
            for server in servers:
                server.close()
    return result


async def _measure(
    nursery: trio.Nursery,
    servers: list[ServerProcess],
    sessions: int,
    members: int,
    seconds: float,
) -> dict[str, object]:
    players: list[Player] = []
    for session in range(sessions):
        for member in range(members):
            # Members alternate, so that every band is on both.
            server = servers[member % len(servers)]
            players.append(await nursery.start(_play_along, server.ws_url, f"band-{session}"))
    leaders = [player for player in players if player.led]
    for player in leaders:
        await player.band.set_tempo(_TEMPO_BPM)
        await player.band.play()
    await trio.sleep(_SETTLE_S)
    seen: dict[Player, list[float]] = {player: [] for player in players}
    with trio.move_on_after(seconds):
        while True:
            for player in players:
                seen[player].append(player.beat_zero_ms())
            await trio.sleep(_LOOK_S)
    for player in players:
        player.hold(seen[player])
    asked = [0]
    nursery.start_soon(_look, players)
    nursery.start_soon(_chat, players, asked)
    outages = []
    for server in servers:
        await trio.sleep(seconds)
        outages.append(await _restart(server, players))
    await trio.sleep(seconds)
    moved = [abs(ms) for player in players for ms in player.moved_ms]
    return {
        "bench": "rolling",
        "sessions": sessions,
        "members": members,
        "secondsUntilAllBack": [round(outage, 2) for outage in outages],
        "chatsMeanwhile": asked[0],
        "sameMember": sum(player.band.member_id == player.member_id for player in players),
        "sameRole": sum(player.band.is_leader == player.led for player in players),
        "reconnected": sum(
            player.band.server.connection_id != player.connection_id for player in players
        ),
        "looks": len(moved),
        "beatMovedMs": spread(moved),
        "beatMovedByMoreThan5Ms": sum(ms > 5 for ms in moved),
    }


async def _play_along(url: str, session: str, *, task_status: trio.TaskStatus[Player]) -> None:
    async with client.connect(url, session) as band:
        task_status.started(Player(band, url))
        await trio.sleep_forever()


async def _look(players: list[Player]) -> None:
    while True:
        for player in players:
            player.look()
        await trio.sleep(_LOOK_S)


async def _chat(players: list[Player], asked: list[int]) -> None:
    """Somebody says something, again and again; who is away now says nothing."""
    draw = Random(1)  # noqa: S311  # whose turn it is
    while True:
        await trio.sleep(_LOOK_S)
        try:
            await draw.choice(players).band.chat("under load")
            asked[0] += 1
        except client.ClientError:
            continue


async def _restart(server: ServerProcess, players: list[Player]) -> float:
    """SIGTERM, drain, start; seconds until everybody who was there is back."""
    began = trio.current_time()
    with trio.move_on_after(_PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for player in players:
                if player.url == server.ws_url:
                    await nursery.start(_come_back, player.band)
            await trio.to_thread.run_sync(server.stop)
            await trio.to_thread.run_sync(server.start)
        return trio.current_time() - began
    raise BenchError("not everybody came back")


async def _come_back(band: Band, *, task_status: trio.TaskStatus[None]) -> None:
    """Wait for another connection than this one."""
    before = band.server.connection_id
    events = band.events()
    task_status.started()
    async for _ in events:
        if band.status == "online" and band.server.connection_id != before:
            return
