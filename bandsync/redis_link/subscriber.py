"""The pub/sub connection: channels, and a liveness probe for the subscription."""

import contextlib
import secrets
from collections import deque
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskStatus
from redis.exceptions import (
    InvalidResponse,
    MovedError,
    RedisError,
    TimeoutError,  # noqa: A004 -- the name redis-py gives it
)

from bandsync.redis_link.cluster.slots import slot_of
from bandsync.redis_link.connection import Reply, pack
from bandsync.redis_link.errors import LinkLostError, again
from bandsync.redis_link.multiplexer import Multiplexer
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.timeouts import Timeouts


class Subscriber(Multiplexer):
    """Receives the messages of channels.

    A subscription can be dead while its connection answers. So the subscriber publishes a liveness
    probe to a channel of its own and is lost when several in a row do not arrive. A probe that
    cannot be published counts as missed. Its error is not raised here: it concerns the link that
    carried the probe, whose supervisor sees it.

    Args:
        on_message: called with channel and payload of each message. Must not block: Redis
            disconnects a subscriber that reads slowly.
        probe_channel: channel of this subscriber only; its messages stay here.
        probe: publishes its argument to that channel, over another link.
        probe_interval_s: between two probes, and the deadline of each.
        probes_missed: number of missed probes in a row that is a loss.
        on_removed: for sharded channels: called with each channel that the node of a Cluster
            removes because its slot moves to another node. Must not block.
        name, timeouts, max_queued: as for a `Multiplexer`.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        name: str,
        timeouts: Timeouts,
        on_message: Callable[[bytes, bytes], None],
        probe_channel: bytes,
        probe: Callable[[bytes], Awaitable[object]],
        probe_interval_s: float = 1.0,
        probes_missed: int = 3,
        max_queued: int = 10_000,
        on_removed: Callable[[bytes], None] | None = None,
    ) -> None:
        super().__init__(address, name=name, timeouts=timeouts, max_queued=max_queued)
        self._on_message = on_message
        self._probe_channel = probe_channel
        self._probe = probe
        self._probe_interval_s = probe_interval_s
        self._probes_missed = probes_missed
        # Tells our probes from messages of other publishers.
        self._probe_prefix = secrets.token_hex(8).encode() + b":"
        self._probe_received = False
        self._on_removed = on_removed
        self._subscribe_verb = b"subscribe" if on_removed is None else b"ssubscribe"
        self._unsubscribe_verb = b"unsubscribe" if on_removed is None else b"sunsubscribe"
        # Verb and channel that confirm each outstanding call, oldest first.
        self._expected: deque[tuple[bytes, bytes]] = deque()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, subscribe to the probe, report that as started, serve until cancelled.

        Raises:
            RedisError: the connection failed or was lost, or messages no longer arrive;
                `loss_reason` says why.
        """
        await super().run(task_status=task_status)

    async def subscribe(self, channel: bytes) -> None:
        """Return when all later messages will be received. Idempotent.

        If cancelled, the channel may still become subscribed.

        Raises:
            RedisError: Redis refuses, or the subscriber is lost. `MovedError` means that the slot
                of a sharded channel belongs to another node.
        """
        await self._confirmed(self._subscribe_verb, channel)

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will be received. Idempotent.

        Raises:
            RedisError: the subscriber is lost.
        """
        await self._confirmed(self._unsubscribe_verb, channel)

    async def _confirmed(self, verb: bytes, channel: bytes) -> None:
        event = anyio.Event()
        call = self._call(pack((verb, channel)), event)
        self._expected.append((verb, channel))
        await event.wait()
        if isinstance(call.reply, RedisError):
            raise again(call.reply)

    async def _use(self, started: Callable[[], None]) -> None:
        await self.subscribe(self._probe_channel)
        started()
        missed = 0
        number = 0
        while missed < self._probes_missed:
            self._probe_received = False
            number += 1
            await self._send_probe(self._probe_prefix + b"%d" % number)
            # A late arrival of an earlier probe proves as much.
            missed = 0 if self._probe_received else missed + 1
        raise TimeoutError(f"{self._address}: {missed} probes did not arrive")

    async def _send_probe(self, payload: bytes) -> None:
        """Publish a probe, and wait until the next one is due."""
        due = anyio.current_time() + self._probe_interval_s
        # An error counts as a missed probe: see the class.
        with anyio.move_on_after(self._probe_interval_s), contextlib.suppress(RedisError):
            await self._probe(payload)
        await anyio.sleep_until(due)

    def _dispatch(self, replies: list[Reply | RedisError]) -> None:
        for reply in replies:
            match reply:
                case [b"message" | b"smessage", bytes(channel), bytes(payload)]:
                    self._deliver(channel, payload)
                case [bytes(verb), bytes(channel), int()] if self._pending and self._expected[
                    0
                ] == (verb, channel):
                    self._answer(reply)
                case [b"sunsubscribe", bytes(channel), int()] if self._on_removed is not None:
                    if channel == self._probe_channel:
                        raise LinkLostError(f"{self._address}: the slot of the probe has moved")
                    self._on_removed(channel)
                case MovedError(slot_id=slot) if not self._next_confirms(slot):
                    # The reply to an unsubscription of a channel that the node had removed: its
                    # removal was counted as the confirmation.
                    pass
                case RedisError() if self._pending:
                    self._answer(reply)
                case _:
                    raise InvalidResponse(f"{self._address}: unexpected reply")

    def _deliver(self, channel: bytes, payload: bytes) -> None:
        if channel != self._probe_channel:
            self._on_message(channel, payload)
        elif payload.startswith(self._probe_prefix):
            self._probe_received = True

    def _next_confirms(self, slot: int) -> bool:
        """Whether the oldest outstanding call is about a channel of this slot."""
        return bool(self._pending) and slot_of(self._expected[0][1]) == slot

    def _answer(self, reply: Reply | RedisError) -> None:
        self._expected.popleft()
        self._pending.popleft().answer(reply)
