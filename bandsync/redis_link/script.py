"""Lua scripts, sent by their hash."""

import hashlib
from collections.abc import Sequence

from redis.exceptions import NoScriptError

from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.interfaces import Executor


class Script:
    """A Lua script. Redis is told the text when it does not know the hash.

    Args:
        text: in Lua.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        # Redis' name for a script; nothing is secured by it.
        self._sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def execute(
        self, link: Executor, keys: Sequence[Argument], args: Sequence[Argument]
    ) -> Reply:
        """What the script returns.

        Raises:
            RedisError: as `Link.execute`, and what the script fails with.
        """
        try:
            return await link.execute("EVALSHA", self._sha1, len(keys), *keys, *args)
        except NoScriptError:
            return await link.execute("EVAL", self._text, len(keys), *keys, *args)
