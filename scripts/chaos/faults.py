"""What can happen to a Redis: how each fault begins and how it ends."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from threading import Thread
from typing import Literal

import redis
import trio

from scripts.chaos.stage import Stage

# Slow, but within all deadlines: no reason to fail over.
_DELAY_S = 0.03


async def nothing(stage: Stage) -> None:
    """For a fault that is over at once, or needs no preparation."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        prepare: what must be done before it.
        kind: see `chaosjudge.Window`.
        begin: makes it happen; the ``Random`` draws what the fault leaves open.
        end: takes it back; nothing for one that is over at once.
        loses: the server must notice and fail over.
    """

    name: str
    kind: Literal["end", "silence", "other"]
    begin: Callable[[Stage, Random], Awaitable[None]]
    end: Callable[[Stage], Awaitable[None]]
    loses: bool = True
    prepare: Callable[[Stage], Awaitable[None]] = nothing


async def _kill(stage: Stage, draw: Random) -> None:
    await trio.to_thread.run_sync(stage.redis.kill)


async def _dump(stage: Stage) -> None:
    await trio.to_thread.run_sync(stage.redis.dump)
    # What is acknowledged now is not in the dump.
    await trio.sleep(0.5)


async def _restart(stage: Stage) -> None:
    await trio.to_thread.run_sync(stage.redis.start)


async def _restart_empty(stage: Stage) -> None:
    await trio.to_thread.run_sync(partial(stage.redis.restart, empty=True))


async def _restart_from_dump(stage: Stage) -> None:
    await trio.to_thread.run_sync(stage.redis.restart_from_dump)


async def _stop(stage: Stage, draw: Random) -> None:
    stage.redis.stop()


async def _resume(stage: Stage) -> None:
    stage.redis.resume()


async def _fill(stage: Stage, draw: Random) -> None:
    await stage.ask_redis("CONFIG", "SET", "maxmemory", "1")


async def _make_room(stage: Stage) -> None:
    await stage.ask_redis("CONFIG", "SET", "maxmemory", "0")


async def _make_replica(stage: Stage, draw: Random) -> None:
    # Of nobody: port 1 is closed.
    await stage.ask_redis("REPLICAOF", "127.0.0.1", "1")


async def _make_primary(stage: Stage) -> None:
    await stage.ask_redis("REPLICAOF", "NO", "ONE")


async def _black_hole(stage: Stage, draw: Random) -> None:
    match draw.choice(["both", "up", "down"]):
        case "up":
            stage.proxy.black_hole("up")
        case "down":
            stage.proxy.black_hole("down")
        case _:
            stage.proxy.black_hole()


async def _reset(stage: Stage, draw: Random) -> None:
    stage.proxy.reset()


async def _cut_off(stage: Stage, draw: Random) -> None:
    stage.proxy.refuse()
    stage.proxy.reset()


async def _half_close(stage: Stage, draw: Random) -> None:
    stage.proxy.half_close()


async def _slow(stage: Stage, draw: Random) -> None:
    stage.proxy.delay_s = _DELAY_S


async def _heal(stage: Stage) -> None:
    stage.proxy.heal()


async def _kill_clients(stage: Stage, draw: Random, *, type_: str) -> None:
    await stage.ask_redis("CLIENT", "KILL", "TYPE", type_)


async def _flush(stage: Stage, draw: Random) -> None:
    await stage.ask_redis("FLUSHALL")


async def _occupy(stage: Stage, draw: Random) -> None:
    # From this many milliseconds on, it says BUSY instead of nothing.
    await stage.ask_redis("CONFIG", "SET", "lua-time-limit", str(draw.choice([50, 3000])))

    def loop() -> None:
        # It ends with SCRIPT KILL, or with the Redis.
        with suppress(redis.RedisError):
            stage.redis.cli("EVAL", "while true do end", "0")

    Thread(target=loop, daemon=True).start()


async def _free(stage: Stage) -> None:
    await stage.ask_redis("SCRIPT", "KILL")


# The first column; `chaos.py --faults` finds them by it.
FAULTS = (
    Fault("kill -9, restart", "end", _kill, _restart),
    Fault("kill -9, restart empty", "end", _kill, _restart_empty),
    Fault("kill -9, older dump", "end", _kill, _restart_from_dump, prepare=_dump),
    Fault("SIGSTOP", "silence", _stop, _resume),
    Fault("full", "end", _fill, _make_room),
    Fault("read-only", "end", _make_replica, _make_primary),
    Fault("black hole", "silence", _black_hole, _heal),
    Fault("reset", "end", _reset, nothing),
    Fault("cut off", "end", _cut_off, _heal),
    Fault("half-close", "end", _half_close, nothing),
    Fault("clients killed", "end", partial(_kill_clients, type_="normal"), nothing),
    Fault("subscriber killed", "end", partial(_kill_clients, type_="pubsub"), nothing, loses=False),
    Fault("FLUSHALL", "end", _flush, nothing, loses=False),
    Fault("busy script", "silence", _occupy, _free),
    Fault("slow", "other", _slow, _heal, loses=False),
)
