"""Rooms whose storage is lost, shared with other servers, or not to be read. On virtual time."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence

import pytest
import structlog
import trio
from msgspec import UNSET
from msgspec.structs import replace
from structlog.testing import CapturingLogger
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import TOMBSTONE_MS, Session, Tip, find, leader_of, present, tip
from bandsync.rooms.failure_detector import FailureDetector
from bandsync.rooms.hub import Hub
from bandsync.rooms.room import Room
from bandsync.rules.actions import Actor, Bind, Command, Decision, Drop
from bandsync.rules.decide import decide
from bandsync.rules.draft import ServerContext
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
from bandsync.storage.relay import Relay
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Pause,
    Play,
    Refusal,
    SetTempo,
    UpdateMessage,
)
from bandsync.wire.messages import MemberConnection, encode
from tests.rooms.test_room import Listener, cancel_when_all_wait
from tests.support.states import HERE, NOW
from tests.support.stores import FixedStores

GRACE_S = 10
OTHER = ServerContext(server_id="hall", boot_id="boot-2", max_members=8, isolated=False)


class Remote(MemoryStorage):
    """A storage in the place of Redis, which does what the test says.

    Attributes:
        fates: what becomes of the next commits; "carried out" means that its answer is lost.
        unreadable: the sessions that cannot be read.
        broken: whether nothing is answered but `Lost`.
        gate: commits and reads wait until it is set.
        commit_gate: commits wait until it is set, when they have been carried out.
        reads: how often each session was read.
        servers: those that are alive.
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


class Eras(FixedStores):
    """Stores whose Redis is lost and comes back."""

    def begin(self, storage: Remote) -> Era:
        """From now on sessions are opened in this one."""
        era = self._era = Era(storage, lambda: None)
        storage.broken = False
        storage.lose = lambda: era.end(Loss("reset", "by a test"))
        return era


