"""Shutting down without a stampede: every client is told, then let go, a few at a time."""

import random

import trio

from bandsync.net.connection import RESTARTS, Connection
from bandsync.net.registry import ConnectionRegistry

# The rate at which clients are let go, and so come back elsewhere, as far as the time allows.
_CLOSES_PER_S = 200.0
_STEP_S = 0.05


async def drain(connections: ConnectionRegistry, timeout_s: float) -> None:
    """Tell every client, close all connections with 1012, and wait until what they did is kept.

    Args:
        timeout_s: after this many seconds, whoever is left is left.
    """
    connections.draining = True
    waiting = list(connections.open)
    window_s = min(timeout_s / 2, len(waiting) / _CLOSES_PER_S)
    # Drawn, not counted: servers that drain together must not agree on a rhythm.
    latest_ms = max(1000, round(1000 * window_s), 10 * len(waiting))
    delays_ms = random.sample(range(latest_ms), len(waiting))
    for connection, delay_ms in zip(waiting, delays_ms, strict=True):
        connection.drain(delay_ms)
    random.shuffle(waiting)
    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_all, waiting, window_s)
            await connections.all_gone()
            nursery.cancel_scope.cancel()
        await connections.hub.finished()


async def _close_all(waiting: list[Connection], window_s: float) -> None:
    steps = max(1, round(window_s / _STEP_S))
    for step in range(steps):
        for connection in waiting[step::steps]:
            connection.close(1012, RESTARTS)
        await trio.sleep(_STEP_S)
