"""Failure detector: disconnects the members of servers that have failed.

Every server refreshes a presence entry in Redis, which lists the sessions that it hosts
(`bandsync/README.md`).
"""

import trio

from bandsync.model.session import Member, present
from bandsync.rooms.hub import Hub
from bandsync.rooms.room import Room
from bandsync.storage.base import Lost, Presence, Unreadable
from bandsync.storage.era import Era

CHECK_PERIOD_S = 2.0
# Require 10 s of continuous absence: FLUSHALL removes every heartbeat key at once, and servers
# rewrite theirs within 3 s.
ABSENCE_S = 10.0


class FailureDetector:
    """Disconnects members whose server has not been seen to host their session for long.

    Args:
        hub: the rooms whose sessions are watched.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # By session id and boot id: since when, on Trio's clock, no entry of that process has
        # listed the session.
        self._absent: dict[tuple[str, str], float] = {}
        self._era: Era | None = None

    async def run(self) -> None:
        """Check, for ever."""
        while True:
            await trio.sleep(CHECK_PERIOD_S)
            era = self._hub.stores.era
            if era is not self._era:
                # An absence is not continuous if Redis was out of reach in between.
                self._absent.clear()
                self._era = era
            if era is not None:
                await self._check(era)

    async def _check(self, era: Era) -> None:
        boot_id = self._hub.server_context.boot_id
        remote: list[tuple[Room, Member]] = []
        for room in self._hub.rooms.values():
            session = room.mirror.session
            if session is not None and room.mirror.era is era:
                remote += [
                    (room, member) for member in present(session) if member.boot_id != boot_id
                ]
        servers = sorted({member.server_id for _, member in remote})
        entries = await era.storage.find_servers(servers)
        if isinstance(entries, Lost):
            return
        hosted: dict[str, frozenset[str]] = {}
        for entry in entries.values():
            if isinstance(entry, Presence):
                hosted[entry.boot_id] = frozenset(entry.sessions)
        now = trio.current_time()
        absent: dict[tuple[str, str], float] = {}
        for room, member in remote:
            if isinstance(entries.get(member.server_id), Unreadable):
                # A newer version may have written it: that is a sign of life.
                continue
            if room.session_id not in hosted.get(member.boot_id, ()):
                key = (room.session_id, member.boot_id)
                since = absent[key] = self._absent.get(key, now)
                if now - since >= ABSENCE_S:
                    await room.drop_lost(member)
        self._absent = absent
