#!/usr/bin/env python3
"""Break Redis in every way while bands play, and prove that they lose nothing.

Starts a redis-server, a proxy before it and a BandSync server; bands play on foreign WebSocket
clients while faults come in an order drawn from the seed; then the server is restarted and all
resume. Prints a table with a line for each fault. The exit code is 1 if an acknowledged change or
a connection was lost, a version came out of order or a state differs; with --strict also if a
command waited too long or the music jumped.

With --servers, several servers share the bands, whose members move between them, and servers and
their links to Redis are broken, too; it prints the faults of each seed and a verdict.
"""

import argparse
import gc
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import trio

from scripts.chaos import cluster_run as chaoscluster
from scripts.chaos.band import Band
from scripts.chaos.faults import FAULTS, Fault, nothing
from scripts.chaos.judge import Final, Finding, Message, Record, Verdict, Window, essence, judge
from scripts.chaos.player import ChaosError, Player
from scripts.chaos.report import report
from scripts.chaos.stage import Stage, as_snapshot, stage

T = TypeVar("T")

_BASELINE_S = 2.0
_REST_S = (0.5, 1.5)
_HOLD_S = (0.1, 2.0)
# Every so often a fault is over before anybody can have noticed.
_BRIEF_SHARE = 0.2
_BRIEF_S = (0.0, 0.05)
_DETECTION_S = 10.0
# Flaps are damped: up to half a minute of stability is asked for.
_RECOVERY_S = 90.0
_SETTLE_S = 0.3
_STORM_S = 0.2
_POLL_S = 0.02
_ENCORE_S = 1.0


