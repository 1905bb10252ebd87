#!/usr/bin/env python3
"""A server for `chaos.py --servers`: `scripts/serve.py` that also writes down what it commits.

The first argument is the file, the others are those of `scripts/serve.py`. Only the stamps tell
whether a change that is gone was overwritten by a later one, and clients are not shown them.
"""

import os
import runpy
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bandsync.model.session import Session
from bandsync.rooms.mirror import Mirror
from bandsync.storage.base import Committed
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.redis import RedisStorage

Commit = Callable[[Any, Session | None, Session, Sequence[bytes]], Awaitable[object]]


def entry(storage: str, base: Session | None, now: Session) -> bytes:
    """A line about a state that was reached from ``base``."""
    before = {} if base is None else base.members
    said = set() if base is None else {chat.message_id for chat in base.chat}
    members = {
        key: [m.incarnation, m.time, m.writer, m.present, m.connected, m.connection_id, m.boot_id]
        for key, m in now.members.items()
        if before.get(key) is not m
    }
    line = {
        "at": time.perf_counter(),
        "first": base is None,
        "storage": storage,
        "session": now.session_id,
        "epoch": now.epoch.id,
        "version": now.version,
        "event": now.event_id,
        "leader": now.leader,
        "transport": now.transport.stamp,
        "message": now.headline.stamp,
        "chat": [(c.message_id, c.sent_at) for c in now.chat if c.message_id not in said],
        "members": members,
        "gone": [key for key in before if key not in now.members],
    }
    return msgspec.json.encode(line) + b"\n"


def trace(kind: type[MemoryStorage | RedisStorage], storage: str, file: int) -> None:
    """Write down every commit before anybody is told of it; a kill -9 loses none."""
    commit: Commit = kind.commit

    async def traced(
        self: object, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> object:
        result = await commit(self, base, change, events)
        if isinstance(result, Committed):
            os.write(file, entry(storage, base, result.session))
        return result

    kind.commit = traced  # type: ignore[method-assign, assignment]


def trace_mirrors(file: int) -> None:
    """Write down what mirrors take over, too: it tells what a server knew, and when."""
    replace = Mirror._replace  # noqa: SLF001  # looked at, not changed

    def traced(self: Mirror, session: Session) -> None:
        os.write(file, entry("mirror", self.session, session))
        replace(self, session)

    Mirror._replace = traced  # type: ignore[method-assign]  # noqa: SLF001


def main() -> None:
    """Serve."""
    path, *arguments = sys.argv[1:]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    trace(MemoryStorage, "memory", file)
    trace(RedisStorage, "redis", file)
    trace_mirrors(file)
    script = Path(__file__).parents[1] / "serve.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
