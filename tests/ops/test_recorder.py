"""Samples of one second, and the recorder that keeps ten minutes of them."""

import gc
from collections.abc import Callable

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session
from bandsync.ops.recorder import KEPT, Recorder
from bandsync.ops.samples import (
    Durations,
    Latency,
    Sample,
    State,
    Totals,
    packed,
    sample,
    unpacked,
)
from bandsync.rules.actions import Drop
from bandsync.rules.server_context import ServerContext
from bandsync.storage.base import RedisStatus
from bandsync.storage.history import HISTORY, Failover, History, Mode, ModeChange, Recovery
from tests.support.states import Stage

NOTHING = Totals(
    at_s=10.0, deliveries=0, received=0, dropped=0, slow_consumers=0, internal_errors=0, cpu_s=0.0
)
QUIET = State(
    at=1_000.0,
    connections=0,
    members=0,
    rooms=0,
    sessions=0,
    spread=0,
    mode="redis",
    degraded=False,
    listening=True,
    link_queue=0,
    round_trip_ms=None,
    clock_error_ms=None,
    clock_uncertainty_ms=None,
    memory_bytes=None,
)


class Storage:
    """The part of a storage manager that the recorder reads."""

    mode: Mode = "redis"
    degraded = False
    listening = True
    round_trip_ms: float | None = 0.25
    redis_status = RedisStatus(connected=True, connection_attempts=0, outstanding=7)

    def report(self) -> "Storage":
        return self


class Observed:
    """A server with fixed numbers."""

    boot_id = "ours"

    def __init__(self) -> None:
        self.storage = Storage()
        self.hosting: list[Session] = []
        self.clock = ServerClock(1_000_000.0, trio.current_time())
        self.offset_ms = 0.0

    def now(self) -> float:
        return self.clock.at(trio.current_time()) + self.offset_ms

    def connections(self) -> int:
        return 4

    def members(self) -> int:
        return 3

    def rooms(self) -> int:
        return 2

    def sessions(self) -> int:
        return 5

    def hosted(self) -> list[Session]:
        return self.hosting


def spread_over(*boot_ids: str, drop: str | None = None) -> Session:
    """A session with a member on each of these servers; ``drop`` names a disconnected one."""
    stage = Stage()
    for boot_id in boot_ids:
        stage.here = ServerContext(server_id=boot_id, boot_id=boot_id, max_members=8)
        stage.join(boot_id)
    if drop is not None:
        stage.do(drop, Drop())
    assert stage.session is not None
    return stage.session


def test_rates_are_per_second_of_actual_length() -> None:
    after = Totals(
        at_s=12.0,
        deliveries=500,
        received=20,
        dropped=3,
        slow_consumers=1,
        internal_errors=2,
        cpu_s=0.5,
    )
    found = sample(NOTHING, after, QUIET, command=None, commit=None, loop_lag_s=1.0)
    assert (found.lasted_ms, found.loop_lag_ms) == (2000, 1000)
    assert (found.deliveries_per_s, found.received_per_s, found.dropped_per_s) == (250, 10, 1.5)
    assert found.cpu == 0.25
    # Rare events are counts, not rates.
    assert (found.slow_consumers, found.internal_errors) == (1, 2)


def test_counts_before_the_first_reading_are_excluded() -> None:
    before = replace(NOTHING, deliveries=1_000_000, slow_consumers=9)
    after = replace(before, at_s=11.0, deliveries=1_000_010)
    found = sample(before, after, QUIET, command=None, commit=None, loop_lag_s=0)
    assert (found.deliveries_per_s, found.slow_consumers) == (10, 0)


def test_unmeasured_value_is_none() -> None:
    after = replace(NOTHING, at_s=11.0)
    found = sample(NOTHING, after, QUIET, command=None, commit=None, loop_lag_s=0)
    assert found.round_trip_ms is None
    assert found.clock_error_ms is None
    assert found.memory_bytes is None
    assert found.commit is None


def test_durations_have_mean_and_maximum_and_reset() -> None:
    durations = Durations()
    assert durations.take() is None
    for seconds in (0.001, 0.004, 0.0025):
        durations.add(seconds)
    assert durations.take() == Latency(3, 2.5, 4)
    assert durations.take() is None
    durations.add(0.001)
    assert durations.take() == Latency(1, 1, 1)


@pytest.fixture
def recorder(nursery: trio.Nursery) -> Callable[..., tuple[Recorder, Observed, Counters]]:
    def start() -> tuple[Recorder, Observed, Counters]:
        counters = Counters()
        recorder, observed = Recorder(counters), Observed()
        nursery.start_soon(recorder.run, observed)
        return recorder, observed, counters

    return start


Start = Callable[[], tuple[Recorder, Observed, Counters]]


