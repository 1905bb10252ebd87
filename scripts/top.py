#!/usr/bin/env python3
"""Watch BandSync servers in a terminal: a summary of /ops.

Needs the extra `ops` (rich, httpx). The exit code of --once is 0 if all servers are well, 1 if one
of them has a problem, 2 if one does not answer.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx
import trio
from rich.console import Console
from rich.live import Live

from scripts.top_view import Watched, screen

DEFAULT = "http://127.0.0.1:3001"
_PERIOD_S = 1.0
_PATIENCE_S = 3.0
_EXIT_NOT_WELL = 1
_EXIT_NO_ANSWER = 2


async def query(client: httpx.AsyncClient, server: Watched) -> None:
    """Query a server once."""
    params = {} if server.since is None else {"since": repr(server.since)}
    try:
        answer = await client.get(f"{server.address}/api/ops", params=params)
        answer.raise_for_status()
        server.update(answer.json())
    except httpx.HTTPStatusError as error:
        hint = "it needs --token or ADMIN_TOKEN" if error.response.status_code == 401 else ""
        server.fail(hint or f"status {error.response.status_code}")
    except httpx.TimeoutException:
        server.fail(f"not within {_PATIENCE_S:.0f} s")
    except httpx.HTTPError as error:
        server.fail(str(error) or type(error).__name__)
    except (ValueError, KeyError, TypeError) as error:
        server.fail(f"not a BandSync server of this version ({error!r})")


async def query_for_ever(client: httpx.AsyncClient, server: Watched) -> None:
    """Query a server once a second, for ever."""
    while True:
        await query(client, server)
        await trio.sleep(_PERIOD_S)


async def once(client: httpx.AsyncClient, servers: Sequence[Watched], console: Console) -> int:
    """Query all servers once, print the screen, and return the exit code."""
    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(query, client, server)
    console.print(screen(servers))
    if any(server.trouble is not None for server in servers):
        return _EXIT_NO_ANSWER
    return 0 if all(server.well for server in servers) else _EXIT_NOT_WELL


async def watch(client: httpx.AsyncClient, servers: Sequence[Watched], console: Console) -> int:
    """Show the servers until a signal, or Ctrl-C."""
    with (
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
    ):
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(query_for_ever, client, server)
            nursery.start_soon(_refresh, live, servers)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
    return 0


async def _refresh(live: Live, servers: Sequence[Watched]) -> None:
    while True:
        live.update(screen(servers), refresh=True)
        await trio.sleep(_PERIOD_S / 4)


async def _main(arguments: argparse.Namespace) -> int:
    # Bytes: a token may have characters that are not ASCII.
    headers = {b"Authorization": f"Bearer {arguments.token}".encode()} if arguments.token else {}
    servers = [Watched(address) for address in arguments.servers]
    async with httpx.AsyncClient(headers=headers, timeout=_PATIENCE_S) as client:
        show = once if arguments.once else watch
        return await show(client, servers, Console())


def _address(text: str) -> str:
    address = text if "//" in text else f"http://{text}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as {DEFAULT}")
    return f"{parts.scheme}://{parts.netloc}"


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, watch, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="top.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "servers",
        nargs="*",
        type=_address,
        default=[DEFAULT],
        metavar="ADDRESS",
        help=f"servers (default {DEFAULT}); http://x:TOKEN@host has a token of its own",
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("ADMIN_TOKEN"),
        help="ADMIN_TOKEN of the servers (default: that of the environment)",
    )
    parser.add_argument("--once", action="store_true", help="print once, and exit")
    return trio.run(_main, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
