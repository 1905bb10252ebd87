"""Event streams: every consumer reads the client's events at its own pace."""

from collections import deque
from typing import Literal, Self
from weakref import WeakSet

import trio
from msgspec import Struct

from bandsync.client.inbound import News, UnknownMessage
from bandsync.wire.messages import RoomStats, ScrollTick

MAX_WAITING = 1024
# Ticks and statistics are useful only while they are fresh.
_MAX_WAITING_FOR_VOLATILE = 64
_VOLATILE = ScrollTick | RoomStats

Status = Literal["connecting", "online", "draining", "resuming", "closed"]


class StatusChanged(Struct, frozen=True):
    """The state of the connection changed.

    Attributes:
        status: ``connecting`` until the first join; ``online``; ``draining``: still online, but
            the server is about to restart; ``resuming``: disconnected, reconnecting; ``closed``.
        failures: failed attempts to connect since the last success.
        retry_in_s: seconds until the next attempt; None if none is planned.
    """

    status: Status
    failures: int = 0
    retry_in_s: float | None = None


class EventsDropped(Struct, frozen=True):
    """This stream was read too slowly, and events were dropped. `Band.session` is up to date.

    Attributes:
        count: number of dropped events.
    """

    count: int


BandEvent = News | UnknownMessage | StatusChanged | EventsDropped


class EventStream:
    """An asynchronous iterator over events; ends when the client has ended.

    The buffer holds at most `MAX_WAITING` events. One more drops them all and puts a single
    `EventsDropped` in their place: such a slow consumer needs the current session, not its history.
    Ticks and statistics are dropped from 64 buffered events on. One task at a time may iterate; a
    second one gets a `trio.BusyResourceError`.
    """

    def __init__(self) -> None:
        self._waiting: deque[BandEvent] = deque()
        self._dropped = 0
        self._ended = False
        self._news = trio.Event()
        self._waited_for = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BandEvent:
        if self._waited_for:
            raise trio.BusyResourceError("another task reads this stream: use one stream per task")
        self._waited_for = True
        try:
            await trio.lowlevel.checkpoint()
            while not self._dropped and not self._waiting:
                if self._ended:
                    raise StopAsyncIteration
                self._news = trio.Event()
                await self._news.wait()
        finally:
            self._waited_for = False
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            return EventsDropped(dropped)
        return self._waiting.popleft()

    def put(self, event: BandEvent) -> None:
        """Add an event."""
        waiting = len(self._waiting)
        if isinstance(event, _VOLATILE) and waiting >= _MAX_WAITING_FOR_VOLATILE:
            return
        if waiting >= MAX_WAITING:
            self._dropped += waiting
            self._waiting.clear()
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        """Mark the end: there are no more events."""
        self._ended = True
        self._news.set()


class EventHub:
    """Broadcasts events to all streams of a client. It holds weak references to them."""

    def __init__(self) -> None:
        self._streams: WeakSet[EventStream] = WeakSet()
        self._ended = False

    def stream(self) -> EventStream:
        """A new stream of the events from now on."""
        stream = EventStream()
        if self._ended:
            stream.end()
        self._streams.add(stream)
        return stream

    def put(self, event: BandEvent) -> None:
        """Put an event into every stream."""
        for stream in tuple(self._streams):
            stream.put(event)

    def end(self) -> None:
        """End every stream."""
        self._ended = True
        for stream in tuple(self._streams):
            stream.end()
