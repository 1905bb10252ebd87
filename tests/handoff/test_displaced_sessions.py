"""Sessions that another worker has hosted since before their own worker (re)started."""

import socket

import trio
from trio.testing import MockClock

from bandsync.handoff.channel import ANSWER_TIMEOUT_S, BREAKER_OPEN_S
from tests.support.handoffs import (
    HandoffWorker,
    channel_to,
    connection,
    session_for,
    unresponsive,
)


async def test_restarted_worker_hands_off_to_the_host_of_its_session(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    one.hosted = {session_for(1), session_for(2)}
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await two.hand_off(session_for(2), b"accepted")
    with connection() as (_, accepted):
        assert await two.peers.hand_back(session_for(2), accepted, b"received")
        # The host does not hand it off again.
        assert not await one.peers.hand_back(session_for(2), accepted, b"received")
    await one.until(2)
    assert one.received == [b"accepted", b"received"]
    # A session that belongs to the other worker is no displaced one.
    assert await two.hand_off(session_for(1))


async def test_displaced_session_returns_once_its_host_has_lost_it(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    one.hosted = {session_for(2)}
    await nursery.start(one.run)
    await nursery.start(two.run)
    assert await two.hand_off(session_for(2))
    # Some members of it are here.
    two.hosted = {session_for(2)}
    assert not await two.hand_off(session_for(2))
    # All members have left there.
    two.hosted = set()
    one.hosted = set()
    assert not await two.hand_off(session_for(2))
    # From then on it belongs here, even if the other worker hosts it again.
    one.hosted = {session_for(2)}
    assert not await two.hand_off(session_for(2))


async def test_all_of_many_concurrent_handoffs_reach_the_host(
    nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    one.hosted = {session_for(2)}
    await nursery.start(one.run)
    await nursery.start(two.run)
    results: list[bool] = []

    async def hand_off() -> None:
        results.append(await two.hand_off(session_for(2)))

    # More than fit into the accept queue of the other worker.
    async with trio.open_nursery() as handoffs:
        for _ in range(300):
            handoffs.start_soon(hand_off)
    assert results == [True] * 300
    await one.until(300)


async def test_silence_is_no_proof_that_the_host_has_lost_a_session(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    one.hosted = {session_for(2)}
    scope = await nursery.start(one.run)
    await nursery.start(two.run)
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    async with unresponsive(group, 1):
        assert not await two.hand_off(session_for(2))
    again = HandoffWorker(group, 1)
    again.hosted = one.hosted
    await nursery.start(again.run)
    await trio.sleep(BREAKER_OPEN_S)
    assert await two.hand_off(session_for(2))


async def test_absent_host_loses_its_displaced_session(nursery: trio.Nursery, group: str) -> None:
    one, two = HandoffWorker(group, 1), HandoffWorker(group, 2)
    one.hosted = {session_for(2)}
    scope = await nursery.start(one.run)
    await nursery.start(two.run)
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert not await two.hand_off(session_for(2))


async def test_unresponsive_peer_delays_the_start_until_the_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery, group: str
) -> None:
    one = HandoffWorker(group, 1)
    async with unresponsive(group, 2):
        began = trio.current_time()
        await nursery.start(one.run)
        assert trio.current_time() - began <= ANSWER_TIMEOUT_S


async def test_invalid_answer_counts_as_none(nursery: trio.Nursery, group: str) -> None:
    one = HandoffWorker(group, 1)

    async def answer(listener: socket.socket) -> None:
        await trio.lowlevel.wait_readable(listener)
        accepted, _ = listener.accept()
        with accepted:
            accepted.send(b'{"no": "list"}')

    async with unresponsive(group, 2) as listener:
        nursery.start_soon(answer, listener)
        await nursery.start(one.run)
        assert not await one.hand_off(session_for(1))


async def test_query_for_an_unknown_worker_is_answered_with_no_sessions(
    nursery: trio.Nursery, group: str
) -> None:
    one = HandoffWorker(group, 1)
    one.hosted = {session_for(1)}
    await nursery.start(one.run)
    for query, answer in ((b"away " + b"9" * 5000, b"[]"), (b"away x", b"[]"), (b"away", b"")):
        with channel_to(group, 1) as sock:
            sock.send(query)
            assert await trio.to_thread.run_sync(sock.recv, 100) == answer
