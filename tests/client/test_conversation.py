"""What the client makes of what a server says, the strange things included. On virtual time."""

import gc
import signal
import weakref
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from bandsync import client
from bandsync.client import EventsDropped, EventStream, JoinRefused, UnknownMessage
from bandsync.client.events import MAX_WAITING, EventHub
from bandsync.wire.commands import Heartbeat, JoinSession, LeaveSession
from bandsync.wire.messages import (
    ChatSent,
    LeaderRequested,
    MessageUpdated,
    RoomStats,
    ScrollTick,
    Snapshot,
    StorageStatus,
)
from tests.support.scripted_server import ANN, START, Message, ScriptedServer, Slow


@pytest.fixture
async def script(nursery: trio.Nursery) -> ScriptedServer:
    return ScriptedServer(nursery)


def joined(script: ScriptedServer, **options: Any) -> Any:
    return client.connect("ws://script", "song", open_stream=script.open_stream, **options)


async def settle() -> None:
    """Virtual time stands still while anybody runs: afterwards everything has happened."""
    await trio.sleep(0.001)


async def said(stream: EventStream) -> list[client.BandEvent]:
    """What has come by now."""
    found = []
    with trio.move_on_after(0.001):
        async for event in stream:
            found.append(event)
    return found


async def nothing(message: Message) -> None:
    pass


