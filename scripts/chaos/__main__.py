"""Break Redis in every way while bands play, and check that no acknowledged change is lost.

Starts a redis-server, a fault proxy before it and a BandSync server. Bands play on two different
WebSocket clients while faults come in an order drawn from the seed. Then the server is restarted
and all members resume. Prints a table with one line per fault. The exit code is 1 after a lost
acknowledged change or connection, a version out of order or a different state. With --strict, it
is also 1 if a command waited too long or the music jumped.

With --servers, several servers share the bands. Members move between servers. Faults also hit the
servers and their links to Redis. Prints the faults of each seed and a verdict.
"""

import argparse
import gc
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import trio

from scripts.chaos.cluster_run import run_cluster
from scripts.chaos.faults import FAULTS, Fault
from scripts.chaos.report import print_report
from scripts.chaos.single_run import run_single_server

_PROGRAM = "python -m scripts.chaos"

T = TypeVar("T")


def choose(names: str) -> list[Fault]:
    """The faults whose names contain one of these texts, separated by commas.

    Raises:
        SystemExit: no name does.
    """
    if names == "none":
        return []
    wanted = names.lower().split(",")
    chosen = [
        fault
        for fault in FAULTS
        if names == "all" or any(text.strip() in fault.name.lower() for text in wanted)
    ]
    if not chosen:
        raise SystemExit(f"{_PROGRAM}: --faults: none or some of: {[f.name for f in FAULTS]}")
    return chosen


def main() -> int:
    """Do a run for each seed. Return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="draws the order and times of faults (default 1)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="number of runs, with ascending seeds (default 1)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each fault comes (default 1)"
    )
    parser.add_argument("--bands", type=int, default=3, help="number of bands (default 3)")
    parser.add_argument(
        "--members", type=int, default=4, help="members per band, besides guests (default 4)"
    )
    parser.add_argument(
        "--faults", default="all", help="texts in the names of faults, comma-separated; or none"
    )
    parser.add_argument("--memory", action="store_true", help="without Redis and faults: a dry run")
    parser.add_argument("--pick", type=int, help="number of faults to draw from the seed")
    parser.add_argument("--strict", action="store_true", help="fail on missed latency targets, too")
    cluster = parser.add_argument_group("several servers: other faults, another judge, no table")
    cluster.add_argument(
        "--servers", type=int, help="number of servers, each with its own proxy to Redis"
    )
    cluster.add_argument(
        "--minutes", type=float, default=0.3, help="duration of the faults (default 0.3)"
    )
    cluster.add_argument(
        "--calm", type=float, default=6.0, help="seconds of rest at the end (default 6)"
    )
    parser.add_argument(
        "--keep-logs", type=Path, metavar="DIR", help="directory for the servers' logs"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    faults = [] if given.memory or given.servers else choose(given.faults)
    with tempfile.TemporaryDirectory(prefix="bandsync-chaos-") as directory:
        try:
            good = _run_all(given, faults, given.keep_logs or Path(directory))
        except KeyboardInterrupt:
            return 130
    print("\nNothing was lost." if good else "\nFAILED")
    return int(not good)


def _run_all(given: argparse.Namespace, faults: Sequence[Fault], logs: Path) -> bool:
    logs.mkdir(parents=True, exist_ok=True)
    logs = logs.resolve()
    # A garbage collection of this process would be measured as a stall of the server.
    gc.disable()
    good = True
    for seed in range(given.seed, given.seed + given.seeds):
        if given.servers:
            clean = trio.run(_until_signal, partial(run_cluster, seed, given, logs))
            if clean is None:
                raise KeyboardInterrupt
            good = clean and good
            gc.collect()
            continue
        draw = Random(seed)  # noqa: S311  # a seed to repeat a run
        pick = min(given.pick or len(faults), len(faults))
        order = [fault for _ in range(given.rounds) for fault in draw.sample(faults, pick)]
        log = logs / f"server-{seed}.log"
        log.unlink(missing_ok=True)
        whole = partial(
            run_single_server,
            order,
            draw,
            log,
            bands=given.bands,
            members=given.members,
            memory=given.memory,
        )
        verdict = trio.run(_until_signal, whole)
        if verdict is None:
            raise KeyboardInterrupt
        good = print_report(seed, verdict, log, strict=given.strict) and good
        gc.collect()
    return good


async def _until_signal(whole: Callable[[], Awaitable[T]]) -> T | None:
    """Await a run; return None if SIGINT or SIGTERM ended it.

    The receiver cancels the run. An exception from a signal handler could be raised inside a
    client's parser, which swallows it.
    """
    result = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_signals, nursery.cancel_scope)
        result = await whole()
        nursery.cancel_scope.cancel()
    return result


async def _run_signals(everything: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        async for _ in received:
            everything.cancel()


if __name__ == "__main__":
    sys.exit(main())
