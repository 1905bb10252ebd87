"""Event streams: one task each, their own pace, bounded."""

import gc
import weakref

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from bandsync.client import EventsDropped, EventStream
from bandsync.client.events import MAX_WAITING, EventHub
from bandsync.wire.messages import (
    ChatSent,
    MessageUpdated,
    ScrollTick,
)
from tests.support.scripted_server import (
    START,
    ScriptedServer,
    events_so_far,
    joined,
    settle,
)


async def test_event_stream_refuses_a_second_task(
    script: ScriptedServer, autojump_clock: MockClock
) -> None:
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
        assert len(await events_so_far(quick)) == 1
        await script.event("message_updated", message="two", by="ann")
        assert len(await events_so_far(quick)) == 1
        assert len(await events_so_far(slow)) == 2
        assert len(await events_so_far(band.events())) == 0


def a_chat(number: int) -> ChatSent:
    return ChatSent("song", number, START, str(number), "ann", "Ann", "x", START)


async def test_slow_reader_receives_events_dropped(autojump_clock: MockClock) -> None:
    stream = EventStream()
    for number in range(MAX_WAITING):
        stream.put(a_chat(number))
    assert [event.version for event in await events_so_far(stream)] == list(range(MAX_WAITING))  # type: ignore[union-attr]
    for number in range(2 * MAX_WAITING + 3):
        stream.put(a_chat(number))
    dropped, *rest = await events_so_far(stream)
    assert dropped == EventsDropped(2 * MAX_WAITING)
    assert [event.version for event in rest] == [2048, 2049, 2050]  # type: ignore[union-attr]
    stream.put(a_chat(1))
    stream.end()
    assert [event async for event in stream] == [a_chat(1)]


async def test_ticks_are_dropped_first(autojump_clock: MockClock) -> None:
    stream = EventStream()
    tick = ScrollTick("song", START, 0.0, 0.0, 120.0)
    for number in range(1000):
        stream.put(tick)
        if number % 100 == 0:
            stream.put(a_chat(number))
    found = await events_so_far(stream)
    assert found.count(tick) == 63
    assert len([event for event in found if isinstance(event, ChatSent)]) == 10


async def test_unreferenced_event_stream_is_freed(autojump_clock: MockClock) -> None:
    hub = EventHub()
    kept = hub.stream()
    dropped = [weakref.ref(hub.stream()) for _ in range(100)]
    gc.collect()
    assert all(stream() is None for stream in dropped)
    hub.put(a_chat(1))
    assert await events_so_far(kept) == [a_chat(1)]
