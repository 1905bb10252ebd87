"""Stored states that differ from the mirror: conflicts and tip comparison. On virtual time."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from bandsync.model.session import find, leader_of
from bandsync.rules.tokens import ResumeToken
from bandsync.wire.commands import (
    ChatMessage,
    Refusal,
)
from tests.support.rooms import GRACE_S, HubHarness, assert_versions_in_order, texts


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> HubHarness:
    return HubHarness(nursery)


async def test_change_after_conflict_follows_a_snapshot(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    await stage.commit_elsewhere(stage.bind("Cid"), "Cid", "far away")
    await stage.commit_elsewhere(ChatMessage(text="first"), "Cid", fresh_id="theirs")
    await stage.send_chat(room, ann, "second")
    assert texts(stage.stored()) == ["first", "second"]
    for peer in (ann, bob):
        kinds = [message["type"] for message in peer.received("snapshot", "chat_message")]
        assert kinds[-2:] == ["snapshot", "chat_message"]
        (heard,) = peer.received("chat_message")
        assert heard["text"] == "second"
        assert_versions_in_order(peer)
    # The stored state contained everything, so nothing was written back.
    assert stage.hub.counters.reconciled == 0
    assert stage.hub.counters.conflicts == 1


async def test_takeover_found_in_storage_closes_the_connection(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    bob, _ = await stage.join("Bob")
    token = ResumeToken("member Ann", 1, "secret of Ann")
    await stage.commit_elsewhere(
        replace(stage.bind("Ann"), resume=(token,)), "Ann", "far away", "unused"
    )
    await stage.hub.compare(stage.era)
    assert (ann.closed, bob.closed) == (4001, None)
    assert room.peers == {"member Bob": bob}
    # Commands and the end of the old connection no longer affect the member.
    refused = await room.command(ann, ChatMessage(text="hi"), "m", "r")
    assert isinstance(refused, Refusal)
    assert refused.code == "not_joined"
    stage.hub.dropped(room, ann, "timeout")
    await trio.sleep(GRACE_S + 1)
    member = find(stage.stored(), "member Ann")
    assert member is not None
    assert (member.connected, member.server_id) == (True, "hall")
    assert leader_of(stage.stored()) == member
    assert bob.received("user_left", "member_connection") == []


async def test_room_closes_when_its_last_member_is_taken_over(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, _ = await stage.join("Ann")
    token = ResumeToken("member Ann", 1, "secret of Ann")
    await stage.commit_elsewhere(
        replace(stage.bind("Ann"), resume=(token,)), "Ann", "far away", "unused"
    )
    await stage.hub.compare(stage.era)
    assert ann.closed == 4001
    assert stage.hub.rooms == {}
    assert stage.stores.memory.ids() == []


async def test_comparison_restores_deleted_session(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.send_chat(room, ann, "hi")
    before = stage.stored()
    stage.remote.discard("song")
    await stage.hub.compare(stage.era)
    after = stage.stored()
    assert after.epoch == before.epoch
    assert after.version >= before.version
    assert after.members.keys() == before.members.keys()
    assert texts(after) == ["hi"]
    assert room.mirror.session == after
    assert_versions_in_order(ann)
    # Later comparisons find nothing to write.
    written = stage.remote.commits
    for _ in range(3):
        await stage.hub.compare(stage.era)
    assert stage.remote.commits == written
    assert len(ann.received("snapshot")) == 2


async def test_comparison_updates_older_stored_state(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    old = stage.stored()
    for text in ("one", "two"):
        await stage.send_chat(room, ann, text)
    newest = stage.stored()
    stage.remote.keep(old)
    await stage.hub.compare(stage.era)
    assert texts(stage.stored()) == ["one", "two"]
    assert stage.stored().version > newest.version
    assert_versions_in_order(ann)


async def test_comparison_does_not_write_equal_session(
    stage: HubHarness, autojump_clock: MockClock
) -> None:
    ann, room = await stage.join("Ann")
    await stage.send_chat(room, ann, "hi")
    written, read = stage.remote.commits, stage.remote.reads["song"]
    for _ in range(3):
        await stage.hub.compare(stage.era)
    assert (stage.remote.commits, stage.remote.reads["song"]) == (written, read)
