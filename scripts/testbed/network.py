"""A simulated network between client and server: a `FaultProxy` in a process of its own.

For tests outside a Trio run, and for measurements. In its own process, the load of the test does
not add to the delay.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import msgspec
import trio

from scripts.testbed.fault_proxy import Direction, FaultProxy
from scripts.testbed.redis_server import HOST

_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 20.0
_LINE_BYTES = 65_536


class ProxyState(msgspec.Struct):
    """A line of the process: the state of its proxy after a command."""

    port: int
    open: int
    accepted: int


class Network:
    """Forwards connections to a port of this machine, with the faults that its methods inject.

    Each method returns when the fault is in force.

    Args:
        upstream_port: the port that connections are forwarded to.

    Attributes:
        port: the listening port; stays the same after `refuse` and `heal`.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self._upstream_port = upstream_port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "scripts.testbed.network", str(self._upstream_port)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.port = self._read_state().port
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        # The process exits at the end of its input.
        process.stdin.close()
        try:
            process.wait(_PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    @property
    def url(self) -> str:
        """The server's base URL through this network."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The server's base URL for WebSockets, through this network."""
        return f"ws://{HOST}:{self.port}"

    @property
    def open(self) -> int:
        """Number of connections that are open now."""
        return self._command("state").open

    @property
    def accepted(self) -> int:
        """Number of connections accepted so far."""
        return self._command("state").accepted

    def delay(self, up_ms: tuple[float, float], down_ms: tuple[float, float]) -> None:
        """Delay each chunk by a time drawn uniformly from a range. Chunks stay in order.

        Args:
            up_ms: least and most delay, towards the server.
            down_ms: least and most delay, towards the client.
        """
        self._command("delay", up_ms, down_ms)

    def black_hole(self, *directions: Direction) -> None:
        """Accept and keep connections, but forward nothing; both ways when none is named."""
        self._command("black_hole", *directions)

    def reset(self) -> None:
        """Send RST on all connections, to both ends."""
        self._command("reset")

    def cut(self) -> None:
        """Reset open connections and refuse new ones, until `heal`."""
        self._command("refuse")
        self._command("reset")

    def refuse(self) -> None:
        """Stop listening. Open connections stay open."""
        self._command("refuse")

    def heal(self) -> None:
        """End all faults: listen again, and forward everything without delay."""
        self._command("heal")

    def _command(self, name: str, *arguments: str | tuple[float, float]) -> ProxyState:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._read_state()

    def _read_state(self) -> ProxyState:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the proxy's process ended"
        return msgspec.json.decode(line, type=ProxyState)


def _carry_out(proxy: FaultProxy, name: str, arguments: list[object]) -> None:
    match name:
        case "delay":
            up, down = msgspec.convert(arguments, list[tuple[float, float]])
            proxy.jitter_s = {
                "up": (up[0] / 1000, up[1] / 1000),
                "down": (down[0] / 1000, down[1] / 1000),
            }
        case "black_hole":
            proxy.black_hole(*cast("list[Direction]", arguments))
        case "reset":
            proxy.reset()
        case "refuse":
            proxy.refuse()
        case "heal":
            proxy.heal()
        case "state":
            pass
        case _:
            raise ValueError(name)


def _print_state(proxy: FaultProxy) -> None:
    state = {"port": proxy.port, "open": proxy.open, "accepted": proxy.accepted}
    print(json.dumps(state), flush=True)


async def _main(upstream_port: int) -> None:
    async with trio.open_nursery() as nursery:
        proxy = await nursery.start(FaultProxy(upstream_port).run)
        _print_state(proxy)
        commands = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        rest = b""
        while data := await commands.receive_some(_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                name, *arguments = json.loads(line)
                _carry_out(proxy, name, arguments)
                _print_state(proxy)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, int(sys.argv[1]))
