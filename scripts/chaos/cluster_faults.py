"""What can happen to a cast: each blow from its beginning to its end."""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import trio

from scripts.chaos.servers import Cast, Host

_DELAY_S = 0.03
# Longer than it takes an entry to expire, the absence after which members are swept, and their
# grace: the first may begin when the entry is almost due.
_LONG_S = (21.0, 28.0)


@dataclass(frozen=True)
class Blow:
    """One fault.

    Attributes:
        strike: from begin to end; tells what it does through its last argument.
        hits: what it breaks; two blows at a time must break different things.
        long: it takes more than ten seconds.
        weight: how often it is drawn.
    """

    name: str
    strike: "Callable[[Cast, Host, Random, Callable[[str], None]], Awaitable[None]]"
    hits: str
    long: bool = False
    weight: float = 1.0


Tell = Callable[[str], None]


async def _end(cast: Cast, host: Host, draw: Random, tell: Tell, *, how: signal.Signals) -> None:
    away_s = draw.uniform(0.0, 2.5)
    tell(f"{how.name} {host.name}, started again after {away_s:.1f} s")
    await host.end(how)
    await trio.sleep(away_s)
    await host.start()


async def _pause(
    cast: Cast, host: Host, draw: Random, tell: Tell, *, between: tuple[float, float]
) -> None:
    for_s = draw.uniform(*between)
    tell(f"SIGSTOP {host.name} for {for_s:.1f} s")
    host.pause()
    await trio.sleep(for_s)
    host.go_on()


async def _cut(
    cast: Cast, host: Host, draw: Random, tell: Tell, *, between: tuple[float, float]
) -> None:
    for_s = draw.uniform(*between)
    how = draw.choice(["black hole", "black hole up", "black hole down", "refused"])
    tell(f"{host.name} cut off from Redis ({how}) for {for_s:.1f} s")
    _cut_off(host, how)
    await trio.sleep(for_s)
    host.proxy.heal()


def _cut_off(host: Host, how: str) -> None:
    match how:
        case "black hole":
            host.proxy.black_hole()
        case "black hole up":
            host.proxy.black_hole("up")
        case "black hole down":
            host.proxy.black_hole("down")
        case _:
            host.proxy.refuse()
            host.proxy.reset()


async def _cut_and_end(cast: Cast, host: Host, draw: Random, tell: Tell) -> None:
    for_s = draw.uniform(1.5, 4.0)
    how = draw.choice([signal.SIGKILL, signal.SIGTERM])
    tell(f"{host.name} cut off from Redis, {how.name} after {for_s:.1f} s")
    _cut_off(host, "refused")
    await trio.sleep(for_s)
    await host.end(how)
    host.proxy.heal()
    await host.start()


async def _slow(cast: Cast, host: Host, draw: Random, tell: Tell) -> None:
    for_s = draw.uniform(1.0, 4.0)
    tell(f"{host.name}: {_DELAY_S * 1000:.0f} ms to Redis and back again, for {for_s:.1f} s")
    host.proxy.delay_s = _DELAY_S
    await trio.sleep(for_s)
    host.proxy.heal()


async def _redis_down(cast: Cast, host: Host, draw: Random, tell: Tell, *, after: str) -> None:
    for_s = draw.uniform(0.1, 3.0)
    tell(f"Redis kill -9, {after} after {for_s:.1f} s")
    redis = cast.redis
    if after == "older dump":
        await trio.to_thread.run_sync(redis.dump)
        await trio.sleep(draw.uniform(0.2, 1.0))
    await trio.to_thread.run_sync(redis.kill)
    await trio.sleep(for_s)
    if after != "restart":
        cast.wiped.append(trio.current_time())
    match after:
        case "empty":
            await trio.to_thread.run_sync(partial(redis.restart, empty=True))
        case "older dump":
            await trio.to_thread.run_sync(redis.restart_from_dump)
        case _:
            await trio.to_thread.run_sync(redis.start)


async def _redis_stop(cast: Cast, host: Host, draw: Random, tell: Tell) -> None:
    for_s = draw.uniform(0.1, 4.0)
    tell(f"SIGSTOP Redis for {for_s:.1f} s")
    cast.redis.stop()
    await trio.sleep(for_s)
    cast.redis.resume()


async def _flush(cast: Cast, host: Host, draw: Random, tell: Tell) -> None:
    tell("FLUSHALL")
    cast.wiped.append(trio.current_time())
    await cast.ask_redis("FLUSHALL")


async def _drop_subscriptions(cast: Cast, host: Host, draw: Random, tell: Tell) -> None:
    tell("CLIENT KILL TYPE pubsub")
    await cast.ask_redis("CLIENT", "KILL", "TYPE", "pubsub")


# `chaos.py --faults` finds them by the first word.
BLOWS = (
    Blow("server kill", partial(_end, how=signal.SIGKILL), "server", weight=2),
    Blow("server term", partial(_end, how=signal.SIGTERM), "server"),
    Blow("server stop", partial(_pause, between=(0.3, 6.0)), "server", weight=1.5),
    Blow("server stop, long", partial(_pause, between=_LONG_S), "server", long=True),
    Blow("cut off", partial(_cut, between=(0.3, 6.0)), "server", weight=2),
    Blow("cut off, long", partial(_cut, between=_LONG_S), "server", long=True),
    Blow("cut off and ended", _cut_and_end, "server"),
    Blow("slow", _slow, "server", weight=0.5),
    Blow("redis restart", partial(_redis_down, after="restart"), "redis"),
    Blow("redis empty", partial(_redis_down, after="empty"), "data"),
    Blow("redis older dump", partial(_redis_down, after="older dump"), "data"),
    Blow("redis stop", _redis_stop, "redis"),
    Blow("redis flush", _flush, "data"),
    Blow("subscriptions", _drop_subscriptions, "link"),
)

# What may happen at the same time: a server, and what loses nothing that only that server has.
TOGETHER = frozenset({"redis", "link"})
