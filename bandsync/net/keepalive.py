"""Keepalive of one connection: ping payloads, round-trip time, timeout of a silent peer."""

import struct

from bandsync.wire.frames import ping_frame

# Smoothing factor of RFC 6298, section 2. The round trip decides how far ahead a start is
# scheduled, so one outlier must not.
_SMOOTHING = 1 / 8
# A ping carries the time when it was sent. Any pong then yields its own round trip, in any order.
_PAYLOAD = struct.Struct("!d")


class Keepalive:
    """Liveness of one peer. Times are on Trio's clock, seconds; the caller passes them in.

    Args:
        timeout_s: how long a peer may be silent, seconds.
        now: when the connection began.

    Attributes:
        received_at: arrival of the latest bytes from the peer.
    """

    __slots__ = ("_latency_ms", "_pinged_at", "_timeout_s", "received_at")

    def __init__(self, timeout_s: float, now: float) -> None:
        self.received_at = now
        self._pinged_at = now
        self._timeout_s = timeout_s
        self._latency_ms: float | None = None

    def timed_out(self, now: float) -> bool:
        """Whether the peer was silent for longer than the timeout and left a ping unanswered."""
        silence_s = now - self.received_at
        return silence_s > self._timeout_s and self.received_at < self._pinged_at

    def ping(self, now: float) -> bytes:
        """The frame of a ping that is sent at ``now``."""
        self._pinged_at = now
        return ping_frame(_PAYLOAD.pack(now))

    def pong(self, payload: bytes) -> float | None:
        """Count a pong that arrived at `received_at`; ignore one that answers no ping of ours.

        Returns:
            The smoothed round trip, milliseconds; None before the first pong.
        """
        if len(payload) == _PAYLOAD.size:
            (sent_at,) = _PAYLOAD.unpack(payload)
            round_trip_ms = (self.received_at - sent_at) * 1000
            if 0 <= round_trip_ms <= self._timeout_s * 1000:
                if self._latency_ms is None:
                    self._latency_ms = round_trip_ms
                else:
                    self._latency_ms += (round_trip_ms - self._latency_ms) * _SMOOTHING
        return self._latency_ms