class Stage:
    """A hub on a `Remote`, and another server that is played by hand."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.remote = Remote()
        self.stores = Eras()
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
    ) -> tuple[Listener, Room]:
        """Join, or with the incarnation of its token resume, on a new connection."""
        peer = Listener(f"connection {next(self._ids)} of {name}")
        bind = self.bind(name, session_id)
        if resume:
            token = ResumeToken(f"member {name}", resume, f"secret of {name}")
            bind = replace(bind, resume=(token,))
        outcome = await self.hub.bind(peer, bind, f"member {name}", UNSET)
        assert not isinstance(outcome, Refusal), outcome
        return peer, outcome[0]

    async def say(self, room: Room, peer: Listener, text: str) -> None:
        """A chat message that must be acknowledged."""
        message_id = f"message {next(self._ids)}"
        assert await room.command(peer, ChatMessage(text=text), message_id, text) is None

    def lose(self) -> None:
        """Redis is gone."""
        self.remote.broken = True
        self.era.end(Loss("reset", "by a test"))

    async def recover(self) -> Counter[str]:
        """Redis is back, with what it has; how many sessions were moved."""
        self.era = self.stores.begin(self.remote)
        moved: Counter[str] = Counter()
        await self.hub.migrate(self.era, lambda: moved.update(["moved"]))
        return moved

    def stored(self, session_id: str = "song") -> Session:
        session = self.remote.find(session_id)
        assert session is not None
        return session

    async def elsewhere(
        self, command: Command, name: str, connection: str = "", fresh_id: str = ""
    ) -> Session:
        """Another server commits a command."""
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


def texts(session: Session) -> list[str]:
    return [chat.text for chat in session.chat]


def in_order(peer: Listener) -> None:
    """No version is skipped or comes twice without a snapshot; none is lower than one before."""
    known = 0
    for message in peer.heard(*VERSIONED):
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


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Stage:
    return Stage(nursery)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_command_whose_answer_is_lost_is_acknowledged_once(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await stage.say(room, ann, "before")
    stage.remote.fates.append(fate)
    await stage.say(room, ann, "lost?")
    await stage.say(room, bob, "after")
    assert stage.stores.storage_type == "memory"
    for peer in (ann, bob):
        heard = [message["text"] for message in peer.heard("chat_message")]
        assert heard == ["before", "lost?", "after"]
        in_order(peer)
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["before", "lost?"]
    kept = stage.stores.memory.find("song")
    assert kept == room.mirror.session

    await trio.sleep(1)
    assert await stage.recover() == {"moved": 1}
    assert stage.stores.memory.ids() == []
    stored = stage.stored()
    assert stored == room.mirror.session
    assert texts(stored) == ["before", "lost?", "after"]
    assert len({chat.message_id for chat in stored.chat}) == 3
    for peer in (ann, bob):
        assert len(peer.heard("chat_message")) == 3
        in_order(peer)
    await stage.say(room, ann, "at last")
    assert texts(stage.stored())[-1] == "at last"
    in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_join_whose_answer_is_lost_makes_one_member(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    stage.remote.fates.append(fate)
    await trio.sleep(1)
    ann, same = await stage.join("Ann")
    assert same is room
    await trio.sleep(1)
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob", "Ann"]
    assert len(bob.heard("user_joined")) == 1
    assert room.peers.keys() == {"member Bob", "member Ann"}
    assert (ann.closed, bob.closed) == (None, None)
    in_order(bob)


@pytest.mark.parametrize("fate", ["dropped", "carried out"])
async def test_a_leave_whose_answer_is_lost_is_not_undone(
    stage: Stage, fate: str, autojump_clock: MockClock
) -> None:
    bob, room = await stage.join("Bob")
    ann, _ = await stage.join("Ann")
    stage.remote.fates.append(fate)
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    await stage.recover()
    assert [member.display_name for member in present(stage.stored())] == ["Bob"]
    assert len(bob.heard("user_left")) == 1
    in_order(bob)


async def test_all_that_wait_are_decided_again_in_their_order(
    stage: Stage, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()
    for number in range(5):
        nursery.start_soon(stage.say, room, ann, str(number))
        await wait_all_tasks_blocked()
    stage.remote.broken = True
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["0", "1", "2", "3", "4"]
    assert texts(room.mirror.session or stage.stored()) == ["0", "1", "2", "3", "4"]
    in_order(ann)


async def test_what_happened_in_memory_meets_what_others_wrote_meanwhile(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.hub.compare(stage.era)
    stage.lose()
    await stage.say(room, ann, "from here")
    await trio.sleep(1)
    await stage.elsewhere(ChatMessage(text="from there"), "Cid", fresh_id="theirs")
    await stage.recover()
    assert sorted(texts(stage.stored())) == ["from here", "from there"]
    assert room.mirror.session == stage.stored()
    snapshot = ann.heard("snapshot")[-1]
    assert isinstance(snapshot["chat"], list)
    assert len(snapshot["chat"]) == 2
    in_order(ann)


async def test_a_session_that_cannot_be_read_is_played_in_memory(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.remote.keep(stored := await foreign_session(stage))
    stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    assert await room.command(ann, Play(), "", "r") is None
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.say(room, ann, "hi")
    assert len(ann.heard("ack")) == 2
    assert stage.stored() is stored
    assert stage.remote.commits == 0
    assert stage.stores.memory.ids() == ["song"]
    assert len(stage.logged("session.unreadable")) == 1
    assert stage.hub.counters.unreadable == 1
    # Others are not concerned.
    await stage.join("Bob", "other song")
    assert stage.remote.find("other song") is not None
    assert stage.stores.memory.ids() == ["song"]
    # Somebody has looked after it by hand.
    stage.remote.unreadable.clear()
    stage.remote.discard("song")
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["hi"]
    assert stage.stores.memory.ids() == []
    in_order(ann)


async def foreign_session(stage: Stage) -> Session:
    session = await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    stage.remote.discard("song")
    return session


async def test_a_session_that_becomes_unreadable_goes_on_in_memory(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stored = stage.stored()
    stage.remote.unreadable.add("song")
    await stage.say(room, ann, "one")
    for _ in range(3):
        await stage.hub.compare(stage.era)
    await stage.say(room, ann, "two")
    assert [ack["requestId"] for ack in ann.heard("ack")] == ["one", "two"]
    assert stage.stored() is stored
    assert len(stage.logged("session.unreadable")) == 1
    stage.remote.unreadable.clear()
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["one", "two"]
    in_order(ann)


async def test_a_change_that_lost_to_another_server_comes_after_a_snapshot(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.elsewhere(ChatMessage(text="first"), "Cid", fresh_id="theirs")
    await stage.say(room, ann, "second")
    assert texts(stage.stored()) == ["first", "second"]
    for peer in (ann, bob):
        kinds = [message["type"] for message in peer.heard("snapshot", "chat_message")]
        assert kinds[-2:] == ["snapshot", "chat_message"]
        (heard,) = peer.heard("chat_message")
        assert heard["text"] == "second"
        in_order(peer)
    # Nothing was there to be written back.
    assert stage.hub.counters.reconciled == 0
    assert stage.hub.counters.conflicts == 1


async def test_a_takeover_seen_only_in_the_storage_closes_the_connection(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    token = ResumeToken("member Ann", 1, "secret of Ann")
    await stage.elsewhere(replace(stage.bind("Ann"), resume=(token,)), "Ann", "far away", "unused")
    await stage.hub.compare(stage.era)
    assert (ann.closed, bob.closed) == (4001, None)
    assert room.peers == {"member Bob": bob}
    # What the old connection still wants, and its end, are nobody's.
    refused = await room.command(ann, ChatMessage(text="hi"), "m", "r")
    assert isinstance(refused, Refusal)
    assert refused.code == "not_joined"
    stage.hub.dropped(room, ann, "timeout")
    await trio.sleep(GRACE_S + 1)
    member = find(stage.stored(), "member Ann")
    assert member is not None
    assert (member.connected, member.server_id) == (True, "hall")
    assert leader_of(stage.stored()) == member
    assert bob.heard("user_left", "member_connection") == []


async def test_a_room_whose_last_member_was_taken_over_is_closed(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, _ = await stage.join("Ann")
    token = ResumeToken("member Ann", 1, "secret of Ann")
    await stage.elsewhere(replace(stage.bind("Ann"), resume=(token,)), "Ann", "far away", "unused")
    await stage.hub.compare(stage.era)
    assert ann.closed == 4001
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_a_session_that_vanished_is_put_back_by_the_comparison(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.say(room, ann, "hi")
    before = stage.stored()
    stage.remote.discard("song")
    await stage.hub.compare(stage.era)
    after = stage.stored()
    assert after.epoch == before.epoch
    assert after.version >= before.version
    assert after.members.keys() == before.members.keys()
    assert texts(after) == ["hi"]
    assert room.mirror.session == after
    in_order(ann)
    # And then all is as it should be.
    written = stage.remote.commits
    for _ in range(3):
        await stage.hub.compare(stage.era)
    assert stage.remote.commits == written
    assert len(ann.heard("snapshot")) == 2


async def test_an_older_state_is_brought_up_to_date_by_the_comparison(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    old = stage.stored()
    for text in ("one", "two"):
        await stage.say(room, ann, text)
    newest = stage.stored()
    stage.remote.keep(old)
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["one", "two"]
    assert stage.stored().version > newest.version
    in_order(ann)


async def test_a_healthy_session_is_not_written_by_comparisons(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.say(room, ann, "hi")
    written, read = stage.remote.commits, stage.remote.reads["song"]
    for _ in range(3):
        await stage.hub.compare(stage.era)
    assert (stage.remote.commits, stage.remote.reads["song"]) == (written, read)


async def test_a_session_whose_band_left_in_memory_is_kept_and_moved_later(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.lose()
    await stage.say(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == ["song"]
    await trio.sleep(60)
    assert await stage.recover() == {"moved": 1}
    assert texts(stage.stored()) == ["dirty"]
    assert list(present(stage.stored())) == []
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_who_comes_back_to_a_kept_session_finds_it_as_it_was(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    await stage.say(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    epoch = stage.stores.memory.find("song")
    assert epoch is not None
    # The new era has begun, but nobody has moved the session yet.
    stage.era = stage.stores.begin(stage.remote)
    bob, _ = await stage.join("Bob")
    assert stage.stored().epoch == epoch.epoch
    assert texts(stage.stored()) == ["dirty"]
    assert stage.stores.memory.ids() == []
    in_order(bob)


async def test_a_room_in_its_graces_moves_and_closes_when_they_are_over(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.lose()
    stage.hub.dropped(room, ann, "timeout")
    await trio.sleep(GRACE_S / 2)
    await stage.recover()
    assert stage.hub.rooms == {"song": room}
    await trio.sleep(GRACE_S)
    assert list(present(stage.stored())) == []
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_a_kept_session_that_cannot_be_read_stays_in_memory(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    await stage.say(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    stage.remote.unreadable.add("song")
    assert await stage.recover() == {"moved": 1}
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == ["song"]
    assert stage.remote.commits == 0
    # The next time it can.
    stage.lose()
    stage.remote.unreadable.clear()
    await stage.recover()
    assert texts(stage.stored()) == ["dirty"]
    assert stage.stores.memory.ids() == []


@pytest.mark.parametrize("connected", [True, False])
async def test_members_found_without_a_connection_get_their_grace(
    stage: Stage, connected: bool, autojump_clock: MockClock
) -> None:
    # An earlier room of this very process left Ann behind.
    ann, room = await stage.join("Ann")
    if not connected:
        stage.hub.dropped(room, ann, "timeout")
        await stage.hub.finished()
    left = stage.stored()
    again = Hub(
        stage.hub._nursery,  # noqa: SLF001 (the rooms are forgotten, the process is the same)
        stores=stage.stores,
        clock=ServerClock(NOW, trio.current_time()),
        server_context=HERE,
        counters=Counters(),
        log=structlog.wrap_logger(stage.log),
        grace_s=GRACE_S,
        tick_s=0,
    )
    again._nursery.start_soon(again.run_graces)  # noqa: SLF001
    stage.hub = again
    assert left.members["member Ann"].connected is connected
    bob, _ = await stage.join("Bob")
    assert [member.connected for member in present(stage.stored())] == [False, True]
    await trio.sleep(GRACE_S - 1)
    assert bob.heard("user_left") == []
    await trio.sleep(2)
    (gone,) = bob.heard("user_left")
    assert (gone["memberId"], gone["reason"]) == ("member Ann", "timeout")
    assert leader_of(stage.stored()) == find(stage.stored(), "member Bob")
    in_order(bob)


async def test_a_migration_moves_each_session_once(stage: Stage, autojump_clock: MockClock) -> None:
    stage.lose()
    rooms = {}
    for number in range(30):
        peer, room = await stage.join("Ann", f"song {number}")
        rooms[f"song {number}"] = room
        if number % 3 == 0:
            assert await room.command(peer, LeaveSession(), "", "bye") is None
    stage.remote.reads.clear()
    assert await stage.recover() == {"moved": 30}
    assert stage.remote.reads == dict.fromkeys(rooms, 1)
    assert stage.remote.commits == 30
    assert len(stage.hub.rooms) == 20
    assert stage.stores.memory.ids() == []
    assert all(room.mirror.era is stage.era for room in stage.hub.rooms.values())
    # Again is no work at all.
    await stage.hub.migrate(stage.era, lambda: None)
    assert stage.remote.reads == dict.fromkeys(rooms, 1)


async def test_a_migration_stops_when_its_era_ends(stage: Stage, autojump_clock: MockClock) -> None:
    stage.lose()
    for number in range(50):
        ann, room = await stage.join("Ann", f"song {number}")
    stage.remote.reads.clear()
    stage.era = stage.stores.begin(stage.remote)
    moved = itertools.count(1)

    def count() -> None:
        if next(moved) == 10:
            stage.lose()

    await stage.hub.migrate(stage.era, count)
    assert sum(stage.remote.reads.values()) < 50
    assert sum(room.mirror.era is not None for room in stage.hub.rooms.values()) == 0
    # Those that were across are dirty again with the next change; nothing else is needed.
    await stage.say(room, ann, "on and on")
    assert await stage.recover() == {"moved": 50}
    assert stage.stores.memory.ids() == []
    assert texts(stage.stored("song 49")) == ["on and on"]


async def test_commands_go_on_while_others_migrate(
    stage: Stage, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage.lose()
    players = [await stage.join("Ann", f"song {number}") for number in range(30)]
    stage.era = stage.stores.begin(stage.remote)
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.hub.migrate, stage.era, lambda: None)
    await wait_all_tasks_blocked()
    # The last ones have not had their turn: they are answered from memory, at once.
    ann, room = players[-1]
    await stage.say(room, ann, "now")
    assert ann.heard("ack")
    # Whose turn it is waits for that, and no longer.
    first, first_room = players[0]
    nursery.start_soon(stage.say, first_room, first, "soon")
    await wait_all_tasks_blocked()
    assert first.heard("ack") == []
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert first.heard("ack")
    assert texts(stage.stored("song 29")) == ["now"]
    assert texts(stage.stored("song 0")) == ["soon"]
    assert stage.stores.memory.ids() == []


@pytest.mark.parametrize("back", [True, False], ids=["answered", "lost"])
async def test_a_join_that_is_cancelled_while_it_is_committed_leaves_no_room_behind(
    stage: Stage, back: bool, autojump_clock: MockClock
) -> None:
    stage.remote.commit_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as connection:
            nursery.start_soon(cancel_when_all_wait, connection)
            await stage.join("Ann")
    if not back:
        stage.remote.broken = True
    stage.remote.commit_gate.set()
    await stage.hub.finished()
    await trio.sleep(GRACE_S + 1)
    if not back:
        await stage.recover()
        await stage.hub.compare(stage.era)
        await trio.sleep(GRACE_S + 1)
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []
    session = stage.remote.find("song")
    if back:
        assert session is not None
        assert list(present(session)) == []


@pytest.mark.parametrize("back", [True, False], ids=["answered", "lost"])
async def test_a_command_that_is_cancelled_while_it_is_committed_reaches_the_others(
    stage: Stage, back: bool, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    stage.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as connection:
            nursery.start_soon(cancel_when_all_wait, connection)
            await room.command(ann, UpdateMessage(message="last words"), "", "r")
    if not back:
        stage.remote.broken = True
    stage.remote.gate.set()
    await stage.hub.finished()
    if not back:
        # It was never acknowledged, but Redis has it.
        await stage.recover()
    assert not room.mirror.uncertain
    assert room.mirror.session == stage.stored()
    assert bob.heard("snapshot")[-1]["message"] == "last words"
    in_order(bob)


async def test_a_move_that_is_cancelled_while_it_is_committed_is_made_up_for(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    era = stage.stores.begin(stage.remote)
    stage.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(room.move, era)
            # The read first, then the commit.
            await wait_all_tasks_blocked()
            stage.remote.gate.set()
            stage.remote.gate = trio.Event()
            nursery.start_soon(cancel_when_all_wait, scope)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    stage.lose()
    stage.remote.gate.set()
    await stage.hub.finished()
    await stage.say(room, ann, "hi")
    await stage.recover()
    assert room.mirror.session == stage.stored()
    assert texts(stage.stored()) == ["hi"]
    assert room.mirror.era is stage.era
    in_order(ann)


async def test_a_room_that_only_waits_for_a_lost_commit_is_closed(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()
    room.unregister(ann, ann.member_id)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as caller:
            nursery.start_soon(cancel_when_all_wait, caller)
            await room.leave(ann.member_id, ann.connection_id)
    stage.remote.broken = True
    stage.remote.gate.set()
    await stage.hub.finished()
    await stage.recover()
    await trio.sleep(GRACE_S + 1)
    assert list(present(stage.stored())) == []
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_who_opens_a_session_in_an_outage_takes_nothing_from_the_band_in_redis(
    stage: Stage, autojump_clock: MockClock
) -> None:
    await stage.elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.elsewhere(SetTempo(tempo=90), "Cid")
    before = await stage.elsewhere(Play(), "Cid")
    stage.lose()
    await trio.sleep(5)
    bob, room = await stage.join("Bob")
    for command in (SetTempo(tempo=140), Pause(), UpdateMessage(message="mine")):
        assert await room.command(bob, command, "", "r") is None
    await trio.sleep(5)
    await stage.recover()
    after = stage.stored()
    assert after.leader == before.leader
    assert after.transport == before.transport
    assert after.headline.value == "mine"
    assert [member.display_name for member in present(after)] == ["Cid", "Bob"]
    assert bob.heard("snapshot")[-1]["leaderId"] == "member Cid"
    in_order(bob)


async def test_who_left_elsewhere_in_a_long_outage_does_not_come_back(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    for name in ("Cid", "Dan"):
        await stage.elsewhere(stage.bind(name), name, f"far away {name}")
    await stage.hub.compare(stage.era)
    stage.lose()
    await trio.sleep(10)
    await stage.elsewhere(LeaveSession(), "Dan")
    await trio.sleep(TOMBSTONE_MS / 1000 + 10)
    # Old tombstones are cleared away by whoever comes and goes.
    await stage.elsewhere(stage.bind("Eve"), "Eve", "far away Eve")
    assert "member Dan" not in stage.stored().members
    await stage.say(room, ann, "meanwhile")
    await stage.recover()
    assert {member.display_name for member in present(stage.stored())} == {"Ann", "Cid", "Eve"}
    assert texts(stage.stored()) == ["meanwhile"]
    in_order(ann)


async def test_a_move_to_an_era_that_is_over_changes_nothing(
    stage: Stage, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    old = stage.era
    stage.lose()
    await stage.recover()
    stage.remote.reads.clear()
    # It waited for the lock while its era ended and another one began.
    assert not await room.move(old)
    assert stage.remote.reads == {}
    assert room.mirror.era is stage.era
    assert stage.stores.memory.ids() == []
    await stage.say(room, ann, "hi")
    assert texts(stage.stored()) == ["hi"]


async def test_what_was_heard_and_cannot_be_taken_does_not_keep_the_room_locked(
    stage: Stage, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.remote.gate = trio.Event()

    def stumble(payload: bytes) -> None:
        raise FloatingPointError

    async def say() -> None:
        with pytest.raises(FloatingPointError):
            await stage.say(room, ann, "first")

    with monkeypatch.context() as patched:
        patched.setattr("bandsync.rooms.relay_inbox.read_channel_message", stumble)
        nursery.start_soon(say)
        await wait_all_tasks_blocked()
        stage.hub.hear("song", b"{}")
        stage.remote.gate.set()
        await wait_all_tasks_blocked()
    assert not room.lock.locked()
    await stage.say(room, ann, "second")
    assert texts(stage.stored()) == ["first", "second"]


class Subscriptions(Relay):
    """A relay that only keeps count."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.wanted: set[str] = set()

    async def subscribe(self, session_id: str) -> None:
        self.wanted.add(session_id)

    async def unsubscribe(self, session_id: str) -> None:
        if session_id not in self.hub.rooms:
            self.wanted.discard(session_id)


