"""Keeps a place in a session: connects, and comes back whenever the connection is lost."""

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
from bandsync.client.websocket import ClientWebSocket, LineEnd, converse
from bandsync.model.exception_leaves import first_leaf

# A refusal that passes; every other one would be repeated for ever.
_PASSING = frozenset({"rate_limited", "conflict", "internal"})
# A connection that lasts so long was a good one. A server that lets everybody in and throws them
# out at once is not to be asked as often as that.
_GOOD_S = 5.0


class Patience(Struct, frozen=True):
    """How long to try, in seconds; infinity for ever.

    Attributes:
        join_s: to get in at first.
        resume_s: to come back.
    """

    join_s: float
    resume_s: float


class ReconnectLoop:
    """The one who keeps the connection.

    Args:
        on_end: called when the client has to give up its place.

    Attributes:
        conversation: the present one; None while there is no connection.
        joined: set at the first join.
        error: why the client has ended; None if nothing was wrong.
        done: it is over.
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
        # Leaving needs the connection: it ends when `stop` says so, not when the block around it
        # is cancelled.
        self._scope = trio.CancelScope(shield=True)
        self._talk: Conversation | None = None
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
        """The present one, once it has joined."""
        talk = self._talk
        return talk if talk is not None and talk.joined else None

    async def run(self) -> None:
        """Connect, again and again, until `stop` or until only a person can help."""
        self._offline_since = trio.current_time()
        try:
            with self._scope:
                while not self._stopping:
                    error = await self._connection()
                    if error is not None:
                        self.error = error
                        self._on_end()
                        break
        finally:
            self._membership.become("closed")
            self._membership.events.end()
            self.done.set()
            self._announce()

    async def next_join(self) -> None:
        """Wait until a connection has joined, or there will be none."""
        await self._next_join.wait()

    def stop(self) -> None:
        """Close the connection, if there is one, and do not come back."""
        self._stopping = True
        if self._talk is not None:
            self._talk.hang_up()
        else:
            self._scope.cancel()

    def withdraw(self) -> None:
        """Take back the join that is under way, if there is one, before a `stop`."""
        if self._talk is not None:
            self._talk.withdraw()

    def abandon(self) -> None:
        """The same at once, without a word."""
        self._stopping = True
        self._scope.cancel()

    async def _connection(self) -> Ended | None:
        """One connection and the wait after it; why there must be no other."""
        end = LineEnd(reason="it took too long")
        try:
            with trio.move_on_at(self._deadline()) as limit:
                end = await converse(self._address, lambda line: self._converse(line, limit))
                if self._talk is not None and self._talk.failure is not None:
                    end = LineEnd(reason="there is no join token", error=self._talk.failure)
        finally:
            talk, self._talk = self._talk, None
            if talk is not None:
                talk.lose()
        if self._stopping:
            return None
        error = self._verdict(talk, end)
        if error is not None:
            return error
        if talk is not None and talk.joined_s is not None:
            self._offline_since = trio.current_time()
            if self._offline_since - talk.joined_s >= _GOOD_S:
                self._waits = 0
        else:
            self._failures += 1
        wait_s = delay_s(
            self._waits,
            random.random(),  # noqa: S311
            slow=end.code == 1013 or end.http_status == 503 or _is_unwelcome(end),
        )
        self._waits += 1
        if talk is not None and talk.drained_s is not None:
            asked_s = talk.drained_s - trio.current_time()
            wait_s = asked_s if asked_s > 0 else wait_s
        if trio.current_time() + wait_s > self._deadline():
            return self._unreachable(end)
        status: Status = "resuming" if self.joined.is_set() else "connecting"
        self._membership.become(status, self._failures, wait_s)
        await trio.sleep(wait_s)
        return None

    async def _converse(self, line: ClientWebSocket, limit: trio.CancelScope) -> None:
        def joined() -> None:
            limit.deadline = float("inf")
            self._failures = 0
            self._membership.become("online")
            self.joined.set()
            self._announce()

        self._talk = Conversation(self._membership, line, joined, self._tap)
        await self._talk.run()

    def _announce(self) -> None:
        self._next_join.set()
        self._next_join = trio.Event()

    def _deadline(self) -> float:
        patience = self._patience
        return self._offline_since + (
            patience.resume_s if self.joined.is_set() else patience.join_s
        )

    def _verdict(self, talk: Conversation | None, end: LineEnd) -> Ended | None:
        """Why only a person can help, if so."""
        if talk is not None and talk.refusal is not None and talk.refusal.code not in _PASSING:
            refusal = talk.refusal
            return JoinRefused(refusal.code, refusal.message, refusal.context)
        if end.code == 4001:
            return Superseded()
        if end.code == 1008:
            return JoinRefused("policy", end.reason or "The server does not want this client.")
        if _is_unwelcome(end) and not self.joined.is_set():
            # Later it is more likely a network that wants us to log in first, and passes.
            if end.http_status is None:
                return self._unreachable(end)
            return JoinRefused("policy", f"The handshake was answered with {end.http_status}.")
        if trio.current_time() >= self._deadline() and not (talk is not None and talk.joined):
            return self._unreachable(end)
        return None

    def _unreachable(self, end: LineEnd) -> Unreachable:
        because = end.reason or f"closed with {end.code}"
        if end.error is not None:
            because = str(_root(end.error))
        error = Unreachable(because, end.code)
        error.__cause__ = end.error
        return error


def _is_unwelcome(end: LineEnd) -> bool:
    """Whether they want to see papers, or have shown none that we trust."""
    cause = end.error.__cause__ if end.error is not None else None
    return end.http_status in {401, 403} or isinstance(cause, ssl.SSLCertVerificationError)


def _root(error: BaseException) -> BaseException:
    """What is behind it: Trio tries every address of a name, and reports a group."""
    if isinstance(error, BaseExceptionGroup):
        error = first_leaf(error)
    return error if error.__cause__ is None else _root(error.__cause__)
