"""Fixed storages for tests of the layers above."""

from bandsync.storage.base import Storage, StorageType
from bandsync.storage.era import Era
from bandsync.storage.memory import MemoryStorage


class FixedStores:
    """Memory alone, or memory and a storage in place of Redis."""

    def __init__(self, redis: Storage | None = None) -> None:
        self.memory = MemoryStorage("boot-1", "for a test")
        self.lost = False
        self._era = None if redis is None else Era(redis, self._lose)

    def _lose(self) -> None:
        self.lost = True

    @property
    def era(self) -> Era | None:
        return None if self._era is None or self._era.over else self._era

    @property
    def awaited(self) -> bool:
        return self._era is not None

    @property
    def storage_type(self) -> StorageType:
        return "memory" if self.era is None else "redis"
