"""Requests in flight on one connection, matched to their replies."""

from itertools import count

import trio

from bandsync.client.exceptions import CommandRefused, ConnectionLost
from bandsync.wire.messages import Ack, Error


class Request:
    """A request in flight.

    Attributes:
        replied: set when the reply has arrived, or the connection is lost.
        done: set when, in addition, the view contains the acknowledged version.
        reply: None before it has arrived.
    """

    __slots__ = ("done", "replied", "reply")

    def __init__(self) -> None:
        self.replied = trio.Event()
        self.done = trio.Event()
        self.reply: Ack | Error | None = None

    def outcome(self) -> int | None:
        """The acknowledged version; None if nothing changed.

        Raises:
            CommandRefused: the server refused the command.
            ConnectionLost: there is no reply.
        """
        match self.reply:
            case Ack() as ack:
                return acknowledged_version(ack)
            case Error() as refusal:
                context = refusal.context if isinstance(refusal.context, dict) else None
                raise CommandRefused(refusal.code, refusal.message, context)
            case None:
                raise ConnectionLost


class Requests:
    """All requests in flight on one connection."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._waiting: dict[str, Request] = {}

    def open(self, request_id: str | None = None) -> tuple[str, Request]:
        """A new request and its id.

        Args:
            request_id: the id to use; None for a new one.

        Raises:
            ValueError: the id is in use.
        """
        if request_id in self._waiting:
            raise ValueError(f"a request with the id {request_id!r} is in flight")
        chosen = request_id or next(n for n in map(str, self._numbers) if n not in self._waiting)
        request = Request()
        self._waiting[chosen] = request
        return chosen, request

    def forget(self, request_id: str) -> None:
        """Drop a request that is no longer awaited."""
        self._waiting.pop(request_id, None)

    def reply(self, reply: Ack | Error, version: int) -> None:
        """Process a reply.

        Args:
            reply: the reply.
            version: version of the view. The request is done once the view has the acknowledged
                version, so that the caller sees its own change.
        """
        request_id = reply.request_id
        request = self._waiting.get(request_id) if isinstance(request_id, str) else None
        if request is None:
            return
        request.reply = reply
        request.replied.set()
        if isinstance(reply, Error) or (acknowledged_version(reply) or 0) <= version:
            request.done.set()

    def reached(self, version: int) -> None:
        """The view has reached ``version``."""
        for request in self._waiting.values():
            reply = request.reply
            if isinstance(reply, Ack) and (acknowledged_version(reply) or 0) <= version:
                request.done.set()

    def lose(self) -> None:
        """The connection is lost. Acknowledged requests are done, the others have no reply."""
        for request in self._waiting.values():
            request.replied.set()
            request.done.set()


def acknowledged_version(ack: Ack) -> int | None:
    """The acknowledged version; None if nothing changed."""
    return ack.version if isinstance(ack.version, int) else None
