"""Graceful shutdown of the connections: announce it, then close them at a limited rate."""

import random

import trio

from bandsync.net.registry import RESTART_REASON, ConnectionRegistry, OpenConnection
from bandsync.wire.close_codes import CloseCode

# Every closed client reconnects elsewhere at once. The rate prevents a thundering herd, as far as
# the time limit allows.
_CLOSES_PER_S = 200.0
_STEP_S = 0.05


async def drain(registry: ConnectionRegistry, timeout_s: float) -> None:
    """Announce the drain, close every connection with 1012, and wait for pending commits.

    Args:
        timeout_s: return after this many seconds, even if connections are left.
    """
    registry.draining = True
    connections = list(registry.open)
    window_s = min(timeout_s / 2, len(connections) / _CLOSES_PER_S)
    # Random delays: servers that drain at the same time must not send their clients in step.
    latest_ms = max(1000, round(1000 * window_s), 10 * len(connections))
    delays_ms = random.sample(range(latest_ms), len(connections))
    for connection, delay_ms in zip(connections, delays_ms, strict=True):
        connection.announce_drain(delay_ms)
    random.shuffle(connections)
    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_all, connections, window_s)
            await registry.wait_empty()
            nursery.cancel_scope.cancel()
        await registry.hub.finished()


async def _close_all(connections: list[OpenConnection], window_s: float) -> None:
    steps = max(1, round(window_s / _STEP_S))
    for step in range(steps):
        for connection in connections[step::steps]:
            connection.close(CloseCode.SERVICE_RESTART, RESTART_REASON)
        await trio.sleep(_STEP_S)
