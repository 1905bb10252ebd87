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
from tests.support.rooms import GRACE_S, HubHarness, assert_versions_in_order, texts
from tests.support.states import HERE, NOW


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> HubHarness:
    return HubHarness(nursery)


async def test_abandoned_session_is_kept_in_memory_until_migrated(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    stage.lose()
    await stage.send_chat(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == ["song"]
    await trio.sleep(60)
    assert await stage.recover() == {"moved": 1}
    assert texts(stage.stored()) == ["dirty"]
    assert list(present(stage.stored())) == []
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_join_finds_session_kept_in_memory_unchanged(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    await stage.send_chat(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    epoch = stage.stores.memory.find("song")
    assert epoch is not None
    # The new era has begun, but the session has not been migrated.
    stage.era = stage.stores.begin(stage.remote)
    bob, _ = await stage.join("Bob")
    assert stage.stored().epoch == epoch.epoch
    assert texts(stage.stored()) == ["dirty"]
    assert stage.stores.memory.ids() == []
    assert_versions_in_order(bob)


async def test_room_with_graces_migrates_and_closes_after_them(
    stage: HubHarness, autojump_clock: MockClock
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


async def test_kept_session_that_is_unreadable_stays_in_memory(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    stage.lose()
    ann, room = await stage.join("Ann")
    await stage.send_chat(room, ann, "dirty")
    assert await room.command(ann, LeaveSession(), "", "bye") is None
    stage.remote.unreadable.add("song")
    assert await stage.recover() == {"moved": 1}
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == ["song"]
    assert stage.remote.commits == 0
    # The next migration can read it.
    stage.lose()
    stage.remote.unreadable.clear()
    await stage.recover()
    assert texts(stage.stored()) == ["dirty"]
    assert stage.stores.memory.ids() == []


@pytest.mark.parametrize("connected", [True, False])
async def test_members_without_connection_get_a_grace_on_open(
    stage: HubHarness, connected: bool, autojump_clock: MockClock
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
    assert bob.received("user_left") == []
    await trio.sleep(2)
    (gone,) = bob.received("user_left")
    assert (gone["memberId"], gone["reason"]) == ("member Ann", "timeout")
    assert leader_of(stage.stored()) == find(stage.stored(), "member Bob")
    assert_versions_in_order(bob)


async def test_migration_moves_each_session_once(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
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
    # A second migration does nothing.
    await stage.hub.migrate(stage.era, lambda: None)
    assert stage.remote.reads == dict.fromkeys(rooms, 1)


async def test_migration_stops_when_its_era_ends(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
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
    # A migrated session becomes dirty again with its next change in memory.
    await stage.send_chat(room, ann, "on and on")
    assert await stage.recover() == {"moved": 50}
    assert stage.stores.memory.ids() == []
    assert texts(stage.stored("song 49")) == ["on and on"]


async def test_commands_are_served_during_migration(
    stage: HubHarness, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage.lose()
    players = [await stage.join("Ann", f"song {number}") for number in range(30)]
    stage.era = stage.stores.begin(stage.remote)
    stage.remote.gate = trio.Event()
    nursery.start_soon(stage.hub.migrate, stage.era, lambda: None)
    await wait_all_tasks_blocked()
    # The last sessions are not being migrated yet: memory answers at once.
    ann, room = players[-1]
    await stage.send_chat(room, ann, "now")
    assert ann.received("ack")
    # A command in a session that is being migrated waits for that migration only.
    first, first_room = players[0]
    nursery.start_soon(stage.send_chat, first_room, first, "soon")
    await wait_all_tasks_blocked()
    assert first.received("ack") == []
    stage.remote.gate.set()
    await wait_all_tasks_blocked()
    assert first.received("ack")
    assert texts(stage.stored("song 29")) == ["now"]
    assert texts(stage.stored("song 0")) == ["soon"]
    assert stage.stores.memory.ids() == []


async def test_session_opened_during_outage_does_not_override_stored_leader(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    await stage.commit_elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.commit_elsewhere(SetTempo(tempo=90), "Cid")
    before = await stage.commit_elsewhere(Play(), "Cid")
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
    assert bob.received("snapshot")[-1]["leaderId"] == "member Cid"
    assert_versions_in_order(bob)


async def test_member_that_left_remotely_during_outage_stays_removed(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    for name in ("Cid", "Dan"):
        await stage.commit_elsewhere(stage.bind(name), name, f"far away {name}")
    await stage.hub.compare(stage.era)
    stage.lose()
    await trio.sleep(10)
    await stage.commit_elsewhere(LeaveSession(), "Dan")
    await trio.sleep(TOMBSTONE_MS / 1000 + 10)
    # A later join prunes old tombstones.
    await stage.commit_elsewhere(stage.bind("Eve"), "Eve", "far away Eve")
    assert "member Dan" not in stage.stored().members
    await stage.send_chat(room, ann, "meanwhile")
    await stage.recover()
    assert {member.display_name for member in present(stage.stored())} == {"Ann", "Cid", "Eve"}
    assert texts(stage.stored()) == ["meanwhile"]
    assert_versions_in_order(ann)


async def test_move_to_ended_era_changes_nothing(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    old = stage.era
    stage.lose()
    await stage.recover()
    stage.remote.reads.clear()
    # As if the call had waited for the lock while its era ended and another began.
    assert not await room.move(old)
    assert stage.remote.reads == {}
    assert room.mirror.era is stage.era
    assert stage.stores.memory.ids() == []
    await stage.send_chat(room, ann, "hi")
    assert texts(stage.stored()) == ["hi"]
