"""Hub and rooms on a storage in place of Redis, with faults on demand; peers that record."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec
import structlog
import trio
from msgspec import UNSET
from msgspec.structs import replace
from structlog.testing import CapturingLogger
from trio.testing import wait_all_tasks_blocked

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import Session, Tip, tip
from bandsync.rooms.hub import Hub
from bandsync.rooms.room import Room
from bandsync.rules.actions import Actor, Bind, Command, Decision
from bandsync.rules.decide import decide
from bandsync.rules.server_context import ServerContext
from bandsync.rules.tokens import ResumeToken
from bandsync.storage.base import (
    Committed,
    Conflict,
    Lost,
    Presence,
    Unreadable,
)
from bandsync.storage.channel_messages import write_change
from bandsync.storage.era import Era, Loss
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.records import changed_fields
from bandsync.wire.commands import (
    ChatMessage,
    Refusal,
)
from bandsync.wire.messages import Outgoing, encode
from tests.support.states import HERE, NOW
from tests.support.stores import FixedStores

GRACE_S = 10
OTHER = ServerContext(server_id="hall", boot_id="boot-2", max_members=8, isolated=False)


class RecordingPeer:
    """A peer that records what it is sent."""

    def __init__(self, connection_id: str) -> None:
        self.connection_id = connection_id
        self.member_id = ""
        self.wants_ticks = True
        self.latency_ms: float | None = None
        self.sync_error_ms: float | None = None
        self.closed: int | None = None
        self._data = b""

    @property
    def push(self) -> Callable[[bytes], None]:
        return self._take

    @property
    def push_volatile(self) -> Callable[[bytes], None]:
        return self._take

    def push_snapshot(self, frames: bytes) -> None:
        self._take(frames)

    def _take(self, frames: bytes) -> None:
        self._data += frames

    def close(self, code: int, reason: str) -> None:
        assert reason
        self.closed = code

    def received(self, *types: str) -> list[dict[str, object]]:
        """The received messages of these types."""
        found = []
        data = self._data
        while data:
            start = 2 if data[1] < 126 else 4
            size = data[1] if start == 2 else int.from_bytes(data[2:4], "big")
            message = msgspec.json.decode(data[start : start + size])
            if message["type"] in types:
                found.append(message)
            data = data[start + size :]
        return found


class FaultyStorage(MemoryStorage):
    """A storage in place of Redis, with faults on demand.

    Attributes:
        fates: faults of the next commits; "carried out" means that only the answer is lost.
        unreadable: the sessions that cannot be read.
        broken: whether every answer is `Lost`.
        gate: commits and reads wait until it is set.
        commit_gate: commits wait until it is set, when they have been carried out.
        reads: how often each session was read.
        servers: the presence entries, by server id.
    """

    def __init__(self) -> None:
        super().__init__("redis", "for a test")
        self.fates: deque[str] = deque()
        self.unreadable: set[str] = set()
        self.broken = False
        self.gate = trio.Event()
        self.gate.set()
        self.commit_gate = trio.Event()
        self.commit_gate.set()
        self.reads: Counter[str] = Counter()
        self.commits = 0
        self.servers: dict[str, Presence] = {}
        self.lose: Callable[[], None] = lambda: None

    async def get_session(self, session_id: str) -> Session | Unreadable | Lost | None:
        self.reads[session_id] += 1
        await self.gate.wait()
        if self.broken:
            return self._lost()
        if session_id in self.unreadable:
            return Unreadable("head: it is in Latin")
        return await super().get_session(session_id)

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unreadable | Lost:
        fate = self.fates.popleft() if self.fates else ""
        result: Committed | Conflict | Unreadable | None = None
        if fate != "dropped" and not self.broken:
            if change.session_id in self.unreadable:
                result = Unreadable("head: it is in Latin")
            else:
                self.commits += 1
                result = await super().commit(base, change, events)
        await self.gate.wait()
        await self.commit_gate.wait()
        if fate or self.broken or result is None:
            return self._lost()
        return result

    async def touch(self, session_ids: Sequence[str]) -> dict[str, Tip | Unreadable | None] | Lost:
        if self.broken:
            return self._lost()
        found = await super().touch(session_ids)
        hidden = self.unreadable.intersection(session_ids)
        return found | dict.fromkeys(hidden, Unreadable("head: it is in Latin"))

    async def find_servers(
        self, server_ids: Sequence[str]
    ) -> dict[str, Presence | Unreadable | None] | Lost:
        if self.broken:
            return self._lost()
        return {server_id: self.servers.get(server_id) for server_id in server_ids}

    def _lost(self) -> Lost:
        self.lose()
        return Lost("reset")


class RecoverableStores(FixedStores):
    """Stores whose Redis can be lost and recovered."""

    def begin(self, storage: FaultyStorage) -> Era:
        """Begin an era: from now on sessions are opened in ``storage``."""
        era = self._era = Era(storage, lambda: None)
        storage.broken = False
        storage.lose = lambda: era.end(Loss("reset", "by a test"))
        return era


class HubHarness:
    """A hub on a `FaultyStorage`, and another server that commits when the test says so."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.remote = FaultyStorage()
        self.stores = RecoverableStores()
        self.log = CapturingLogger()
        self.era = self.stores.begin(self.remote)
        self.hub = Hub(
            nursery,
            stores=self.stores,
            clock=ServerClock(NOW, trio.current_time()),
            server_context=HERE,
            counters=Counters(),
            log=structlog.wrap_logger(self.log, processors=[structlog.processors.format_exc_info]),
            grace_s=GRACE_S,
            tick_s=0,
        )
        self._ids = itertools.count(1)
        nursery.start_soon(self.hub.run_graces)

    def bind(self, name: str, session_id: str = "song") -> Bind:
        return Bind(session_id, f"epoch of {name}", f"secret of {name}", name)

    async def join(
        self, name: str, session_id: str = "song", *, resume: int = 0
    ) -> tuple[RecordingPeer, Room]:
        """Join on a new connection; with the incarnation of a token, resume."""
        peer = RecordingPeer(f"connection {next(self._ids)} of {name}")
        bind = self.bind(name, session_id)
        if resume:
            token = ResumeToken(f"member {name}", resume, f"secret of {name}")
            bind = replace(bind, resume=(token,))
        outcome = await self.hub.bind(peer, bind, f"member {name}", UNSET)
        assert not isinstance(outcome, Refusal), outcome
        return peer, outcome[0]

    async def send_chat(self, room: Room, peer: RecordingPeer, text: str) -> None:
        """Send a chat message that must be acknowledged."""
        message_id = f"message {next(self._ids)}"
        assert await room.command(peer, ChatMessage(text=text), message_id, text) is None

    def lose(self) -> None:
        """Lose Redis."""
        self.remote.broken = True
        self.era.end(Loss("reset", "by a test"))

    async def recover(self) -> Counter[str]:
        """Recover Redis with its data; returns the number of migrated sessions."""
        self.era = self.stores.begin(self.remote)
        moved: Counter[str] = Counter()
        await self.hub.migrate(self.era, lambda: moved.update(["moved"]))
        return moved

    def stored(self, session_id: str = "song") -> Session:
        session = self.remote.find(session_id)
        assert session is not None
        return session

    async def commit_elsewhere(
        self, command: Command, name: str, connection: str = "", fresh_id: str = ""
    ) -> Session:
        """Let another server commit a command."""
        base = self.remote.find("song")
        member = None if base is None else base.members.get(f"member {name}")
        connection = connection or ("" if member is None else member.connection_id)
        actor = Actor(OTHER, connection, f"member {name}", fresh_id or f"member {name}")
        decision = decide(base, command, actor, self.hub.now())
        assert isinstance(decision, Decision), decision
        result = await MemoryStorage.commit(self.remote, base, decision.session, ())
        assert isinstance(result, Committed)
        return result.session

    def logged(self, event: str) -> list[dict[str, object]]:
        return [call.kwargs for call in self.log.calls if call.kwargs["event"] == event]


