"""Benchmark `rolling`: two servers are restarted in turn while bands play."""

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
_PERIOD_S = 0.05
_PATIENCE_S = 60.0
_TEMPO_BPM = 120.0


class BeatProbe:
    """A member whose beat is measured.

    Attributes:
        band: its connection to the session.
        url: of its server.
        was_leader: whether it led at the start.
        member_id: at the start.
        connection_id: at the start.
        moved_ms: distances of its beat from the reference, one for each measurement.
    """

    def __init__(self, band: Band, url: str) -> None:
        self.band = band
        self.url = url
        self.was_leader = band.is_leader
        self.member_id = band.member_id
        self.connection_id = band.server.connection_id
        self.moved_ms: list[float] = []
        self._reference_ms: float | None = None

    def beat_zero_ms(self) -> float:
        """The instant of the song's first beat, on the clock of this process, ms."""
        segment = self.band.transport_at()
        instant = segment.anchor_time - segment.beat * 60_000 / segment.tempo_bpm
        return self.band.clock.to_local(instant) * 1000

    def set_reference(self, seen_ms: list[float]) -> None:
        """Use the median of these instants as the reference."""
        self._reference_ms = statistics.median(seen_ms)

    def measure(self) -> None:
        """Record the distance of the beat from the reference."""
        if self._reference_ms is not None:
            self.moved_ms.append(self.beat_zero_ms() - self._reference_ms)


def rolling(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Two servers restart in turn under load: outages, roles, and movements of the beat."""
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
    probes: list[BeatProbe] = []
    for session in range(sessions):
        for member in range(members):
            # Members alternate, so that every band uses both servers.
            server = servers[member % len(servers)]
            probes.append(await nursery.start(_connect, server.ws_url, f"band-{session}"))
    leaders = [probe for probe in probes if probe.was_leader]
    for probe in leaders:
        await probe.band.set_tempo(_TEMPO_BPM)
        await probe.band.play()
    await trio.sleep(_SETTLE_S)
    seen: dict[BeatProbe, list[float]] = {probe: [] for probe in probes}
    with trio.move_on_after(seconds):
        while True:
            for probe in probes:
                seen[probe].append(probe.beat_zero_ms())
            await trio.sleep(_PERIOD_S)
    for probe in probes:
        probe.set_reference(seen[probe])
    sent = [0]
    nursery.start_soon(_measure_for_ever, probes)
    nursery.start_soon(_chat, probes, sent)
    outages = []
    for server in servers:
        await trio.sleep(seconds)
        outages.append(await _restart(server, probes))
    await trio.sleep(seconds)
    moved = [abs(ms) for probe in probes for ms in probe.moved_ms]
    return {
        "bench": "rolling",
        "sessions": sessions,
        "members": members,
        "secondsUntilAllBack": [round(outage, 2) for outage in outages],
        "chatsMeanwhile": sent[0],
        "sameMember": sum(probe.band.member_id == probe.member_id for probe in probes),
        "sameRole": sum(probe.band.is_leader == probe.was_leader for probe in probes),
        "reconnected": sum(
            probe.band.server.connection_id != probe.connection_id for probe in probes
        ),
        "looks": len(moved),
        "beatMovedMs": spread(moved),
        "beatMovedByMoreThan5Ms": sum(ms > 5 for ms in moved),
    }


async def _connect(url: str, session: str, *, task_status: trio.TaskStatus[BeatProbe]) -> None:
    async with client.connect(url, session) as band:
        task_status.started(BeatProbe(band, url))
        await trio.sleep_forever()


async def _measure_for_ever(probes: list[BeatProbe]) -> None:
    while True:
        for probe in probes:
            probe.measure()
        await trio.sleep(_PERIOD_S)


async def _chat(probes: list[BeatProbe], sent: list[int]) -> None:
    """Send chat messages of random members. Disconnected ones are skipped."""
    draw = Random(1)  # noqa: S311  # whose turn it is
    while True:
        await trio.sleep(_PERIOD_S)
        try:
            await draw.choice(probes).band.chat("under load")
            sent[0] += 1
        except client.ClientError:
            continue


async def _restart(server: ServerProcess, probes: list[BeatProbe]) -> float:
    """Drain and restart a server; return the seconds until all its members are back."""
    began = trio.current_time()
    with trio.move_on_after(_PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for probe in probes:
                if probe.url == server.ws_url:
                    await nursery.start(_wait_for_new_connection, probe.band)
            await trio.to_thread.run_sync(server.stop)
            await trio.to_thread.run_sync(server.start)
        return trio.current_time() - began
    raise BenchError("not all members came back")


async def _wait_for_new_connection(band: Band, *, task_status: trio.TaskStatus[None]) -> None:
    """Wait until the band has another connection."""
    before = band.server.connection_id
    events = band.events()
    task_status.started()
    async for _ in events:
        if band.status == "online" and band.server.connection_id != before:
            return
