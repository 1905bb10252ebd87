"""Benchmark `commit`: CPU per versioned commit to Redis. Each contender is a process of its own."""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from statistics import median
from typing import Final, NamedTuple, cast

import redis
import trio
from msgspec.structs import replace

from bandsync.model.session import Session
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import parse_address
from bandsync.redis_link.timeouts import Timeouts
from bandsync.rules.actions import Actor, Bind, Decision
from bandsync.rules.decide import decide
from bandsync.rules.server_context import ServerContext
from bandsync.storage.base import Committed
from bandsync.storage.redis import Keys, RedisStorage
from bandsync.wire.commands import Seek
from bandsync.wire.messages import encode
from scripts.bench.processes import (
    ROOT,
    BenchError,
    all_cores,
    clean_environment,
    now_s,
    relax_garbage_collection,
)

_SLICE_S = 2.0
_WARM_UP_S = 0.5
_PATIENCE_S = 5.0
_TTL_S = 3600
_NOW_MS = 1_800_000_000_000.0
_VARIETY = 16


class Slice(NamedTuple):
    """The commits of one contender in some time."""

    commits: int
    seconds: float
    cpu_s: float

    def cost(self) -> float:
        """CPU per commit, µs."""
        return self.cpu_s / self.commits * 1e6


def commit(callers: int, members: int, seconds: float) -> dict[str, object]:
    """CPU per commit to Redis in a closed loop: BandSync's link beside redis-py in threads.

    Both contenders prepare a commit with the same code. Most of the threads' cost on several cores
    is contention for the GIL. So each contender is measured on one core, and on all cores.
    """
    # Imported late, so that the contenders' processes do not load it.
    from scripts.bench.redis import new_redis

    slices = max(2, round(seconds / _SLICE_S))
    placements = {"oneCore": all_cores()[:1], "allCores": all_cores()}
    found: dict[tuple[str, str], list[Slice]] = {}
    with new_redis() as server:
        for _ in range(slices):
            for placement, cores in placements.items():
                for name in CONTENDERS:
                    server.cli("FLUSHALL")
                    given = (name, server.url(), callers, members, seconds / slices)
                    found.setdefault((placement, name), []).append(_run(cores, *given))
    result: dict[str, object] = {
        "bench": "commit",
        "callers": callers,
        "members": members,
        "windowSeconds": round(seconds, 1),
        "slices": slices,
    }
    for placement in placements:
        ours, theirs = (found[placement, name] for name in CONTENDERS)
        pairs = zip(ours, theirs, strict=True)
        result[placement] = {
            **{name: _summary(found[placement, name]) for name in CONTENDERS},
            "ratio": round(_total(theirs).cost() / _total(ours).cost(), 2),
            "medianRatio": round(median(their.cost() / own.cost() for own, their in pairs), 2),
        }
    return result


def _summary(slices: Sequence[Slice]) -> dict[str, object]:
    whole = _total(slices)
    return {
        "cpuUsPerCommit": round(whole.cost(), 2),
        "cpuUsPerSlice": [round(part.cost(), 2) for part in slices],
        "commitsPerSecond": round(whole.commits / whole.seconds),
        "cpu": round(whole.cpu_s / whole.seconds, 3),
    }


def _total(slices: Sequence[Slice]) -> Slice:
    return Slice(*(sum(figures) for figures in zip(*slices, strict=True)))


def _run(cores: Sequence[int], *given: str | float) -> Slice:
    """Run one contender in a process of its own, on these cores."""
    process = subprocess.Popen(  # noqa: S603  # our own module
        [sys.executable, "-m", "scripts.bench.commit", *map(str, given)],
        stdout=subprocess.PIPE,
        env=clean_environment(),
        cwd=ROOT / "scripts",
    )
    with process:
        os.sched_setaffinity(process.pid, cores)
        try:
            output, _ = process.communicate(timeout=_PATIENCE_S + 60)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise BenchError(f"{given[0]} failed")
    return Slice(*json.loads(output))


class ThreadedClient:
    """redis-py's blocking client in threads, with as much of a `Link` as a commit uses."""

    publish_verb: Final = "PUBLISH"

    def __init__(self, url: str, threads: int) -> None:
        self._client = redis.Redis.from_url(url, max_connections=threads)
        self._threads = trio.CapacityLimiter(threads)

    async def execute(self, *args: Argument) -> Reply:
        """Send a command in a thread; return the reply."""
        return await trio.to_thread.run_sync(
            self._client.execute_command, *args, limiter=self._threads
        )


