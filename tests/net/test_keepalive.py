"""Keepalive: round-trip time from pongs, and the timeout of a silent peer. No I/O, no clock."""

import struct

import pytest

from bandsync.net.keepalive import Keepalive

TIMEOUT_S = 30.0


def pong(sent_at: float) -> bytes:
    return struct.pack("!d", sent_at)


def test_latency_is_the_smoothed_round_trip() -> None:
    keepalive = Keepalive(TIMEOUT_S, now=100.0)
    keepalive.received_at = 200.0
    assert keepalive.pong(pong(199.99)) == pytest.approx(10.0)
    # A pong may answer an earlier ping than the latest.
    assert keepalive.pong(pong(199.92)) == pytest.approx(18.75)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(pong(201.0), id="from the future"),
        pytest.param(pong(-1e6), id="older than the timeout"),
        pytest.param(pong(float("nan")), id="not a number"),
        pytest.param(b"what?", id="wrong size"),
        pytest.param(b"", id="empty"),
    ],
)
def test_pong_that_answers_no_ping_leaves_the_latency(payload: bytes) -> None:
    keepalive = Keepalive(TIMEOUT_S, now=100.0)
    keepalive.received_at = 200.0
    assert keepalive.pong(payload) is None
    keepalive.pong(pong(199.99))
    assert keepalive.pong(payload) == pytest.approx(10.0)


def test_ping_carries_its_time() -> None:
    keepalive = Keepalive(TIMEOUT_S, now=100.0)
    frame = keepalive.ping(now=120.0)
    assert frame == b"\x89\x08" + pong(120.0)


def test_silent_peer_times_out_after_an_unanswered_ping() -> None:
    keepalive = Keepalive(TIMEOUT_S, now=100.0)
    # Silence alone is no timeout: a client that was never pinged may be silent.
    assert not keepalive.timed_out(now=131.0)
    keepalive.ping(now=110.0)
    assert not keepalive.timed_out(now=129.0)
    assert keepalive.timed_out(now=131.0)
    keepalive.received_at = 131.0
    assert not keepalive.timed_out(now=162.0)
