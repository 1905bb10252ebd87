"""Benchmark `rolling`: two servers restart in turn while bands play."""

import pytest

from scripts.bench.rolling import rolling


@pytest.mark.slow
def test_rolling_restart_keeps_members_roles_and_beat(redis_binary: None) -> None:
    members = 6
    result = rolling(sessions=3, members=2, seconds=1.0)
    assert result["reconnected"] == members
    assert result["sameMember"] == members
    assert result["sameRole"] == members
    assert result["chatsMeanwhile"]
    moved = result["beatMovedMs"]
    assert isinstance(moved, dict)
    assert moved["p99"] < 5
