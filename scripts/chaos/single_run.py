"""A run with one server: faults of its Redis while bands play, then restarts of the server."""

import signal
from collections.abc import Sequence
from pathlib import Path
from random import Random

import trio

from bandsync.model.exception_leaves import leaves
from scripts.chaos.band import ChaosBand
from scripts.chaos.faults import Fault, no_action
from scripts.chaos.judge import FaultWindow, FinalState, RunResult, Violation, judge
from scripts.chaos.player import ChaosError, Player
from scripts.chaos.records import ConnectionRecord, agreed_state
from scripts.chaos.stage import ChaosSetup, as_snapshot, start_setup
from scripts.testbed.json_messages import JsonMessage

_BASELINE_S = 2.0
_REST_S = (0.5, 1.5)
_HOLD_S = (0.1, 2.0)
# This share of the faults ends before anything can detect it.
_BRIEF_SHARE = 0.2
_BRIEF_S = (0.0, 0.05)
_DETECTION_S = 10.0
# Damping of flaps demands up to half a minute of stability.
_RECOVERY_S = 90.0
_SETTLE_S = 0.3
_STORM_S = 0.2
_POLL_S = 0.02
_PLAY_ON_S = 1.0


class SingleServerRun:
    """One run with one seed.

    Args:
        nursery: runs the connections of the members.
        setup: the server, its Redis and the proxy between them.
        bands: number of bands.
        members: of each band, besides guests.
        draw: for times and details of faults.

    Attributes:
        violations: found during the run, besides those in the records.
        windows: of the faults so far.
        bands: the bands that play.
    """

    def __init__(
        self, nursery: trio.Nursery, setup: ChaosSetup, bands: int, members: int, draw: Random
    ) -> None:
        self.violations: list[Violation] = []
        self.windows: list[FaultWindow] = []
        self._nursery = nursery
        self._setup = setup
        self._draw = draw
        self._changed = trio.Event()
        self._notices: list[tuple[float, str]] = []
        self.bands = [
            ChaosBand(
                nursery,
                setup.server.port,
                f"band{number}",
                members,
                f"{draw.random()}",
                self._notice,
            )
            for number in range(bands)
        ]

    async def play(self, faults: Sequence[Fault]) -> None:
        """Let all bands play, and inject the faults one after the other."""
        for band in self.bands:
            await band.join()
        now = trio.current_time()
        self.windows = [FaultWindow("none", "none", now, quiet_from=now)]
        async with trio.open_nursery() as playing:
            for band in self.bands:
                playing.start_soon(band.play)
            await trio.sleep(_BASELINE_S)
            for fault in faults:
                await fault.prepare(self._setup)
                self._set_storm(True)
                await trio.sleep(_STORM_S)
                window = FaultWindow(fault.name, fault.kind, trio.current_time())
                self.windows.append(window)
                await self._inject(fault, window)
                await trio.sleep(self._draw.uniform(*_REST_S))
            for band in self.bands:
                band.stop()

    async def restart(self, number: signal.Signals) -> None:
        """Restart the server, resume all members, and let them play on for a moment."""
        server = self._setup.server
        before = [agreed_state(await band.leader.fresh_snapshot()) for band in self.bands]
        window = FaultWindow(f"server: {number.name}", "none", trio.current_time())
        self.windows = [window]
        for band in self.bands:
            for player in band.players:
                player.connection.ending = True
        server.signal(number)
        await server.gone()
        for band in self.bands:
            for player in band.players:
                await player.ended()
        window.lifted = trio.current_time()
        await server.start()
        await self._setup.until_on_redis(_RECOVERY_S)
        for band, then in zip(self.bands, before, strict=True):
            roles = {player.name: player.role for player in band.players}
            await band.join()
            if roles != (now := {player.name: player.role for player in band.players}):
                self._add_violation(f"{band.session}: roles {now} after {number.name}, not {roles}")
            after = agreed_state(await band.leader.fresh_snapshot())
            for part, value in after.items():
                if part != "version" and value != then[part]:
                    text = f"{part} {value} after {number.name}, not {then[part]}"
                    self._add_violation(f"{band.session}: {text}")
        window.recovered = trio.current_time()
        async with trio.open_nursery() as playing:
            for band in self.bands:
                playing.start_soon(band.play)
            await trio.sleep(_PLAY_ON_S)
            for band in self.bands:
                band.stop()

    async def finals(self) -> list[FinalState]:
        """The final state of each session: for its members, for a fresh joiner, and in Redis."""
        finals = []
        for band in self.bands:
            late = Player(self._nursery, self._setup.server.port, band.session, "late")
            await late.join()
            snapshots = {"late": late.snapshot}
            for player in band.players:
                snapshots[player.name] = await player.fresh_snapshot()
            stored = await self._stored(band.session) if self._setup.maybe_redis else None
            ids = {player.member_id for player in (*band.players, late)}
            finals.append(FinalState(band.session, snapshots, stored, ids))
            await late.leave()
        return finals

    async def _inject(self, fault: Fault, window: FaultWindow) -> None:
        """Inject one fault; return when the server has recovered from it."""
        brief = fault.end is not no_action and self._draw.random() < _BRIEF_SHARE
        await fault.begin(self._setup, self._draw)
        if brief:
            window.fault += " (brief)"
            await trio.sleep(self._draw.uniform(*_BRIEF_S))
        elif fault.loses or fault.end is not no_action:
            if fault.loses and not await self._wait_for_storage(window.injected, "memory"):
                self._add_violation(f"{fault.name}: not detected", window.injected)
            await trio.sleep(_STORM_S)
            self._set_storm(False)
            await trio.sleep(self._draw.uniform(*_HOLD_S))
        await fault.end(self._setup)
        window.lifted = window.injected if fault.end is no_action else trio.current_time()
        if fault.loses:
            # The server may not have detected it yet.
            await trio.sleep(_SETTLE_S)
            self._set_storm(False)
        await self._recover()
        self._set_storm(False)
        window.quiet_from = trio.current_time()
        window.detected = self._received_at(window.injected, "memory")
        window.recovered = self._received_at(window.injected, "redis") or window.quiet_from

    def _set_storm(self, storm: bool) -> None:
        for band in self.bands:
            band.storm = storm

    async def _recover(self) -> None:
        """Wait until the server reports Redis, and Redis holds every session again."""
        await self._setup.until_on_redis(_RECOVERY_S)
        keys = [_key(band.session) for band in self.bands]
        with trio.move_on_after(_RECOVERY_S):
            while await self._setup.query_redis("EXISTS", *keys) < len(keys):  # noqa: ASYNC110  # Redis sends no event for this
                await trio.sleep(_POLL_S)
            return
        raise ChaosError("a session is not back in Redis")

    async def _stored(self, session: str) -> JsonMessage:
        """The session in Redis, in the form of a snapshot."""
        fields = await self._setup.query_redis("HGETALL", _key(session))
        return as_snapshot(session, fields)

    async def _wait_for_storage(self, since: float, storage: str) -> bool:
        """Wait until a client receives this storage type; return False if none does."""
        with trio.move_on_after(_DETECTION_S):
            while self._received_at(since, storage) is None:
                await self._changed.wait()
        return self._received_at(since, storage) is not None

    def _received_at(self, since: float, storage: str) -> float | None:
        """Arrival of this storage type: memory at the first client, Redis at the last one."""
        times = [
            at for at, storage_type in self._notices if at >= since and storage_type == storage
        ]
        if not times:
            return None
        return min(times) if storage == "memory" else max(times)

    def _notice(self, at: float, message: JsonMessage) -> None:
        self._notices.append((at, message["storageType"]))
        self._changed.set()
        self._changed = trio.Event()

    def _add_violation(self, text: str, at: float = float("inf")) -> None:
        self.violations.append(Violation("state", at, text))