class Run:
    """One run with one seed.

    Args:
        members: of each band, besides guests.
        draw: for the times and details of faults.

    Attributes:
        findings: what is wrong besides what the records show.
        windows: of the faults so far.
    """

    def __init__(
        self, nursery: trio.Nursery, scene: Stage, bands: int, members: int, draw: Random
    ) -> None:
        self.findings: list[Finding] = []
        self.windows: list[Window] = []
        self._nursery = nursery
        self._stage = scene
        self._draw = draw
        self._news = trio.Event()
        self._notices: list[tuple[float, str]] = []
        self.bands = [
            Band(
                nursery,
                scene.server.port,
                f"band{number}",
                members,
                f"{draw.random()}",
                self._notice,
            )
            for number in range(bands)
        ]

    async def play(self, faults: Sequence[Fault]) -> None:
        """Everybody plays, the faults come."""
        for band in self.bands:
            await band.join()
        now = trio.current_time()
        self.windows = [Window("none", "none", now, quiet_from=now)]
        async with trio.open_nursery() as playing:
            for band in self.bands:
                playing.start_soon(band.play)
            await trio.sleep(_BASELINE_S)
            for fault in faults:
                await fault.prepare(self._stage)
                self._storm(True)
                await trio.sleep(_STORM_S)
                window = Window(fault.name, fault.kind, trio.current_time())
                self.windows.append(window)
                await self._strike(fault, window)
                await trio.sleep(self._draw.uniform(*_REST_S))
            for band in self.bands:
                band.stop()

    async def restart(self, number: signal.Signals) -> None:
        """Restart the server and resume; then everybody plays on for a moment."""
        server = self._stage.server
        before = [essence(await band.leader.fresh_snapshot()) for band in self.bands]
        window = Window(f"server: {number.name}", "none", trio.current_time())
        self.windows = [window]
        for band in self.bands:
            for player in band.players:
                player.connection.ending = True
        server.end(number)
        await server.gone()
        for band in self.bands:
            for player in band.players:
                await player.ended()
        window.lifted = trio.current_time()
        await server.start()
        await self._stage.until_on_redis(_RECOVERY_S)
        for band, then in zip(self.bands, before, strict=True):
            roles = {player.name: player.role for player in band.players}
            await band.join()
            if roles != (now := {player.name: player.role for player in band.players}):
                self._find(f"{band.session}: roles {now} after {number.name}, not {roles}")
            after = essence(await band.leader.fresh_snapshot())
            for part, value in after.items():
                if part != "version" and value != then[part]:
                    text = f"{part} {value} after {number.name}, not {then[part]}"
                    self._find(f"{band.session}: {text}")
        window.recovered = trio.current_time()
        async with trio.open_nursery() as playing:
            for band in self.bands:
                playing.start_soon(band.play)
            await trio.sleep(_ENCORE_S)
            for band in self.bands:
                band.stop()

    async def finals(self) -> list[Final]:
        """What everybody has at the end, a stranger and Redis included."""
        finals = []
        for band in self.bands:
            late = Player(self._nursery, self._stage.server.port, band.session, "late")
            await late.join()
            snapshots = {"late": late.snapshot}
            for player in band.players:
                snapshots[player.name] = await player.fresh_snapshot()
            stored = await self._stored(band.session) if self._stage.maybe_redis else None
            ids = {player.member_id for player in (*band.players, late)}
            finals.append(Final(band.session, snapshots, stored, ids))
            await late.leave()
        return finals

    async def _strike(self, fault: Fault, window: Window) -> None:
        """One fault, from its beginning to the recovery."""
        brief = fault.end is not nothing and self._draw.random() < _BRIEF_SHARE
        await fault.begin(self._stage, self._draw)
        if brief:
            window.fault += " (brief)"
            await trio.sleep(self._draw.uniform(*_BRIEF_S))
        elif fault.loses or fault.end is not nothing:
            if fault.loses and not await self._told(window.injected, "memory"):
                self._find(f"{fault.name}: nobody noticed", window.injected)
            await trio.sleep(_STORM_S)
            self._storm(False)
            await trio.sleep(self._draw.uniform(*_HOLD_S))
        await fault.end(self._stage)
        window.lifted = window.injected if fault.end is nothing else trio.current_time()
        if fault.loses:
            # It may not have noticed yet.
            await trio.sleep(_SETTLE_S)
            self._storm(False)
        await self._recover()
        self._storm(False)
        window.quiet_from = trio.current_time()
        window.detected = self._when(window.injected, "memory")
        window.recovered = self._when(window.injected, "redis") or window.quiet_from

    def _storm(self, storm: bool) -> None:
        for band in self.bands:
            band.storm = storm

    async def _recover(self) -> None:
        """Wait until the server, the clients and Redis itself say that all is back."""
        await self._stage.until_on_redis(_RECOVERY_S)
        keys = [_key(band.session) for band in self.bands]
        with trio.move_on_after(_RECOVERY_S):
            while await self._stage.ask_redis("EXISTS", *keys) < len(keys):  # noqa: ASYNC110
                await trio.sleep(_POLL_S)
            return
        raise ChaosError("a session is not back in Redis")

    async def _stored(self, session: str) -> Message:
        """The session as Redis has it, in the form of a snapshot."""
        fields = await self._stage.ask_redis("HGETALL", _key(session))
        return as_snapshot(session, fields)

    async def _told(self, since: float, storage: str) -> bool:
        """Wait until a client is told of this storage; False if none is."""
        with trio.move_on_after(_DETECTION_S):
            while self._when(since, storage) is None:
                await self._news.wait()
        return self._when(since, storage) is not None

    def _when(self, since: float, storage: str) -> float | None:
        """When a client was told: of memory first, of Redis last."""
        times = [at for at, told in self._notices if at >= since and told == storage]
        if not times:
            return None
        return min(times) if storage == "memory" else max(times)

    def _notice(self, at: float, message: Message) -> None:
        self._notices.append((at, message["storageType"]))
        self._news.set()
        self._news = trio.Event()

    def _find(self, text: str, at: float = float("inf")) -> None:
        self.findings.append(Finding("state", at, text))


def _key(session: str) -> str:
    return f"bandsync:session:{{{session}}}"


