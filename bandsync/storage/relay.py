"""The relay: receives the commits of other servers (`bandsync/README.md`)."""

from collections.abc import Awaitable, Callable, Collection

import trio
from redis.exceptions import RedisError
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.backoff import Backoff
from bandsync.redis_link.errors import loss_reason
from bandsync.redis_link.interfaces import ChannelSubscriber
from bandsync.storage.redis import Keys

_RETRY_BASE_S = 0.05
_RETRY_CAP_S = 2.0
_MAX_SUBSCRIBING = 500


class Relay:
    """Keeps the channels of hosted sessions subscribed, during one era of Redis.

    It keeps no list of subscriptions: after a loss it subscribes the sessions hosted then.

    Args:
        make_subscriber: returns an unconnected subscriber for one attempt, which calls its
            argument with channel and payload of each message.
        keys: the names of the channels.
        hosted: the ids of the hosted sessions.
        on_message: called with session id and payload of each message; never blocks.
        resync: compares all hosted sessions with the stored ones, because messages were missed.
        counters: counts the losses.
        log: receives the losses.

    Attributes:
        tried: set after the first attempt, successful or not.
    """

    def __init__(
        self,
        make_subscriber: Callable[[Callable[[bytes, bytes], None]], ChannelSubscriber],
        keys: Keys,
        *,
        hosted: Callable[[], Collection[str]],
        on_message: Callable[[str, bytes], None],
        resync: Callable[[], Awaitable[None]],
        counters: Counters,
        log: FilteringBoundLogger,
    ) -> None:
        self.tried = trio.Event()
        self._make_subscriber = make_subscriber
        self._keys = keys
        self._hosted = hosted
        self._on_session_message = on_message
        self._resync = resync
        self._counters = counters
        self._log = log
        self._subscriber: ChannelSubscriber | None = None
        # The parts of a channel's name before and after the session id.
        self._prefix, self._suffix = keys.events("\0").encode().split(b"\0")

    @property
    def listening(self) -> bool:
        """Whether there is a subscription."""
        return self._subscriber is not None and self._subscriber.usable

    async def run(self) -> None:
        """Receive for ever. A lost subscription only delays remote changes; it ends no era."""
        backoff = Backoff(_RETRY_CAP_S, _RETRY_BASE_S)
        failures = 0
        while True:
            if await self._receive():
                failures = 0
            failures += 1
            await trio.sleep(backoff.compute(failures))

    async def subscribe(self, session_id: str) -> None:
        """Return when all later changes will be received, or a resync will follow."""
        subscriber = self._subscriber
        if subscriber is not None:
            try:
                await subscriber.subscribe(self._channel(session_id))
            except RedisError:
                # Lost: the next subscriber begins with all hosted sessions and a resync.
                return

    async def unsubscribe(self, session_id: str) -> None:
        """Unsubscribe a session that is no longer hosted."""
        subscriber = self._subscriber
        if subscriber is not None and session_id not in self._hosted():
            try:
                await subscriber.unsubscribe(self._channel(session_id))
            except RedisError:
                return

    async def _receive(self) -> bool:
        """Receive until the subscription is lost; False if there never was one."""
        subscriber = self._make_subscriber(self._on_message)
        subscribed = False
        lost: RedisError | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(subscriber.run)
                self._subscriber = subscriber
                self.tried.set()
                await self._subscribe_all()
                subscribed = True
                await self._resync()
        except* RedisError as group:
            lost = first_leaf(group)
        finally:
            self._subscriber = None
            self.tried.set()
        self._counters.relay_losses += subscribed
        self._log.warning(
            "relay.lost" if subscribed else "relay.unreachable",
            reason=None if lost is None else loss_reason(lost),
            detail=str(lost),
        )
        return subscribed

    async def _subscribe_all(self) -> None:
        """Subscribe all hosted sessions, in batches that fit the queue of a subscriber."""
        session_ids = list(self._hosted())
        for start in range(0, len(session_ids), _MAX_SUBSCRIBING):
            async with trio.open_nursery() as nursery:
                for session_id in session_ids[start : start + _MAX_SUBSCRIBING]:
                    nursery.start_soon(self.subscribe, session_id)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        prefix, suffix = self._prefix, self._suffix
        if channel.startswith(prefix) and channel.endswith(suffix):
            self._on_session_message(channel[len(prefix) : -len(suffix)].decode(), payload)

    def _channel(self, session_id: str) -> bytes:
        return self._keys.events(session_id).encode()
