"""Timers of the client: backoff, silence, probing, deadlines. On virtual time."""

import random
import ssl
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from bandsync import client
from bandsync.client import Band, ConnectionLost, StatusChanged, Unreachable
from bandsync.client.retry_delay import delay_s
from tests.support.scripted_server import (
    START,
    Clogged,
    Message,
    ScriptedServer,
    Slow,
    joined,
    never_answer,
)

GRACE_S = 10.0


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


async def test_attempts_grow_rarer_but_never_end(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.refuse = 1000
        await script.streams[-1].aclose()
        await trio.sleep(3600)
        assert band.status == "resuming"
        first, *others = gaps(script.attempts[1:])
        assert 0.3 <= script.attempts[1] - script.connected[0] <= 0.7
        assert 0.5 <= first <= 1.3
        assert max(others) <= 8.1
        assert min(others[4:]) >= 4
        # No two clients wait alike.
        assert len({round(gap, 3) for gap in others}) > len(others) / 2
        script.refuse = 0
        await band.until_online()
        assert band.you.resumed
        # From the bottom again, if that was a good connection.
        await trio.sleep(6)
        back = trio.current_time()
        await script.streams[-1].aclose()
        await trio.sleep(0.01)
        await band.until_online()
        assert trio.current_time() - back <= 0.7


@pytest.mark.parametrize("failures", [0, 1, 5, 10_000])
@pytest.mark.parametrize("slow", [False, True])
def test_delays_are_bounded(failures: int, slow: bool) -> None:
    least, most = delay_s(failures, 0, slow=slow), delay_s(failures, 1, slow=slow)
    assert most == 2 * least
    assert (2 if slow else 0.3) <= least
    assert most <= (30 if slow else 8)


async def test_full_server_is_retried_later(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        closed = trio.current_time()
        await script.close(1013)
        await trio.sleep(1)
        await band.until_online()
        # Within the grace all the same.
        assert 2 <= script.connected[1] - closed <= 4.1


async def test_short_connections_keep_the_backoff_growing(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def let_in_and_throw_out(message: Message) -> None:
        await script.let_in(message)
        await trio.sleep(0.1)
        await script.close(1011)

    script.answers["join_session"] = let_in_and_throw_out
    async with joined(script):
        await trio.sleep(600)
        assert gaps(script.connected)[0] <= 0.8
        assert min(gaps(script.connected)[5:]) >= 4


async def test_captive_portal_is_retried_slowly(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    wanted: list[bytes | Exception] = []

    async def open_stream() -> trio.abc.Stream:
        if not wanted:
            return await script.open_stream()
        script.attempts.append(trio.current_time())
        answer = wanted.pop(0)
        if isinstance(answer, Exception):
            raise trio.BrokenResourceError from answer
        ours, theirs = memory_stream_pair()
        await ours.send_all(answer)
        return theirs

    async with client.connect("ws://script", "song", open_stream=open_stream) as band:
        forbidden = b"HTTP/1.1 403 Log in\r\nContent-Length: 0\r\n\r\n"
        wanted += [ssl.SSLCertVerificationError("not trusted"), forbidden, forbidden]
        await script.streams[-1].aclose()
        await trio.sleep(1)
        assert band.status == "resuming"
        await band.until_online()
        assert band.you.resumed
        # Not so often.
        assert min(gaps(script.attempts[1:])) >= 4


async def test_drain_sets_the_reconnect_time(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        told = trio.current_time()
        await script.send("server_draining", reconnectInMs=5000)
        await trio.sleep(1)
        assert band.status == "draining"
        assert await band.chat("still works") is None
        await script.close(1012)
        await trio.sleep(3.9)
        assert len(script.connected) == 1
        await trio.sleep(0.2)
        assert script.connected[1] - told == pytest.approx(5, abs=0.01)
        assert band.status == "online"


async def test_silence_is_noticed_well_before_the_grace_is_over(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await trio.sleep(60)
        assert len(script.connected) == 1
        events = band.events()
        script.mute = True
        silent = trio.current_time()
        async for event in events:
            if isinstance(event, StatusChanged):
                assert event.status == "resuming"
                break
        assert 5 <= trio.current_time() - silent <= 6.5
        script.mute = False
        await band.until_online()
        assert trio.current_time() - silent < GRACE_S - 2
        join = [message for _, message in script.received if message["type"] == "join_session"][-1]
        assert join["resumeToken"] == "token-1"
        assert band.resume_token == "token-2"


async def test_stall_of_the_process_is_not_a_loss(
    script: ScriptedServer, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0
    async with joined(script) as band:
        await trio.sleep(5)
        # The server answers; the client's process stands still for a minute.
        mock_clock.jump(60)
        await trio.sleep(5)
        assert len(script.connected) == 1
        assert band.status == "online"


async def test_leave_is_bounded(script: ScriptedServer, autojump_clock: MockClock) -> None:
    async with joined(script):
        script.mute = True
        script.answers["leave_session"] = never_answer
        left = trio.current_time()
    assert script.times("leave_session") == [pytest.approx(left, abs=0.01)]
    assert trio.current_time() - left <= 4
    assert len(script.connected) == 1


async def test_join_and_leave_do_not_wait_for_a_version(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def let_in(message: Message) -> None:
        script.answers["join_session"] = never_answer
        await script.snapshot(you=YOU)
        await script.ack(message, script.version + 5)

    async def let_go(message: Message) -> None:
        # A member that left receives no `user_left` of its own.
        await script.ack(message, script.version + 1)

    script.answers |= {"join_session": let_in, "leave_session": let_go}
    async with joined(script):
        pass
    assert trio.current_time() < 0.1
    assert len(script.connected) == 1


YOU = {"memberId": "ann", "role": "leader", "resumeToken": "token", "resumed": False}


async def test_command_without_an_answer_fails_after_30_s(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        script.answers["chat_message"] = never_answer
        asked = trio.current_time()
        with pytest.raises(ConnectionLost):
            await band.chat("hello?")
        assert trio.current_time() - asked == pytest.approx(30)
        assert band.status == "online"


async def test_a_command_returns_when_the_session_shows_it(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def ack_first(message: Message) -> None:
        await script.ack(message, script.version + 1)
        await trio.sleep(1)
        await script.event("message_updated", message=message["message"], by="ann")

    async with joined(script) as band:
        script.answers["update_message"] = ack_first
        assert await band.update_message("Hi") == 2
        assert band.session.message == "Hi"
        assert script.times("sync_request") == []


async def test_missing_event_of_an_ack_requests_a_sync(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def ack_only(message: Message) -> None:
        script.version += 1
        await script.ack(message, script.version)

    async with joined(script) as band:
        script.answers["update_message"] = ack_only
        script.answers["sync_request"] = lambda message: script.snapshot(message="Hi")
        asked = trio.current_time()
        assert await band.update_message("Hi") == 2
        assert band.session.message == "Hi"
        assert 1 <= trio.current_time() - asked <= 5
        assert len(script.times("sync_request")) == 1


@pytest.mark.parametrize("resuming", [False, True])
async def test_cancelled_join_is_left(
    script: ScriptedServer, autojump_clock: MockClock, resuming: bool
) -> None:
    script.answers["join_session"] = never_answer
    with trio.move_on_after(1 if not resuming else 60):
        if resuming:
            del script.answers["join_session"]
        async with joined(script):
            await cut_and_asked_again(script)
    assert len(script.times("join_session")) == (2 if resuming else 1)
    (left,) = script.times("leave_session")
    assert left >= script.times("join_session")[-1]


async def test_close_during_a_resume_keeps_the_membership(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await cut_and_asked_again(script)
        await band.close()
    assert script.times("leave_session") == []


async def cut_and_asked_again(script: ScriptedServer) -> None:
    asked = trio.Event()

    async def ask(message: Message) -> None:
        asked.set()

    script.answers["join_session"] = ask
    await script.streams[-1].aclose()
    await asked.wait()


async def test_unanswered_join_is_left_before_the_next(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def no_answer(message: Message) -> None:
        del script.answers["join_session"]
        # It is not silent otherwise.
        for _ in range(5):
            await trio.sleep(2)
            await script.send("heartbeat", serverTime=START)

    script.answers["join_session"] = no_answer
    async with joined(script):
        assert len(script.times("leave_session")) == 1
        kinds = [message["type"] for _, message in script.received]
        assert [kind for kind in kinds if kind != "clock_sync"] == [
            "join_session",
            "leave_session",
            "join_session",
        ]


@pytest.mark.parametrize("where", ["connecting", "handshake"])
async def test_cancelling_the_attempt_is_at_once(autojump_clock: MockClock, where: str) -> None:
    async def open_stream() -> trio.abc.Stream:
        if where == "connecting":
            await trio.sleep_forever()
        return streams[1]

    streams = memory_stream_pair()
    with trio.move_on_after(0.2) as scope:
        async with client.connect("ws://script", "song", open_stream=open_stream):
            raise AssertionError("nobody is in")
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(0.2, abs=0.01)


async def test_an_acknowledged_change_is_not_lost_with_its_event(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def ack_only(message: Message) -> None:
        await script.ack(message, script.version + 1)

    async def ack_and_die(message: Message) -> None:
        await script.ack(message, script.version + 1)
        await trio.sleep(0.1)
        await script.streams[-1].aclose()

    async with joined(script) as band:
        script.answers["chat_message"] = ack_only
        script.answers["pause"] = ack_and_die
        assert await band.chat("x") == 2
        assert await band.pause() == 2


@pytest.mark.parametrize("what", ["welcome", "join"])
async def test_unanswered_welcome_or_join_is_retried(
    script: ScriptedServer, autojump_clock: MockClock, what: str
) -> None:
    if what == "welcome":
        script.mute = True
    else:
        script.answers["join_session"] = never_answer
    with pytest.raises(Unreachable):
        async with joined(script, join_within=60):
            raise AssertionError("nobody is in")
    # It does not wait for an attempt that would come too late.
    assert 50 <= trio.current_time() <= 61
    # Muted, it is silent; otherwise it only does not answer.
    assert 4 <= len(script.connected) <= 10


@pytest.mark.parametrize("jitter_ms", [0, 40, 250])
async def test_probing_follows_the_jitter_and_keeps_within_the_limits(
    script: ScriptedServer, autojump_clock: MockClock, jitter_ms: float
) -> None:
    draw = random.Random(1)
    script.delay = lambda: draw.uniform(0, jitter_ms / 1000)
    async with joined(script) as band:
        await trio.sleep(2)
        times = script.times("clock_sync")
        assert gaps(times[:20]) == [pytest.approx(0.08, abs=1e-6)] * 19
        await trio.sleep(60)
        steady = [time for time in script.times("clock_sync") if time > times[0] + 20]
        # 30 s / 15, 30 s / 20 or so, 30 s / 100.
        expected = {0: (1.99, 2.01), 40: (1.2, 2.01), 250: (0.29, 0.31)}[jitter_ms]
        for gap in gaps(steady):
            assert expected[0] <= gap <= expected[1]
        reports = [message for _, message in script.received if message["type"] == "sync_report"]
        assert all(0 <= report["errorMs"] <= jitter_ms + 40 for report in reports)
        told = script.times("sync_report")
        assert gaps(told) == [pytest.approx(5, abs=0.001)] * 12
        # The truth is known here.
        assert band.clock.error_ms is not None
        off = band.clock.now() - (START + trio.current_time() * 1000)
        assert abs(off) <= band.clock.error_ms
        assert band.clock.to_local(band.clock.now()) == pytest.approx(trio.current_time())
    assert script.limited == []


async def test_reconnect_keeps_the_clock_continuous(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await trio.sleep(10)
        samples = band.clock.samples
        assert samples > 20
        await script.streams[-1].aclose()
        seen: list[tuple[float, float]] = []
        for _ in range(500):
            seen.append((trio.current_time() * 1000, band.clock.now()))
            await trio.sleep(0.01)
        assert band.clock.samples <= samples + 2
        for (before, earlier), (after, later) in pairwise(seen):
            assert later - earlier == pytest.approx(after - before, rel=0.03)
    assert script.limited == []


async def test_clogged_connection_is_abandoned(
    script: ScriptedServer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    streams: list[Clogged] = []

    async def open_stream() -> trio.abc.Stream:
        streams.append(Clogged(await script.open_stream()))
        return streams[-1]

    async with client.connect("ws://script", "song", open_stream=open_stream) as band:
        streams[-1].clogged = True
        clogged = trio.current_time()

        async def chatter() -> None:
            while len(script.connected) == 1:
                await script.send("heartbeat", serverTime=START)
                await trio.sleep(0.5)

        nursery.start_soon(chatter)
        with pytest.raises(ConnectionLost):
            await band.chat("anybody?")
        assert 10 <= trio.current_time() - clogged <= 12
        await band.until_online()
        assert band.you.resumed


async def test_many_concurrent_commands_are_all_sent(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async def one(band: Band, number: int) -> None:
        await band.chat(str(number))

    async with joined(script) as band, trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(one, band, number)
    said = [message["text"] for _, message in script.received if message["type"] == "chat_message"]
    assert sorted(said, key=int) == [str(number) for number in range(500)]


async def test_ping_during_the_close_does_not_delay_it(
    script: ScriptedServer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    streams: list[Slow] = []

    async def open_stream() -> trio.abc.Stream:
        streams.append(Slow(await script.open_stream()))
        return streams[-1]

    async def ping() -> None:
        await trio.sleep(0.1)
        assert script.socket is not None
        nursery.start_soon(script.socket.ping)

    async def slow_down(message: Message) -> None:
        streams[-1].delay_s = 0.2
        nursery.start_soon(ping)
        await script.ack(message)

    async with client.connect("ws://script", "song", open_stream=open_stream):
        script.answers["leave_session"] = slow_down
        left = trio.current_time()
    assert trio.current_time() - left < 2
