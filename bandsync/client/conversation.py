"""The protocol on one connection: welcome, join, requests, clock probes, liveness."""

from collections import deque
from collections.abc import Callable

import msgspec
import trio
from msgspec import UNSET
from msgspec.structs import replace

from bandsync.client.exceptions import CommandRefused, ConnectionLost, NotConnected
from bandsync.client.inbound import News, ServerMessage, UnknownMessage, decode
from bandsync.client.membership import Membership
from bandsync.client.requests import Requests
from bandsync.client.session_clock import local_ms
from bandsync.client.websocket import ClientWebSocket
from bandsync.wire.commands import ClientMessage, ClockSync, LeaveSession, SyncReport, SyncRequest
from bandsync.wire.messages import (
    Ack,
    ClockSyncReply,
    Error,
    HeartbeatReply,
    LatencyResponse,
    ServerDraining,
    Snapshot,
    SyncResponse,
    Welcome,
    You,
)

PROTOCOL = 1
JOIN_TIMEOUT_S = 10.0
# Longer than a live server ever needs: a commit waits for a hanging Redis, but not that long.
REPLY_TIMEOUT_S = 30.0
# Well below the resume grace of 10 s: the new connection takes time, too.
SILENCE_S = 5.5
# After this process was suspended, read buffered messages before judging the silence.
_SECOND_LOOK_S = 0.5
BURST = 20
_BURST_PERIOD_S = 0.08
_REPORT_PERIOD_S = 5.0
_SYNC_RETRY_S = 2.0
_MAX_PROBES = 64

Tap = Callable[[float, str], None]

_ANY_VERSION = 2**63


