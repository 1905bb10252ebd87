"""Faults of a peer: unresponsive, foreign, out of file descriptors, or sending junk."""

import contextlib
import os
import socket

import pytest
import trio
from trio.testing import MockClock

from bandsync.handoff import channel
from bandsync.handoff.channel import ANSWER_TIMEOUT_S, BREAKER_OPEN_S
from bandsync.handoff.peers import REBIND_S
from tests.support.handoffs import (
    HandoffWorker,
    channel_to,
    connection,
    no_file_descriptors,
    session_for,
    unresponsive,
)


async def test_unresponsive_peer_opens_the_circuit_breaker(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    async with unresponsive(group, 2) as listener:
        began = trio.current_time()
        results: list[bool] = []

        async def hand_off() -> None:
            results.append(await one.hand_off(session_for(2)))

        async with trio.open_nursery() as handoffs:
            for _ in range(100):
                handoffs.start_soon(hand_off)
        assert results == [False] * 100
        assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT_S)
        assert len(one.log.all("handoff.peer_unresponsive", peer=2)) == 1
        # The breaker is open: no further probe, and no wait.
        assert not await one.hand_off(session_for(2))
        assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT_S)
        waiting, _ = listener.accept()
        waiting.close()
        with pytest.raises(BlockingIOError):
            listener.accept()
    await nursery.start(two.run)
    await trio.sleep(BREAKER_OPEN_S)
    assert await one.hand_off(session_for(2))


async def test_answer_to_a_probe_expires(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one = HandoffWorker(group, 1)
    await nursery.start(one.run)
    async with unresponsive(group, 2) as listener:
        probes: list[bytes] = []

        async def answer_once() -> None:
            await trio.lowlevel.wait_readable(listener)
            accepted, _ = listener.accept()
            await trio.lowlevel.wait_readable(accepted)
            probes.append(accepted.recv(100))
            accepted.send(b"!")
            nursery.start_soon(hold, accepted)

        async def hold(accepted: socket.socket) -> None:
            with accepted:
                await trio.sleep_forever()

        nursery.start_soon(answer_once)
        assert await one.hand_off(session_for(2))
        assert await one.hand_off(session_for(2))
        await trio.sleep(channel.PROBE_VALID_S)
        assert not await one.hand_off(session_for(2))
        assert probes == [b"?"]
        nursery.cancel_scope.cancel()


async def test_worker_without_file_descriptors_is_full(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with connection() as (_, accepted):
        # The sockets between the two exist before the descriptors run out.
        assert await one.peers.hand_off(session_for(2), accepted, b"head")
        await two.until(1)
        await trio.sleep(channel.PROBE_VALID_S)
        with no_file_descriptors():
            assert not await one.peers.hand_off(session_for(2), accepted, b"head")
        await trio.sleep(channel.PROBE_VALID_S)
        assert await one.peers.hand_off(session_for(2), accepted, b"head")
        # A connection that is already on its way is lost, and logged.
        with no_file_descriptors():
            await trio.testing.wait_all_tasks_blocked()
        (lost,) = two.log.all("handoff.connections_lost")
        assert lost["connections"] == 1
    assert len(two.received) == 1


async def test_processes_of_another_user_are_rejected(
    nursery: trio.Nursery, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    uid = os.geteuid()
    monkeypatch.setattr(channel.os, "geteuid", lambda: uid + 1)
    # The sender checks the process that has the name,
    assert not await one.hand_off(session_for(2))
    # and the receiver checks the process that connects.
    with channel_to(group, 2) as sock:
        assert await trio.to_thread.run_sync(sock.recv, 10) == b""
    monkeypatch.undo()
    assert await one.hand_off(session_for(2))
    await two.until(1)


async def test_foreign_process_that_answers_receives_nothing(
    nursery: trio.Nursery, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = HandoffWorker(group, 1)
    await nursery.start(one.run)
    monkeypatch.setattr(channel, "is_same_user", lambda sock: False)
    received: list[bytes] = []

    async def answer(listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            accepted, _ = listener.accept()
            with accepted:
                with contextlib.suppress(BrokenPipeError):  # The worker has disconnected.
                    accepted.send(b"!")
                await trio.lowlevel.wait_readable(accepted)
                received.append(accepted.recv(100))

    async with unresponsive(group, 2) as listener, trio.open_nursery() as answering:
        answering.start_soon(answer, listener)
        assert not await one.hand_off(session_for(2))
        await trio.testing.wait_all_tasks_blocked()
        assert set(received) == {b""}
        answering.cancel_scope.cancel()


async def test_junk_ends_only_its_own_channel(nursery: trio.Nursery, group: str) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with channel_to(group, 2) as sock:
        sock.send(b"what?")
        assert await trio.to_thread.run_sync(sock.recv, 10) == b""
    assert await one.hand_off(session_for(2))


async def test_descriptor_that_is_no_socket_ends_only_its_own_channel(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    with channel_to(group, 2) as sock:
        before = len(os.listdir("/proc/self/fd"))
        reader, writer = os.pipe()
        socket.send_fds(sock, [b"head"], [reader])
        os.close(reader)
        assert await trio.to_thread.run_sync(sock.recv, 10) == b""
        # The descriptor that was sent is closed.
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        os.close(writer)
        assert len(os.listdir("/proc/self/fd")) <= before
    assert await one.hand_off(session_for(2))


async def test_worker_retries_to_bind_while_its_name_is_taken(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two, late = HandoffWorker(group, 1), HandoffWorker(group, 2), HandoffWorker(group, 2)
    await nursery.start(one.run)
    async with unresponsive(group, 2):
        await nursery.start(two.run)
        await nursery.start(late.run)
        await trio.sleep(10 * REBIND_S)
        assert len(two.log.all("handoff.bind_failed")) == 1
        late.peers.leave()
    await trio.sleep(2 * REBIND_S)
    assert await one.hand_off(session_for(2))
    await two.until(1)
    # A worker that has left does not bind again.
    two.peers.leave()
    await trio.sleep(2 * REBIND_S)
    assert not await one.hand_off(session_for(2))
