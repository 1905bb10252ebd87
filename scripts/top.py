#!/usr/bin/env python3
"""Watch BandSync servers in a terminal: what /ops shows, at a glance.

Needs the extra `ops` (rich, httpx). The exit code of --once is 0 if all servers say that all is
well, 1 if one of them says otherwise, 2 if one does not answer.
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


async def ask(client: httpx.AsyncClient, server: Watched) -> None:
    """Ask a server once."""
    params = {} if server.since is None else {"since": repr(server.since)}
    try:
        answer = await client.get(f"{server.address}/api/ops", params=params)
        answer.raise_for_status()
        server.take(answer.json())
    except httpx.HTTPStatusError as error:
        hint = "it needs --token or ADMIN_TOKEN" if error.response.status_code == 401 else ""
        server.miss(hint or f"status {error.response.status_code}")
    except httpx.TimeoutException:
        server.miss(f"not within {_PATIENCE_S:.0f} s")
    except httpx.HTTPError as error:
        server.miss(str(error) or type(error).__name__)
    except (ValueError, KeyError, TypeError) as error:
        server.miss(f"this is no BandSync server of our version ({error!r})")


async def ask_for_ever(client: httpx.AsyncClient, server: Watched) -> None:
    """Ask a server once a second, whether it answers or not."""
    while True:
        await ask(client, server)
        await trio.sleep(_PERIOD_S)


async def once(client: httpx.AsyncClient, servers: Sequence[Watched], console: Console) -> int:
    """Ask all servers, print what they say, and return the exit code."""
    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(ask, client, server)
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
                nursery.start_soon(ask_for_ever, client, server)
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
    headers = {"Authorization": f"Bearer {arguments.token}".encode()} if arguments.token else {}
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
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as {DEFAULT}")
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
        help=f"servers (default {DEFAULT}); http://x:TOKEN@host brings a token of its own",
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("ADMIN_TOKEN"),
        help="their ADMIN_TOKEN (default: that of the environment)",
    )
    parser.add_argument("--once", action="store_true", help="print once, and exit")
    return trio.run(_main, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