def leaves(group: BaseExceptionGroup[ChaosError]) -> Iterator[ChaosError]:
    """The errors in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


async def perform(
    faults: Sequence[Fault], draw: Random, log: Path, *, bands: int, members: int, memory: bool
) -> Verdict:
    """A whole run, and the verdict."""
    async with trio.open_nursery() as nursery, stage(nursery, log, memory=memory) as scene:
        if not memory:
            await scene.until_on_redis(_RECOVERY_S)
        run = Run(nursery, scene, bands, members, draw)
        records: list[Record] = []
        parts: list[Verdict] = []

        def conclude(finals: Sequence[Final]) -> None:
            now = [record for band in run.bands for record in band.records]
            new = [record for record in now if all(record is not old for old in records)]
            records.extend(new)
            parts.append(judge(new, run.windows, finals))

        try:
            await run.play(faults)
            conclude(await run.finals())
            if not memory:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    await run.restart(number)
                    conclude(await run.finals())
        except* ChaosError as group:
            for error in leaves(group):
                run.findings.append(Finding("state", float("inf"), str(error)))
            conclude([])
        for band in run.bands:
            await band.go_home()
        nursery.cancel_scope.cancel()
    return Verdict(
        [row for part in parts for row in part.rows],
        [*(finding for part in parts for finding in part.findings), *run.findings],
        parts[0].quiet_stall_ms,
    )


def choose(names: str) -> list[Fault]:
    """The faults with one of these texts (by comma) in their names.

    Raises:
        SystemExit: there is none.
    """
    if names == "none":
        return []
    wanted = names.lower().split(",")
    chosen = [
        fault
        for fault in FAULTS
        if names == "all" or any(text.strip() in fault.name.lower() for text in wanted)
    ]
    if not chosen:
        raise SystemExit(f"chaos.py: --faults: none or some of: {[f.name for f in FAULTS]}")
    return chosen


def main() -> int:
    """Run with each seed; 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="draws order and times (default 1)")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, seeds counted up")
    parser.add_argument("--rounds", type=int, default=1, help="each fault so often")
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--members", type=int, default=4, help="of each band, besides guests")
    parser.add_argument("--faults", default="all", help="texts in their names, by comma; or none")
    parser.add_argument("--memory", action="store_true", help="no Redis at all: a dry run")
    parser.add_argument("--pick", type=int, help="so many of the faults, other ones for each seed")
    parser.add_argument("--strict", action="store_true", help="the targets for time count, too")
    cluster = parser.add_argument_group("many servers: other faults, another verdict, no table")
    cluster.add_argument("--servers", type=int, help="so many, each with its own way to Redis")
    cluster.add_argument("--minutes", type=float, default=0.3, help="of faults (default 0.3)")
    cluster.add_argument("--calm", type=float, default=6.0, help="seconds in the end (default 6)")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="for the server's logs")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    faults = [] if given.memory or given.servers else choose(given.faults)
    with tempfile.TemporaryDirectory(prefix="bandsync-chaos-") as directory:
        try:
            good = _run_all(given, faults, given.keep_logs or Path(directory))
        except KeyboardInterrupt:
            return 130
    print("\nNothing was lost." if good else "\nFAILED")
    return int(not good)


def _run_all(given: argparse.Namespace, faults: Sequence[Fault], logs: Path) -> bool:
    logs.mkdir(parents=True, exist_ok=True)
    logs = logs.resolve()
    # Our own pauses would be taken for the server's.
    gc.disable()
    good = True
    for seed in range(given.seed, given.seed + given.seeds):
        if given.servers:
            clean = trio.run(_until_signal, partial(chaoscluster.perform, seed, given, logs))
            if clean is None:
                raise KeyboardInterrupt
            good = clean and good
            gc.collect()
            continue
        draw = Random(seed)  # noqa: S311  # a seed to repeat a run
        pick = min(given.pick or len(faults), len(faults))
        order = [fault for _ in range(given.rounds) for fault in draw.sample(faults, pick)]
        log = logs / f"server-{seed}.log"
        log.unlink(missing_ok=True)
        whole = partial(
            perform,
            order,
            draw,
            log,
            bands=given.bands,
            members=given.members,
            memory=given.memory,
        )
        verdict = trio.run(_until_signal, whole)
        if verdict is None:
            raise KeyboardInterrupt
        good = report(seed, verdict, log, strict=given.strict) and good
        gc.collect()
    return good


async def _until_signal(whole: Callable[[], Awaitable[T]]) -> T | None:
    """A run; None if a signal ended it.

    As an exception a signal could end one of the clients' parsers, which swallow it.
    """
    result = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_signals, nursery.cancel_scope)
        result = await whole()
        nursery.cancel_scope.cancel()
    return result


async def _run_signals(everything: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        async for _ in received:
            everything.cancel()


if __name__ == "__main__":
    sys.exit(main())
