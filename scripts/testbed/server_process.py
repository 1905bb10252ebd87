"""`scripts/serve.py` in processes of its own, for tests and scripts outside a Trio run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from bandsync.settings import OPTIONS
from scripts.testbed.redis_server import HOST, free_port, reaper_of

SERVE = Path(__file__).parents[2] / "scripts" / "serve.py"

_PATIENCE_S = 30.0
_ATTEMPTS = 10


class ServerError(Exception):
    """A server does not start, or does not end properly."""


class ServerProcess:
    """A BandSync server on 127.0.0.1 that keeps its port across restarts.

    Methods block. They may be called from any thread.

    Args:
        settings: by environment name: ``ADMIN_TOKEN="secret"``. Redis is disabled by default.

    Attributes:
        port: the listening port; 0 before the first start, then unchanged.
    """

    def __init__(self, **settings: str) -> None:
        self.port = 0
        ours = {option.name for option in OPTIONS}
        plain = {name: text for name, text in os.environ.items() if name not in ours}
        self._environment = {"REDIS_ENABLED": "false"} | plain | settings
        # Not the repository's directory: it may contain an .env.
        self._directory = Path(tempfile.mkdtemp(prefix="bandsync-server-"))
        self._log = self._directory / "log"
        self._process: subprocess.Popen[str] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's base URL."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The server's base URL for WebSockets."""
        return f"ws://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Its standard error, over all starts."""
        return self._log.read_text()

    def start(self) -> None:
        """Start the server; return when it listens.

        Raises:
            ServerError: it exited instead; the message contains its log.
        """
        for _ in range(_ATTEMPTS):
            # Chosen here, not 0: no outgoing connection may take the port while the server is down.
            port = self.port or free_port()
            if self._try(port):
                self.port = port
                return
            self.kill()
        raise ServerError(f"{SERVE} does not start:\n{self.log}")

    def stop(self) -> None:
        """Send SIGTERM: the server drains; return when it has exited.

        Raises:
            ServerError: it exited with a failure, or does not exit.
        """
        assert self._process is not None
        self._process.terminate()
        self.wait()

    def drain(self) -> None:
        """Send SIGTERM; return at once."""
        assert self._process is not None
        self._process.terminate()

    def wait(self) -> None:
        """Wait until it has exited by itself, after `drain`.

        Raises:
            ServerError: it exited with a failure, or does not exit.
        """
        assert self._process is not None
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise ServerError(f"{SERVE} does not end:\n{self.log}") from None
        finally:
            self.kill()
        if code != 0:
            raise ServerError(f"{SERVE} ended with {code}:\n{self.log}")

    def kill(self) -> None:
        """Send SIGKILL; return when the process is gone."""
        for process in (self._reaper, self._process):
            if process is not None:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
        self._process = self._reaper = None

    def freeze(self) -> None:
        """Send SIGSTOP: the server neither answers nor closes connections."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Kill the server if it runs, and start it again on the same port."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill the server and remove its files."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _try(self, port: int) -> bool:
        """Start on this port; False if the server exited, as it does when the port is taken."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own script
                [sys.executable, SERVE],
                cwd=self._directory,
                env=self._environment | {"HOST": HOST, "PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A Ctrl-C goes to this process only, which then closes the server.
                start_new_session=True,
            )
        self._reaper = reaper_of(self._process.pid)
        assert self._process.stdout is not None
        # Its second line names the storage, when everything is up.
        lines = [self._process.stdout.readline() for _ in range(2)]
        return all(lines)
