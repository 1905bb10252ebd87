"""What a load has seen: counts, latencies, and what must not happen."""

import time
from collections import Counter
from pathlib import Path

from scripts.bench.epoll_ws import TICK, Loop
from scripts.bench.histogram import Histogram
from scripts.bench.processes import now_s

# The kinds of versioned events: every member is told each of them, in order.
EVENTS = frozenset(
    (b"user", b"memb", b"role", b"play", b"paus", b"stop", b"seek", b"temp", b"posi", b"mess")
) | {b"chat"}
# What the server counts as deliveries besides.
VOLATILE = frozenset((TICK, b"room"))
LATENCIES = ("command", "event", "tick", "join", "resume")

_EXAMPLES = 20


class Score:
    """Counts what happens.

    Attributes:
        counts: of what the clients did.
        errors: that they were told, by code.
        closes: lines that ended without their doing, by close code or word.
        findings: what must not happen, by name; with some ``examples``.
        anchor_error_ms: the most that two members' ideas of where the song is were apart, by the
            anchors they were given.
        tick_error_ms: the most that a tick was off the anchor that its receiver was given before.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.closes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.examples: list[str] = []
        self.anchor_error_ms = 0.0
        self.tick_error_ms = 0.0
        self._whole = {name: Histogram() for name in LATENCIES}
        self._lately = {name: Histogram() for name in LATENCIES}

    def took(self, name: str, latency_ms: float) -> None:
        """Note a latency."""
        self._lately[name].add(latency_ms)
        self._whole[name].add(latency_ms)

    def find(self, name: str, text: str) -> None:
        """Note what must not happen."""
        self.findings[name] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{name}: {text}")

    def lately(self) -> dict[str, dict[str, float] | None]:
        """The latencies since the last look."""
        told = {name: histogram.spread() for name, histogram in self._lately.items()}
        self._lately = {name: Histogram() for name in LATENCIES}
        return told

    def all_in_all(self) -> dict[str, dict[str, float] | None]:
        """The latencies since the last time that this was called."""
        told = {name: histogram.spread() for name, histogram in self._whole.items()}
        self._whole = {name: Histogram() for name in LATENCIES}
        return told


def deliveries(kinds: Counter[bytes]) -> int:
    """How many of the texts received the server counts as deliveries."""
    return sum(count for kind, count in kinds.items() if kind in EVENTS or kind in VOLATILE)


class Pulse:
    """What happens per second, and what it costs this process."""

    def __init__(self, loop: Loop, score: Score) -> None:
        self._loop = loop
        self._score = score
        self._began = self._at = now_s()
        self._kinds: Counter[bytes] = Counter()
        self._counts: Counter[str] = Counter()
        self._cpu = time.process_time()
        self._waited = waited_s()

    def row(self) -> dict[str, object]:
        """What happened since the last row."""
        loop, score = self._loop, self._score
        now, cpu, waited = now_s(), time.process_time(), waited_s()
        seconds = now - self._at
        kinds, counts = loop.kinds - self._kinds, score.counts - self._counts
        row: dict[str, object] = {
            "t": round(now - self._began, 3),
            "seconds": round(seconds, 3),
            "deliveries": deliveries(kinds),
            "ticks": kinds[TICK],
            "counts": dict(counts),
            "errors": sum(score.errors.values()),
            "closes": sum(score.closes.values()),
            "findings": sum(score.findings.values()),
            "latencyMs": score.lately(),
            "driverCpu": round((cpu - self._cpu) / seconds, 3),
            "driverWaited": round((waited - self._waited) / seconds, 3),
            "driverLagMs": round(loop.lag_s * 1000, 2),
        }
        loop.lag_s = 0.0
        self._at, self._cpu, self._waited = now, cpu, waited
        self._kinds, self._counts = loop.kinds.copy(), score.counts.copy()
        return row


def waited_s() -> float:
    """How long this process could run and had no core, seconds; 0 where that is not told."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
