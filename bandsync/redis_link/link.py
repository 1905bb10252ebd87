"""The link: commands of any number of tasks over one connection."""

from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import InvalidResponse, RedisError

from bandsync.redis_link.connection import Argument, Reply, pack
from bandsync.redis_link.errors import again
from bandsync.redis_link.interfaces import Executor, PublishVerb
from bandsync.redis_link.multiplexer import Multiplexer


class Link(Multiplexer):
    """Commands from any number of tasks; those of one pass of the event loop leave in one write.

    An error reply goes to its caller only, even one that means that Redis cannot be used. The
    supervisor of the link decides whether to give the link up.
    """

    publish_verb: Final[PublishVerb] = "PUBLISH"

    def migrates(self, key: str) -> bool:
        """False: there is no other node."""
        return False

    def parts(self) -> Sequence[Executor]:
        """Itself: one server has all keys."""
        return (self,)

    async def execute(self, *args: Argument) -> Reply:
        """The reply to one command. If cancelled, Redis may still carry it out.

        Raises:
            RedisError: an error reply, or the link is lost. After a loss it is unknown whether
                Redis carried the command out.
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
        """The replies to several commands that leave together, error replies among them.

        They are no transaction. If cancelled, Redis may still carry out any of them.

        Raises:
            RedisError: the link is lost.
        """
        # Pack all before the first is queued: an argument that cannot be packed queues none.
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

    async def _use(self, started: Callable[[], None]) -> None:
        started()

    def _dispatch(self, replies: list[Reply | RedisError]) -> None:
        pending = self._pending
        for reply in replies:
            if not pending:
                raise InvalidResponse(f"{self._address}: unexpected reply")
            pending.popleft().answer(reply)
