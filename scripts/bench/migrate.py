"""Benchmark `migrate`: the return of sessions to Redis, and the latency of commands meanwhile."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from types import TracebackType
from typing import NamedTuple, Self, TypedDict

from scripts.bench.fleet import ACK, Fleet, FleetClient, masked
from scripts.bench.load import SETTLE_S, disable_garbage_collection, join
from scripts.bench.processes import (
    ROOT,
    BenchError,
    MeasuredServer,
    bandsync,
    clean_environment,
    now_s,
    spread,
    wall_ms,
)

_PROBES = 3
# Numbers far from those of the loaded sessions.
_FIRST_PROBE = 1_000_000
_PAUSE_S = 0.002
_POLL_S = 0.001
# Commands within this time after the kill are counted as its consequences.
_KILL_S = 0.5
_PATIENCE_S = 30.0
# A batch of changes, then a wait for their replies: small enough not to delay the probes.
_BATCH = 20


class RecoveryDocument(TypedDict):
    """The last recovery, in `/api/storage/status`."""

    sessions: int
    migrationMs: float
    at: float


class StorageStatusDocument(TypedDict):
    """The fields of `/api/storage/status` that are read here."""

    mode: str
    lastRecovery: RecoveryDocument


class ProbeSample(NamedTuple):
    """One command of a probe: when it was sent, and its latency, seconds."""

    sent: float
    waited_s: float


def migrate(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Latency of commands while Redis dies, every session changes, and Redis returns empty."""
    # Imported late, so that the process of the probes does not load it.
    from scripts.bench.redis import new_redis

    connections = sessions * members + _PROBES
    with (
        new_redis() as redis,
        bandsync(connections, members, redis_url=redis.url()) as server,
        Fleet(server.port) as fleet,
    ):
        _expect(server, "redis")
        leaders = join(fleet, sessions, members)
        disable_garbage_collection()
        with ProbeProcess(server.port) as probers:
            fleet.run_for(SETTLE_S)
            began = now_s()
            fleet.run_for(seconds)
            notices = fleet.kinds[b"stor"]
            killed = now_s()
            redis.kill()
            fleet.run_until(lambda: fleet.kinds[b"stor"] == notices + sessions * members)
            fleet.run_for(2 * _KILL_S)
            _change_all(fleet, leaders)
            _expect(server, "memory")
            fleet.run_for(SETTLE_S)
            restarted = now_s()
            redis.restart(empty=True)
            fleet.run_until(lambda: fleet.kinds[b"stor"] == notices + 2 * sessions * members)
            fleet.run_for(seconds)
            ended = now_s()
            samples = probers.stop()
        status = _expect(server, "redis")
        stored = redis.cli("EVAL", "return #redis.call('KEYS', '*session:*')", 0)
        gone = fleet.gone
    recovery = status["lastRecovery"]
    if not recovery["sessions"] == stored == sessions + _PROBES or gone:
        raise BenchError(f"{stored} sessions in Redis, {gone} connections gone: {recovery}")
    # Redis shares the clock of this machine, and so does the session clock.
    finished = recovery["at"] / 1000 - (wall_ms() / 1000 - now_s())
    decided = finished - recovery["migrationMs"] / 1000
    phases = {
        "before": (began, killed),
        "kill": (killed, killed + _KILL_S),
        "memory": (killed + _KILL_S, restarted),
        "proving": (restarted, decided),
        "migrating": (decided, finished),
        "after": (finished, ended),
    }
    waits = {name: _waits(samples, *span) for name, span in phases.items()}
    return {
        "bench": "migrate",
        "sessions": sessions,
        "members": members,
        "sessionsMoved": recovery["sessions"],
        "migrationMs": round(recovery["migrationMs"], 1),
        "secondsFromRestart": round(finished - restarted, 2),
        "longestStallMs": {name: waited_s["max"] for name, waited_s in waits.items()},
        "commandMs": waits,
        "commands": len(samples),
    }


def _waits(samples: Sequence[ProbeSample], begin: float, end: float) -> dict[str, float]:
    """Latencies of the commands in flight between ``begin`` and ``end``."""
    return spread(
        [waited_s * 1000 for sent, waited_s in samples if sent < end and sent + waited_s > begin]
    )


def _change_all(fleet: Fleet, leaders: Sequence[FleetClient]) -> None:
    frame = masked({"type": "chat_message", "text": "in memory mode", "requestId": "c0"})
    answered = fleet.kinds[ACK]
    for start in range(0, len(leaders), _BATCH):
        for leader in leaders[start : start + _BATCH]:
            leader.send(frame)
            answered += 1
        fleet.run_until(partial(_has_acks, fleet, answered))


def _has_acks(fleet: Fleet, count: int) -> bool:
    return fleet.kinds[ACK] == count


def _expect(server: MeasuredServer, mode: str) -> StorageStatusDocument:
    """Read the storage status, and check its mode.

    Raises:
        BenchError: the mode is another one.
    """
    status: StorageStatusDocument = json.loads(server.get("/api/storage/status"))
    if status["mode"] != mode:
        raise BenchError(f"the storage mode is not {mode}: {status}")
    return status


class ProbeProcess:
    """Members that send one command after the other, in a process of their own."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "scripts.bench.migrate", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(),
            cwd=ROOT / "scripts",
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise BenchError("the probes did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> list[ProbeSample]:
        """End the process; return all its samples."""
        output, _ = self._process.communicate(timeout=_PATIENCE_S)
        if self._process.returncode != 0:
            raise BenchError("the probes failed")
        return [ProbeSample(*sample) for sample in json.loads(output)]


class _ProbeMember:
    """One probing member."""

    def __init__(self, client: FleetClient, samples: list[ProbeSample]) -> None:
        self._client = client
        self._samples = samples
        self._sent: float | None = None
        self._due = 0.0
        self._frames = cycle(
            masked({"type": "seek", "positionMs": 1000.0 * number, "requestId": "c0"})
            for number in range(16)
        )
        client.on_text = self._receive

    def send_if_due(self) -> None:
        """Send the next command if it is due."""
        if self._sent is None and now_s() >= self._due:
            self._sent = now_s()
            self._client.send(next(self._frames))

    def _receive(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(b'{"type":"error"', start):
            raise BenchError(f"refused: {data[start:end].decode()}")
        if self._sent is not None and data.startswith(b'{"type":"ack"', start):
            now = now_s()
            self._samples.append(ProbeSample(self._sent, now - self._sent))
            self._sent = None
            self._due = now + _PAUSE_S


def _run_probes(port: int) -> list[ProbeSample]:
    """Send commands until the end of standard input."""
    samples: list[ProbeSample] = []
    with Fleet(port) as fleet:
        clients = fleet.open(
            range(_FIRST_PROBE, _FIRST_PROBE + _PROBES), masked({"type": "join_session"})
        )
        fleet.run_until(lambda: fleet.kinds[b"snap"] == _PROBES)
        probes = [_ProbeMember(client, samples) for client in clients]
        disable_garbage_collection()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for probe in probes:
                probe.send_if_due()
            fleet.run_for(_POLL_S)
    return samples


if __name__ == "__main__":
    print(json.dumps(_run_probes(int(sys.argv[1]))))
