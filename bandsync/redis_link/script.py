"""Lua scripts, called by their hash (EVALSHA)."""

import hashlib
from collections.abc import Sequence

from redis.exceptions import NoScriptError

from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.interfaces import Executor


class Script:
    """A Lua script. Its text is sent only to a Redis that does not know its hash.

    Args:
        text: the Lua source.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        # The name that Redis gives a script, no security measure.
        self._sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def execute(
        self, link: Executor, keys: Sequence[Argument], args: Sequence[Argument]
    ) -> Reply:
        """The return value of the script.

        Raises:
            RedisError: as `Link.execute`, and the errors of the script.
        """
        try:
            return await link.execute("EVALSHA", self._sha1, len(keys), *keys, *args)
        except NoScriptError:
            return await link.execute("EVAL", self._text, len(keys), *keys, *args)
