"""The reconnect loop: connects, and reconnects whenever the connection is lost."""

import random
import ssl
from collections.abc import Callable

import trio
from msgspec import Struct

from bandsync.client.conversation import Conversation, Tap
from bandsync.client.events import Status
from bandsync.client.exceptions import Ended, JoinRefused, Superseded, Unreachable
from bandsync.client.membership import Membership
from bandsync.client.retry_delay import delay_s
from bandsync.client.server_address import ServerAddress
from bandsync.client.websocket import ClientWebSocket, ConnectionEnd, run_connection
from bandsync.model.exception_leaves import first_leaf
from bandsync.wire.close_codes import CloseCode, may_reconnect

# Refusals that are temporary; a retry after any other one would be refused again.
_PASSING = frozenset({"rate_limited", "conflict", "internal"})
# A connection that lasts this long resets the backoff. Shorter ones do not, so that a server that
# accepts and closes at once is not flooded.
_GOOD_S = 5.0


class Patience(Struct, frozen=True):
    """Time limits in seconds; infinity for none.

    Attributes:
        join_s: for the first join.
        resume_s: for each resume.
    """

    join_s: float
    resume_s: float


class ReconnectLoop:
    """Keeps a membership connected.

    Args:
        address: the session's address.
        membership: state across connections.
        patience: time limits.
        on_end: called when the client stops because of an error.
        tap: see `Conversation`.

    Attributes:
        joined: set at the first join.
        error: why the client has ended; None without an error.
        done: set when the loop has ended.
    """

    def __init__(
        self,
        address: ServerAddress,
        membership: Membership,
        patience: Patience,
        on_end: Callable[[], None],
        tap: Tap | None,
    ) -> None:
        self._address = address
        self._membership = membership
        self._patience = patience
        self._on_end = on_end
        self._tap = tap
        # Shielded, because leaving needs the connection: `stop` ends it, not the cancellation of
        # the surrounding block.
        self._scope = trio.CancelScope(shield=True)
        self._current: Conversation | None = None
        self._stopping = False
        self._failures = 0
        self._waits = 0
        self._offline_since = 0.0
        self.joined = trio.Event()
        self._next_join = trio.Event()
        self.error: Ended | None = None
        self.done = trio.Event()

    @property
    def conversation(self) -> Conversation | None:
        """The current conversation; None unless it has joined."""
        conversation = self._current
        return conversation if conversation is not None and conversation.joined else None

    async def run(self) -> None:
        """Connect and reconnect until `stop`, or until only a person can help."""
        self._offline_since = trio.current_time()
        try:
            with self._scope:
                while not self._stopping:
                    error = await self._connect_once()
                    if error is not None:
                        self.error = error
                        self._on_end()
                        break
        finally:
            self._membership.become("closed")
            self._membership.events.end()
            self.done.set()
            self._notify_waiters()

    async def next_join(self) -> None:
        """Wait until a connection has joined or the loop has ended."""
        await self._next_join.wait()

    def stop(self) -> None:
        """Close the connection, if there is one, and do not reconnect."""
        self._stopping = True
        if self._current is not None:
            self._current.hang_up()
        else:
            self._scope.cancel()

    def withdraw(self) -> None:
        """Before a `stop`: withdraw a join that is in flight."""
        if self._current is not None:
            self._current.withdraw()

    def abandon(self) -> None:
        """Stop at once, without a close frame."""
        self._stopping = True
        self._scope.cancel()

    async def _connect_once(self) -> Ended | None:
        """Run one connection and the delay after it; return the error that ends the loop."""
        end = ConnectionEnd(reason="the time limit was exceeded")
        try:
            with trio.move_on_at(self._deadline()) as limit:
                end = await run_connection(
                    self._address, lambda websocket: self._converse(websocket, limit)
                )
                if self._current is not None and self._current.failure is not None:
                    end = ConnectionEnd(
                        reason="the token function failed", error=self._current.failure
                    )
        finally:
            conversation, self._current = self._current, None
            if conversation is not None:
                conversation.lose()
        if self._stopping:
            return None
        error = self._final_error(conversation, end)
        if error is not None:
            return error
        if conversation is not None and conversation.joined_s is not None:
            self._offline_since = trio.current_time()
            if self._offline_since - conversation.joined_s >= _GOOD_S:
                self._waits = 0
        else:
            self._failures += 1
        wait_s = delay_s(
            self._waits,
            random.random(),  # noqa: S311
            slow=end.code == CloseCode.TRY_AGAIN_LATER
            or end.http_status == 503
            or _authentication_failed(end),
        )
        self._waits += 1
        if conversation is not None and conversation.drained_s is not None:
            drain_s = conversation.drained_s - trio.current_time()
            wait_s = drain_s if drain_s > 0 else wait_s
        if trio.current_time() + wait_s > self._deadline():
            return self._unreachable(end)
        status: Status = "resuming" if self.joined.is_set() else "connecting"
        self._membership.become(status, self._failures, wait_s)
        await trio.sleep(wait_s)
        return None

    async def _converse(self, websocket: ClientWebSocket, limit: trio.CancelScope) -> None:
        def joined() -> None:
            limit.deadline = float("inf")
            self._failures = 0
            self._membership.become("online")
            self.joined.set()
            self._notify_waiters()

        self._current = Conversation(self._membership, websocket, joined, self._tap)
        await self._current.run()

    def _notify_waiters(self) -> None:
        self._next_join.set()
        self._next_join = trio.Event()

    def _deadline(self) -> float:
        patience = self._patience
        return self._offline_since + (
            patience.resume_s if self.joined.is_set() else patience.join_s
        )

    def _final_error(self, conversation: Conversation | None, end: ConnectionEnd) -> Ended | None:
        """The error that ends the loop; None if a retry may help."""
        if (
            conversation is not None
            and conversation.refusal is not None
            and conversation.refusal.code not in _PASSING
        ):
            refusal = conversation.refusal
            return JoinRefused(refusal.code, refusal.message, refusal.context)
        if end.code == CloseCode.SESSION_TAKEN:
            return Superseded()
        if not may_reconnect(end.code):
            return JoinRefused("policy", end.reason or "The server refused this client.")
        if _authentication_failed(end) and not self.joined.is_set():
            # Only at the first join: later it is more likely a captive portal, which is temporary.
            if end.http_status is None:
                return self._unreachable(end)
            return JoinRefused("policy", f"The handshake was refused with {end.http_status}.")
        if trio.current_time() >= self._deadline() and not (
            conversation is not None and conversation.joined
        ):
            return self._unreachable(end)
        return None

    def _unreachable(self, end: ConnectionEnd) -> Unreachable:
        because = end.reason or f"closed with {end.code}"
        if end.error is not None:
            because = str(_root(end.error))
        error = Unreachable(because, end.code)
        error.__cause__ = end.error
        return error


def _authentication_failed(end: ConnectionEnd) -> bool:
    """Whether authentication failed: HTTP 401 or 403, or an untrusted certificate."""
    cause = end.error.__cause__ if end.error is not None else None
    return end.http_status in {401, 403} or isinstance(cause, ssl.SSLCertVerificationError)


def _root(error: BaseException) -> BaseException:
    """The root cause. Trio tries every address of a host name and reports a group."""
    if isinstance(error, BaseExceptionGroup):
        error = first_leaf(error)
    return error if error.__cause__ is None else _root(error.__cause__)
