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
from collections.abc import Sequence

import trio
from dotenv import dotenv_values

from bandsync import __version__
from bandsync.app import serve
from bandsync.ops.logs import Sink, make_logger
from bandsync.settings import OPTIONS, Settings, SettingsError, parse
from bandsync.startup import StartError
from bandsync.workers.supervisor import supervise
from bandsync.workers.worker import work

STOP_ON = (signal.SIGTERM, signal.SIGINT)
REPLACE_ON = (signal.SIGHUP,)
# Makes a process a worker. The server id that follows is only for lists of processes: the worker
# reads its configuration from standard input.
WORKER = "--worker"

EXIT_CANNOT_START = 1
EXIT_BAD_SETTINGS = 2


def run(program: str, arguments: list[str], *, command: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        program: name of the program, for its help and its error messages.
        arguments: command-line arguments without the program.
        command: starts this program again; workers are started by it.

    Returns:
        The exit code: 0 after a drain, 1 if the server cannot start, 2 for unusable settings.
    """
    if arguments[:1] == [WORKER]:
        return _run_worker()
    try:
        settings = load_settings(program, arguments)
    except SettingsError as error:
        print(f"{program}: these settings cannot be used:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    _raise_file_limit(program, settings.max_connections)
    _relax_garbage_collection()
    sink = Sink(sys.stderr)
    try:
        trio.run(_serve, settings, sink, command)
    except StartError as error:
        # Flush the log first, so that this is the last line.
        sink.close()
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    finally:
        sink.close()
    return 0


async def _serve(settings: Settings, sink: Sink, command: Sequence[str]) -> None:
    """Serve in this process, or supervise workers.

    Raises:
        StartError: the settings cannot be used on this machine.
    """
    log = make_logger(settings, sink)
    if settings.workers > 1:
        await supervise(
            settings,
            log,
            command=[*command, WORKER],
            announce=_announce,
            stop_on=STOP_ON,
            replace_on=REPLACE_ON,
        )
    else:
        await serve(settings, log, announce=_announce, signals=STOP_ON)


def _announce(line: str) -> None:
    # One write a line, also where Python does not buffer: the log may go to the same file.
    print(f"{line}\n", end="", flush=True)


def _run_worker() -> int:
    """Serve as one of several workers; the supervisor is at the other ends of the pipes."""
    _relax_garbage_collection()
    sink = Sink(sys.stderr)
    try:
        trio.run(_work, sink)
    finally:
        sink.close()
    return 0


async def _work(sink: Sink) -> None:
    inlet = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    outlet = trio.lowlevel.FdStream(os.dup(sys.stdout.fileno()))
    # Anything that a library prints must not go to the supervisor's pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # A closed terminal sends SIGHUP to all processes; the supervisor handles it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    async with inlet, outlet:
        await work(inlet, outlet, lambda settings: make_logger(settings, sink), signals=STOP_ON)


def parse_arguments(program: str, arguments: list[str]) -> dict[str, str]:
    """The settings that were given as flags, by variable name."""
    parser = argparse.ArgumentParser(
        prog=program,
        # The full list of flags before an error would hide the error; --help has the list.
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


def load_settings(program: str, arguments: list[str]) -> Settings:
    """The settings of this process, from `.env`, environment and flags.

    Raises:
        SettingsError: some settings are not usable; the error has all problems.
    """
    flags = parse_arguments(program, arguments)
    # An empty variable counts as not set, so that it does not hide the one in `.env`.
    environment = {name: text for name, text in os.environ.items() if text}
    file = {name: text for name, text in dotenv_values(".env").items() if text}
    return parse({**file, **environment, **flags})


def _raise_file_limit(program: str, connections: int) -> None:
    """Raise the limit of file descriptors for this many connections; print a line if it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
        if ceiling < wanted:
            print(
                f"{program}: only {ceiling} file descriptors for MAX_CONNECTIONS={connections}: "
                "raise the limit (ulimit -n) or lower the setting",
                file=sys.stderr,
            )


def _relax_garbage_collection() -> None:
    """Run the cyclic garbage collector less often: connections are many objects, few are garbage.

    Measured with 1000 connections: 4 % less CPU per delivery, a fifth less per accepted
    connection, the same memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
