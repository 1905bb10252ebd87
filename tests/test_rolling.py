"""Servers are replaced one after the other, and the bands play on."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
from benchrolling import rolling  # noqa: E402

sys.path.remove(str(SCRIPTS))


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
