"""The faults of a run with one server: how each begins and how it ends."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from threading import Thread
from typing import Literal

import redis
import trio

from scripts.chaos.stage import ChaosSetup

# Slow, but within all deadlines: no reason for a failover.
_DELAY_S = 0.03


async def no_action(setup: ChaosSetup) -> None:
    """The end of a fault that is over at once, or the preparation of one that needs none."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: the first column of the table.
        kind: see `FaultWindow`.
        begin: injects it. The ``Random`` draws unspecified details.
        end: ends it; `no_action` for a fault that is over at once.
        loses: the server must detect it and fail over.
        prepare: runs before the fault.
    """

    name: str
    kind: Literal["end", "silence", "other"]
    begin: Callable[[ChaosSetup, Random], Awaitable[None]]
    end: Callable[[ChaosSetup], Awaitable[None]]
    loses: bool = True
    prepare: Callable[[ChaosSetup], Awaitable[None]] = no_action


async def _kill(setup: ChaosSetup, draw: Random) -> None:
    await trio.to_thread.run_sync(setup.redis.kill)


async def _dump(setup: ChaosSetup) -> None:
    await trio.to_thread.run_sync(setup.redis.dump)
    # Changes acknowledged from now on are not in the dump.
    await trio.sleep(0.5)


async def _restart(setup: ChaosSetup) -> None:
    await trio.to_thread.run_sync(setup.redis.start)


async def _restart_empty(setup: ChaosSetup) -> None:
    await trio.to_thread.run_sync(partial(setup.redis.restart, empty=True))


async def _restart_from_dump(setup: ChaosSetup) -> None:
    await trio.to_thread.run_sync(setup.redis.restart_from_dump)


async def _stop(setup: ChaosSetup, draw: Random) -> None:
    setup.redis.stop()


async def _resume(setup: ChaosSetup) -> None:
    setup.redis.resume()


async def _fill(setup: ChaosSetup, draw: Random) -> None:
    await setup.query_redis("CONFIG", "SET", "maxmemory", "1")


async def _free_memory(setup: ChaosSetup) -> None:
    await setup.query_redis("CONFIG", "SET", "maxmemory", "0")


async def _make_replica(setup: ChaosSetup, draw: Random) -> None:
    # A replica without a master: port 1 is closed.
    await setup.query_redis("REPLICAOF", "127.0.0.1", "1")


async def _make_primary(setup: ChaosSetup) -> None:
    await setup.query_redis("REPLICAOF", "NO", "ONE")


async def _black_hole(setup: ChaosSetup, draw: Random) -> None:
    match draw.choice(["both", "up", "down"]):
        case "up":
            setup.proxy.black_hole("up")
        case "down":
            setup.proxy.black_hole("down")
        case _:
            setup.proxy.black_hole()


async def _reset(setup: ChaosSetup, draw: Random) -> None:
    setup.proxy.reset()


async def _cut_off(setup: ChaosSetup, draw: Random) -> None:
    setup.proxy.refuse()
    setup.proxy.reset()


async def _half_close(setup: ChaosSetup, draw: Random) -> None:
    setup.proxy.half_close()


async def _slow(setup: ChaosSetup, draw: Random) -> None:
    setup.proxy.delay_s = _DELAY_S


async def _heal(setup: ChaosSetup) -> None:
    setup.proxy.heal()


async def _kill_clients(setup: ChaosSetup, draw: Random, *, type_: str) -> None:
    await setup.query_redis("CLIENT", "KILL", "TYPE", type_)


async def _flush(setup: ChaosSetup, draw: Random) -> None:
    await setup.query_redis("FLUSHALL")


async def _block_with_script(setup: ChaosSetup, draw: Random) -> None:
    # After this many milliseconds Redis answers BUSY. Before, it does not answer.
    await setup.query_redis("CONFIG", "SET", "lua-time-limit", str(draw.choice([50, 3000])))

    def loop() -> None:
        # The command ends with SCRIPT KILL, or with the Redis.
        with suppress(redis.RedisError):
            setup.redis.cli("EVAL", "while true do end", "0")

    Thread(target=loop, daemon=True).start()


async def _kill_script(setup: ChaosSetup) -> None:
    await setup.query_redis("SCRIPT", "KILL")


# ``--faults`` selects by text in these names.
FAULTS = (
    Fault("kill -9, restart", "end", _kill, _restart),
    Fault("kill -9, restart empty", "end", _kill, _restart_empty),
    Fault("kill -9, older dump", "end", _kill, _restart_from_dump, prepare=_dump),
    Fault("SIGSTOP", "silence", _stop, _resume),
    Fault("full", "end", _fill, _free_memory),
    Fault("read-only", "end", _make_replica, _make_primary),
    Fault("black hole", "silence", _black_hole, _heal),
    Fault("reset", "end", _reset, no_action),
    Fault("cut off", "end", _cut_off, _heal),
    Fault("half-close", "end", _half_close, no_action),
    Fault("clients killed", "end", partial(_kill_clients, type_="normal"), no_action),
    Fault(
        "subscriber killed", "end", partial(_kill_clients, type_="pubsub"), no_action, loses=False
    ),
    Fault("FLUSHALL", "end", _flush, no_action, loses=False),
    Fault("busy script", "silence", _block_with_script, _kill_script),
    Fault("slow", "other", _slow, _heal, loses=False),
)
