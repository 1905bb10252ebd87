"""A run with several servers: bands are spread over them, and faults hit them while they play."""

import random
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

from scripts.chaos.cluster_faults import CLUSTER_FAULTS, CONCURRENT, ClusterFault
from scripts.chaos.cluster_judge import (
    ClusterFinalState,
    disagreements,
    excuse,
    judge_acked_changes,
    judge_connections,
    judge_mirrors,
    judge_removals,
    judge_resumes,
    removed,
)
from scripts.chaos.cluster_records import GRACE_S, ResumeAttempt, RoamingRecord, ServerRun
from scripts.chaos.judge import Violation
from scripts.chaos.player import ChaosError
from scripts.chaos.records import agreed_state
from scripts.chaos.roaming import RoamingPlayer
from scripts.chaos.servers import ChaosCluster, ChaosServer, start_cluster
from scripts.chaos.trace import CommitTraces

_BASELINE_S = 1.0
_REST_S = (0.2, 2.0)
_PAIR_SHARE = 0.4
_WAIT_SHARE = 0.5
_LAST_COMMAND_S = (0.5, 3.0)
_FAST_SHARE = 0.4
_RECOVERY_S = 60.0
# Until a change is replicated whose only other copy died with a server.
_REPLICATED_S = 3.0
# Failure detector and its check, grace, anti-entropy, and a margin.
_CALM_S = 10.0 + 2.0 + GRACE_S + 5.0 + 4.0
_POLL_S = 0.2


class ClusterRun:
    """One run with one seed.

    Args:
        nursery: runs the connections of the members.
        cluster: the servers and their Redis.
        given: the command line.
        draw: for the faults and their times.

    Attributes:
        described: the faults, each with the time when it began.
        violations: found during the run, besides those in the records.
        final_states: of the sessions, as compared last.
        began: start of the run.
        bands: the members of each session.
    """

    def __init__(
        self, nursery: trio.Nursery, cluster: ChaosCluster, given: Namespace, draw: random.Random
    ) -> None:
        self.described: list[tuple[float, str]] = []
        self.violations: list[Violation] = []
        self.final_states: list[ClusterFinalState] = []
        self.began = trio.current_time()
        self._nursery = nursery
        self._cluster = cluster
        self._given = given
        self._draw = draw
        self._last_server_fault = 0.0
        self.bands = {
            f"band{number}": [
                self._new_player(f"band{number}", f"p{n}") for n in range(given.members)
            ]
            for number in range(given.bands)
        }

    @property
    def players(self) -> list[RoamingPlayer]:
        """All members of all bands."""
        return [player for band in self.bands.values() for player in band]

    @property
    def records(self) -> list[RoamingRecord]:
        """The records of all connections that ever were."""
        return [record for player in self.players for record in player.records]

    @property
    def server_runs(self) -> list[ServerRun]:
        """All server processes that ever were."""
        return [run for server in self._cluster.servers for run in server.runs]

    async def play(self, faults: Sequence[ClusterFault]) -> None:
        """Let all members play, inject faults, and wait until all servers use Redis again."""
        async with trio.open_nursery() as playing:
            for player in self.players:
                playing.start_soon(player.play)
            await trio.sleep(_BASELINE_S)
            end = trio.current_time() + self._given.minutes * 60
            while faults and trio.current_time() < end:
                await self._inject(faults, end - trio.current_time())
                await trio.sleep(self._draw.uniform(*_REST_S))
                if self._draw.random() < _WAIT_SHARE:
                    with trio.move_on_after(5.0):
                        await self._cluster.until_all_on_redis(_RECOVERY_S)
            if faults:
                # The last command is sent during a fault, with none after it.
                playing.start_soon(self._stop_soon)
                await self._inject([fault for fault in faults if not fault.long] or faults, 0.0)
            self._stop()
        await self._cluster.until_all_on_redis(_RECOVERY_S)

    async def _stop_soon(self) -> None:
        await trio.sleep(self._draw.uniform(*_LAST_COMMAND_S))
        self._stop()

    def _stop(self) -> None:
        for player in self.players:
            player.stop()

    async def rest(self) -> None:
        """Wait until all agree, let a new member join, and check that nothing changes any more."""
        await self._agree(_CALM_S)
        for session, band in self.bands.items():
            late_joiner = self._new_player(session, "late")
            band.append(late_joiner)
        await self._agree(_CALM_S)
        before = {final.session: agreed_state(final.stored) for final in self.final_states}
        await trio.sleep(self._given.calm)
        await self._agree(_POLL_S)
        for final in self.final_states:
            if (now := agreed_state(final.stored)) != before[final.session]:
                self._add_violation(
                    f"{final.session}: {before[final.session]} became {now} by itself"
                )

    def judge(self) -> list[Violation]:
        """All violations of the run, in the order of time."""
        end = trio.current_time()
        self.traces = traces = CommitTraces(self.server_runs, self._cluster.clock_offset_s)
        violations = [*judge_connections(self.records, traces, end), *self.violations]
        violations += judge_mirrors(self.server_runs, traces)
        self.removals = removed(self.records, traces)
        resumes = [attempt for player in self.players for attempt in player.resumes]
        violations += judge_resumes(resumes, self._cluster.data_losses, self.removals, traces)
        for final in self.final_states:
            records = [record for record in self.records if record.session == final.session]
            violations += judge_acked_changes(records, final, traces)
            violations += judge_removals(records, traces)
        return sorted(violations, key=lambda violation: violation.at)

    def excuse(self, attempt: ResumeAttempt) -> str | None:
        """Why a member was legitimately not resumed; None if that was a violation."""
        return excuse(attempt, self._cluster.data_losses, self.removals, self.traces)

    async def _inject(self, faults: Sequence[ClusterFault], left_s: float) -> None:
        draw = self._draw
        fitting = [fault for fault in faults if not fault.long or left_s >= 10.0] or list(faults)
        fault = draw.choices(fitting, [fault.weight for fault in fitting])[0]
        servers = draw.sample(self._cluster.servers, len(self._cluster.servers))
        pair = [(fault, servers[0])]
        if fault.target == "server" and draw.random() < _PAIR_SHARE:
            others = [
                other
                for other in fitting
                if other.target in CONCURRENT or (other.target == "server" and len(servers) > 2)
            ]
            if others:
                pair.append((draw.choice(others), servers[1]))
        if fault.target == "data":
            # A server that was just killed and the data of Redis may hold the only copies.
            await trio.sleep_until(self._last_server_fault + _REPLICATED_S)
        fast = draw.random() < _FAST_SHARE
        for player in self.players:
            player.fast = fast
        async with trio.open_nursery() as striking:
            for each, server in pair:
                striking.start_soon(self._run_fault, each, server)
                await trio.sleep(draw.uniform(0.0, 0.5))
        if fault.target == "server":
            self._last_server_fault = trio.current_time()

    async def _run_fault(self, fault: ClusterFault, server: ChaosServer) -> None:
        at = trio.current_time()
        await fault.run(
            self._cluster,
            server,
            self._draw,
            lambda text: self.described.append((at - self.began, text)),
        )

    async def _agree(self, patience_s: float) -> None:
        """Wait until all snapshots and Redis agree. Remaining differences are violations."""
        deadline = trio.current_time() + patience_s
        while True:
            self.final_states = []
            errors: list[str] = []
            for session, band in self.bands.items():
                snapshots = {}
                for player in band:
                    await player.stay_connected()
                    snapshot = await player.fresh_snapshot()
                    if snapshot is None:
                        errors.append(f"{session}: {player.name} received no snapshot")
                    else:
                        snapshots[player.name] = snapshot
                stored = await self._cluster.stored(session)
                if stored is None:
                    errors.append(f"{session} is not in Redis")
                else:
                    members = {player.member_id: player.name for player in band}
                    final = ClusterFinalState(session, snapshots, *stored, members)
                    self.final_states.append(final)
                    errors += disagreements(final)
            if not errors:
                return
            if trio.current_time() >= deadline:
                for text in errors:
                    self._add_violation(text)
                return
            await trio.sleep(_POLL_S)

    def _new_player(self, session: str, name: str) -> RoamingPlayer:
        draw = random.Random(f"{self._draw.random()}")  # noqa: S311  # a seed to repeat a run
        return RoamingPlayer(self._nursery, self._cluster, session, name, draw)

    def _add_violation(self, text: str) -> None:
        self.violations.append(Violation("state", trio.current_time(), text))


