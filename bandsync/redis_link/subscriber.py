"""The connection that listens: channels, and the proof that it still hears anything."""

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
    TimeoutError,  # noqa: A004
)

from bandsync.redis_link.cluster.slots import slot_of
from bandsync.redis_link.connection import Reply, pack
from bandsync.redis_link.errors import LinkLostError, again
from bandsync.redis_link.multiplexer import Multiplexer
from bandsync.redis_link.redis_address import RedisAddress


class Subscriber(Multiplexer):
    """Messages of channels, for as long as they come.

    A subscription can be dead while its connection is not. So the subscriber has a message
    published to itself, again and again; when it hears none for some time it is lost. A probe that
    cannot be published counts as unheard: what is not proved is not assumed. Its error is not
    raised here, for it says why the link it went over fails, which is found out there.

    Args:
        on_message: called with each message's channel and payload. Must not block: Redis
            disconnects a subscriber that reads slowly.
        probe_channel: of this subscriber only; its messages are not passed on.
        probe: publishes its argument there, by another link.
        probe_interval_s: how often, and how long each may take.
        probes_missed: how many unheard in a row are a loss.
        gone: for the sharded channels of one node of a Cluster: called with each channel that the
            node takes away, because its slot moves to another one. Must not block.
        name, connect_timeout_s, command_timeout_s, silence_s, max_queued: as for a `Multiplexer`.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        name: str,
        connect_timeout_s: float,
        command_timeout_s: float,
        silence_s: float,
        on_message: Callable[[bytes, bytes], None],
        probe_channel: bytes,
        probe: Callable[[bytes], Awaitable[object]],
        probe_interval_s: float = 1.0,
        probes_missed: int = 3,
        max_queued: int = 10_000,
        gone: Callable[[bytes], None] | None = None,
    ) -> None:
        super().__init__(
            address,
            name=name,
            connect_timeout_s=connect_timeout_s,
            command_timeout_s=command_timeout_s,
            silence_s=silence_s,
            max_queued=max_queued,
        )
        self._on_message = on_message
        self._probe_channel = probe_channel
        self._probe = probe
        self._probe_interval_s = probe_interval_s
        self._probes_missed = probes_missed
        # So that nobody else's message is taken for ours.
        self._probe_prefix = secrets.token_hex(8).encode() + b":"
        self._heard = False
        self._gone = gone
        self._subscribe = b"subscribe" if gone is None else b"ssubscribe"
        self._unsubscribe = b"unsubscribe" if gone is None else b"sunsubscribe"
        # What each call waits to have confirmed.
        self._expected: deque[tuple[bytes, bytes]] = deque()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, subscribe to the probe, report that as started, serve until cancelled.

        Raises:
            RedisError: there is no connection, or nothing is heard over it any more;
                `loss_reason` says why.
        """
        await super().run(task_status=task_status)

    async def subscribe(self, channel: bytes) -> None:
        """Return when every message published from now on will come; again does no harm.

        May be cancelled; the channel may be subscribed all the same.

        Raises:
            RedisError: Redis refuses, or the subscriber is lost. It refuses a sharded channel
                with `MovedError` when the slot is another node's.
        """
        await self._confirmed(self._subscribe, channel)

    async def unsubscribe(self, channel: bytes) -> None:
        """Return when no more messages will come; for a channel that is not subscribed too.

        Raises:
            RedisError: the subscriber is lost.
        """
        await self._confirmed(self._unsubscribe, channel)

    async def _confirmed(self, verb: bytes, channel: bytes) -> None:
        event = anyio.Event()
        call = self._call(pack((verb, channel)), event)
        self._expected.append((verb, channel))
        await event.wait()
        if isinstance(call.reply, RedisError):
            raise again(call.reply)

    async def _attend(self, started: Callable[[], None]) -> None:
        await self.subscribe(self._probe_channel)
        started()
        missed = 0
        number = 0
        while missed < self._probes_missed:
            self._heard = False
            number += 1
            await self._send_probe(self._probe_prefix + b"%d" % number)
            # An earlier one that was slow is as good a proof.
            missed = 0 if self._heard else missed + 1
        raise TimeoutError(f"{self._address}: {missed} probes were not heard")

    async def _send_probe(self, payload: bytes) -> None:
        """Send it, and wait until the next is due."""
        due = anyio.current_time() + self._probe_interval_s
        # An error is as good as unheard: see the class.
        with anyio.move_on_after(self._probe_interval_s), contextlib.suppress(RedisError):
            await self._probe(payload)
        await anyio.sleep_until(due)

    def _take(self, replies: list[Reply | RedisError]) -> None:
        for reply in replies:
            match reply:
                case [b"message" | b"smessage", bytes(channel), bytes(payload)]:
                    self._message(channel, payload)
                case [bytes(verb), bytes(channel), int()] if self._pending and self._expected[
                    0
                ] == (verb, channel):
                    self._answer(reply)
                case [b"sunsubscribe", bytes(channel), int()] if self._gone is not None:
                    if channel == self._probe_channel:
                        raise LinkLostError(f"{self._address}: the slot of the probe has moved")
                    self._gone(channel)
                case MovedError(slot_id=slot) if not self._awaits(slot):
                    # Of an unsubscription, after the node has taken the channel away: that was
                    # taken for the answer.
                    pass
                case RedisError() if self._pending:
                    self._answer(reply)
                case _:
                    raise InvalidResponse(f"{self._address}: a reply that nobody asked for")

    def _message(self, channel: bytes, payload: bytes) -> None:
        if channel != self._probe_channel:
            self._on_message(channel, payload)
        elif payload.startswith(self._probe_prefix):
            self._heard = True

    def _awaits(self, slot: int) -> bool:
        """Whether the next answer is about a channel of this slot."""
        return bool(self._pending) and slot_of(self._expected[0][1]) == slot

    def _answer(self, reply: Reply | RedisError) -> None:
        self._expected.popleft()
        self._pending.popleft().answer(reply)
