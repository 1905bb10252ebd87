"""How sessions come back to Redis, and what that costs those who play; bench.py starts it."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle
from types import TracebackType
from typing import Any, NamedTuple, Self

from scripts.bench.fleet import ACK, Client, Fleet, masked
from scripts.bench.load import SETTLE_S, join, settle
from scripts.bench.processes import (
    ROOT,
    BenchError,
    Server,
    bandsync,
    clean_environment,
    now_s,
    spread,
    wall_ms,
)

_PROBES = 3
# Sessions of their own, far from those of the load.
_FIRST_PROBE = 1_000_000
_PAUSE_S = 0.002
_POLL_S = 0.001
# How long after the kill its consequences are counted as such.
_KILL_S = 0.5
_PATIENCE_S = 30.0
# As many changes in a row, then their answers: no load that a command would wait behind.
_AT_ONCE = 20


class Sample(NamedTuple):
    """One command of a prober: when it was sent, and how long its answer took, seconds."""

    sent: float
    took: float


def migrate(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Redis dies, every session changes, Redis comes back empty: what commands wait meanwhile."""
    # Not at the top: the prober should pay for nothing of it.
    from scripts.bench.redis import new_redis

    connections = sessions * members + _PROBES
    with (
        new_redis() as redis,
        bandsync(connections, members, redis_url=redis.url()) as server,
        Fleet(server.port) as fleet,
    ):
        _expect(server, "redis")
        leaders = join(fleet, sessions, members)
        settle()
        with Probers(server.port) as probers:
            fleet.run_for(SETTLE_S)
            began = now_s()
            fleet.run_for(seconds)
            told = fleet.kinds[b"stor"]
            killed = now_s()
            redis.kill()
            fleet.run_until(lambda: fleet.kinds[b"stor"] == told + sessions * members)
            fleet.run_for(2 * _KILL_S)
            _change_all(fleet, leaders)
            _expect(server, "memory")
            fleet.run_for(SETTLE_S)
            restarted = now_s()
            redis.restart(empty=True)
            fleet.run_until(lambda: fleet.kinds[b"stor"] == told + 2 * sessions * members)
            fleet.run_for(seconds)
            ended = now_s()
            samples = probers.stop()
        status = _expect(server, "redis")
        stored = redis.cli("EVAL", "return #redis.call('KEYS', '*session:*')", 0)
        gone = fleet.gone
    recovery = status["lastRecovery"]
    if not recovery["sessions"] == stored == sessions + _PROBES or gone:
        raise BenchError(f"{stored} sessions in Redis, {gone} connections gone: {recovery}")
    # The session clock is the machine's, which Redis shares.
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
        "longestStallMs": {name: took["max"] for name, took in waits.items()},
        "commandMs": waits,
        "commands": len(samples),
    }


def _waits(samples: Sequence[Sample], begin: float, end: float) -> dict[str, float]:
    """How long the commands took that were under way then."""
    return spread([took * 1000 for sent, took in samples if sent < end and sent + took > begin])


def _change_all(fleet: Fleet, leaders: Sequence[Client]) -> None:
    frame = masked({"type": "chat_message", "text": "Without a net now", "requestId": "c0"})
    answered = fleet.kinds[ACK]
    for start in range(0, len(leaders), _AT_ONCE):
        for leader in leaders[start : start + _AT_ONCE]:
            leader.send(frame)
            answered += 1
        fleet.run_until(lambda wanted=answered: fleet.kinds[ACK] == wanted)


def _expect(server: Server, mode: str) -> dict[str, Any]:
    """The storage status.

    Raises:
        BenchError: another mode.
    """
    status: dict[str, Any] = json.loads(server.get("/api/storage/status"))
    if status["mode"] != mode:
        raise BenchError(f"the storage mode is not {mode}: {status}")
    return status


class Probers:
    """Members that give one command after the other, in a process that does nothing else."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own script
            [sys.executable, "-m", "scripts.bench.migrate", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(),
            cwd=ROOT / "scripts",
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise BenchError("the probers did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> list[Sample]:
        """End it, and tell of all its commands."""
        output, _ = self._process.communicate(timeout=_PATIENCE_S)
        if self._process.returncode != 0:
            raise BenchError("the probers failed")
        return [Sample(*sample) for sample in json.loads(output)]


class _Probe:
    """One member."""

    def __init__(self, client: Client, samples: list[Sample]) -> None:
        self._client = client
        self._samples = samples
        self._sent: float | None = None
        self._due = 0.0
        self._frames = cycle(
            masked({"type": "seek", "positionMs": 1000.0 * number, "requestId": "c0"})
            for number in range(16)
        )
        client.on_text = self._receive

    def go_on(self) -> None:
        """Send the next command if it is time."""
        if self._sent is None and now_s() >= self._due:
            self._sent = now_s()
            self._client.send(next(self._frames))

    def _receive(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(b'{"type":"error"', start):
            raise BenchError(f"refused: {data[start:end].decode()}")
        if self._sent is not None and data.startswith(b'{"type":"ack"', start):
            now = now_s()
            self._samples.append(Sample(self._sent, now - self._sent))
            self._sent = None
            self._due = now + _PAUSE_S


def _probe(port: int) -> list[Sample]:
    """Give commands until our input ends."""
    samples: list[Sample] = []
    with Fleet(port) as fleet:
        clients = fleet.open(
            range(_FIRST_PROBE, _FIRST_PROBE + _PROBES), masked({"type": "join_session"})
        )
        fleet.run_until(lambda: fleet.kinds[b"snap"] == _PROBES)
        probes = [_Probe(client, samples) for client in clients]
        settle()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for probe in probes:
                probe.go_on()
            fleet.run_for(_POLL_S)
    return samples


if __name__ == "__main__":
    print(json.dumps(_probe(int(sys.argv[1]))))
