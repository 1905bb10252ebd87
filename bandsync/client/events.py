"""What happens, handed out to whoever asks for it, each at its own pace."""

from collections import deque
from typing import Literal, Self
from weakref import WeakSet

import trio
from msgspec import Struct

from bandsync.client.inbound import News, UnknownMessage
from bandsync.wire.messages import RoomStats, ScrollTick

MAX_WAITING = 1024
# Ticks and statistics are worth something while they are fresh.
_MAX_WAITING_FOR_VOLATILE = 64
_VOLATILE = ScrollTick | RoomStats

Status = Literal["connecting", "online", "draining", "resuming", "closed"]


class StatusChanged(Struct, frozen=True):
    """The connection came, went or is about to go.

    Attributes:
        status: ``connecting`` until the first join; ``online``; ``draining``: still online, but
            the server is about to restart; ``resuming``: cut off, trying to come back; ``closed``.
        failures: attempts to connect that have failed since the last success.
        retry_in_s: when the next attempt is, in seconds; None if none is planned.
    """

    status: Status
    failures: int = 0
    retry_in_s: float | None = None


class EventsDropped(Struct, frozen=True):
    """You did not keep up: so many events were thrown away. `Band.session` is up to date."""

    count: int


BandEvent = News | UnknownMessage | StatusChanged | EventsDropped


class EventStream:
    """An asynchronous iterator over events; ends when the client has ended.

    Holds at most `MAX_WAITING` events. One more, and all that wait are thrown away for one
    `EventsDropped`: whoever is that late is better served by the session as it is. Ticks and
    statistics are left out as soon as 64 events wait. For one task at a time: a second one gets a
    `trio.BusyResourceError`.
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
            raise trio.BusyResourceError("another task waits for these events: take two streams")
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
        """There will be no more."""
        self._ended = True
        self._news.set()


class EventHub:
    """All streams of a client. One that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._streams: WeakSet[EventStream] = WeakSet()
        self._ended = False

    def stream(self) -> EventStream:
        """A new stream, with what happens from now on."""
        stream = EventStream()
        if self._ended:
            stream.end()
        self._streams.add(stream)
        return stream

    def put(self, event: BandEvent) -> None:
        """Hand out an event."""
        for stream in tuple(self._streams):
            stream.put(event)

    def end(self) -> None:
        """Nothing happens any more."""
        self._ended = True
        for stream in tuple(self._streams):
            stream.end()
