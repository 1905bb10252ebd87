"""`chaos.py --servers N`: bands spread over servers, which are broken while they play."""

import random
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

from scripts.chaos.cluster_faults import BLOWS, TOGETHER, Blow
from scripts.chaos.cluster_judge import (
    Ending,
    disagreements,
    excuse,
    judge_changes,
    judge_lines,
    judge_mirrors,
    judge_removals,
    judge_returns,
    removed,
)
from scripts.chaos.judge import Finding, essence
from scripts.chaos.player import ChaosError
from scripts.chaos.roaming import Line, Return, Roamer
from scripts.chaos.servers import GRACE_S, Cast, Host, Life, cast
from scripts.chaos.trace import Traces

_BASELINE_S = 1.0
_REST_S = (0.2, 2.0)
_PAIR_SHARE = 0.4
_WAIT_SHARE = 0.5
_LAST_WORD_S = (0.5, 3.0)
_HURRY_SHARE = 0.4
_RECOVERY_S = 60.0
# Until a change whose only other copy died with a server is surely with others.
_KNOWN_S = 3.0
# The sweep and its glance, the grace, anti-entropy, and a little.
_CALM_S = 10.0 + 2.0 + GRACE_S + 5.0 + 4.0
_POLL_S = 0.2


class Tour:
    """One run with one seed.

    Attributes:
        told: the faults, with the time when each began.
        findings: what is wrong besides what the records show.
    """

    def __init__(
        self, nursery: trio.Nursery, scene: Cast, given: Namespace, draw: random.Random
    ) -> None:
        self.told: list[tuple[float, str]] = []
        self.findings: list[Finding] = []
        self.endings: list[Ending] = []
        self.began = trio.current_time()
        self._nursery = nursery
        self._cast = scene
        self._given = given
        self._draw = draw
        self._server_hit = 0.0
        self.bands = {
            f"band{number}": [self._roamer(f"band{number}", f"p{n}") for n in range(given.members)]
            for number in range(given.bands)
        }

    @property
    def roamers(self) -> list[Roamer]:
        """All of them."""
        return [roamer for band in self.bands.values() for roamer in band]

    @property
    def lines(self) -> list[Line]:
        """All connections that ever were."""
        return [line for roamer in self.roamers for line in roamer.lines]

    @property
    def lives(self) -> list[Life]:
        """All server processes that ever were."""
        return [life for host in self._cast.hosts for life in host.lives]

    async def play(self, blows: Sequence[Blow]) -> None:
        """Everybody plays, the faults come; then all come to rest."""
        async with trio.open_nursery() as playing:
            for roamer in self.roamers:
                playing.start_soon(roamer.play)
            await trio.sleep(_BASELINE_S)
            end = trio.current_time() + self._given.minutes * 60
            while blows and trio.current_time() < end:
                await self._strike(blows, end - trio.current_time())
                await trio.sleep(self._draw.uniform(*_REST_S))
                if self._draw.random() < _WAIT_SHARE:
                    with trio.move_on_after(5.0):
                        await self._cast.until_all_on_redis(_RECOVERY_S)
            if blows:
                # The last word is spoken during a fault, and nobody speaks after it.
                playing.start_soon(self._stop_soon)
                await self._strike([blow for blow in blows if not blow.long] or blows, 0.0)
            self._stop()
        await self._cast.until_all_on_redis(_RECOVERY_S)

    async def _stop_soon(self) -> None:
        await trio.sleep(self._draw.uniform(*_LAST_WORD_S))
        self._stop()

    def _stop(self) -> None:
        for roamer in self.roamers:
            roamer.stop()

    async def rest(self) -> None:
        """Wait until all agree, let a stranger join, and see that it stays so."""
        await self._agree(_CALM_S)
        for session, band in self.bands.items():
            late = self._roamer(session, "late")
            band.append(late)
        await self._agree(_CALM_S)
        before = {ending.session: essence(ending.stored) for ending in self.endings}
        await trio.sleep(self._given.calm)
        await self._agree(_POLL_S)
        for ending in self.endings:
            if (now := essence(ending.stored)) != before[ending.session]:
                self._find(f"{ending.session}: {before[ending.session]} became {now} by itself")

    def verdict(self) -> list[Finding]:
        """All that is wrong."""
        end = trio.current_time()
        self.traces = traces = Traces(self.lives, self._cast.lag)
        findings = [*judge_lines(self.lines, traces, end), *self.findings]
        findings += judge_mirrors(self.lives, traces)
        self.gone = removed(self.lines, traces)
        returns = [back for roamer in self.roamers for back in roamer.returns]
        findings += judge_returns(returns, self._cast.wiped, self.gone, traces)
        for ending in self.endings:
            lines = [line for line in self.lines if line.session == ending.session]
            findings += judge_changes(lines, ending, traces)
            findings += judge_removals(lines, traces)
        return sorted(findings, key=lambda finding: finding.at)

    def excuse(self, back: Return) -> str | None:
        """Why somebody was rightly not resumed."""
        return excuse(back, self._cast.wiped, self.gone, self.traces)

    async def _strike(self, blows: Sequence[Blow], left_s: float) -> None:
        draw = self._draw
        fitting = [blow for blow in blows if not blow.long or left_s >= 10.0] or list(blows)
        blow = draw.choices(fitting, [blow.weight for blow in fitting])[0]
        hosts = draw.sample(self._cast.hosts, len(self._cast.hosts))
        pair = [(blow, hosts[0])]
        if blow.hits == "server" and draw.random() < _PAIR_SHARE:
            others = [
                other
                for other in fitting
                if other.hits in TOGETHER or (other.hits == "server" and len(hosts) > 2)
            ]
            if others:
                pair.append((draw.choice(others), hosts[1]))
        if blow.hits == "data":
            # A server that has just died and the data of Redis may be the only copies.
            await trio.sleep_until(self._server_hit + _KNOWN_S)
        hurry = draw.random() < _HURRY_SHARE
        for roamer in self.roamers:
            roamer.hurry = hurry
        async with trio.open_nursery() as striking:
            for one, host in pair:
                striking.start_soon(self._blow, one, host)
                await trio.sleep(draw.uniform(0.0, 0.5))
        if blow.hits == "server":
            self._server_hit = trio.current_time()

    async def _blow(self, blow: Blow, host: Host) -> None:
        at = trio.current_time()
        await blow.strike(
            self._cast, host, self._draw, lambda text: self.told.append((at - self.began, text))
        )

    async def _agree(self, patience_s: float) -> None:
        """Wait until all agree on everything; what they do not agree on is a finding."""
        deadline = trio.current_time() + patience_s
        while True:
            self.endings = []
            wrong: list[str] = []
            for session, band in self.bands.items():
                snapshots = {}
                for roamer in band:
                    await roamer.stay()
                    shown = await roamer.shown()
                    if shown is None:
                        wrong.append(f"{session}: {roamer.name} has no answer")
                    else:
                        snapshots[roamer.name] = shown
                stored = await self._cast.stored(session)
                if stored is None:
                    wrong.append(f"{session} is not in Redis")
                else:
                    members = {roamer.member_id: roamer.name for roamer in band}
                    ending = Ending(session, snapshots, *stored, members)
                    self.endings.append(ending)
                    wrong += disagreements(ending)
            if not wrong:
                return
            if trio.current_time() >= deadline:
                for text in wrong:
                    self._find(text)
                return
            await trio.sleep(_POLL_S)

    def _roamer(self, session: str, name: str) -> Roamer:
        draw = random.Random(f"{self._draw.random()}")  # noqa: S311  # a seed to repeat a run
        return Roamer(self._nursery, self._cast, session, name, draw)

    def _find(self, text: str) -> None:
        self.findings.append(Finding("state", trio.current_time(), text))


