#!/usr/bin/env python3
"""Start a BandSync server, or several that share one port (--workers).

Settings come from `.env` in the working directory, then the environment, then these flags, each
stronger than the one before.
"""

import argparse
import gc
import os
import resource
import signal
import sys

import trio
from dotenv import dotenv_values

from bandsync import __version__
from bandsync.app import StartError, serve
from bandsync.ops.logs import Sink, make_logger
from bandsync.settings import OPTIONS, Settings, SettingsError, parse
from bandsync.workers.supervisor import supervise
from bandsync.workers.worker import work

STOP_ON = (signal.SIGTERM, signal.SIGINT)
REPLACE_ON = (signal.SIGHUP,)
# Followed by a name, for those who list processes: this one is a worker, all it needs to know
# comes through its standard input.
WORKER = "--worker"


def parse_arguments(arguments: list[str]) -> dict[str, str]:
    """The settings that were given as flags, by variable name."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        # All of them before a line about one that is wrong would hide it; --help lists them.
        usage="%(prog)s [--help] [--version] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"BandSync {__version__}")
    for option in OPTIONS:
        default = f"; default {option.default}" if option.default else ""
        parser.add_argument(
            f"--{option.name.lower().replace('_', '-')}",
            dest=option.name,
            metavar="VALUE",
            help=f"{option.meaning} ({option.allowed}{default})".replace("%", "%%"),
        )
    given = parser.parse_args(arguments)
    return {name: text for name, text in vars(given).items() if text is not None}


def load_settings(arguments: list[str]) -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: with all problems at once.
    """
    flags = parse_arguments(arguments)
    # An empty variable is not given: it does not hide the one in `.env`.
    environment = {name: text for name, text in os.environ.items() if text}
    file = {name: text for name, text in dotenv_values(".env").items() if text}
    return parse({**file, **environment, **flags})


def raise_file_limit(connections: int) -> None:
    """Ask the kernel for as many file descriptors as `connections` need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
        if ceiling < wanted:
            print(
                f"serve.py: only {ceiling} file descriptors for MAX_CONNECTIONS={connections}: "
                "raise the limit (ulimit -n) or lower the setting",
                file=sys.stderr,
            )


def relax_garbage_collection() -> None:
    """Look for cycles less often: thousands of connections are many objects, and few are garbage.

    Measured with 1000 connections: 4 % less CPU per delivery, a fifth less per accepted
    connection, the same memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def run_worker(sink: Sink) -> None:
    """Serve as one of several workers: `bandsync.workers.worker`."""
    inlet = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    outlet = trio.lowlevel.FdStream(os.dup(sys.stdout.fileno()))
    # What some library may print is no report to the supervisor, and must not fill its pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # A terminal that closes tells the supervisor too, which knows what to do.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    async with inlet, outlet:
        await work(inlet, outlet, lambda settings: make_logger(settings, sink), signals=STOP_ON)


def main() -> int:
    """Serve until SIGTERM or SIGINT; 2 for settings that cannot be used, 1 if it cannot start."""
    if sys.argv[1:2] == [WORKER]:
        relax_garbage_collection()
        sink = Sink(sys.stderr)
        try:
            trio.run(run_worker, sink)
        finally:
            sink.close()
        return 0
    try:
        settings = load_settings(sys.argv[1:])
    except SettingsError as error:
        print("serve.py: these settings cannot be used:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        return 2
    raise_file_limit(settings.max_connections)
    relax_garbage_collection()

    sink = Sink(sys.stderr)
    log = make_logger(settings, sink)

    def announce(line: str) -> None:
        # In one write, also where Python does not buffer: the log's lines may go to the same file.
        print(f"{line}\n", end="", flush=True)

    async def run() -> None:
        if settings.workers > 1:
            command = [sys.executable, __file__, WORKER]
            await supervise(
                settings,
                log,
                command=command,
                announce=announce,
                stop_on=STOP_ON,
                replace_on=REPLACE_ON,
            )
        else:
            await serve(settings, log, announce=announce, signals=STOP_ON)

    try:
        trio.run(run)
    except StartError as error:
        sink.close()
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    finally:
        sink.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
