"""A Redis for benchmarks, without persistence."""

from scripts.testbed.redis_server import RedisServer

__all__ = ["RedisServer", "new_redis"]


def new_redis() -> RedisServer:
    """An empty Redis that writes nothing to disk, on the cores of this process."""
    return RedisServer(appendonly="no")
