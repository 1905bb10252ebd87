"""The score of a load: counts, latencies and violations."""

import time
from collections import Counter
from pathlib import Path

from scripts.bench.documents import SecondReport, Spread
from scripts.bench.epoll_ws import TICK, EpollLoop
from scripts.bench.histogram import Histogram
from scripts.bench.processes import now_s

# Versioned events, by the beginning of their type. Every member receives each of them, in order.
EVENTS = frozenset(
    (b"user", b"memb", b"role", b"play", b"paus", b"stop", b"seek", b"temp", b"posi", b"mess")
) | {b"chat"}
# Other messages that the server counts as deliveries.
VOLATILE = frozenset((TICK, b"room"))
LATENCIES = ("command", "event", "tick", "join", "resume")

_EXAMPLES = 20


class LoadScore:
    """Counts actions, latencies and violations.

    Attributes:
        counts: actions of the clients, by name.
        errors: error messages received, by code.
        closes: connections that the server ended, by close code or reason.
        findings: violations, by name.
        examples: texts of the first violations.
        anchor_error_ms: largest distance between the song positions of two members, by their
            anchors.
        tick_error_ms: largest distance of a tick from its receiver's anchor.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.closes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.examples: list[str] = []
        self.anchor_error_ms = 0.0
        self.tick_error_ms = 0.0
        self._all = {name: Histogram() for name in LATENCIES}
        self._latest = {name: Histogram() for name in LATENCIES}

    def add_latency(self, name: str, latency_ms: float) -> None:
        """Count a latency."""
        self._latest[name].add(latency_ms)
        self._all[name].add(latency_ms)

    def add_finding(self, name: str, text: str) -> None:
        """Count a violation."""
        self.findings[name] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{name}: {text}")

    def take_latest(self) -> dict[str, Spread]:
        """Latencies since the previous call."""
        spreads = {name: histogram.spread() for name, histogram in self._latest.items()}
        self._latest = {name: Histogram() for name in LATENCIES}
        return spreads

    def take_all(self) -> dict[str, Spread]:
        """Latencies since the previous call; independent of `take_latest`."""
        spreads = {name: histogram.spread() for name, histogram in self._all.items()}
        self._all = {name: Histogram() for name in LATENCIES}
        return spreads


def deliveries(kinds: Counter[bytes]) -> int:
    """Number of received messages that the server counts as deliveries."""
    return sum(count for kind, count in kinds.items() if kind in EVENTS or kind in VOLATILE)


class SecondRecorder:
    """Measures what happened in each second, and the CPU of this process."""

    def __init__(self, loop: EpollLoop, score: LoadScore) -> None:
        self._loop = loop
        self._score = score
        self._began = self._at = now_s()
        self._kinds: Counter[bytes] = Counter()
        self._counts: Counter[str] = Counter()
        self._cpu = time.process_time()
        self._waited = core_wait_s()

    def row(self) -> SecondReport:
        """The report since the previous one."""
        loop, score = self._loop, self._score
        now, cpu, waited = now_s(), time.process_time(), core_wait_s()
        seconds = now - self._at
        kinds, counts = loop.kinds - self._kinds, score.counts - self._counts
        row: SecondReport = {
            "t": round(now - self._began, 3),
            "seconds": round(seconds, 3),
            "deliveries": deliveries(kinds),
            "ticks": kinds[TICK],
            "counts": dict(counts),
            "errors": sum(score.errors.values()),
            "closes": sum(score.closes.values()),
            "findings": sum(score.findings.values()),
            "latencyMs": score.take_latest(),
            "driverCpu": round((cpu - self._cpu) / seconds, 3),
            "driverWaited": round((waited - self._waited) / seconds, 3),
            "driverLagMs": round(loop.lag_s * 1000, 2),
        }
        loop.lag_s = 0.0
        self._at, self._cpu, self._waited = now, cpu, waited
        self._kinds, self._counts = loop.kinds.copy(), score.counts.copy()
        return row


def core_wait_s() -> float:
    """Time that this process was runnable without a core, seconds; 0 where unknown."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