@pytest.fixture
async def subscriptions(stage: Stage) -> Subscriptions:
    stage.era.relay = Subscriptions(stage.hub)
    return stage.era.relay


async def test_joins_that_are_cancelled_while_the_session_is_read_leave_no_subscription(
    stage: Stage, subscriptions: Subscriptions, autojump_clock: MockClock
) -> None:
    stage.remote.gate = trio.Event()
    for number in range(20):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as connection:
                nursery.start_soon(cancel_when_all_wait, connection)
                await stage.join("Ann", f"song {number}")
        assert stage.remote.reads[f"song {number}"] == 1
    await stage.hub.finished()
    assert stage.hub.rooms == {}
    assert subscriptions.wanted == set()


@pytest.mark.parametrize("since", ["before", "while they play", "never"])
async def test_a_room_that_closes_leaves_no_subscription_whether_it_could_be_read_or_not(
    stage: Stage, subscriptions: Subscriptions, since: str, autojump_clock: MockClock
) -> None:
    if since == "before":
        stage.remote.unreadable.add("song")
    ann, room = await stage.join("Ann")
    if since == "while they play":
        stage.remote.unreadable.add("song")
    await stage.say(room, ann, "hi")
    await stage.hub.compare(stage.era)
    assert (room.mirror.era is None) == (since != "never")
    assert subscriptions.wanted == {"song"}
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    await stage.hub.finished()
    assert stage.hub.rooms == {}
    assert subscriptions.wanted == set()


