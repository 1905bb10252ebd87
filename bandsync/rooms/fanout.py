"""The seats of a room: whose connection is here, and how to reach all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bandsync.model.session import Member


class Peer(Protocol):
    """A connection, as a room sees it.

    Attributes:
        member_id: the member it is bound to in its room; empty before it joined.
        latency_ms: its round trip; None before the first pong.
        sync_error_ms: the client's own bound on its clock error, if it told.
    """

    connection_id: str
    member_id: str
    wants_ticks: bool
    latency_ms: float | None
    sync_error_ms: float | None

    @property
    def push(self) -> Callable[[bytes], None]:
        """Hand over frames; never blocks."""

    @property
    def push_volatile(self) -> Callable[[bytes], None]:
        """The same for frames that may be dropped when the peer is slow."""

    def push_snapshot(self, frames: bytes) -> None:
        """The same as ``push`` for frames with a snapshot, which may be large."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection soon; never blocks."""


class LocalPeers:
    """The members of a session whose connections are on this server.

    Attributes:
        peers: their connections, by member id.
        bound: the members as they were bound, for the audit (see `bandsync.rules.reconcile`).
    """

    __slots__ = ("_ticks", "bound", "peers")

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.bound: dict[str, Member] = {}
        # What a tick needs of the peers: each object more that it touched would be a cache miss
        # more per delivery.
        self._ticks: tuple[Callable[[bytes], None], ...] = ()

    def put(self, member: Member, peer: Peer) -> None:
        """Give ``peer`` its member's seat."""
        self.peers[member.member_id] = peer
        self.bound[member.member_id] = member
        self._count()

    def clear(self, member_id: str) -> Peer | None:
        """Free a seat; who had it, if anybody."""
        peer = self.peers.pop(member_id, None)
        self.bound.pop(member_id, None)
        self._count()
        return peer

    def push(self, frames: bytes, without: Peer | None = None) -> None:
        """Send to all but one."""
        for peer in self.peers.values():
            if peer is not without:
                peer.push(frames)

    def push_snapshot(self, frame: bytes, then: bytes) -> None:
        """Send a snapshot to all, and what follows it."""
        for peer in self.peers.values():
            peer.push_snapshot(frame)
            if then:
                peer.push(then)

    def push_volatile(self, frames: bytes) -> None:
        """Send to all who are not slow."""
        for peer in self.peers.values():
            peer.push_volatile(frames)

    def tick(self, frame: bytes) -> int:
        """Send to those who want ticks; how many they are."""
        for push_volatile in self._ticks:
            push_volatile(frame)
        return len(self._ticks)

    def latencies_ms(self) -> dict[str, float | None]:
        """Round trips by member id, None where not known."""
        return {member_id: peer.latency_ms for member_id, peer in self.peers.items()}

    def sync_errors_ms(self) -> dict[str, float | None]:
        """The clients' own bounds on their clock errors by member id, None where not known."""
        return {member_id: peer.sync_error_ms for member_id, peer in self.peers.items()}

    def _count(self) -> None:
        self._ticks = tuple(
            [peer.push_volatile for peer in self.peers.values() if peer.wants_ticks]
        )
