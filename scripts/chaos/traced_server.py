"""A server for cluster runs: `scripts/serve.py` that also writes its commits to a file.

The first argument is the file, the others are those of `scripts/serve.py`. Only stamps show whether
a lost change was overwritten by a later one, and clients do not receive stamps.
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


def trace_line(storage: str, base: Session | None, now: Session) -> bytes:
    """A line of the trace: the state ``now``, reached from ``base``."""
    before = {} if base is None else base.members
    known_chats = set() if base is None else {chat.message_id for chat in base.chat}
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
        "chat": [(c.message_id, c.sent_at) for c in now.chat if c.message_id not in known_chats],
        "members": members,
        "gone": [key for key in before if key not in now.members],
    }
    return msgspec.json.encode(line) + b"\n"


def trace_commits(kind: type[MemoryStorage | RedisStorage], storage: str, file: int) -> None:
    """Write each commit before any client receives it. A kill -9 loses no line."""
    commit: Commit = kind.commit

    async def traced(
        self: object, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> object:
        result = await commit(self, base, change, events)
        if isinstance(result, Committed):
            os.write(file, trace_line(storage, base, result.session))
        return result

    kind.commit = traced  # type: ignore[method-assign, assignment]  # to trace, without a hook in the product


def trace_mirrors(file: int) -> None:
    """Write each state that a mirror applies, too: it shows what a server knew, and when."""
    set_state = Mirror.set_state

    def traced(self: Mirror, session: Session) -> None:
        os.write(file, trace_line("mirror", self.session, session))
        set_state(self, session)

    Mirror.set_state = traced  # type: ignore[method-assign]  # wrapped to trace it


def main() -> None:
    """Trace, and serve."""
    path, *arguments = sys.argv[1:]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    trace_commits(MemoryStorage, "memory", file)
    trace_commits(RedisStorage, "redis", file)
    trace_mirrors(file)
    script = Path(__file__).parents[1] / "serve.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
