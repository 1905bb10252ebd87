"""Rendezvous hashing: the order in which a session prefers the workers."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bandsync.handoff.rendezvous import preference

NAMES = st.text(max_size=64)


@given(NAMES, st.integers(1, 20))
def test_preference_contains_every_worker_once(session_id: str, workers: int) -> None:
    assert sorted(preference(session_id, workers)) == list(range(1, workers + 1))


@given(NAMES, st.integers(2, 20))
def test_additional_worker_moves_only_its_own_sessions(session_id: str, workers: int) -> None:
    without = [number for number in preference(session_id, workers) if number != workers]
    assert preference(session_id, workers - 1) == without


def test_sessions_are_spread_evenly() -> None:
    chosen = Counter(preference(f"song-{number}", 4)[0] for number in range(4000))
    second = Counter(
        preference(f"song-{number}", 4)[1]
        for number in range(4000)
        if preference(f"song-{number}", 4)[0] == 1
    )
    assert all(900 < chosen[number] < 1100 for number in (1, 2, 3, 4))
    assert all(chosen[1] / 4 < second[number] < chosen[1] / 2 for number in (2, 3, 4))