async def perform(seed: int, given: Namespace, logs: Path) -> bool:
    """A whole run; whether nothing is wrong. Prints its faults and a verdict."""
    draw = random.Random(seed)  # noqa: S311  # a seed to repeat a run
    findings: list[Finding] = []
    async with (
        trio.open_nursery() as nursery,
        cast(nursery, logs, f"{seed}", given.servers) as all_,
    ):
        tour = Tour(nursery, all_, given, draw)
        try:
            await tour.play(choose(given.faults))
            await tour.rest()
        except* ChaosError as group:
            findings += [Finding("state", trio.current_time(), str(e)) for e in group.exceptions]
        findings += tour.verdict()
        nursery.cancel_scope.cancel()
    print(f"\nseed {seed}: {given.servers} servers, {given.bands} bands of {given.members}")
    for at, text in sorted(tour.told):
        print(f"  {at:6.1f} s  {text}")
    print(f"  {_played(tour)}")
    for finding in findings:
        print(f"WRONG ({finding.kind}) at {finding.at - tour.began:.2f} s: {finding.text}")
    print(
        f"seed {seed}: {f'FAILED: {len(findings)} findings' if findings else 'clean'}", flush=True
    )
    return not findings


def choose(names: str) -> list[Blow]:
    """The blows whose names contain one of these texts (by comma).

    Raises:
        SystemExit: there is none.
    """
    if names == "none":
        return []
    wanted = [text.strip() for text in names.lower().split(",")]
    chosen = [b for b in BLOWS if names == "all" or any(text in b.name for text in wanted)]
    if not chosen:
        raise SystemExit(f"chaos.py: --faults: none or some of: {[b.name for b in BLOWS]}")
    return chosen


def _played(tour: Tour) -> str:
    """What was done, in figures: a run in which little happened proves little."""
    answers = Counter[str]()
    closed = Counter(int(line.closed[1]) for line in tour.lines if line.closed)
    for line in tour.lines:
        for asked in line.asked:
            if asked.answer is None:
                answers["unanswered"] += 1
            else:
                answers[asked.answer.get("code", "acknowledged")] += 1
    returns = [back for roamer in tour.roamers for back in roamer.returns]
    anew = Counter(tour.excuse(back) or "WRONG" for back in returns if not back.resumed)
    heard = sum(len(line.heard) for line in tour.lines)
    return (
        f"commands {dict(answers)}; messages heard {heard}; connections {len(tour.lines)}, "
        f"closed {dict(closed)}; resumed {len(returns) - anew.total()}; not resumed {dict(anew)}"
    )
