"""Percentiles from buckets."""

import random

import pytest

from scripts.bench.histogram import Histogram


def test_percentiles_are_close_to_the_exact_ones() -> None:
    chance = random.Random(7)
    values = sorted(chance.lognormvariate(0, 1.5) for _ in range(5000))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for share in (0.0, 0.5, 0.9, 0.99, 0.999):
        exact = values[int(share * len(values))]
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.03)
    assert histogram.percentile(1.0) == pytest.approx(values[-1], rel=0.03)
    spread = histogram.spread()
    assert spread is not None
    assert spread["max"] == pytest.approx(values[-1], abs=0.001)
    assert spread["count"] == 5000


def test_empty_histogram_has_no_percentiles() -> None:
    assert Histogram().percentile(0.5) is None
    assert Histogram().spread() is None


def test_latencies_out_of_range_are_counted() -> None:
    histogram = Histogram()
    histogram.add(-3.0)
    histogram.add(0.0)
    assert (histogram.percentile(0.5) or 0) <= 0.002
    histogram.add(1e12)
    assert histogram.longest == 1e12
