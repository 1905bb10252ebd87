"""Commands that wait for their answers, on one connection."""

from itertools import count

import trio

from bandsync.client.exceptions import CommandRefused, ConnectionLost
from bandsync.wire.messages import Ack, Error


class Request:
    """A command under way.

    Attributes:
        answered: set when there is an answer, or there will be none.
        done: set when there is nothing more to wait for.
        answer: None while there is none.
    """

    __slots__ = ("answer", "answered", "done")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.done = trio.Event()
        self.answer: Ack | Error | None = None

    def outcome(self) -> int | None:
        """The version that was made; None if nothing changed.

        Raises:
            CommandRefused: the server said no.
            ConnectionLost: there is no answer.
        """
        match self.answer:
            case Ack() as ack:
                return made(ack)
            case Error() as refusal:
                context = refusal.context if isinstance(refusal.context, dict) else None
                raise CommandRefused(refusal.code, refusal.message, context)
            case None:
                raise ConnectionLost


class Requests:
    """All that are under way on one connection."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._waiting: dict[str, Request] = {}

    def open(self, request_id: str | None = None) -> tuple[str, Request]:
        """A new request, and the id that its answer will carry.

        Args:
            request_id: use this one.

        Raises:
            ValueError: it is in use.
        """
        if request_id in self._waiting:
            raise ValueError(f"a command with the request id {request_id!r} is under way")
        chosen = request_id or next(n for n in map(str, self._numbers) if n not in self._waiting)
        request = Request()
        self._waiting[chosen] = request
        return chosen, request

    def forget(self, request_id: str) -> None:
        """Nobody waits for this any more."""
        self._waiting.pop(request_id, None)

    def answer(self, answer: Ack | Error, version: int) -> None:
        """Take an answer.

        Args:
            version: that of the view. What was acknowledged and is not in it yet is waited for, so
                that whoever changed something sees it changed.
        """
        request_id = answer.request_id
        request = self._waiting.get(request_id) if isinstance(request_id, str) else None
        if request is None:
            return
        request.answer = answer
        request.answered.set()
        if isinstance(answer, Error) or (made(answer) or 0) <= version:
            request.done.set()

    def reached(self, version: int) -> None:
        """The view is at ``version`` now."""
        for request in self._waiting.values():
            answer = request.answer
            if isinstance(answer, Ack) and (made(answer) or 0) <= version:
                request.done.set()

    def lose(self) -> None:
        """The connection is over. What was acknowledged is not lost."""
        for request in self._waiting.values():
            request.answered.set()
            request.done.set()


def made(ack: Ack) -> int | None:
    """The version that was acknowledged; None if nothing changed."""
    return ack.version if isinstance(ack.version, int) else None