class Conversation:
    """The protocol on one connection.

    Args:
        on_joined: called after the join.
        tap: called with the arrival time (Trio's clock, seconds) and the text of every message.

    Attributes:
        joined_s: instant of the join, Trio's clock, seconds; None before.
        refusal: why the join was refused; None if it was not.
        failure: exception of the caller's token function; None without one.
        drained_s: when to reconnect after ``server_draining``, Trio's clock, seconds.
    """

    def __init__(
        self,
        membership: Membership,
        websocket: ClientWebSocket,
        on_joined: Callable[[], None],
        tap: Tap | None,
    ) -> None:
        self._membership = membership
        self._websocket = websocket
        self._on_joined = on_joined
        self._tap = tap
        self._requests = Requests()
        self._probes: deque[float] = deque(maxlen=_MAX_PROBES)
        self._probes_answered = 0
        self._welcomed = trio.Event()
        self._snapshot_received = trio.Event()
        # Replaced only by its waiter, `_resync`.
        self._gap = trio.Event()
        self._behind = False
        self._join_sent = False
        self._leaving = False
        self._scope = trio.CancelScope()
        self.joined_s: float | None = None
        self.refusal: CommandRefused | None = None
        self.failure: Exception | None = None
        self.drained_s: float | None = None

    @property
    def joined(self) -> bool:
        """Whether the join has succeeded."""
        return self.joined_s is not None

    async def run(self) -> None:
        """Run until the connection ends, it is silent for too long, or `hang_up` is called."""
        try:
            await self._run()
        finally:
            if self._membership.resume_token is None:
                # Without a token the membership could never be resumed.
                self.withdraw()

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(self._join_and_sync, nursery)
                while (received := await self._websocket.receive()) is not None:
                    arrival, text = received
                    if self._tap is not None:
                        self._tap(arrival, text)
                    message = decode(text)
                    if message is not None:
                        self._dispatch(arrival, message)
                nursery.cancel_scope.cancel()

    def hang_up(self) -> None:
        """Close the connection, with a close frame."""
        self._scope.cancel()

    def withdraw(self) -> None:
        """Leave again if a join is in flight, so that no abandoned member stays."""
        if self._join_sent and not self.joined and self.refusal is None:
            self._join_sent = False
            self._websocket.send_nowait(_encode(LeaveSession()))

    def lose(self) -> None:
        """Fail all requests in flight."""
        self._requests.lose()

    async def command(self, message: ClientMessage) -> int | None:
        """Send a command; wait for its reply and until the view shows the change.

        Returns:
            The version of the change; None if nothing changed.

        Raises:
            CommandRefused: the server refused it.
            NotConnected: the connection is closed; nothing was sent.
            ConnectionLost: no reply arrived.
            ValueError: the message is too long, or its request id is in use.
        """
        given = message.request_id if isinstance(message.request_id, str) else None
        request_id, request = self._requests.open(given)
        try:
            text = _encode(replace(message, request_id=request_id))
            self._check_length(text)
            self._leaving = self._leaving or isinstance(message, LeaveSession)
            with trio.move_on_after(REPLY_TIMEOUT_S):
                try:
                    await self._websocket.send(text)
                except trio.BrokenResourceError:
                    # Wait until the cause is recorded: that happens before the requests fail.
                    await request.done.wait()
                    raise NotConnected from None
                await request.replied.wait()
                with trio.move_on_after(_SYNC_RETRY_S):
                    await request.done.wait()
                if not request.done.is_set():
                    # Acknowledged, but the event is missing.
                    self._mark_gap()
                await request.done.wait()
            if request.reply is None and not request.done.is_set():
                raise ConnectionLost(f"no reply within {REPLY_TIMEOUT_S:.0f} s")
            return request.outcome()
        finally:
            self._requests.forget(request_id)

    def _check_length(self, text: str) -> None:
        server = self._membership.server
        size = len(text.encode())
        if server is not None and size > server.limits.max_message_bytes:
            raise ValueError(
                f"a message of {size} bytes exceeds the limit of {server.limits.max_message_bytes}"
            )

    async def _join_and_sync(self, nursery: trio.Nursery) -> None:
        """Join, then keep the clock synchronised."""
        with trio.move_on_after(JOIN_TIMEOUT_S):
            await self._welcomed.wait()
            # Probe before the join, so that the clock is known when the session is.
            self._probe()
            await self._join()
        if not self.joined:
            self.hang_up()
            return
        self._on_joined()
        nursery.start_soon(self._sync_clock, nursery)
        nursery.start_soon(self._resync)

    async def _join(self) -> None:
        try:
            token = await self._get_token()
        except Exception as failure:  # the caller's function may raise anything
            self.failure = failure
            return
        resume_token = self._membership.resume_token
        join = replace(
            self._membership.join,
            token=UNSET if token is None else token,
            resume_token=UNSET if resume_token is None else resume_token,
        )
        self._join_sent = True
        try:
            await self.command(join)
        except CommandRefused as refusal:
            self.refusal = refusal
        except ValueError as too_long:
            self.refusal = CommandRefused("invalid_field", str(too_long))
        except (ConnectionLost, NotConnected):
            pass
        else:
            # The snapshot arrives before the ack or right after it.
            await self._snapshot_received.wait()
            self.joined_s = trio.current_time()

    async def _get_token(self) -> str | None:
        token = self._membership.token
        if not callable(token):
            return token
        found = token()
        return found if isinstance(found, str) else await found

    async def _sync_clock(self, nursery: trio.Nursery) -> None:
        for _ in range(BURST - 1):
            await trio.sleep(_BURST_PERIOD_S)
            self._probe()
        nursery.start_soon(self._report)
        while True:
            await trio.sleep(self._membership.clock.probe_interval_s)
            self._probe()

    async def _report(self) -> None:
        """Report the bound on the clock error, for ``room_stats``."""
        while True:
            error_ms = self._membership.clock.error_ms
            if error_ms is not None:
                self._websocket.send_nowait(_encode(SyncReport(error_ms=error_ms)))
            await trio.sleep(_REPORT_PERIOD_S)

    def _probe(self) -> None:
        self._websocket.send_nowait(self._stamped_probe)

    def _stamped_probe(self) -> str:
        """Encode a probe when it is sent, so that queueing does not count as network delay."""
        now = local_ms()
        self._probes.append(now)
        return _encode(ClockSync(t0=now))

    async def _resync(self) -> None:
        """Request a snapshot when a version is missing; retry if the request is lost or refused."""
        while True:
            await self._gap.wait()
            self._gap = trio.Event()
            while self._behind:
                view = self._membership.view
                assert view is not None
                self._websocket.send_nowait(
                    _encode(SyncRequest(version=view.version, epoch=view.epoch))
                )
                await trio.sleep(_SYNC_RETRY_S)

    def _mark_gap(self) -> None:
        self._behind = True
        self._gap.set()

    async def _watch(self) -> None:
        """Abandon the connection after `SILENCE_S` without data."""
        websocket = self._websocket
        while True:
            await trio.sleep_until(websocket.received_s + SILENCE_S)
            await trio.sleep(_SECOND_LOOK_S)
            if trio.current_time() - websocket.received_s >= SILENCE_S:
                websocket.abandon("no data for too long")
                self.hang_up()
                return

    def _dispatch(self, arrival: float, message: ServerMessage | UnknownMessage) -> None:
        membership = self._membership
        match message:
            case ClockSyncReply():
                self._observe(message, arrival)
            case Ack() | Error():
                # A join waits for its snapshot, whatever the version. After a leave there are no
                # more versions to wait for.
                current = self.joined and not self._leaving
                self._requests.reply(message, membership.version if current else _ANY_VERSION)
            case Snapshot(you=You() as you):
                membership.joined(message, you)
                self._behind = False
                self._snapshot_received.set()
            case Welcome():
                self._on_welcome(message)
            case SyncResponse():
                # The view is current.
                self._behind = False
            case HeartbeatReply() | LatencyResponse():
                pass
            case _:
                self._apply(message)

    def _apply(self, message: News | UnknownMessage) -> None:
        membership = self._membership
        before = membership.view
        if membership.apply(message):
            self._mark_gap()
        if isinstance(message, ServerDraining):
            self.drained_s = trio.current_time() + message.reconnect_in_ms / 1000
            membership.become("draining")
        after = membership.view
        if after is before or after is None:
            return
        if isinstance(message, Snapshot):
            self._behind = False
        other_epoch = before is not None and before.epoch != after.epoch
        self._requests.reached(_ANY_VERSION if other_epoch else after.version)

    def _on_welcome(self, welcome: Welcome) -> None:
        membership = self._membership
        if welcome.protocol != PROTOCOL:
            self.refusal = CommandRefused(
                "unsupported_protocol",
                f"The server speaks protocol {welcome.protocol}, this client {PROTOCOL}: "
                "update the older of the two.",
            )
            self.hang_up()
            return
        membership.server = welcome
        membership.clock.greet(welcome.server_time)
        self._welcomed.set()

    def _observe(self, reply: ClockSyncReply, arrival: float) -> None:
        if reply.t0 not in self._probes or reply.t2 < reply.t1:
            return
        self._probes.remove(reply.t0)
        self._probes_answered += 1
        burst = self._probes_answered < BURST
        self._membership.clock.observe(reply.t0, reply.t1, reply.t2, arrival * 1000, burst=burst)


def _encode(message: ClientMessage) -> str:
    return msgspec.json.encode(message).decode()
