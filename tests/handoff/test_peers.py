"""Handoff between workers in one process: which worker gets a connection, and how it arrives."""

import socket

import pytest
import trio
from trio.testing import MockClock

from bandsync.handoff import channel
from bandsync.handoff.rendezvous import preference
from tests.support.handoffs import (
    HandoffWorker,
    channel_to,
    connection,
    no_file_descriptors,
    session_for,
)


async def test_connection_arrives_with_the_bytes_that_were_read(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    largest = bytes(range(256)) * 64 + b"x"
    for number, received in enumerate((b"GET /ws/song", largest), 1):
        with connection() as (client, accepted):
            assert await one.peers.hand_off(session_for(2), accepted, received)
            accepted.close()
            await two.until(number)
            assert two.received[-1] == received
            two.sockets[-1].sendall(b"hello")
            assert await trio.to_thread.run_sync(client.recv, 100) == b"hello"


async def test_owner_keeps_the_connection(nursery: trio.Nursery, group: str) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert not await one.hand_off(session_for(1))
    assert two.received == []


async def test_next_preferred_worker_replaces_an_absent_one(
    nursery: trio.Nursery, group: str
) -> None:
    one, two, three = (HandoffWorker(group, number, 3) for number in (1, 2, 3))
    await nursery.start(one.run)
    sessions = {tuple(preference(name, 3)): name for name in map(str, range(100))}
    assert not await one.hand_off(sessions[2, 3, 1])
    scope = await nursery.start(three.run)
    assert await one.hand_off(sessions[2, 3, 1])
    # The worker itself comes before those that the session prefers less.
    assert not await one.hand_off(sessions[2, 1, 3])
    await nursery.start(two.run)
    assert await one.hand_off(sessions[2, 3, 1])
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert await one.hand_off(sessions[3, 2, 1])
    await two.until(2)
    await three.until(1)
    assert (len(two.received), len(three.received)) == (2, 1)


async def test_replaced_worker_is_found_at_once(nursery: trio.Nursery, group: str) -> None:
    one = HandoffWorker(group, 1)
    await nursery.start(one.run)
    for _ in range(3):
        two = HandoffWorker(group, 2)
        scope = await nursery.start(two.run)
        assert await one.hand_off(session_for(2))
        await two.until(1)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert not await one.hand_off(session_for(2))


async def test_host_keeps_its_session_unless_it_is_full(nursery: trio.Nursery, group: str) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    one.hosted = {session_for(2)}
    assert not await one.hand_off(session_for(2))
    assert await one.hand_off(session_for(2), full=True)


async def test_all_of_many_concurrent_handoffs_succeed(
    mock_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)

    async def slow_down() -> None:
        """Let each pass of the event loop take longer than a probe is valid."""
        while True:
            mock_clock.jump(1.5 * channel.PROBE_VALID_S)
            await trio.lowlevel.checkpoint()

    nursery.start_soon(slow_down)
    results: list[bool] = []

    async def hand_off() -> None:
        results.append(await one.hand_off(session_for(2)))

    # More than fit into the queue of the socket between the two.
    async with trio.open_nursery() as handoffs:
        for _ in range(500):
            handoffs.start_soon(hand_off)
    assert results == [True] * 500
    await two.until(500)
    assert not one.log.all("handoff.peer_unresponsive")


async def test_full_worker_is_skipped_until_it_has_room(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await one.hand_off(session_for(2))
    two.has_room = False
    await trio.sleep(channel.PROBE_VALID_S)
    assert not await one.hand_off(session_for(2))
    two.has_room = True
    assert not await one.hand_off(session_for(2))
    await trio.sleep(channel.PROBE_VALID_S)
    assert await one.hand_off(session_for(2))
    await two.until(2)
    assert not one.log.all("handoff.peer_unresponsive")


async def test_full_owner_hands_off_to_any_worker(nursery: trio.Nursery, group: str) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await one.hand_off(session_for(1), full=True)
    await two.until(1)
    two.peers.leave()
    assert not await one.hand_off(session_for(1), full=True)


async def test_worker_that_leaves_receives_what_was_sent_before(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    await nursery.start(one.run)
    await nursery.start(two.run)
    for number in range(5):
        assert await one.hand_off(session_for(2), b"%d" % number)
    # The last ones are still queued in the kernel: no other task has run since.
    assert len(two.received) < 5
    two.peers.leave()
    assert not await one.hand_off(session_for(2))
    await two.until(5)
    assert two.received == [b"0", b"1", b"2", b"3", b"4"]
    # It can still hand off its own connections.
    assert await two.hand_off(session_for(1))


@pytest.mark.parametrize("passes", range(6))
async def test_worker_that_leaves_disconnects_every_peer(
    nursery: trio.Nursery, group: str, passes: int
) -> None:
    """After any number of passes of the event loop since the peer has connected."""
    two = HandoffWorker(group, 2)
    await nursery.start(two.run)
    with channel_to(group, 2) as sock:
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        two.peers.leave()
        with pytest.raises(ConnectionError):
            sock.send(b"?")


async def test_worker_without_file_descriptors_can_leave(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    two = HandoffWorker(group, 2)
    await nursery.start(two.run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with no_file_descriptors():
            sock.connect(channel.address_of(group, 2))
            await trio.sleep(1)
            # Logged once, not at every attempt.
            assert len(two.log.all("handoff.accept_failed")) == 1
        two.peers.leave()
        with socket.socket() as closed:
            pass
        # Trio would still know a task that waits for a socket closed without notice.
        with pytest.raises(ValueError, match="negative"):
            await trio.lowlevel.wait_readable(closed)
        await trio.sleep(1)
