"""Sessions that move from memory to Redis when it is back. On virtual time."""

import itertools

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.model.session import TOMBSTONE_MS, find, leader_of, present
from bandsync.rooms.hub import Hub
from bandsync.wire.commands import (
    LeaveSession,
    Pause,
    Play,
    SetTempo,
    UpdateMessage,
)
from tests.support.rooms import GRACE_S, Stage, in_order, texts
from tests.support.states import HERE, NOW


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Stage:
    return Stage(nursery)


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
    # A new hub in the same process has no rooms.
    again = Hub(
        stage.nursery,
        stores=stage.stores,
        clock=ServerClock(NOW, trio.current_time()),
        server_context=HERE,
        counters=Counters(),
        log=structlog.wrap_logger(stage.log),
        grace_s=GRACE_S,
        tick_s=0,
    )
    stage.nursery.start_soon(again.run_graces)
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