class RelayHarness(HubHarness):
    """Ann and Bob are here; Cid is on the server ``hall``, which commits when the test says so.

    Attributes:
        ann, bob: connections of this server.
    """

    async def meet(self) -> None:
        self.ann, self.room = await self.join("Ann")
        self.bob, _ = await self.join("Bob")
        self.receive(await self.commit_remotely(self.bind("Cid"), "Cid", "far away"))
        self.remote.reads.clear()

    async def commit_remotely(
        self, command: Command, name: str = "Cid", connection: str = ""
    ) -> bytes:
        """Let the other server commit a command; returns its relay message."""
        base = self.stored()
        member = base.members.get(f"member {name}")
        connection = connection or ("" if member is None else member.connection_id)
        fresh_id = f"{name} {next(self._ids)}" if member else f"member {name}"
        actor = Actor(OTHER, connection, f"member {name}", fresh_id)
        decision = decide(base, command, actor, self.hub.now())
        assert isinstance(decision, Decision), decision
        return await self.commit_state(base, decision.session, decision.events)

    async def commit_state(
        self, base: Session, session: Session, events: tuple[Outgoing, ...]
    ) -> bytes:
        """Let the other server commit a state; returns its relay message."""
        result = await MemoryStorage.commit(self.remote, base, session, ())
        assert isinstance(result, Committed)
        return change_message(base, result.session, *map(encode, events))

    async def chats(self, count: int) -> list[bytes]:
        """Relay messages of this many chats by Cid, numbered from 0."""
        return [
            await self.commit_remotely(ChatMessage(text=str(number))) for number in range(count)
        ]

    def receive(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.hub.receive("song", payload)

    @property
    def reads(self) -> int:
        """How often the session was read since the band met."""
        return self.remote.reads["song"]


def change_message(base: Session, session: Session, *events: bytes) -> bytes:
    fields, gone = changed_fields(base, session)
    return write_change(tip(base), tip(session), "hall", fields, gone, events)


async def cancel_when_all_wait(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()


def texts(session: Session) -> list[str]:
    return [chat.text for chat in session.chat]


def chat(peer: RecordingPeer) -> list[object]:
    return [message["text"] for message in peer.received("chat_message")]


def shown(peer: RecordingPeer) -> list[object]:
    """The chat texts in the latest snapshot."""
    ring = peer.received("snapshot")[-1]["chat"]
    assert isinstance(ring, list)
    return [message["text"] for message in ring]


def assert_versions_in_order(peer: RecordingPeer) -> None:
    """No version is skipped or repeated without a snapshot, and none goes backwards."""
    known = 0
    for message in peer.received(*VERSIONED):
        version = message["version"]
        assert isinstance(version, int)
        if message["type"] == "snapshot":
            assert version >= known, message
        else:
            assert version == known + 1, message
        known = version


VERSIONED = (
    "snapshot",
    "user_joined",
    "user_left",
    "member_connection",
    "role_changed",
    "play",
    "pause",
    "tempo_changed",
    "message_updated",
    "chat_message",
)
