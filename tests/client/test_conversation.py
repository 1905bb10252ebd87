"""The client's reaction to server messages, valid and invalid. On virtual time."""

import msgspec
import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from bandsync import client
from bandsync.client import UnknownMessage
from bandsync.wire.commands import Heartbeat, JoinSession, LeaveSession
from bandsync.wire.messages import (
    LeaderRequested,
    MessageUpdated,
    RoomStats,
    Snapshot,
    StorageStatus,
)
from tests.support.scripted_server import (
    ANN,
    START,
    Message,
    ScriptedServer,
    events_so_far,
    joined,
    never_answer,
    settle,
)


async def test_join_sends_its_options(script: ScriptedServer, autojump_clock: MockClock) -> None:
    async with joined(
        script, display_name="Ann", role="leader", token="jwt", resume_token="old", ticks=True
    ):
        (join,) = [message for _, message in script.received if message["type"] == "join_session"]
        del join["requestId"]
        assert join == {
            "type": "join_session",
            "sessionId": "song",
            "displayName": "Ann",
            "role": "leader",
            "token": "jwt",
            "resumeToken": "old",
            "ticks": True,
        }
    async with joined(script):
        join = [message for _, message in script.received if message["type"] == "join_session"][-1]
        assert join.keys() == {"type", "sessionId", "requestId", "ticks"}
        assert join["ticks"] is False
    # Every way out leaves.
    assert len(script.times("leave_session")) == 2


@pytest.mark.parametrize("waits", [False, True])
async def test_join_token_is_fetched_for_every_join(
    script: ScriptedServer, autojump_clock: MockClock, waits: bool
) -> None:
    tokens = iter(["one", "two", "three"])

    async def later() -> str:
        await trio.sleep(1)
        return next(tokens)

    async with joined(script, token=later if waits else lambda: next(tokens)) as band:
        await script.streams[-1].aclose()
        await trio.sleep(3)
        assert band.status == "online"
    asked = [message for _, message in script.received if message["type"] == "join_session"]
    assert [join["token"] for join in asked] == ["one", "two"]