async def run_cluster(seed: int, given: Namespace, logs: Path) -> bool:
    """Do a whole run and print its faults and verdict; return whether there is no violation."""
    draw = random.Random(seed)  # noqa: S311  # a seed to repeat a run
    violations: list[Violation] = []
    async with (
        trio.open_nursery() as nursery,
        start_cluster(nursery, logs, f"{seed}", given.servers) as cluster,
    ):
        run = ClusterRun(nursery, cluster, given, draw)
        try:
            await run.play(choose(given.faults))
            await run.rest()
        except* ChaosError as group:
            violations += [
                Violation("state", trio.current_time(), str(e)) for e in group.exceptions
            ]
        violations += run.judge()
        nursery.cancel_scope.cancel()
    print(f"\nseed {seed}: {given.servers} servers, {given.bands} bands of {given.members}")
    for at, text in sorted(run.described):
        print(f"  {at:6.1f} s  {text}")
    print(f"  {_statistics(run)}")
    for violation in violations:
        print(f"WRONG ({violation.kind}) at {violation.at - run.began:.2f} s: {violation.text}")
    print(
        f"seed {seed}: {f'FAILED: {len(violations)} violations' if violations else 'clean'}",
        flush=True,
    )
    return not violations


def choose(names: str) -> list[ClusterFault]:
    """The faults whose names contain one of these texts, separated by commas.

    Raises:
        SystemExit: no name does.
    """
    if names == "none":
        return []
    wanted = [text.strip() for text in names.lower().split(",")]
    chosen = [
        fault
        for fault in CLUSTER_FAULTS
        if names == "all" or any(text in fault.name for text in wanted)
    ]
    if not chosen:
        all_names = [fault.name for fault in CLUSTER_FAULTS]
        raise SystemExit(f"python -m scripts.chaos: --faults: none or some of: {all_names}")
    return chosen


def _statistics(run: ClusterRun) -> str:
    """Numbers of commands, connections and resumes: a run with little activity proves little."""
    answers = Counter[str]()
    closed = Counter(int(record.closed[1]) for record in run.records if record.closed)
    for record in run.records:
        for command in record.commands:
            if command.answer is None:
                answers["unanswered"] += 1
            else:
                answers[command.answer.get("code", "acknowledged")] += 1
    resumes = [attempt for player in run.players for attempt in player.resumes]
    not_resumed = Counter(
        run.excuse(attempt) or "WRONG" for attempt in resumes if not attempt.resumed
    )
    received = sum(len(record.received) for record in run.records)
    resumed = len(resumes) - not_resumed.total()
    return (
        f"commands {dict(answers)}; messages received {received}; connections {len(run.records)}, "
        f"closed {dict(closed)}; resumed {resumed}; not resumed {dict(not_resumed)}"
    )