async def test_what_is_asked_for_at_the_join(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(
        script, display_name="Ann", role="leader", token="jwt", resume_token="old", ticks=True
    ):
        (join,) = [message for _, message in script.heard if message["type"] == "join_session"]
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
        join = [message for _, message in script.heard if message["type"] == "join_session"][-1]
        assert join.keys() == {"type", "sessionId", "requestId", "ticks"}
        assert join["ticks"] is False
    # Every way out leaves.
    assert len(script.times("leave_session")) == 2


@pytest.mark.parametrize("waits", [False, True])
async def test_a_join_token_is_asked_for_at_every_join(
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
    asked = [message for _, message in script.heard if message["type"] == "join_session"]
    assert [join["token"] for join in asked] == ["one", "two"]


async def test_without_a_join_token_there_is_another_attempt(
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
    (join,) = [message for _, message in script.heard if message["type"] == "join_session"]
    assert join["token"] == "good"
    answers = [OSError("still no network")] * 100
    with pytest.raises(client.Unreachable, match="still no network") as unreachable:
        async with joined(script, token=token):
            raise AssertionError("nobody is in")
    assert unreachable.value.__cause__ is answers[0]


async def test_a_missing_version_is_asked_for(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.answers["sync_request"] = lambda message: script.snapshot(message="healed")
        events = band.events()
        script.version += 1
        await script.event("message_updated", message="late", by="ann")
        await settle()
        asked = [message for _, message in script.heard if message["type"] == "sync_request"]
        assert asked == [{"type": "sync_request", "version": 1, "epoch": "one"}]
        assert (band.session.version, band.session.message) == (3, "healed")
        # The event that came too early tells nobody anything.
        (snapshot,) = await said(events)
        assert isinstance(snapshot, Snapshot)
        # Once is enough.
        await script.event("message_updated", message="next", by="ann")
        await trio.sleep(10)
        assert len(script.times("sync_request")) == 1
        assert band.session.message == "next"


async def test_it_is_asked_for_again_when_nobody_answers(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.answers["sync_request"] = nothing
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
async def test_what_came_before_a_gap_does_not_hide_it(
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


async def test_a_server_that_says_there_is_no_more(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.version = 3
        await script.event("message_updated", message="?", by="ann")
        await settle()
        await say_there_is_no_more(script, band)
        await trio.sleep(10)
        assert len(script.times("sync_request")) == 1


async def test_old_news_is_no_news(script: ScriptedServer, autojump_clock: MockClock) -> None:
    async with joined(script) as band:
        events = band.events()
        await script.event("message_updated", message="two", by="ann")
        script.version = 0
        await script.event("message_updated", message="one", by="ann")
        await script.snapshot(message="one")
        await settle()
        assert (band.session.version, band.session.message) == (2, "two")
        assert [type(event) for event in await said(events)] == [MessageUpdated]
        assert script.times("sync_request") == []


async def test_a_session_that_began_anew_is_taken_as_it_is(
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
        # What waited for a version of the old one waits no more.
        assert nursery.child_tasks == set()


async def test_a_newer_server_is_survived(
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
        applause, updated = await said(events)
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


async def test_another_protocol_is_not_for_us(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    script.protocol = 2
    with pytest.raises(JoinRefused, match="protocol 2") as refused:
        async with joined(script):
            raise AssertionError("nobody is in")
    assert refused.value.code == "unsupported_protocol"
    assert script.times("join_session") == []


@pytest.mark.parametrize("code", ["rate_limited", "conflict", "internal"])
async def test_a_refusal_that_passes_is_waited_out(
    script: ScriptedServer, autojump_clock: MockClock, code: str
) -> None:
    async def refuse(message: Message) -> None:
        del script.answers["join_session"]
        await script.refusal(message, code)

    script.answers["join_session"] = refuse
    async with joined(script) as band:
        assert band.status == "online"
    assert len(script.connected) == 2


@pytest.mark.parametrize("code", ["unauthorized", "session_full", "invalid_field", "new_code"])
async def test_a_refusal_at_a_resume_ends_the_client(
    script: ScriptedServer, autojump_clock: MockClock, code: str
) -> None:
    with pytest.raises(JoinRefused) as refused:
        async with joined(script):
            script.answers["join_session"] = lambda message: script.refusal(message, code)
            await script.streams[-1].aclose()
            await trio.sleep_forever()
    assert refused.value.code == code
    assert len(script.connected) == 2


async def test_who_is_not_wanted_stays_away(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    with pytest.raises(JoinRefused, match="go away") as refused:
        async with joined(script):
            await script.close(1008, "go away")
            await trio.sleep_forever()
    assert refused.value.code == "policy"
    await trio.sleep(60)
    assert len(script.connected) == 1


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_command_after_the_end_does_not_hide_the_reason(
    script: ScriptedServer, autojump_clock: MockClock, grouped: bool
) -> None:
    async def heedless(band: client.Band) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(1)
        with pytest.raises(client.NotConnected):
            await band.until_online()
        await band.chat("anybody?")

    with pytest.raises(client.Superseded) as superseded:
        async with joined(script) as band:
            await script.close(4001)
            if grouped:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(heedless, band)
            await heedless(band)
    assert superseded.value.__cause__ is None


@pytest.mark.parametrize(
    ("code", "reason"), [(4001, client.Superseded), (1008, client.JoinRefused)]
)
async def test_a_command_given_during_the_close_does_not_hide_the_reason(
    script: ScriptedServer,
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    code: int,
    reason: type[Exception],
) -> None:
    streams: list[Slow] = []

    async def open_stream() -> trio.abc.Stream:
        streams.append(Slow(await script.open_stream()))
        return streams[-1]

    async def chatter(band: client.Band, start: float) -> None:
        await trio.sleep(start)
        while True:
            await band.chat("x")
            await trio.sleep(0.01)

    with pytest.raises(reason):
        async with (
            client.connect("ws://script", "song", open_stream=open_stream) as band,
            trio.open_nursery() as commands,
        ):
            await trio.sleep(2.5)
            # Our answer to the close takes its time; commands fail meanwhile.
            streams[-1].delay_s = 0.05
            script.answers["chat_message"] = nothing
            nursery.start_soon(script.close, code)
            for number in range(30):
                commands.start_soon(chatter, band, number / 100)


async def test_an_interrupt_that_strikes_our_own_task_is_an_interrupt(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    def interrupted(at: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with joined(script, tap=interrupted):
            raise AssertionError("nobody is in")


def test_an_interrupt_while_the_block_is_left_ends_it() -> None:
    ended: list[float] = []

    # Only the main task of a run of Trio gets it.
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            script = ScriptedServer(nursery)

            async def open_stream() -> trio.abc.Stream:
                # Nothing else would end it then.
                assert not script.mute
                return await script.open_stream()

            nursery.start_soon(interrupt_at, 0.5)
            try:
                async with client.connect("ws://script", "song", open_stream=open_stream):
                    script.mute = True
            finally:
                ended.append(trio.current_time())

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert ended[0] <= 4


@trio.lowlevel.enable_ki_protection
async def interrupt_at(seconds: float) -> None:
    await trio.sleep_until(seconds)
    signal.raise_signal(signal.SIGINT)


async def test_what_fails_together_is_told_together(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    def broken(at: float, text: str) -> None:
        raise ZeroDivisionError

    # A bug of the recorder ends the block loudly, with what the block itself raises meanwhile.
    armed = False
    with pytest.raises(ExceptionGroup) as group:
        async with joined(script, tap=lambda at, text: broken(at, text) if armed else None):
            armed = True
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("ours")
    assert group.value.subgroup(KeyError)
    assert group.value.subgroup(ZeroDivisionError)


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1009, 1011, 1012, 4000, 4999])
async def test_after_any_other_close_it_comes_back(
    script: ScriptedServer, autojump_clock: MockClock, code: int
) -> None:
    async with joined(script) as band:
        if code == 1006:
            await script.streams[-1].aclose()
        else:
            await script.close(code)
        await trio.sleep(1)
        assert band.status == "online"
        assert band.you.resumed


async def test_a_message_beyond_all_bounds_ends_the_connection(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await script.send("applause", noise="x" * 5_000_000)
        await trio.sleep(1)
        assert (band.status, len(script.connected)) == ("online", 2)


async def test_an_old_connection_is_not_listened_to(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        old = script.socket
        assert old is not None
        script.mute = True
        await trio.sleep(6.1)
        script.mute = False
        await band.until_online()
        script.socket, new = old, script.socket
        # It was superseded by ourselves.
        with trio.move_on_after(1):
            await script.close(4001)
        script.socket = new
        await trio.sleep(1)
        assert band.status == "online"
        await band.chat("here")


async def test_what_is_known_besides_the_session(
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
        kinds = [type(event) for event in await said(events)]
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


async def test_who_tries_again_at_once_stops_nobody(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await script.streams[-1].aclose()
        tries = 0
        with trio.move_on_after(5):
            while True:
                try:
                    await band.chat("now?")
                    break
                except (client.NotConnected, client.ConnectionLost):
                    tries += 1
                    assert tries < 1000
                    if band.status == "resuming":
                        await trio.sleep(0.1)
        assert band.status == "online"
        await band.close()
        # Nor does it go on when it is cancelled.
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(trio.Cancelled):
                await band.chat("now?")
            await trio.lowlevel.checkpoint()


async def test_what_is_no_command_of_a_member_is_said_at_once(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        for message in (JoinSession(session_id="other"), LeaveSession()):
            with pytest.raises(ValueError, match="use connect to join"):
                await band.command(message)
        with pytest.raises(ValueError, match="16384"):
            await band.update_message("\N{EIGHTH NOTE}" * 6000)
        assert await band.chat("still here") is None
        assert {message["type"] for _, message in script.heard} == {
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
        used = int(next(m for _, m in script.heard if m["type"] == "join_session")["requestId"])
        # The one that the client itself would take next.
        mine = Heartbeat(request_id=str(used + 1))
        nursery.start_soon(band.command, mine)
        await settle()
        with pytest.raises(ValueError, match="in flight"):
            await band.command(mine)
        await band.chat("with another")
        await trio.sleep(2)
        await band.command(mine)
    ids = [message["requestId"] for _, message in script.heard if "requestId" in message]
    assert ids == [str(used), str(used + 1), str(used + 2), str(used + 1), str(used + 3)]


async def test_a_stream_is_for_one_task(script: ScriptedServer, autojump_clock: MockClock) -> None:
    async with joined(script) as band:
        events = band.events()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anext, events)
            await settle()
            with pytest.raises(trio.BusyResourceError), trio.fail_after(1):
                await anext(events)
            # The first is none the worse for it.
            await script.event("message_updated", message="two", by="ann")
        await script.event("message_updated", message="three", by="ann")
        event = await anext(events)
        assert isinstance(event, MessageUpdated)
        assert event.message == "three"


async def test_each_stream_has_its_own_pace(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        quick, slow = band.events(), band.events()
        await script.event("message_updated", message="one", by="ann")
        assert len(await said(quick)) == 1
        await script.event("message_updated", message="two", by="ann")
        assert len(await said(quick)) == 1
        assert len(await said(slow)) == 2
        assert len(await said(band.events())) == 0


def a_chat(number: int) -> ChatSent:
    return ChatSent("song", number, START, str(number), "ann", "Ann", "x", START)


async def test_who_does_not_keep_up_is_told(autojump_clock: MockClock) -> None:
    stream = EventStream()
    for number in range(MAX_WAITING):
        stream.put(a_chat(number))
    assert [event.version for event in await said(stream)] == list(range(MAX_WAITING))  # type: ignore[union-attr]
    for number in range(2 * MAX_WAITING + 3):
        stream.put(a_chat(number))
    dropped, *rest = await said(stream)
    assert dropped == EventsDropped(2 * MAX_WAITING)
    assert [event.version for event in rest] == [2048, 2049, 2050]  # type: ignore[union-attr]
    stream.put(a_chat(1))
    stream.end()
    assert [event async for event in stream] == [a_chat(1)]


async def test_ticks_are_the_first_that_are_left_out(autojump_clock: MockClock) -> None:
    stream = EventStream()
    tick = ScrollTick("song", START, 0.0, 0.0, 120.0)
    for number in range(1000):
        stream.put(tick)
        if number % 100 == 0:
            stream.put(a_chat(number))
    found = await said(stream)
    assert found.count(tick) == 63
    assert len([event for event in found if isinstance(event, ChatSent)]) == 10


async def test_a_stream_that_nobody_holds_is_forgotten(autojump_clock: MockClock) -> None:
    hub = EventHub()
    kept = hub.stream()
    dropped = [weakref.ref(hub.stream()) for _ in range(100)]
    gc.collect()
    assert all(stream() is None for stream in dropped)
    hub.put(a_chat(1))
    assert await said(kept) == [a_chat(1)]
