"""Anti-entropy: finds hosted sessions whose stored state differs, and reconciles them.

A relay message can be lost, and Redis can be flushed, restored or edited. The tips of all hosted
sessions are therefore compared with what is stored, every few seconds.
"""

from collections.abc import Awaitable, Callable, Mapping

import trio

from bandsync.model.session import Tip
from bandsync.rooms.context import Stores
from bandsync.rooms.room import Room
from bandsync.storage.base import Lost
from bandsync.storage.era import Era

COMPARE_PERIOD_S = 5.0
_BATCH = 100
# A relay message that is under way arrives within this time and moves the mirror.
_RELAY_DELAY_S = 0.1


class AntiEntropy:
    """Compares the tips of hosted sessions with the stored ones.

    Args:
        rooms: the hosted sessions, by id.
        move: moves one session to Redis, whether it is hosted or only kept in memory.
    """

    def __init__(
        self,
        rooms: Mapping[str, Room],
        stores: Stores,
        move: Callable[[str, Era], Awaitable[None]],
    ) -> None:
        self._rooms = rooms
        self._stores = stores
        self._move = move

    async def run(self) -> None:
        """Compare, for ever."""
        while True:
            await trio.sleep(COMPARE_PERIOD_S)
            era = self._stores.era
            if era is not None:
                await self.compare(era)

    async def compare(self, era: Era) -> None:
        """Reconcile every session whose stored tip differs; refresh the TTL of all of them."""
        suspects: dict[str, Tip | None] = {}
        session_ids = list(self._rooms)
        for start in range(0, len(session_ids), _BATCH):
            batch = session_ids[start : start + _BATCH]
            stored = await era.storage.touch(batch)
            if isinstance(stored, Lost):
                return
            for session_id in batch:
                room = self._rooms.get(session_id)
                if room is None:
                    continue
                if room.mirror.era is not era:
                    # It stayed in memory when the others moved to Redis.
                    await room.move(era)
                elif room.mirror.tip != stored[session_id]:
                    suspects[session_id] = room.mirror.tip
        for session_id in self._stores.memory.ids():
            # It could not be read when the others moved, and has no room.
            if session_id not in self._rooms:
                await self._move(session_id, era)
        if suspects:
            await trio.sleep(_RELAY_DELAY_S)
        for session_id, seen in suspects.items():
            room = self._rooms.get(session_id)
            if room is not None and room.mirror.tip == seen:
                await room.catch_up()