@asynccontextmanager
async def _threaded(url: str, callers: int) -> AsyncIterator[Link]:
    yield cast("Link", ThreadedClient(url, callers))


@asynccontextmanager
async def _linked(url: str, callers: int) -> AsyncIterator[Link]:
    link = Link(
        parse_address(url),
        name="bench",
        timeouts=Timeouts(_PATIENCE_S, _PATIENCE_S, _PATIENCE_S, _PATIENCE_S),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        yield link
        nursery.cancel_scope.cancel()


# Ours first. The common preparation of a commit is part of both figures.
CONTENDERS: dict[str, Callable[[str, int], AbstractAsyncContextManager[Link]]] = {
    "bandsync": _linked,
    "redisPy": _threaded,
}


class CommittingSession:
    """A session in Redis, whose leader sends one command after the other."""

    def __init__(self, storage: RedisStorage, number: int, members: int) -> None:
        self._storage = storage
        self._server = ServerContext(server_id="bench", boot_id="boot", max_members=members)
        self._session = self._filled(f"band-{number}", members)
        self.commits = 0

    def _filled(self, session_id: str, members: int) -> Session:
        session: Session | None = None
        for number in range(members):
            bind = Bind(session_id, "epoch", f"secret-{number}", f"Musician {number}")
            actor = Actor(self._server, f"connection-{number}", "", f"member-{number}")
            session = _decided(session, bind, actor).session
        assert session is not None
        return replace(session, version=1)

    async def store(self) -> None:
        """Store the session in Redis."""
        await self._commit(None, self._session, ())

    async def work(self, ended: Callable[[], bool]) -> None:
        """Commit one change after the other until ``ended``."""
        actor = Actor(self._server, "connection-0", "member-0", "fresh")
        decisions = [
            _decided(self._session, Seek(position_ms=1000.0 * number), actor)
            for number in range(_VARIETY)
        ]
        changes = [
            (decision.session, [encode(event) for event in decision.events])
            for decision in decisions
        ]
        for change, events in itertools.cycle(changes):
            if ended():
                return
            base = self._session
            await self._commit(base, replace(change, version=base.version + 1), events)
            self.commits += 1

    async def _commit(self, base: Session | None, change: Session, events: Sequence[bytes]) -> None:
        outcome = await self._storage.commit(base, change, events)
        if not isinstance(outcome, Committed):
            raise BenchError(f"not committed: {outcome}")
        self._session = outcome.session


def _decided(session: Session | None, command: Bind | Seek, actor: Actor) -> Decision:
    decision = decide(session, command, actor, _NOW_MS)
    assert isinstance(decision, Decision)
    return decision


async def _measure(name: str, url: str, callers: int, members: int, seconds: float) -> Slice:
    ended = False
    async with CONTENDERS[name](url, callers) as link:
        storage = RedisStorage(
            link,
            Keys("bandsync:"),
            ttl_s=_TTL_S,
            server_id="bench",
            event_ids=(f"event-{number:x}" for number in itertools.count()),
            on_loss=lambda reason, error: print(f"lost: {reason}: {error}", file=sys.stderr),
        )
        sessions = [CommittingSession(storage, number, members) for number in range(callers)]
        for session in sessions:
            await session.store()
        relax_garbage_collection()

        def usage() -> Slice:
            used = resource.getrusage(resource.RUSAGE_SELF)
            commits = sum(session.commits for session in sessions)
            return Slice(commits, now_s(), used.ru_utime + used.ru_stime)

        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(session.work, lambda: ended)
            await trio.sleep(_WARM_UP_S)
            before = usage()
            await trio.sleep(seconds)
            after = usage()
            ended = True
    return Slice(
        after.commits - before.commits, after.seconds - before.seconds, after.cpu_s - before.cpu_s
    )


def main(given: Sequence[str]) -> None:
    """Run one contender, and print its figures."""
    name, url, callers, members, seconds = given
    figures = trio.run(_measure, name, url, int(callers), int(members), float(seconds))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
