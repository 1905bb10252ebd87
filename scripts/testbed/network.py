"""The network between a phone and a server: a `FaultProxy` in a process of its own.

For tests that are no part of a Trio run, and for measurements: what it delays is then delayed by
what was asked for, and not by what the test itself is busy with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from scripts.testbed.fault_proxy import Direction, FaultProxy
from scripts.testbed.redis_server import HOST

_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 20.0
_LINE_BYTES = 65_536


class Network:
    """Forwards connections to a port of this machine until told otherwise.

    Its methods return when what they ask for is done.

    Args:
        upstream_port: where connections go.

    Attributes:
        port: where it listens, also after `refuse` and `heal`.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self._upstream_port = upstream_port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.testbed.network", str(self._upstream_port)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.port = self._answer()["port"]
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
        # The end of its input is the end of it.
        process.stdin.close()
        try:
            process.wait(_PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    @property
    def url(self) -> str:
        """Where the pages of the server are, through this network."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The same for WebSockets, without a path."""
        return f"ws://{HOST}:{self.port}"

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return int(self._ask("look")["open"])

    @property
    def accepted(self) -> int:
        """Connections so far."""
        return int(self._ask("look")["accepted"])

    def delay(self, up_ms: tuple[float, float], down_ms: tuple[float, float]) -> None:
        """Delay each chunk from now on by a time drawn evenly between these; they stay in order.

        Args:
            up_ms: least and most, towards the server.
            down_ms: least and most, towards the client.
        """
        self._ask("delay", up_ms, down_ms)

    def black_hole(self, *directions: Direction) -> None:
        """Accept and keep connections, and forward nothing; both ways when none is named."""
        self._ask("black_hole", *directions)

    def reset(self) -> None:
        """RST on all connections, to both ends."""
        self._ask("reset")

    def cut(self) -> None:
        """Reset what is open and refuse what comes, until `heal`."""
        self._ask("refuse")
        self._ask("reset")

    def refuse(self) -> None:
        """Stop listening; connections that are open go on."""
        self._ask("refuse")

    def heal(self) -> None:
        """Listen, and forward everything at once, without delay."""
        self._ask("heal")

    def _ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the network process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _do(proxy: FaultProxy, what: str, arguments: list[Any]) -> None:
    match what:
        case "delay":
            (up, down) = ([limit / 1000 for limit in limits] for limits in arguments)
            proxy.jitter_s = {"up": (up[0], up[1]), "down": (down[0], down[1])}
        case "black_hole":
            proxy.black_hole(*arguments)
        case "reset":
            proxy.reset()
        case "refuse":
            proxy.refuse()
        case "heal":
            proxy.heal()
        case "look":
            pass
        case _:
            raise ValueError(what)


def _report(proxy: FaultProxy) -> None:
    state = {"port": proxy.port, "open": proxy.open, "accepted": proxy.accepted}
    print(json.dumps(state), flush=True)  # noqa: T201  # the parent reads it


async def _main(upstream_port: int) -> None:
    async with trio.open_nursery() as nursery:
        proxy = await nursery.start(FaultProxy(upstream_port).run)
        _report(proxy)
        commands = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        rest = b""
        while data := await commands.receive_some(_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                what, *arguments = json.loads(line)
                _do(proxy, what, arguments)
                _report(proxy)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, int(sys.argv[1]))