async def test_recorder_takes_a_sample_every_second(
    recorder: Start, autojump_clock: MockClock
) -> None:
    recording, _, counters = recorder()
    await trio.sleep(0.5)
    counters.deliveries += 100
    recording.commits.add(0.002)
    recording.commands.add(0.003)
    recording.lag(0.04)
    await trio.sleep(2)
    first, second = recording.since()
    assert first.deliveries_per_s == 100
    assert first.commit == Latency(1, 2, 2)
    assert first.command == Latency(1, 3, 3)
    assert first.loop_lag_ms == 40
    assert (second.deliveries_per_s, second.commit, second.loop_lag_ms) == (0, None, 0)
    assert second.at - first.at == pytest.approx(1000)
    assert (first.connections, first.members, first.rooms, first.sessions) == (4, 3, 2, 5)
    assert (first.mode, first.round_trip_ms, first.link_queue) == ("redis", 0.25, 7)
    assert first.memory_bytes is None or first.memory_bytes > 1_000_000


async def test_spread_counts_sessions_with_connected_members_elsewhere(
    recorder: Start, autojump_clock: MockClock
) -> None:
    recording, observed, _ = recorder()
    observed.hosting = [
        spread_over("ours"),
        spread_over("ours", "theirs"),
        spread_over("ours", "theirs", drop="theirs"),
        spread_over("ours", "theirs", "others", drop="theirs"),
    ]
    await trio.sleep(1.5)
    assert [each.spread for each in recording.since()] == [2]


async def test_recorder_keeps_ten_minutes(recorder: Start, autojump_clock: MockClock) -> None:
    recording, _, _ = recorder()
    await trio.sleep(KEPT + 100.5)
    kept = recording.since()
    assert len(kept) == KEPT
    assert kept[-1].at - kept[0].at == pytest.approx((KEPT - 1) * 1000)


async def test_recorder_keeps_samples_packed(recorder: Start, autojump_clock: MockClock) -> None:
    """Objects would grow to half a megabyte, which looks like a leak."""
    recording, _, _ = recorder()
    await trio.sleep(100.5)
    gc.collect()
    assert sum(isinstance(each, Sample) for each in gc.get_objects()) < 10
    assert len(recording.since()) == 100


def test_packed_sample_is_unpacked_unchanged() -> None:
    after = replace(NOTHING, at_s=11.25, deliveries=70, cpu_s=0.1)
    measured = replace(
        QUIET,
        mode="memory (disabled)",
        degraded=True,
        listening=False,
        connections=10_000,
        round_trip_ms=0.25,
        clock_error_ms=-1.5,
        clock_uncertainty_ms=0.5,
        memory_bytes=2**40,
    )
    for state, latency in ((QUIET, None), (measured, Latency(70_000, 0.125, 4.5))):
        each = sample(NOTHING, after, state, command=latency, commit=None, loop_lag_s=0.002)
        assert unpacked(packed(each)) == each
        assert type(unpacked(packed(each)).connections) is int


async def test_since_returns_later_samples(recorder: Start, autojump_clock: MockClock) -> None:
    recording, _, _ = recorder()
    assert recording.since(0) == []
    await trio.sleep(10.5)
    every = recording.since()
    assert len(every) == 10
    assert recording.since(every[6].at) == every[7:]
    assert recording.since(every[-1].at) == []
    assert recording.since(0) == every
    # An instant in the future is of another clock: all samples are new to the client.
    assert recording.since(every[-1].at + 1) == every


async def test_stall_is_one_long_sample(recorder: Start, mock_clock: MockClock) -> None:
    recording, _, counters = recorder()
    await trio.testing.wait_all_tasks_blocked()
    counters.received += 80
    mock_clock.jump(4.25)
    await trio.testing.wait_all_tasks_blocked()
    (only,) = recording.since()
    assert only.lasted_ms == pytest.approx(4250, abs=1)
    assert only.received_per_s == pytest.approx(80 / 4.25, abs=0.01)
    assert only.loop_lag_ms >= 3000
    mock_clock.jump(0.76)
    await trio.testing.wait_all_tasks_blocked()
    assert len(recording.since()) == 2


async def test_samples_restart_when_the_clock_is_set_back(
    recorder: Start, autojump_clock: MockClock
) -> None:
    recording, observed, _ = recorder()
    await trio.sleep(20.5)
    observed.offset_ms = -3_600_000
    await trio.sleep(3)
    kept = recording.since()
    assert len(kept) == 3
    assert [each.at for each in kept] == sorted(each.at for each in kept)


def test_last_failover_and_recovery_outlive_the_history() -> None:
    history = History("memory", 0)
    assert (history.mode, history.since, list(history.changes)) == (
        "memory",
        0,
        [ModeChange(0, "memory")],
    )
    recovery = Recovery(2, None, 1, 3)
    history.enter("migrating", 1)
    history.recover(recovery)
    assert (history.mode, history.last_recovery) == ("redis", recovery)
    for number in range(HISTORY):
        history.fail_over(Failover(3 + 2 * number, "reset", "gone"))
        history.enter("migrating", 4 + 2 * number)
    assert len(history.changes) == HISTORY
    assert (history.mode, history.since) == ("migrating", 4 + 2 * (HISTORY - 1))
    assert all(change.recovery is None for change in history.changes)
    assert history.last_recovery == recovery
    assert history.last_failover == Failover(3 + 2 * (HISTORY - 1), "reset", "gone")
