"""The sweeper: members of servers that are gone are not left behind (design.md section 5)."""

import trio

from bandsync.model.session import Member, present
from bandsync.rooms.hub import Hub
from bandsync.rooms.room import Room
from bandsync.storage.base import Lost, Presence, Unreadable
from bandsync.storage.era import Era

GLANCE_PERIOD_S = 2.0
# One glance sweeps nobody: a flush of Redis deletes every entry, and each server puts its own
# back within three seconds.
ABSENCE_S = 10.0


class FailureDetector:
    """Disconnects members whose server has not been seen to host their session for long."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # Since when, on Trio's clock, a boot id has not been seen with a session.
        self._absent: dict[tuple[str, str], float] = {}
        self._era: Era | None = None

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            await trio.sleep(GLANCE_PERIOD_S)
            era = self._hub.stores.era
            if era is not self._era:
                # What was not seen while Redis was out of sight says nothing.
                self._absent.clear()
                self._era = era
            if era is not None:
                await self._glance(era)

    async def _glance(self, era: Era) -> None:
        here = self._hub.here.boot_id
        foreign: list[tuple[Room, Member]] = []
        for room in self._hub.rooms.values():
            session = room.mirror.session
            if session is not None and room.mirror.era is era:
                foreign += [(room, member) for member in present(session) if member.boot_id != here]
        servers = sorted({member.server_id for _, member in foreign})
        entries = await era.storage.find_servers(servers)
        if isinstance(entries, Lost):
            return
        hosted: dict[str, frozenset[str]] = {}
        for entry in entries.values():
            if isinstance(entry, Presence):
                hosted[entry.boot_id] = frozenset(entry.sessions)
        now = trio.current_time()
        absent: dict[tuple[str, str], float] = {}
        for room, member in foreign:
            if isinstance(entries.get(member.server_id), Unreadable):
                # Of a newer version, perhaps: no reason to throw its members out.
                continue
            if room.session_id not in hosted.get(member.boot_id, ()):
                key = (room.session_id, member.boot_id)
                since = absent[key] = self._absent.get(key, now)
                if now - since >= ABSENCE_S:
                    await room.sweep(member)
        self._absent = absent
