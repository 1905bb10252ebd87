"""Refusals, closes and errors: when the client reconnects, and what it raises."""

import signal
from collections.abc import Iterator

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from bandsync import client
from bandsync.client import JoinRefused
from tests.support.scripted_server import Message, ScriptedServer, Slow, joined, never_answer


async def test_other_protocol_version_is_refused(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    script.protocol = 2
    with pytest.raises(JoinRefused, match="protocol 2") as refused:
        async with joined(script):
            raise AssertionError("nobody is in")
    assert refused.value.code == "unsupported_protocol"
    assert script.times("join_session") == []


@pytest.mark.parametrize("code", ["rate_limited", "conflict", "internal"])
async def test_temporary_join_refusal_is_retried(
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
async def test_permanent_refusal_at_a_resume_ends_the_client(
    script: ScriptedServer, autojump_clock: MockClock, code: str
) -> None:
    with pytest.raises(JoinRefused) as refused:
        async with joined(script):
            script.answers["join_session"] = lambda message: script.refusal(message, code)
            await script.streams[-1].aclose()
            await trio.sleep_forever()
    assert refused.value.code == code
    assert len(script.connected) == 2


async def test_policy_close_ends_the_client(
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
            script.answers["chat_message"] = never_answer
            nursery.start_soon(script.close, code)
            for number in range(30):
                commands.start_soon(chatter, band, number / 100)


async def test_interrupt_in_the_client_task_is_raised(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    def interrupted(at: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with joined(script, tap=interrupted):
            raise AssertionError("nobody is in")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handler of SIGINT: background jobs and pytest-xdist ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_interrupt_while_leaving_ends_the_block() -> None:
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


async def test_simultaneous_errors_are_grouped(
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
async def test_client_resumes_after_any_other_close(
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


async def test_oversized_message_ends_the_connection(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
    async with joined(script) as band:
        await script.send("applause", noise="x" * 5_000_000)
        await trio.sleep(1)
        assert (band.status, len(script.connected)) == ("online", 2)


async def test_close_of_an_old_connection_is_ignored(
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


async def test_immediate_retries_do_not_starve_the_reconnect(
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
