"""Rows over time: trends, leaks, leftovers, bottlenecks."""

import random
import re
from typing import Any

import pytest

from scripts.bench.trend import RowSeries, bottleneck, leaks, left_behind, trend


def rows(memory: "list[float]", **columns: "list[float]") -> list[Any]:
    plain = {"phase": "play", "connections": 100, "descriptors": 110}
    return [
        plain
        | {"t": float(second), "memoryMb": value}
        | {name: values[second] for name, values in columns.items()}
        for second, value in enumerate(memory)
    ]


def noise(count: int, level: float, width: float) -> list[float]:
    chance = random.Random(count)
    return [level + chance.uniform(-width, width) for _ in range(count)]


def test_trend_is_the_least_squares_line() -> None:
    line = trend([0, 1, 2, 3, 4], [5, 5, 5, 5, 5])
    assert line is None, "five points are no trend"
    times = [float(second) for second in range(100)]
    line = trend(times, [10 + 0.5 * second for second in times], warm_up=0.0)
    assert line is not None
    assert (line.first, line.last) == pytest.approx((10, 59.5))
    assert line.growth == pytest.approx(4.95)


def test_flat_memory_is_no_leak() -> None:
    assert leaks(rows(noise(600, 80, 1.5))) == []


def test_growth_in_the_warm_up_is_no_leak() -> None:
    memory = [40 + second for second in range(60)] + noise(540, 100, 0.5)
    assert leaks(rows([float(each) for each in memory])) == []


def test_peak_at_the_end_is_no_leak() -> None:
    memory = noise(600, 80, 0.5)
    memory[-3:] = [120.0, 130.0, 140.0]
    assert leaks(rows(memory)) == []


def test_growing_memory_is_a_leak() -> None:
    memory = [value + second * 0.01 for second, value in enumerate(noise(600, 80, 1.5))]
    (finding,) = leaks(rows(memory))
    assert re.search(r"memory grew by (6|7)\.\d%", finding)


def test_leak_with_a_low_last_point_is_found() -> None:
    # By the first and the last point alone, it would shrink.
    memory = [value + second * 0.02 for second, value in enumerate(noise(600, 80, 0.5))]
    memory[-1] = 70.0
    assert leaks(rows(memory))


def test_leaking_descriptors_are_found() -> None:
    found = leaks(rows(noise(600, 80, 1), descriptors=[110 + second / 20 for second in range(600)]))
    assert len(found) == 1
    assert "descriptors" in found[0]
    # More descriptors for more connections are no leak.
    more = [100 + second / 20 for second in range(600)]
    columns = {"connections": more, "descriptors": [each + 10 for each in more]}
    assert leaks(rows(noise(600, 80, 1), **columns)) == []


def test_leaking_tasks_are_found() -> None:
    two_each = [200.0 + second % 3 for second in range(600)]
    assert leaks(rows(noise(600, 80, 1), tasks=two_each)) == []
    # One task leaks for every tenth closed connection, of four a second.
    leaking = [count + second * 0.4 for second, count in enumerate(two_each)]
    (finding,) = leaks(rows(noise(600, 80, 1), tasks=leaking))
    assert re.fullmatch(r"tasks beyond those of connections: 2\d\d more", finding)


def test_tasks_of_more_connections_are_no_leak() -> None:
    more = [100 + second / 20 for second in range(600)]
    columns = {"connections": more, "descriptors": [each + 10 for each in more]}
    columns["tasks"] = [2 * each + 12 for each in more]
    assert leaks(rows(noise(600, 80, 1), **columns)) == []


def test_short_run_is_not_judged() -> None:
    (finding,) = leaks(rows([80.0] * 5))
    assert "too short" in finding
    assert leaks(rows([80.0] * 5 + [81.0] * 20)) == []


def test_unknown_memory_is_not_judged() -> None:
    assert leaks([row | {"memoryMb": None} for row in rows([1.0] * 100)])


def test_leftovers_are_found() -> None:
    before = {"rooms": 0.0, "connections": 0.0, "descriptors": 9.0}
    assert left_behind(before, before) == []
    assert left_behind(before, before | {"descriptors": 8.0}) == []
    assert left_behind(before, {}) == []
    (finding,) = left_behind(before, before | {"rooms": 2.0})
    assert finding == "2 rooms were left behind (0 before, 2 now)"


def test_busy_or_late_driver_is_a_bottleneck() -> None:
    quiet = [{"driverCpu": 0.4, "driverLagMs": 2.0}] * 100
    assert bottleneck(quiet) is None
    assert bottleneck([]) is None
    busy = [{"driverCpu": 0.95, "driverLagMs": 2.0}] * 10
    assert "busy" in (bottleneck(quiet + busy) or "")
    late = [{"driverCpu": 0.4, "driverLagMs": 80.0}] * 10
    assert "late" in (bottleneck(quiet + late) or "")


def test_long_run_is_kept_in_bounded_rows() -> None:
    series = RowSeries(most=100)
    for second in range(10_000):
        series.add(
            {"t": float(second), "phase": "play", "rate": 4.0, "p99Ms": float(second), "none": None}
        )
        assert len(series.rows) <= 100
    assert len(series.rows) > 40
    assert all(row["rate"] == 4.0 for row in series.rows)
    # The longest latency is kept, and nothing earlier is lost.
    assert [row["p99Ms"] for row in series.rows] == [row["t"] for row in series.rows]
    assert series.rows[0]["t"] == pytest.approx(10_000 / len(series.rows), rel=1)
