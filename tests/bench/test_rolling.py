"""Servers are replaced one after the other, and the bands play on."""

from pathlib import Path

from scripts.bench.rolling import rolling

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_everybody_is_back_with_the_role_and_the_beat(redis_binary: None) -> None:
    members = 6
    result = rolling(sessions=3, members=2, seconds=1.0)
    assert result["reconnected"] == members
    assert result["sameMember"] == members
    assert result["sameRole"] == members
    assert result["chatsMeanwhile"]
    moved = result["beatMovedMs"]
    assert isinstance(moved, dict)
    assert moved["p99"] < 5
