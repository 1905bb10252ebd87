"""The oracle of a session under load: all members must receive the same, and no ack may be lost."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from bandsync.model.transport import Transport, beat_at, in_force, position_at
from scripts.bench.score import LoadScore
from scripts.testbed.json_messages import JsonMessage

MOVES = frozenset((b"play", b"paus", b"stop", b"seek", b"temp", b"posi"))

# PROTOCOL.md: a snapshot holds this many chat messages.
CHAT_RING = 50

_KEPT_EVENTS = 256
# Rounding errors.
_TOLERANCE_MS = 1e-3
# The event that must follow an acknowledged command.
_EVENT_OF = {
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
    """An event that changes the transport."""

    transport: Transport


_read_move = msgspec.json.Decoder(_Moved).decode


def read_move(payload: bytes) -> Transport:
    """The transport of an event of the kinds `MOVES`."""
    return _read_move(payload).transport


class Observer(Protocol):
    """A member who receives events.

    Attributes:
        name: of the member.
        epoch: of its last snapshot.
    """

    name: str
    epoch: str


class SessionOracle:
    """The session of a band, as its members receive it.

    Args:
        name: id of the session.
        score: counts violations.
        present: returns the number of joined members.

    Attributes:
        playing: whether the song plays, or will.
    """

    def __init__(self, name: str, score: LoadScore, present: Callable[[], int]) -> None:
        self.playing = False
        self._name = name
        self._score = score
        self._present = present
        self._epoch = ""
        self._events: dict[int, tuple[bytes, bytes]] = {}
        self._forgotten = 0
        self._acked_kinds: dict[int, bytes] = {}
        self._acked = 0
        # The latest change of the transport that any member received.
        self._move: tuple[int, Transport] | None = None
        # Versions of the latest chat messages, and the acknowledged ones with their texts.
        self._chats: deque[int] = deque(maxlen=CHAT_RING)
        self._acked_chats: deque[tuple[int, str]] = deque(maxlen=CHAT_RING)
        self._final_snapshots: dict[Observer, JsonMessage] | None = None

    def event_received(self, observer: Observer, version: int, kind: bytes, payload: bytes) -> None:
        """Compare an event with the one of the same version that another member received."""
        # A member that reads again after a pause receives old events.
        if observer.epoch != self._epoch or version <= self._forgotten:
            return
        known = self._events.get(version)
        if known is not None:
            if known[1] != payload:
                self._differs(observer, known[1], payload)
            return
        self._events[version] = (kind, payload)
        if len(self._events) > _KEPT_EVENTS:
            self._forgotten = min(self._events)
            del self._events[self._forgotten]
        acked = self._acked_kinds.pop(version, None)
        if acked is not None and acked != kind:
            self._score.add_finding("otherAck", f"{self._name}: {acked!r} was {kind!r}")
        if kind in {b"play", b"paus", b"stop"}:
            self.playing = kind == b"play"
        if kind == b"chat":
            self._chats.append(version)
        if kind in MOVES and (self._move is None or version > self._move[0]):
            self._move = (version, read_move(payload))

    def acked(self, observer: Observer, version: int | None, command: Mapping[str, object]) -> None:
        """Remember an acknowledged command: its event must arrive, and its change must be kept."""
        kind = _EVENT_OF.get(str(command["type"]))
        if version is None or kind is None or observer.epoch != self._epoch:
            return
        self._acked = max(self._acked, version)
        if kind == b"chat":
            self._acked_chats.append((version, str(command["text"])))
        known = self._events.get(version)
        if known is None:
            self._acked_kinds[version] = kind
            if len(self._acked_kinds) > _KEPT_EVENTS:
                del self._acked_kinds[next(iter(self._acked_kinds))]
        elif known[0] != kind:
            self._score.add_finding("otherAck", f"{self._name}: {kind!r} was {known[0]!r}")

    def snapshot_received(self, observer: Observer, snapshot: JsonMessage) -> None:
        """Handle a snapshot. A new epoch is a new session, which replaces the previous one."""
        epoch = snapshot["epoch"]
        if epoch != self._epoch:
            if self._epoch and self._present() > 1:
                self._score.add_finding("newEpoch", f"{self._name}: {self._epoch} became {epoch}")
            self._epoch = epoch
            self._acked = self._forgotten = 0
            self._move = None
            for kept in (self._events, self._acked_kinds, self._chats, self._acked_chats):
                kept.clear()
        if self._final_snapshots is not None and "you" not in snapshot:
            self._final_snapshots[observer] = snapshot

    def begin_comparison(self) -> None:
        """Keep each member's snapshot from now on."""
        self._final_snapshots = {}

    def has_compared(self, observer: Observer) -> bool:
        """Whether a member has received a snapshot since `begin_comparison`."""
        return self._final_snapshots is not None and observer in self._final_snapshots

    def versions_agree(self) -> bool:
        """Whether all snapshots have the same version: no event was in flight."""
        snapshot_received = {
            (each["epoch"], each["version"]) for each in (self._final_snapshots or {}).values()
        }
        return len({version for _, version in snapshot_received}) == len(
            {epoch for epoch, _ in snapshot_received}
        )

    def judge(self) -> None:
        """Compare the final snapshots with each other and with all acknowledged changes."""
        add_finding = self._score.add_finding
        if not self._final_snapshots:
            if self._epoch:
                add_finding("noSnapshot", f"{self._name}: no member received a final snapshot")
            return
        reference = next(iter(self._final_snapshots.values()))
        at = reference["serverTime"]
        final = msgspec.convert(reference["transport"], Transport)
        for observer, snapshot in self._final_snapshots.items():
            for field in ("epoch", "version", "leaderId", "message", "chat"):
                if snapshot.get(field) != reference.get(field):
                    add_finding("disagreement", f"{observer.name}: {field} at the end")
            if _members(snapshot) != _members(reference):
                add_finding("disagreement", f"{observer.name}: members at the end")
            self._compare(msgspec.convert(snapshot["transport"], Transport), final, at)
        if reference["version"] < self._acked:
            text = (
                f"{self._name}: {self._acked} was acknowledged, {reference['version']} is the end"
            )
            add_finding("lostAck", text)
        if self._move is not None:
            self._compare(self._move[1], final, at)
        texts = {chat["text"] for chat in reference["chat"]}
        oldest = self._chats[0] if len(self._chats) == CHAT_RING else 0
        for version, said in self._acked_chats:
            if version >= oldest and said not in texts:
                add_finding("lostAck", f"{self._name}: chat {version}, {said!r}")

    def _differs(self, observer: Observer, known: bytes, payload: bytes) -> None:
        self._score.add_finding("disagreement", f"{observer.name}: {payload!r} and {known!r}")
        both = [msgspec.json.decode(each) for each in (known, payload)]
        if all("transport" in each for each in both):
            one, other = (msgspec.convert(each["transport"], Transport) for each in both)
            self._compare(one, other, both[0]["serverTime"])

    def _compare(self, one: Transport, other: Transport, at: float) -> None:
        own, others = in_force(one, at), in_force(other, at)
        beats = abs(beat_at(own, at) - beat_at(others, at))
        error_ms = max(
            abs(position_at(own, at) - position_at(others, at)), beats * 60_000 / own.tempo_bpm
        )
        self._score.anchor_error_ms = max(self._score.anchor_error_ms, error_ms)
        if error_ms > _TOLERANCE_MS:
            self._score.add_finding(
                "beat", f"{self._name}: {error_ms:.3f} ms between {one} and {other}"
            )


def _members(snapshot: JsonMessage) -> list[tuple[str, str, bool]]:
    """The members in a snapshot, sorted: servers may list them in different orders."""
    members = snapshot["members"]
    return sorted((each["memberId"], each["role"], each["connected"]) for each in members)
