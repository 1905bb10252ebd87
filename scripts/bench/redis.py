"""A Redis for benchmarks: the server of the tests, without its log of writes."""


# It is no part of the package, and a script sees only its own directory.

from scripts.testbed.redis_server import RedisServer

__all__ = ["RedisServer", "new_redis"]


def new_redis() -> RedisServer:
    """One of our own, empty, that keeps nothing on disk; on the cores of this process."""
    return RedisServer(appendonly="no")
