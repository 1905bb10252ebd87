"""What is said on one connection: welcome, join, commands and their answers, clock, silence."""

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
# Of a server that lives: a commit waits for a Redis that hangs, but not as long.
ANSWER_TIMEOUT_S = 30.0
# Well before the resume grace of 10 s is over: a new connection takes time, too.
SILENCE_S = 5.5
# When we ourselves stood still, what came meanwhile is read first.
_SECOND_LOOK_S = 0.5
BURST = 20
_BURST_PERIOD_S = 0.08
_REPORT_PERIOD_S = 5.0
_SYNC_RETRY_S = 2.0
_MAX_PROBES = 64

Tap = Callable[[float, str], None]

_ANY_VERSION = 2**63


class Conversation:
    """The talk on one connection.

    Args:
        on_joined: called when we are in.
        tap: called with every text that arrives, and when it did (Trio's clock).

    Attributes:
        joined_s: when we were let in, on Trio's clock; None while we are not.
        refusal: why we are not let in.
        failure: what the caller's function for tokens raised.
        drained_s: when the server asked us to come back, on Trio's clock.
    """

    def __init__(
        self,
        membership: Membership,
        line: ClientWebSocket,
        on_joined: Callable[[], None],
        tap: Tap | None,
    ) -> None:
        self._membership = membership
        self._line = line
        self._on_joined = on_joined
        self._tap = tap
        self._requests = Requests()
        self._probes: deque[float] = deque(maxlen=_MAX_PROBES)
        self._answered = 0
        self._welcomed = trio.Event()
        self._seated = trio.Event()
        # Only `_mend_gaps`, who waits for it, replaces it.
        self._gap = trio.Event()
        self._missing = False
        self._asked = False
        self._leaving = False
        self._scope = trio.CancelScope()
        self.joined_s: float | None = None
        self.refusal: CommandRefused | None = None
        self.failure: Exception | None = None
        self.drained_s: float | None = None

    @property
    def joined(self) -> bool:
        """Whether we are in."""
        return self.joined_s is not None

    async def run(self) -> None:
        """Talk until the connection ends, it is silent for too long, or `hang_up`."""
        try:
            await self._run()
        finally:
            if self._membership.resume_token is None:
                # Let in after all, we could not come back to that place.
                self.withdraw()

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(self._begin, nursery)
                while (received := await self._line.receive()) is not None:
                    arrival, text = received
                    if self._tap is not None:
                        self._tap(arrival, text)
                    message = decode(text)
                    if message is not None:
                        self._hear(arrival, message)
                nursery.cancel_scope.cancel()

    def hang_up(self) -> None:
        """Close the connection, with a close frame."""
        self._scope.cancel()

    def withdraw(self) -> None:
        """Take the join back, if it was asked for and not answered, so that no ghost stays."""
        if self._asked and not self.joined and self.refusal is None:
            self._asked = False
            self._line.send_nowait(_encode(LeaveSession()))

    def lose(self) -> None:
        """Tell whoever still waits for an answer that none will come."""
        self._requests.lose()

    async def command(self, message: ClientMessage) -> int | None:
        """Send a command and wait for its answer, and for what it changed.

        Returns:
            The version that it made; None if nothing changed.

        Raises:
            CommandRefused: the server said no.
            NotConnected: the connection is over; nothing was sent.
            ConnectionLost: no answer came.
            ValueError: the server would not take it: it is too long, or its request id in use.
        """
        given = message.request_id if isinstance(message.request_id, str) else None
        request_id, request = self._requests.open(given)
        try:
            text = _encode(replace(message, request_id=request_id))
            self._check_length(text)
            self._leaving = self._leaving or isinstance(message, LeaveSession)
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                try:
                    await self._line.send(text)
                except trio.BrokenResourceError:
                    # Until the reason is known: it is set before the requests are lost.
                    await request.done.wait()
                    raise NotConnected from None
                await request.answered.wait()
                with trio.move_on_after(_SYNC_RETRY_S):
                    await request.done.wait()
                if not request.done.is_set():
                    # Acknowledged, but its event does not come.
                    self._miss()
                await request.done.wait()
            if request.answer is None and not request.done.is_set():
                raise ConnectionLost(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
            return request.outcome()
        finally:
            self._requests.forget(request_id)

    def _check_length(self, text: str) -> None:
        server = self._membership.server
        size = len(text.encode())
        if server is not None and size > server.limits.max_message_bytes:
            raise ValueError(
                f"a message of {size} bytes: the server takes {server.limits.max_message_bytes}"
            )

    async def _begin(self, nursery: trio.Nursery) -> None:
        """Join, then keep the clock."""
        with trio.move_on_after(JOIN_TIMEOUT_S):
            await self._welcomed.wait()
            # Before the join, so that the clock is known when the session is.
            self._probe()
            await self._join()
        if not self.joined:
            self.hang_up()
            return
        self._on_joined()
        nursery.start_soon(self._keep_time, nursery)
        nursery.start_soon(self._mend_gaps)

    async def _join(self) -> None:
        try:
            token = await self._ask_token()
        except Exception as failure:  # theirs, and most likely the network's
            self.failure = failure
            return
        resume_token = self._membership.resume_token
        join = replace(
            self._membership.join,
            token=UNSET if token is None else token,
            resume_token=UNSET if resume_token is None else resume_token,
        )
        self._asked = True
        try:
            await self.command(join)
        except CommandRefused as refusal:
            self.refusal = refusal
        except ValueError as too_long:
            self.refusal = CommandRefused("invalid_field", str(too_long))
        except (ConnectionLost, NotConnected):
            pass
        else:
            # The snapshot comes before the ack or right after it.
            await self._seated.wait()
            self.joined_s = trio.current_time()

    async def _ask_token(self) -> str | None:
        token = self._membership.token
        if not callable(token):
            return token
        found = token()
        return found if isinstance(found, str) else await found

    async def _keep_time(self, nursery: trio.Nursery) -> None:
        for _ in range(BURST - 1):
            await trio.sleep(_BURST_PERIOD_S)
            self._probe()
        nursery.start_soon(self._report)
        while True:
            await trio.sleep(self._membership.clock.probe_interval_s)
            self._probe()

    async def _report(self) -> None:
        """Tell the band how well we are in time."""
        while True:
            error_ms = self._membership.clock.error_ms
            if error_ms is not None:
                self._line.send_nowait(_encode(SyncReport(error_ms=error_ms)))
            await trio.sleep(_REPORT_PERIOD_S)

    def _probe(self) -> None:
        self._line.send_nowait(self._stamped_probe)

    def _stamped_probe(self) -> str:
        """Made when it leaves: what it waited in a queue is not the network's."""
        now = local_ms()
        self._probes.append(now)
        return _encode(ClockSync(t0=now))

    async def _mend_gaps(self) -> None:
        """Ask for a snapshot when a version is missing, again if that gets lost or refused."""
        while True:
            await self._gap.wait()
            self._gap = trio.Event()
            while self._missing:
                view = self._membership.view
                assert view is not None
                self._line.send_nowait(_encode(SyncRequest(version=view.version, epoch=view.epoch)))
                await trio.sleep(_SYNC_RETRY_S)

    def _miss(self) -> None:
        self._missing = True
        self._gap.set()

    async def _watch(self) -> None:
        """Give the connection up when nothing has been heard for too long."""
        line = self._line
        while True:
            await trio.sleep_until(line.heard_s + SILENCE_S)
            await trio.sleep(_SECOND_LOOK_S)
            if trio.current_time() - line.heard_s >= SILENCE_S:
                line.abandon("nothing was heard for too long")
                self.hang_up()
                return

    def _hear(self, arrival: float, message: ServerMessage | UnknownMessage) -> None:
        membership = self._membership
        match message:
            case ClockSyncReply():
                self._take_time(message, arrival)
            case Ack() | Error():
                # Who joins is waited for by `_seated`, whatever the version; who has left hears of
                # no more versions.
                here = self.joined and not self._leaving
                self._requests.answer(message, membership.version if here else _ANY_VERSION)
            case Snapshot(you=You() as you):
                membership.joined(message, you)
                self._missing = False
                self._seated.set()
            case Welcome():
                self._welcome(message)
            case SyncResponse():
                # We have all there is.
                self._missing = False
            case HeartbeatReply() | LatencyResponse():
                pass
            case _:
                self._take(message)

    def _take(self, message: News | UnknownMessage) -> None:
        membership = self._membership
        before = membership.view
        if membership.hear(message):
            self._miss()
        if isinstance(message, ServerDraining):
            self.drained_s = trio.current_time() + message.reconnect_in_ms / 1000
            membership.become("draining")
        after = membership.view
        if after is before or after is None:
            return
        if isinstance(message, Snapshot):
            self._missing = False
        other_epoch = before is not None and before.epoch != after.epoch
        self._requests.reached(_ANY_VERSION if other_epoch else after.version)

    def _welcome(self, welcome: Welcome) -> None:
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

    def _take_time(self, reply: ClockSyncReply, arrival: float) -> None:
        if reply.t0 not in self._probes or reply.t2 < reply.t1:
            return
        self._probes.remove(reply.t0)
        self._answered += 1
        burst = self._answered < BURST
        self._membership.clock.observe(reply.t0, reply.t1, reply.t2, arrival * 1000, burst=burst)


def _encode(message: ClientMessage) -> str:
    return msgspec.json.encode(message).decode()