def _key(session: str) -> str:
    return f"bandsync:session:{{{session}}}"


async def run_single_server(
    faults: Sequence[Fault], draw: Random, log: Path, *, bands: int, members: int, memory: bool
) -> RunResult:
    """Do a whole run; return its result."""
    async with trio.open_nursery() as nursery, start_setup(nursery, log, memory=memory) as setup:
        if not memory:
            await setup.until_on_redis(_RECOVERY_S)
        run = SingleServerRun(nursery, setup, bands, members, draw)
        records: list[ConnectionRecord] = []
        results: list[RunResult] = []

        def conclude(finals: Sequence[FinalState]) -> None:
            now = [record for band in run.bands for record in band.records]
            new = [record for record in now if all(record is not old for old in records)]
            records.extend(new)
            results.append(judge(new, run.windows, finals))

        try:
            await run.play(faults)
            conclude(await run.finals())
            if not memory:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    await run.restart(number)
                    conclude(await run.finals())
        except* ChaosError as group:
            for error in leaves(group):
                run.violations.append(Violation("state", float("inf"), str(error)))
            conclude([])
        for band in run.bands:
            await band.disconnect()
        nursery.cancel_scope.cancel()
    return RunResult(
        [row for result in results for row in result.rows],
        [*(violation for result in results for violation in result.violations), *run.violations],
        results[0].quiet_stall_ms,
    )
