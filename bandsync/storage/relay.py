"""The relay: what other servers commit, heard as it happens (design.md section 4, step 6)."""

from collections.abc import Awaitable, Callable, Collection

import trio
from redis.exceptions import RedisError
from structlog.typing import FilteringBoundLogger

from bandsync.counters import Counters
from bandsync.model.exception_leaves import first_leaf
from bandsync.redis_link.backoff import Backoff
from bandsync.redis_link.errors import loss_reason
from bandsync.redis_link.interfaces import Listener
from bandsync.storage.redis import Keys

_RETRY_BASE_S = 0.05
_RETRY_CAP_S = 2.0
_SUBSCRIBED_AT_ONCE = 500


class Relay:
    """Keeps the channels of hosted sessions subscribed, during one era of Redis.

    There is no list of subscriptions: after a loss, what is hosted then is subscribed again.

    Args:
        make_subscriber: a subscriber for each attempt, that calls what it is given with each
            channel and message.
        hosted: the sessions whose channels are wanted, by id.
        heard: called with a session id and a message; never blocks.
        catch_up: compares all that is hosted with what is stored: messages were missed.

    Attributes:
        tried: set after the first attempt, whatever came of it.
    """

    def __init__(
        self,
        make_subscriber: Callable[[Callable[[bytes, bytes], None]], Listener],
        keys: Keys,
        *,
        hosted: Callable[[], Collection[str]],
        heard: Callable[[str, bytes], None],
        catch_up: Callable[[], Awaitable[None]],
        counters: Counters,
        log: FilteringBoundLogger,
    ) -> None:
        self.tried = trio.Event()
        self._make_subscriber = make_subscriber
        self._keys = keys
        self._hosted = hosted
        self._heard = heard
        self._catch_up = catch_up
        self._counters = counters
        self._log = log
        self._subscriber: Listener | None = None
        # What stands around the session id in the name of a channel.
        start, end = keys.events("\0").encode().split(b"\0")
        self._around = start, end

    @property
    def listening(self) -> bool:
        """Whether there is a subscription."""
        return self._subscriber is not None and self._subscriber.usable

    async def run(self) -> None:
        """Listen, for ever: a subscription that dies alone makes changes late, no more."""
        backoff = Backoff(_RETRY_CAP_S, _RETRY_BASE_S)
        failures = 0
        while True:
            if await self._listen():
                failures = 0
            failures += 1
            await trio.sleep(backoff.compute(failures))

    async def subscribe(self, session_id: str) -> None:
        """Return when every change from now on will be heard, or a catch-up will follow."""
        subscriber = self._subscriber
        if subscriber is not None:
            try:
                await subscriber.subscribe(self._channel(session_id))
            except RedisError:
                # It is lost: the next one starts with all that is hosted, and a catch-up.
                return

    async def unsubscribe(self, session_id: str) -> None:
        """Hear no more of a session that is not hosted any more."""
        subscriber = self._subscriber
        if subscriber is not None and session_id not in self._hosted():
            try:
                await subscriber.unsubscribe(self._channel(session_id))
            except RedisError:
                return

    async def _listen(self) -> bool:
        """Listen until the subscription is lost; False if there was none."""
        subscriber = self._make_subscriber(self._on_message)
        listened = False
        lost: RedisError | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(subscriber.run)
                self._subscriber = subscriber
                self.tried.set()
                await self._subscribe_all()
                listened = True
                await self._catch_up()
        except* RedisError as group:
            lost = first_leaf(group)
        finally:
            self._subscriber = None
            self.tried.set()
        self._counters.relay_losses += listened
        self._log.warning(
            "relay.lost" if listened else "relay.unreachable",
            reason=None if lost is None else loss_reason(lost),
            detail=str(lost),
        )
        return listened

    async def _subscribe_all(self) -> None:
        """Subscribe what is hosted, in parts that fit the queue of a subscriber."""
        session_ids = list(self._hosted())
        for start in range(0, len(session_ids), _SUBSCRIBED_AT_ONCE):
            async with trio.open_nursery() as nursery:
                for session_id in session_ids[start : start + _SUBSCRIBED_AT_ONCE]:
                    nursery.start_soon(self.subscribe, session_id)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        start, end = self._around
        if channel.startswith(start) and channel.endswith(end):
            self._heard(channel[len(start) : -len(end)].decode(), payload)

    def _channel(self, session_id: str) -> bytes:
        return self._keys.events(session_id).encode()
