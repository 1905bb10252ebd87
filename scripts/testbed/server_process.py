"""`scripts/serve.py` as processes of their own, for tests that are no part of a Trio run."""

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
    """A server that does not do what it was started for."""


class ServerProcess:
    """A BandSync server on 127.0.0.1 that keeps its port across restarts.

    Its methods block; they may be called from any thread.

    Args:
        settings: by their names in the environment: ``ADMIN_TOKEN="secret"``. Without any it uses
            no Redis.

    Attributes:
        port: the same for its whole life.
    """

    def __init__(self, **settings: str) -> None:
        self.port = 0
        ours = {option.name for option in OPTIONS}
        plain = {name: text for name, text in os.environ.items() if name not in ours}
        self._environment = {"REDIS_ENABLED": "false"} | plain | settings
        # Not the directory of the repository: an .env may be there.
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
        """Where its pages are."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The same for WebSockets, without a path."""
        return f"ws://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What it wrote to standard error, over all its starts."""
        return self._log.read_text()

    def start(self) -> None:
        """Start it; returns when it listens.

        Raises:
            ServerError: it ended instead; with its log.
        """
        for _ in range(_ATTEMPTS):
            # A port of our own choice, not 0: no outgoing connection may get it while it is down.
            port = self.port or free_port()
            if self._try(port):
                self.port = port
                return
            self.kill()
        raise ServerError(f"{SERVE} does not start:\n{self.log}")

    def stop(self) -> None:
        """SIGTERM: it drains; returns when it has ended.

        Raises:
            ServerError: it ended with a failure, or does not end.
        """
        assert self._process is not None
        self._process.terminate()
        self.wait()

    def drain(self) -> None:
        """SIGTERM, and return at once."""
        assert self._process is not None
        self._process.terminate()

    def wait(self) -> None:
        """Wait until it has ended by itself, after `drain`.

        Raises:
            ServerError: it ended with a failure, or does not end.
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
        """SIGKILL; returns when it is gone."""
        for process in (self._reaper, self._process):
            if process is not None:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
        self._process = self._reaper = None

    def freeze(self) -> None:
        """SIGSTOP: it neither answers nor closes anything."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill it and remove its files."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _try(self, port: int) -> bool:
        """Start on this port; False if it ended, which it does when the port is taken."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, SERVE],
                cwd=self._directory,
                env=self._environment | {"HOST": HOST, "PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A Ctrl-C is for us, who then close it.
                start_new_session=True,
            )
        self._reaper = reaper_of(self._process.pid)
        assert self._process.stdout is not None
        # Its second line names the storage: then everything is up.
        lines = [self._process.stdout.readline() for _ in range(2)]
        return all(lines)
