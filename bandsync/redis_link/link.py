"""One connection that carries the commands of all who have any."""

from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import InvalidResponse, RedisError

from bandsync.redis_link.connection import Argument, Reply, pack
from bandsync.redis_link.errors import again
from bandsync.redis_link.interfaces import Executor, PublishVerb
from bandsync.redis_link.multiplexer import Multiplexer


class Link(Multiplexer):
    """Commands from any number of tasks; those of one pass of the event loop leave in one write.

    Error replies are for their caller, also those that mean that Redis is of no use now: whether
    the link is given up then is for its supervisor to say.
    """

    publish_verb: Final[PublishVerb] = "PUBLISH"

    def handed_over(self, key: str) -> bool:
        """Never: there is no other node."""
        return False

    def parts(self) -> Sequence[Executor]:
        """Itself: one server has all keys."""
        return (self,)

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command. May be cancelled; Redis may carry it out all the same.

        Raises:
            RedisError: an error reply, or the link is lost: then it is not known whether Redis
                carried the command out.
        """
        event = self._new_event()
        call = self._call(pack(args), event)
        await event.wait()
        reply = call.reply
        if isinstance(reply, RedisError):
            raise again(reply)
        return reply

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        """The replies to several commands that leave together; an error reply is one of them.

        They are not a transaction. May be cancelled, as `execute`.

        Raises:
            RedisError: the link is lost.
        """
        # All packed before any is queued: a wrong argument must not leave half of them behind.
        packed = [pack(command) for command in commands]
        if not packed:
            return []
        event = self._new_event()
        last = packed.pop()
        calls = [self._call(command, None) for command in packed]
        calls.append(self._call(last, event))
        await event.wait()
        if calls[-1].reply is self._lost and self._lost is not None:
            raise again(self._lost)
        return [call.reply for call in calls]

    async def _attend(self, started: Callable[[], None]) -> None:
        started()

    def _take(self, replies: list[Reply | RedisError]) -> None:
        pending = self._pending
        for reply in replies:
            if not pending:
                raise InvalidResponse(f"{self._address}: a reply that nobody asked for")
            pending.popleft().answer(reply)
