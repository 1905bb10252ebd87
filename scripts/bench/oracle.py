"""What a band under load was told: all must be told the same, and what was acknowledged be kept."""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from bandsync.model.transport import Transport, beat_at, in_force, position_at
from scripts.bench.score import Score

Document = dict[str, Any]

MOVES = frozenset((b"play", b"paus", b"stop", b"seek", b"temp", b"posi"))

# So many chat messages are in every snapshot: protocol.md section 4.
CHAT_RING = 50

_KEPT_EVENTS = 256
# Noise of floats.
_SAME_MS = 1e-3
# What an acknowledged command must have been told as.
_TOLD_AS = {
    "play": b"play",
    "pause": b"paus",
    "stop": b"stop",
    "seek": b"seek",
    "set_tempo": b"temp",
    "update_message": b"mess",
    "chat_message": b"chat",
    "set_role": b"role",
}


class _Moved(msgspec.Struct):
    """An event that moves the music."""

    transport: Transport


_read_move = msgspec.json.Decoder(_Moved).decode


def read_move(payload: bytes) -> Transport:
    """The transport of an event of the kinds `MOVES`."""
    return _read_move(payload).transport


class Witness(Protocol):
    """Who was told something."""

    name: str
    epoch: str


class Truth:
    """The session of a band, as far as its members were told of it.

    Args:
        present: how many of them are joined now.

    Attributes:
        playing: whether the music plays, or will.
    """

    def __init__(self, name: str, score: Score, present: Callable[[], int]) -> None:
        self.playing = False
        self._name = name
        self._score = score
        self._present = present
        self._epoch = ""
        self._events: dict[int, tuple[bytes, bytes]] = {}
        self._forgotten = 0
        self._promises: dict[int, bytes] = {}
        self._acked = 0
        # The latest change of the music that anybody was told of.
        self._move: tuple[int, Transport] | None = None
        # Versions of the latest chat messages that were told, and texts of those acknowledged.
        self._chats: deque[int] = deque(maxlen=CHAT_RING)
        self._said: deque[tuple[int, str]] = deque(maxlen=CHAT_RING)
        self._last: dict[Witness, Document] | None = None

    def told(self, who: Witness, version: int, kind: bytes, payload: bytes) -> None:
        """One was told of a change: the others must be told the same."""
        # An old event is that of a sleeper who woke up.
        if who.epoch != self._epoch or version <= self._forgotten:
            return
        known = self._events.get(version)
        if known is not None:
            if known[1] != payload:
                self._differs(who, known[1], payload)
            return
        self._events[version] = (kind, payload)
        if len(self._events) > _KEPT_EVENTS:
            self._forgotten = min(self._events)
            del self._events[self._forgotten]
        promised = self._promises.pop(version, None)
        if promised is not None and promised != kind:
            self._score.find("otherAck", f"{self._name}: {promised!r} was {kind!r}")
        if kind in {b"play", b"paus", b"stop"}:
            self.playing = kind == b"play"
        if kind == b"chat":
            self._chats.append(version)
        if kind in MOVES and (self._move is None or version > self._move[0]):
            self._move = (version, read_move(payload))

    def promised(self, who: Witness, version: int | None, command: Document) -> None:
        """A command was acknowledged: the event must be told, and the change be kept."""
        kind = _TOLD_AS.get(command["type"])
        if version is None or kind is None or who.epoch != self._epoch:
            return
        self._acked = max(self._acked, version)
        if kind == b"chat":
            self._said.append((version, command["text"]))
        known = self._events.get(version)
        if known is None:
            self._promises[version] = kind
            if len(self._promises) > _KEPT_EVENTS:
                del self._promises[next(iter(self._promises))]
        elif known[0] != kind:
            self._score.find("otherAck", f"{self._name}: {kind!r} was {known[0]!r}")

    def shown(self, who: Witness, snapshot: Document) -> None:
        """One got a snapshot; a new epoch is a new session, and forgets the one before."""
        epoch = snapshot["epoch"]
        if epoch != self._epoch:
            if self._epoch and self._present() > 1:
                self._score.find("newEpoch", f"{self._name}: {self._epoch} became {epoch}")
            self._epoch = epoch
            self._acked = self._forgotten = 0
            self._move = None
            for kept in (self._events, self._promises, self._chats, self._said):
                kept.clear()
        if self._last is not None and "you" not in snapshot:
            self._last[who] = snapshot

    def look(self) -> None:
        """From now on, keep what everybody is shown."""
        self._last = {}

    def looked(self, who: Witness) -> bool:
        """Whether one was shown the session since."""
        return self._last is not None and who in self._last

    def settled(self) -> bool:
        """Whether they were shown the same version: nothing happened meanwhile."""
        shown = {(each["epoch"], each["version"]) for each in (self._last or {}).values()}
        return len({version for _, version in shown}) == len({epoch for epoch, _ in shown})

    def judge(self) -> None:
        """Compare what everybody was shown at the end, and what was acknowledged before."""
        find = self._score.find
        if not self._last:
            if self._epoch:
                find("unheard", f"{self._name}: nobody was shown how it ends")
            return
        first = next(iter(self._last.values()))
        at = first["serverTime"]
        final = msgspec.convert(first["transport"], Transport)
        for who, snapshot in self._last.items():
            for field in ("epoch", "version", "leaderId", "message", "chat"):
                if snapshot[field] != first[field]:
                    find("disagreement", f"{who.name}: {field} at the end")
            if _members(snapshot) != _members(first):
                find("disagreement", f"{who.name}: members at the end")
            self._compare(msgspec.convert(snapshot["transport"], Transport), final, at)
        if first["version"] < self._acked:
            text = f"{self._name}: {self._acked} was acknowledged, {first['version']} is the end"
            find("lostAck", text)
        if self._move is not None:
            self._compare(self._move[1], final, at)
        texts = {chat["text"] for chat in first["chat"]}
        oldest = self._chats[0] if len(self._chats) == CHAT_RING else 0
        for version, said in self._said:
            if version >= oldest and said not in texts:
                find("lostAck", f"{self._name}: chat {version}, {said!r}")

    def _differs(self, who: Witness, known: bytes, payload: bytes) -> None:
        self._score.find("disagreement", f"{who.name}: {payload!r} and {known!r}")
        both = [msgspec.json.decode(each) for each in (known, payload)]
        if all("transport" in each for each in both):
            one, other = (msgspec.convert(each["transport"], Transport) for each in both)
            self._compare(one, other, both[0]["serverTime"])

    def _compare(self, one: Transport, other: Transport, at: float) -> None:
        mine, yours = in_force(one, at), in_force(other, at)
        beats = abs(beat_at(mine, at) - beat_at(yours, at))
        error_ms = max(
            abs(position_at(mine, at) - position_at(yours, at)), beats * 60_000 / mine.tempo_bpm
        )
        self._score.anchor_error_ms = max(self._score.anchor_error_ms, error_ms)
        if error_ms > _SAME_MS:
            self._score.find("beat", f"{self._name}: {error_ms:.3f} ms between {one} and {other}")


def _members(snapshot: Document) -> list[tuple[str, str, bool]]:
    """Who is there: of several servers, each may list them in its own order."""
    members = snapshot["members"]
    return sorted((each["memberId"], each["role"], each["connected"]) for each in members)
