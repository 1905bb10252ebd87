"""Fan-out: encodes each message once and pushes it to every member connected here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import UNSET, UnsetType

from bandsync.model.session import Member, Session
from bandsync.model.transport import beat_at, in_force, position_at
from bandsync.rooms.context import RoomContext
from bandsync.rooms.mirror import Applied, Outcome
from bandsync.rules.reconcile import superseded
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import Ack, Outgoing, ScrollTick, Snapshot, encode
from bandsync.wire.snapshots import room_stats, snapshot

REPLACED = "the same member resumed on another connection"


class Peer(Protocol):
    """A connection, as a room sees it.

    Attributes:
        connection_id: names the connection; unique.
        member_id: the member that the connection is bound to; empty before it joined.
        wants_ticks: whether it receives ``scroll_tick``.
        latency_ms: the smoothed round trip; None before the first pong.
        sync_error_ms: the client's bound on its clock error; None if it reported none.
    """

    connection_id: str
    member_id: str
    wants_ticks: bool
    latency_ms: float | None
    sync_error_ms: float | None

    @property
    def push(self) -> Callable[[bytes], None]:
        """Send frames; never blocks."""

    @property
    def push_volatile(self) -> Callable[[bytes], None]:
        """Send frames that may be dropped if the peer is slow; never blocks."""

    def push_snapshot(self, frames: bytes) -> None:
        """Send frames with a snapshot, which may be large; never blocks."""

    def close(self, code: CloseCode, reason: str) -> None:
        """Close the connection soon; never blocks."""


class LocalPeers:
    """The members of a session whose connections are on this server.

    Attributes:
        peers: their connections, by member id.
        bound: the members as they were bound, by member id: see `bandsync.rules.reconcile`.
        tick_pushes: `Peer.push_volatile` of the peers that want ticks. A tick touches nothing
            else of a peer: each further object would be a cache miss per delivery.
    """

    __slots__ = ("bound", "peers", "tick_pushes")

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.bound: dict[str, Member] = {}
        self.tick_pushes: tuple[Callable[[bytes], None], ...] = ()

    def add(self, member: Member, peer: Peer) -> None:
        """Register ``peer`` as the connection of ``member``."""
        self.peers[member.member_id] = peer
        self.bound[member.member_id] = member
        self._collect_tick_pushes()

    def remove(self, member_id: str) -> Peer | None:
        """Unregister a member's connection, and return it if there was one."""
        peer = self.peers.pop(member_id, None)
        self.bound.pop(member_id, None)
        self._collect_tick_pushes()
        return peer

    def has(self, member_id: str, connection_id: str) -> bool:
        """Whether the member is bound to this very connection, on this server."""
        bound = self.bound.get(member_id)
        return bound is not None and bound.connection_id == connection_id

    def close_superseded(self, session: Session) -> None:
        """Close the connections of members that are bound to another server in ``session``."""
        for member_id in superseded(session, self.bound):
            peer = self.remove(member_id)
            if peer is not None:
                peer.close(CloseCode.SESSION_TAKEN, REPLACED)

    def latencies_ms(self) -> dict[str, float | None]:
        """Round trips by member id; None where unknown."""
        return {member_id: peer.latency_ms for member_id, peer in self.peers.items()}

    def sync_errors_ms(self) -> dict[str, float | None]:
        """Bounds on the clients' clock errors by member id; None where unknown."""
        return {member_id: peer.sync_error_ms for member_id, peer in self.peers.items()}

    def _collect_tick_pushes(self) -> None:
        self.tick_pushes = tuple(
            [peer.push_volatile for peer in self.peers.values() if peer.wants_ticks]
        )


class Fanout:
    """Encodes messages and pushes them to the local members of one session.

    Every frame is encoded once, however many members receive it. No method blocks: a slow consumer
    delays nobody else.
    """

    __slots__ = ("_context", "_local_peers")

    def __init__(self, context: RoomContext, local_peers: LocalPeers) -> None:
        self._context = context
        self._local_peers = local_peers

    def send_outcome(
        self, outcome: Outcome, caller: Peer | None = None, request_id: str | UnsetType = UNSET
    ) -> None:
        """Send what was committed: the events to everybody, reply and ``ack`` to the caller."""
        decision, events = outcome.decision, outcome.events
        frames = b"".join([text_frame(event) for event in events])
        peers = self._local_peers.peers
        if events:
            for peer in peers.values():
                if peer is not caller:
                    peer.push(frames)
            self._context.counters.deliveries += len(events) * len(peers)
        if caller is None:
            return
        answer = b"" if decision.reply is None else message_frame(decision.reply)
        answer += ack_frame(request_id, decision.session.version if events else UNSET)
        if isinstance(decision.reply, Snapshot):
            caller.push_snapshot(answer)
        elif events or answer:
            caller.push(frames + answer)

    def send_applied(self, applied: Applied) -> None:
        """Send a change that another server committed, its frames as that server encoded them."""
        if applied.members_changed:
            self._local_peers.close_superseded(applied.session)
        events = applied.events
        if applied.snapshot is not None:
            self._send_snapshot(applied.snapshot, events)
        else:
            frames = text_frames(events)
            for peer in self._local_peers.peers.values():
                peer.push(frames)
        self._context.counters.deliveries += len(events) * len(self._local_peers.peers)
        self._context.counters.relayed += 1

    def send_resync(self, shown: Session, events: Sequence[bytes]) -> None:
        """Send a state that was read or merged as a snapshot, then its encoded events."""
        self._local_peers.close_superseded(shown)
        self._send_snapshot(shown, events)
        self._context.counters.deliveries += (1 + len(events)) * len(self._local_peers.peers)

    def send_tick(self, session: Session) -> None:
        """Send the position to the peers that want ticks, if the song plays."""
        now = self._context.now()
        segment = in_force(session.transport.value, now)
        if not segment.is_playing:
            return
        position = position_at(segment, now)
        beat = beat_at(segment, now)
        frame = text_frame(
            encode(ScrollTick(session.session_id, now, position, beat, segment.tempo_bpm))
        )
        pushes = self._local_peers.tick_pushes
        for push_volatile in pushes:
            push_volatile(frame)
        self._context.counters.deliveries += len(pushes)

    def send_stats(
        self,
        session: Session,
        latencies_ms: Mapping[str, float | None],
        sync_errors_ms: Mapping[str, float | None],
    ) -> None:
        """Send ``room_stats``: how well every member is connected."""
        stats = room_stats(session, self._context.now(), latencies_ms, sync_errors_ms)
        frame = message_frame(stats)
        peers = self._local_peers.peers
        for peer in peers.values():
            peer.push_volatile(frame)
        self._context.counters.deliveries += len(peers)

    def _send_snapshot(self, shown: Session, events: Sequence[bytes]) -> None:
        frame = message_frame(snapshot(shown, self._context.now()))
        frames = text_frames(events)
        for peer in self._local_peers.peers.values():
            peer.push_snapshot(frame)
            if frames:
                peer.push(frames)


def message_frame(message: Outgoing) -> bytes:
    """One message as a WebSocket frame."""
    return text_frame(encode(message))


def text_frames(messages: Iterable[bytes]) -> bytes:
    """Encoded messages as WebSocket frames."""
    return b"".join([text_frame(message) for message in messages])


def ack_frame(request_id: str | UnsetType, version: int | UnsetType) -> bytes:
    """The ``ack`` of a request; empty if the client wants none."""
    if request_id is UNSET:
        return b""
    return message_frame(Ack(request_id, version))
