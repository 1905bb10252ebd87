"""A storage manager on virtual time, and a Redis that does what a test wants."""

from collections.abc import Callable, Sequence

import anyio
import structlog
import trio
from msgspec.structs import replace
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from structlog.testing import CapturingLogger

from bandsync.counters import Counters
from bandsync.model.clock import ServerClock
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.subscriber import Subscriber
from bandsync.rules.draft import new_session
from bandsync.settings import Settings
from bandsync.storage.base import Presence
from bandsync.storage.era import Era
from bandsync.storage.health import HealthCheck
from bandsync.storage.manager import StorageManager
from bandsync.storage.memory import MemoryStorage
from bandsync.storage.operations import create_session
from bandsync.storage.records import read_presence, write_presence
from bandsync.storage.redis import Keys
from bandsync.storage.redis_connector import read_timeouts
from tests.support.redis_storages import IMPATIENT
from tests.support.states import HERE, NOW

SETTINGS = Settings(redis_auto_recover=True)
INTERVAL_S = SETTINGS.redis_health_interval_ms / 1000
TIMEOUT_S = SETTINGS.redis_health_timeout_ms / 1000


class ObedientLink(Link):
    """A link to nowhere."""

    def __init__(self, redis: "ObedientRedis") -> None:
        super().__init__(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
        )
        self.redis = redis
        self.died = trio.Event()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self.redis.attempts.append(trio.current_time())
        if not self.redis.there:
            raise LinkLostError("nobody there", "refused")
        self._usable = True
        task_status.started()
        try:
            await self.died.wait()
        finally:
            self._usable = False
            self.redis.ended()
        raise LinkLostError("gone", "reset")

    async def execute(self, *args: Argument) -> Reply:
        await trio.sleep(self.redis.latency_s)
        if args[0] == "DEL":
            self.redis.entry = None
            return 1
        if args[0] == "EVALSHA":
            if self.redis.lacks_scripts:
                raise ResponseError("ERR unknown command 'EVALSHA'")
            return [] if ":session:" in str(args[3]) else self._write_presence(*args[4:])
        entry = self.redis.entry
        if args[0] == "GET":
            return None if entry is None else write_presence(entry)
        assert args[0] == "PTTL"
        refreshed = self.redis.refreshed
        moment = trio.current_time()
        if self.redis.rival_lives:
            refreshed = moment - moment % 3
        return round(10_000 - (moment - refreshed) * 1000)

    def _write_presence(
        self, boot_id: Argument, entry: Argument, expiry_ms: Argument, owned: Argument
    ) -> Reply:
        """The same as presence.lua."""
        stored = self.redis.entry
        if stored is not None and owned and stored.boot_id < str(boot_id):
            return write_presence(stored)
        self.redis.writes.append(trio.current_time())
        if self.redis.full:
            raise OutOfMemoryError("OOM")
        assert isinstance(entry, bytes)
        written = read_presence(entry)
        assert isinstance(written, Presence)
        self.redis.entry = written
        self.redis.refreshed = trio.current_time()
        return None

    async def execute_all(
        self, commands: Sequence[tuple[Argument, ...]]
    ) -> list[Reply | RedisError]:
        if self.redis.silent:
            await trio.sleep(TIMEOUT_S)
            raise LinkLostError("no reply in time", "timed_out")
        await trio.sleep(self.redis.latency_s)
        replies: list[Reply | RedisError] = []
        for command in commands:
            if command[0] == "TIME":
                replies.append([b"1800000000", b"0"])
            else:
                replies.append(b"PONG")
        return replies


class DeafSubscriber(Subscriber):
    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep_forever()


class ObedientRedis:
    """The Redis that the links of a manager connect to.

    Attributes:
        attempts, writes: when somebody connected, and wrote its presence.
        entry: the presence under our name, and when it was last refreshed.
        rival_lives: whether somebody else refreshes it every three seconds.
        latency_s: how long each answer takes.
        ended: called when a link ends.
    """

    def __init__(self) -> None:
        self.there = True
        self.silent = False
        self.full = False
        self.attempts: list[float] = []
        self.writes: list[float] = []
        self.entry: Presence | None = None
        self.refreshed = trio.current_time()
        self.rival_lives = False
        self.latency_s = 0.0
        self.lacks_scripts = False
        self.ended: Callable[[], None] = lambda: None
        self.links: list[ObedientLink] = []
        self.keys = Keys("bandsync:")

    def __str__(self) -> str:
        return "redis://stage"

    def subscriber(self, link: Link, heard: Callable[[bytes, bytes], None]) -> Subscriber:
        """Nobody is heard, and nobody speaks."""
        return DeafSubscriber(
            RedisAddress(),
            name="test",
            timeouts=IMPATIENT,
            on_message=heard,
            probe_channel=b"probe",
            probe=trio.sleep,
        )

    def link(self) -> ObedientLink:
        self.links.append(ObedientLink(self))
        return self.links[-1]

    def drop(self) -> None:
        """Reset the connection."""
        self.links[-1].died.set()


class Stage:
    """A manager that runs.

    Attributes:
        told: the storage type at each transition that clients are told of, with its time.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        redis: ObedientRedis | None = None,
        enabled: bool = True,
        boot_id: str = "boot-1",
        **changes: object,
    ) -> None:
        settings = replace(SETTINGS, **changes)
        self.redis = redis or ObedientRedis()
        self.counters = Counters()
        self.log = CapturingLogger()
        self.rooms: dict[str, object] = {}
        self.told: list[tuple[str, float]] = []
        self.migrations: list[Era] = []
        self.gate = trio.Event()
        self.gate.set()
        self.recoveries: list[float] = []
        self.memory = MemoryStorage(boot_id, "for a test")
        clock = ServerClock(NOW, trio.current_time())
        self.manager = StorageManager(
            settings,
            self.redis if enabled else None,
            memory=self.memory,
            health=HealthCheck(
                timeouts=read_timeouts(settings),
                clock=clock,
                presence_key="server:stage",
                presence=lambda: Presence(boot_id, NOW, f"http://{boot_id}", [], 0),
                is_gone=lambda entry: entry.pid == GONE,
                serving=lambda: True,
            ),
            server_id="stage",
            boot_id=boot_id,
            now=lambda: clock.at(trio.current_time()),
            counters=self.counters,
            recovery_seconds=self.recoveries.append,
            log=structlog.wrap_logger(
                self.log,
                processors=[],
                wrapper_class=structlog.make_filtering_bound_logger("info"),
            ),
        )
        self._nursery = nursery
        self._news = trio.Event()

    def start(self) -> None:
        self._nursery.start_soon(self.manager.run, self, self.tell)

    async def migrate(self, era: Era, moved: Callable[[], None]) -> None:
        self.migrations.append(era)
        await self.gate.wait()

    async def compare(self, era: Era) -> None:
        """Nothing is committed unheard here."""

    def receive(self, session_id: str, payload: bytes) -> None:
        raise AssertionError(session_id)

    def tell(self) -> None:
        self.told.append((self.manager.storage_type, trio.current_time()))
        self._news.set()
        self._news = trio.Event()

    async def until(self, storage_type: str) -> None:
        """Wait until clients are told that this is in use."""
        while self.manager.storage_type != storage_type:
            await self._news.wait()

    def modes(self) -> list[str]:
        return [mode for mode, _ in self.told]

    async def keep_a_session(self) -> None:
        session = replace(new_session("song", "epoch", HERE, NOW), version=1)
        await create_session(self.memory, session)


GONE = 99
RIVAL = Presence("boot-2", NOW, "http://there", [], 0)
