"""Relay inbox: what other servers publish on a session's channel, until the room handles it."""

from collections.abc import Iterable

from bandsync.rooms.mirror import GAP, Applied, Gap, Mirror
from bandsync.storage.channel_messages import (
    CommittedChange,
    ConnectionStats,
    DirectMessage,
    read_channel_message,
)

# Bound on relay messages buffered while the lock is held. Beyond it, discard them and read the
# session from Redis instead.
MAX_BUFFERED = 256


class RelayInbox:
    """Decodes the relay messages of one session; buffers them while the room's lock is held.

    Like the mirror it returns effects, which the room carries out at once.

    Attributes:
        buffered: the messages that arrived while the lock was held.
    """

    __slots__ = ("_mirror", "_stats", "buffered")

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self.buffered: list[bytes] = []
        # The connection stats that other servers published last, by member id.
        self._stats: dict[str, tuple[float | None, float | None]] = {}

    def buffer(self, payload: bytes) -> Gap | None:
        """Keep a message for later; `Gap` if there were too many, which are discarded."""
        self.buffered.append(payload)
        if len(self.buffered) <= MAX_BUFFERED:
            return None
        self.buffered.clear()
        return GAP

    def take_buffered(self) -> list[bytes]:
        """The buffered messages, which are removed."""
        buffered, self.buffered = self.buffered, []
        return buffered

    def receive(self, payload: bytes) -> Applied | DirectMessage | Gap | None:
        """Decode a message and apply it to the mirror.

        Returns:
            `Gap` also for a malformed message: it may have been a change.
        """
        match read_channel_message(payload):
            case None:
                return GAP
            case CommittedChange() as change:
                return self._mirror.apply(change)
            case ConnectionStats(stats=stats):
                self._stats |= stats
                return None
            case message:
                return message

    def stats_of(self, member_ids: Iterable[str]) -> dict[str, tuple[float | None, float | None]]:
        """Round trip and clock error of these members; the stats of all others are discarded."""
        self._stats = {id_: self._stats.get(id_, (None, None)) for id_ in member_ids}
        return self._stats

    def latencies_ms(self) -> dict[str, float | None]:
        """Round trips of members on other servers, by member id; None where unknown."""
        return {member_id: latency for member_id, (latency, _) in self._stats.items()}