async def test_failed_token_fetch_is_retried(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    answers: list[Exception | str] = [OSError("no network"), "good"]

    def token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with joined(script, token=token) as band:
        assert band.status == "online"
    (join,) = [message for _, message in script.received if message["type"] == "join_session"]
    assert join["token"] == "good"
    answers = [OSError("still no network")] * 100
    with pytest.raises(client.Unreachable, match="still no network") as unreachable:
        async with joined(script, token=token):
            raise AssertionError("nobody is in")
    assert unreachable.value.__cause__ is answers[0]


async def test_missing_version_requests_a_sync(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.answers["sync_request"] = lambda message: script.snapshot(message="healed")
        events = band.events()
        script.version += 1
        await script.event("message_updated", message="late", by="ann")
        await settle()
        asked = [message for _, message in script.received if message["type"] == "sync_request"]
        assert asked == [{"type": "sync_request", "version": 1, "epoch": "one"}]
        assert (band.session.version, band.session.message) == (3, "healed")
        # The event that came too early tells nobody anything.
        (snapshot,) = await events_so_far(events)
        assert isinstance(snapshot, Snapshot)
        # Once is enough.
        await script.event("message_updated", message="next", by="ann")
        await trio.sleep(10)
        assert len(script.times("sync_request")) == 1
        assert band.session.message == "next"


async def test_unanswered_sync_is_repeated(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.answers["sync_request"] = never_answer
        script.version += 5
        for _ in range(30):
            await script.event("message_updated", message="?", by="ann")
        await trio.sleep(7)
        times = script.times("sync_request")
        assert len(times) == 4
        assert band.session.version == 1
        await script.snapshot()
        await trio.sleep(10)
        assert len(script.times("sync_request")) == 4
        assert band.session.version == script.version


@pytest.mark.parametrize("before", ["snapshot", "sync_response", "another gap"])
async def test_gap_after_a_snapshot_is_detected(
    script: ScriptedServer, autojump_clock: MockClock, before: str
) -> None:
    async with joined(script) as band:
        await trio.sleep(3)
        script.answers["sync_request"] = lambda message: script.snapshot(message="healed")
        script.version += 1
        if before == "snapshot":
            # Unsolicited, as after a merge.
            await script.snapshot()
        elif before == "sync_response":
            await say_there_is_no_more(script, band)
        else:
            await script.event("message_updated", message="late", by="ann")
        await trio.sleep(5)
        asked = len(script.times("sync_request"))
        script.version += 1
        await script.event("message_updated", message="late", by="ann")
        await trio.sleep(1)
        assert len(script.times("sync_request")) == asked + 1
        assert (band.session.version, band.session.message) == (script.version, "healed")


async def say_there_is_no_more(script: ScriptedServer, band: client.Band) -> None:
    fields = {"epoch": "one", "positionMs": 0.0, "tempoBpm": 120.0, "isPlaying": False}
    transport = msgspec.to_builtins(band.session.transport)
    await script.send("sync_response", **script.head(), **fields, transport=transport)


async def test_sync_response_ends_the_catch_up(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.version = 3
        await script.event("message_updated", message="?", by="ann")
        await settle()
        await say_there_is_no_more(script, band)
        await trio.sleep(10)
        assert len(script.times("sync_request")) == 1


async def test_older_versions_are_ignored(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        events = band.events()
        await script.event("message_updated", message="two", by="ann")
        script.version = 0
        await script.event("message_updated", message="one", by="ann")
        await script.snapshot(message="one")
        await settle()
        assert (band.session.version, band.session.message) == (2, "two")
        assert [type(event) for event in await events_so_far(events)] == [MessageUpdated]
        assert script.times("sync_request") == []


async def test_snapshot_of_a_new_epoch_replaces_the_view(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    waiting = trio.Event()

    async def ack_and_wait(message: Message) -> None:
        await script.ack(message, 100)
        waiting.set()

    async with joined(script) as band, trio.open_nursery() as nursery:
        script.version = 50
        await script.snapshot()
        script.answers["chat_message"] = ack_and_wait
        nursery.start_soon(band.chat, "x")
        await waiting.wait()
        script.version, script.epoch = 3, "two"
        await script.snapshot(message="anew")
        await settle()
        assert (band.session.epoch, band.session.version) == ("two", 3)
        # Commands that wait for a version of the old epoch return.
        assert nursery.child_tasks == set()


async def test_unknown_messages_of_a_newer_server_are_tolerated(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        events = band.events()
        await script.send("applause", loudness=11)
        await script.event("message_updated", message="Hi", by="ann", mood="sunny")
        await script.send_text("not JSON")
        await script.send_text(b"\x00binary")
        await script.send_text('{"no":"type"}')
        await script.send("ack", requestId="nobody asked", version=5)
        await script.send("error", code="new_code", message="?", context={"depth": 3})
        await script.send("clock_sync", t0=1.0, t1=2.0, t2=3.0)
        await script.send("heartbeat", serverTime=START)
        await settle()
        applause, updated = await events_so_far(events)
        assert applause == UnknownMessage("applause", {"type": "applause", "loudness": 11})
        assert isinstance(updated, MessageUpdated)
        assert abs(band.clock.now() - (START + trio.current_time() * 1000)) < 1
        # A change that is not understood: better asked for than missed.
        script.answers["sync_request"] = lambda message: script.snapshot(message="encored")
        await script.event("encore", times=2)
        await settle()
        assert band.session.message == "encored"
        assert band.session.version == script.version
        assert await band.chat("still here") is None


async def test_a_refusal_with_a_context_of_any_kind(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def refuse(message: Message) -> None:
        await script.send(
            "error", code="x", message="No.", requestId=message["requestId"], context={"depth": 3}
        )

    async with joined(script) as band:
        script.answers["play"] = refuse
        with pytest.raises(client.CommandRefused) as refused:
            await band.play()
        assert refused.value.context == {"depth": 3}


async def test_storage_and_stats_are_kept(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        events = band.events()
        assert (band.storage, dict(band.stats)) == (None, {})
        await script.send("storage_status", storageType="memory", degraded=True, reason="lost")
        stats = {"memberId": "ann", "latencyMs": 3.5, "syncErrorMs": None, "quality": "excellent"}
        await script.send(
            "room_stats",
            **script.head(),
            memberCount=1,
            connectedCount=1,
            isPlaying=False,
            tempo=120,
            position=0,
            leaderId="ann",
            uptimeMs=1,
            averageLatencyMs=3.5,
            members=[stats],
        )
        await script.send("leader_requested", **script.head(), memberId="bob", displayName="Bob")
        kinds = [type(event) for event in await events_so_far(events)]
        assert kinds == [StorageStatus, RoomStats, LeaderRequested]
        assert band.storage is not None
        assert band.storage.degraded
        assert band.stats["ann"].latency_ms == 3.5
        assert band.server.connection_id == "1"


async def test_members_who_are_not_there(script: ScriptedServer, autojump_clock: MockClock) -> None:
    async with joined(script) as band:
        await script.snapshot(leaderId=None, members=[{**ANN, "memberId": "bob"}])
        await settle()
        assert (band.me, band.leader, band.is_leader) == (None, None, False)
        await script.event("member_connection", memberId="nobody", connected=True)
        await settle()
        assert list(band.session.members) == ["bob"]


async def test_foreign_and_oversized_commands_raise(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        for message in (JoinSession(session_id="other"), LeaveSession()):
            with pytest.raises(ValueError, match="use connect to join"):
                await band.command(message)
        with pytest.raises(ValueError, match="16384"):
            await band.update_message("\N{EIGHTH NOTE}" * 6000)
        assert await band.chat("still here") is None
        assert {message["type"] for _, message in script.received} == {
            "join_session",
            "clock_sync",
            "chat_message",
        }


async def test_a_request_id_names_one_command_at_a_time(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def later(message: Message) -> None:
        await trio.sleep(1)
        await script.ack(message)

    async with joined(script) as band, trio.open_nursery() as nursery:
        script.answers["heartbeat"] = later
        used = int(next(m for _, m in script.received if m["type"] == "join_session")["requestId"])
        # The one that the client itself would take next.
        mine = Heartbeat(request_id=str(used + 1))
        nursery.start_soon(band.command, mine)
        await settle()
        with pytest.raises(ValueError, match="in flight"):
            await band.command(mine)
        await band.chat("with another")
        await trio.sleep(2)
        await band.command(mine)
    ids = [message["requestId"] for _, message in script.received if "requestId" in message]
    assert ids == [str(used), str(used + 1), str(used + 2), str(used + 1), str(used + 3)]