class Watched(Stage):
    """Ann is here, Cid is on the server ``hall``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        nursery.start_soon(FailureDetector(self.hub).run)

    async def meet(self) -> Listener:
        ann, _ = await self.join("Ann")
        await self.elsewhere(self.bind("Cid"), "Cid", "far away")
        self.show()
        await self.hub.compare(self.era)
        return ann

    def show(self, boot_id: str = OTHER.boot_id, *session_ids: str) -> None:
        """The server ``hall`` is alive, as this process, with these sessions."""
        sessions = list(session_ids or ("song",))
        self.remote.servers["hall"] = Presence(boot_id, NOW, "http://hall", sessions, 1)

    def hide(self) -> None:
        """Its entry is gone."""
        self.remote.servers.clear()

    async def swept(self, name: str) -> bytes:
        """The server ``hall`` takes this member for lost; what it says of it."""
        base = self.stored()
        member = base.members[f"member {name}"]
        after = await self.elsewhere(Drop(), name, member.connection_id)
        fields, gone = changed_fields(base, after)
        event = MemberConnection("song", after.version, self.hub.now(), member.member_id, False)
        return write_change(tip(base), tip(after), "hall", fields, gone, [encode(event)])

    @property
    def cid(self) -> bool | None:
        """Whether Cid is connected; None if it is gone."""
        member = find(self.stored(), "member Cid")
        return None if member is None else member.connected


@pytest.fixture
async def watched(nursery: trio.Nursery, autojump_clock: MockClock) -> Watched:
    return Watched(nursery)


async def test_members_of_a_server_that_is_gone_get_a_grace_and_leave(
    watched: Watched, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    await trio.sleep(60)
    assert watched.cid is True
    watched.hide()
    await trio.sleep(9.5)
    assert watched.cid is True
    await trio.sleep(4.6)
    assert watched.cid is False
    (drop,) = ann.heard("member_connection")
    assert (drop["memberId"], drop["connected"]) == ("member Cid", False)
    assert ann.heard("user_left") == []
    await trio.sleep(GRACE_S)
    assert watched.cid is None
    (left,) = ann.heard("user_left")
    assert (left["memberId"], left["reason"]) == ("member Cid", "server_lost")
    in_order(ann)
    # The sweeper's own server and its members are none of its business.
    assert ann.closed is None
    assert find(watched.stored(), "member Ann") is not None


@pytest.mark.parametrize(
    "show",
    [lambda stage: stage.show("boot-3"), lambda stage: stage.show(OTHER.boot_id, "another song")],
    ids=["another process", "another session"],
)
async def test_an_entry_that_says_something_else_is_no_sign_of_life(
    watched: Watched, show: Callable[[Watched], None], autojump_clock: MockClock
) -> None:
    await watched.meet()
    show(watched)
    await trio.sleep(15)
    assert watched.cid is False


async def test_an_absence_that_was_interrupted_starts_anew(
    watched: Watched, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    for _ in range(5):
        watched.hide()
        await trio.sleep(8)
        watched.show()
        await trio.sleep(3)
    assert watched.cid is True
    assert ann.heard("member_connection") == []


async def test_what_is_not_seen_without_redis_says_nothing(
    watched: Watched, autojump_clock: MockClock
) -> None:
    await watched.meet()
    watched.hide()
    await trio.sleep(8)
    watched.lose()
    await trio.sleep(60)
    await watched.recover()
    await trio.sleep(8)
    assert watched.cid is True
    await trio.sleep(6)
    assert watched.cid is False


async def test_a_member_that_was_swept_and_asserted_again_has_a_whole_grace_when_it_drops(
    watched: Watched, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    room = watched.hub.rooms["song"]
    for _ in range(2):
        # The other server did not see ours for a while, and says so.
        watched.hub.hear("song", await watched.swept("Ann"))
        await watched.hub.finished()
        assert watched.stored().members["member Ann"].connected
        await trio.sleep(GRACE_S * 0.4)
    watched.hub.dropped(room, ann, "timeout")
    await trio.sleep(GRACE_S - 0.1)
    assert find(watched.stored(), "member Ann") is not None
    await trio.sleep(0.2)
    assert find(watched.stored(), "member Ann") is None


async def test_members_of_a_server_that_lives_get_its_grace_not_ours(
    watched: Watched, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    session = watched.stored()
    gone = replace(session.members["member Cid"], connected=False, time=NOW + 1000)
    changed = replace(
        session,
        version=session.version + 1,
        event_id="theirs",
        members={**session.members, "member Cid": gone},
    )
    watched.remote.keep(changed)
    await watched.hub.compare(watched.era)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is False
    assert ann.heard("user_left") == []
    # Its server dies during the grace.
    watched.hide()
    await trio.sleep(15 + GRACE_S)
    assert watched.cid is None
    assert ann.heard("user_left")[-1]["reason"] == "server_lost"


async def test_who_comes_back_within_the_grace_stays(
    watched: Watched, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    watched.hide()
    await trio.sleep(15)
    assert watched.cid is False
    token = ResumeToken("member Cid", 1, "secret of Cid")
    resumed = replace(watched.bind("Cid"), resume=(token,))
    await watched.elsewhere(resumed, "Cid", "farther away", "unused")
    watched.show()
    await watched.hub.compare(watched.era)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is True
    assert ann.heard("user_left") == []


async def test_a_swept_member_may_resume_here(watched: Watched, autojump_clock: MockClock) -> None:
    ann = await watched.meet()
    watched.hide()
    await trio.sleep(15)
    cid, room = await watched.join("Cid", resume=1)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is True
    assert room.peers.keys() == {"member Ann", "member Cid"}
    assert ann.heard("user_left") == []
    assert cid.closed is None
