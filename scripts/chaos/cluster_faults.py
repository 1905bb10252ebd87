"""The faults of a run with several servers, each one function from its beginning to its end."""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import trio

from scripts.chaos.servers import ChaosCluster, ChaosServer

_DELAY_S = 0.03
# Longer than the expiry of a presence entry, the failure detector's timeout and the grace, even
# when the fault begins with an entry almost due.
_LONG_S = (21.0, 28.0)


@dataclass(frozen=True)
class ClusterFault:
    """One fault.

    Attributes:
        name: its first word is for ``--faults``.
        run: injects and ends the fault; describes it through its last argument.
        target: the part that it breaks. Two concurrent faults must have different targets.
        long: it takes more than ten seconds.
        weight: its relative frequency.
    """

    name: str
    run: "Callable[[ChaosCluster, ChaosServer, Random, Callable[[str], None]], Awaitable[None]]"
    target: str
    long: bool = False
    weight: float = 1.0


Describe = Callable[[str], None]


async def _end(
    cluster: ChaosCluster,
    server: ChaosServer,
    draw: Random,
    describe: Describe,
    *,
    mode: signal.Signals,
) -> None:
    down_s = draw.uniform(0.0, 2.5)
    describe(f"{mode.name} {server.name}, started again after {down_s:.1f} s")
    await server.end(mode)
    await trio.sleep(down_s)
    await server.start()


async def _suspend(
    cluster: ChaosCluster,
    server: ChaosServer,
    draw: Random,
    describe: Describe,
    *,
    between: tuple[float, float],
) -> None:
    duration_s = draw.uniform(*between)
    describe(f"SIGSTOP {server.name} for {duration_s:.1f} s")
    server.suspend()
    await trio.sleep(duration_s)
    server.resume()


async def _cut_off_for(
    cluster: ChaosCluster,
    server: ChaosServer,
    draw: Random,
    describe: Describe,
    *,
    between: tuple[float, float],
) -> None:
    duration_s = draw.uniform(*between)
    mode = draw.choice(["black hole", "black hole up", "black hole down", "refused"])
    describe(f"{server.name} cut off from Redis ({mode}) for {duration_s:.1f} s")
    _cut_off(server, mode)
    await trio.sleep(duration_s)
    server.proxy.heal()


def _cut_off(server: ChaosServer, mode: str) -> None:
    match mode:
        case "black hole":
            server.proxy.black_hole()
        case "black hole up":
            server.proxy.black_hole("up")
        case "black hole down":
            server.proxy.black_hole("down")
        case _:
            server.proxy.refuse()
            server.proxy.reset()


async def _cut_and_end(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe
) -> None:
    duration_s = draw.uniform(1.5, 4.0)
    mode = draw.choice([signal.SIGKILL, signal.SIGTERM])
    describe(f"{server.name} cut off from Redis, {mode.name} after {duration_s:.1f} s")
    _cut_off(server, "refused")
    await trio.sleep(duration_s)
    await server.end(mode)
    server.proxy.heal()
    await server.start()


async def _slow(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe
) -> None:
    duration_s = draw.uniform(1.0, 4.0)
    describe(
        f"{server.name}: {_DELAY_S * 1000:.0f} ms to Redis and back again, for {duration_s:.1f} s"
    )
    server.proxy.delay_s = _DELAY_S
    await trio.sleep(duration_s)
    server.proxy.heal()


async def _redis_down(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe, *, after: str
) -> None:
    duration_s = draw.uniform(0.1, 3.0)
    describe(f"Redis kill -9, {after} after {duration_s:.1f} s")
    redis = cluster.redis
    if after == "older dump":
        await trio.to_thread.run_sync(redis.dump)
        await trio.sleep(draw.uniform(0.2, 1.0))
    await trio.to_thread.run_sync(redis.kill)
    await trio.sleep(duration_s)
    if after != "restart":
        cluster.data_losses.append(trio.current_time())
    match after:
        case "empty":
            await trio.to_thread.run_sync(partial(redis.restart, empty=True))
        case "older dump":
            await trio.to_thread.run_sync(redis.restart_from_dump)
        case _:
            await trio.to_thread.run_sync(redis.start)


async def _redis_stop(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe
) -> None:
    duration_s = draw.uniform(0.1, 4.0)
    describe(f"SIGSTOP Redis for {duration_s:.1f} s")
    cluster.redis.stop()
    await trio.sleep(duration_s)
    cluster.redis.resume()


async def _flush(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe
) -> None:
    describe("FLUSHALL")
    cluster.data_losses.append(trio.current_time())
    await cluster.query_redis("FLUSHALL")


async def _drop_subscriptions(
    cluster: ChaosCluster, server: ChaosServer, draw: Random, describe: Describe
) -> None:
    describe("CLIENT KILL TYPE pubsub")
    await cluster.query_redis("CLIENT", "KILL", "TYPE", "pubsub")


# ``--faults`` selects by text in these names.
CLUSTER_FAULTS = (
    ClusterFault("server kill", partial(_end, mode=signal.SIGKILL), "server", weight=2),
    ClusterFault("server term", partial(_end, mode=signal.SIGTERM), "server"),
    ClusterFault("server stop", partial(_suspend, between=(0.3, 6.0)), "server", weight=1.5),
    ClusterFault("server stop, long", partial(_suspend, between=_LONG_S), "server", long=True),
    ClusterFault("cut off", partial(_cut_off_for, between=(0.3, 6.0)), "server", weight=2),
    ClusterFault("cut off, long", partial(_cut_off_for, between=_LONG_S), "server", long=True),
    ClusterFault("cut off and ended", _cut_and_end, "server"),
    ClusterFault("slow", _slow, "server", weight=0.5),
    ClusterFault("redis restart", partial(_redis_down, after="restart"), "redis"),
    ClusterFault("redis empty", partial(_redis_down, after="empty"), "data"),
    ClusterFault("redis older dump", partial(_redis_down, after="older dump"), "data"),
    ClusterFault("redis stop", _redis_stop, "redis"),
    ClusterFault("redis flush", _flush, "data"),
    ClusterFault("subscriptions", _drop_subscriptions, "link"),
)

# Targets of a second, concurrent fault: they lose nothing whose only copy a server has.
CONCURRENT = frozenset({"redis", "link"})
