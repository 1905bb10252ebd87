"""The master that Redis Sentinel names, and a link that stays with it."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus
from msgspec.structs import asdict, replace
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, TimeoutError  # noqa: A004
from redis.retry import Retry
from redis.sentinel import Sentinel

from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress

# How often the Sentinels are asked whether the master is still the one in use; and while it does
# not even let us in: whoever hangs is replaced long before a connection is given up.
_LOOK_PERIOD_S = 5.0
_LOOK_PERIOD_OUTSIDE_S = 1.0

T = TypeVar("T")

# redis-py does not annotate it.
_make_sentinel: Final = cast("Callable[..., Any]", Sentinel)


class _State(NamedTuple):
    """What a Sentinel says of the master.

    Attributes:
        epoch: the number of the failover that made it the master.
        alive: whether it believes that it is.
    """

    host: str
    port: int
    epoch: int
    alive: bool


class Sentinels:
    """Asks Sentinels where the master is, in a thread: redis-py does that, and it is a cold path.

    One thread at a time: whoever is cancelled leaves it behind, and it ends by itself, for each
    Sentinel gets ``timeout_s`` to connect and as much to answer.

    Args:
        hosts: host and port of each Sentinel.
        master: the name under which they watch it.
        like: credentials, database and TLS of the master; its TLS is that of the Sentinels too.
        password: of the Sentinels.
        timeout_s: for each Sentinel.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        master: str,
        like: RedisAddress,
        *,
        password: str | None,
        timeout_s: float,
    ) -> None:
        self._hosts = hosts
        self._master = master
        self._like = like
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "password": password,
            "decode_responses": True,
        }
        if like.tls is not None:
            tls = asdict(like.tls)
            tls["password"] = tls.pop("key_password")
            options |= {"ssl": True} | {f"ssl_{name}": value for name, value in tls.items()}
        # Kept: it asks first who answered last.
        self._sentinel = _make_sentinel(list(hosts), sentinel_kwargs=options)
        self._threads: anyio.CapacityLimiter | None = None
        # Of the latest failover that was heard of; they are numbered.
        self._epoch = 0

    def __str__(self) -> str:
        hosts = ", ".join(f"{host}:{port}" for host, port in self._hosts)
        return f"the master {self._master!r} of the Sentinels {hosts}"

    async def find(self) -> RedisAddress:
        """Where the master is, as the first Sentinel says that answers and believes it alive.

        Who has not heard of a failover that is known here has its say only when nobody else has:
        all may have been set up anew.

        Raises:
            LinkLostError: none does.
        """
        state = await self._in_thread(self._discover)
        self._epoch = state.epoch
        return self._address(state)

    async def find_later(self) -> RedisAddress | None:
        """The master after a failover later than what is known; None if no Sentinel has one.

        A Sentinel that was cut off may name an old master for some seconds: the first `find`
        cannot tell, those after this can.
        """
        state = await self._in_thread(self._compare)
        if state is None:
            return None
        self._epoch = state.epoch
        return self._address(state)

    async def _in_thread(self, look: Callable[[], T]) -> T:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._threads)

    def _address(self, state: _State) -> RedisAddress:
        return replace(self._like, host=state.host, port=state.port, path=None)

    def _discover(self) -> _State:
        problems: list[str] = []
        behind: list[_State] = []
        with contextlib.closing(self._states(problems)) as states:
            for state in states:
                if not state.alive:
                    problems.append("it is down")
                elif state.epoch < self._epoch:
                    behind.append(state)
                else:
                    return state
        if behind:
            return max(behind, key=lambda state: state.epoch)
        raise LinkLostError(f"{self}: {'; '.join(problems)}", "no_master")

    def _compare(self) -> _State | None:
        later = [state for state in self._states([]) if state.epoch > self._epoch]
        return max(later, key=lambda state: state.epoch, default=None)

    def _states(self, problems: list[str]) -> Generator[_State, None, None]:
        """What each Sentinel that answers thinks of the master; ``problems`` of the others.

        redis-py's own `Sentinel.discover_master` does the same, but does not tell the problems.
        """
        clients = self._sentinel.sentinels
        try:
            for client in list(clients):
                try:
                    told = client.sentinel_master(self._master)
                    # Asked after it, the address is never older than the epoch.
                    where = client.sentinel_get_master_addr_by_name(self._master)
                    state = self._state(told, *where)
                except RedisError as error:
                    problems.append(str(error))
                except (LookupError, TypeError, ValueError) as error:
                    # Whoever answers so is no Sentinel.
                    problems.append(f"an answer without meaning: {error!r}")
                else:
                    # Who answers is asked first next time.
                    clients.remove(client)
                    clients.insert(0, client)
                    yield state
        finally:
            for client in clients:
                client.close()

    def _state(self, told: dict[str, Any], host: str, port: int) -> _State:
        # Until all replicas follow the new master, ``told`` has the new epoch and the old address.
        replaced = (host, port) != (told["ip"], told["port"])
        alive = replaced or self._sentinel.check_master_state(told, self._master)
        return _State(host, port, int(told["config-epoch"]), alive)


class MasterLink(Link):
    """A link to the master. Lost when another one is, even if this one does not know it yet.

    Args:
        sentinels: asked at the connect, and from time to time.
        found: told where the master is.
        name, command_timeout_s, silence_s: as for a `Line`.
        connect_timeout_s: for the Sentinels' answer and the connection together.
    """

    def __init__(
        self,
        sentinels: Sentinels,
        like: RedisAddress,
        *,
        found: Callable[[RedisAddress], None],
        name: str,
        connect_timeout_s: float,
        command_timeout_s: float,
        silence_s: float,
    ) -> None:
        super().__init__(
            like,
            name=name,
            connect_timeout_s=connect_timeout_s,
            command_timeout_s=command_timeout_s,
            silence_s=silence_s,
        )
        self._sentinels = sentinels
        self._found = found
        self._let_in = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Find the master, connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: no master is known, there is no connection to it, or no longer.
        """
        deadline = anyio.current_time() + self._connect_timeout_s
        with anyio.CancelScope(deadline=deadline) as scope:
            self._address = await self._sentinels.find()
        if scope.cancelled_caught:
            raise TimeoutError(f"{self._sentinels}: no answer within {self._connect_timeout_s:g} s")
        self._found(self._address)
        self._connect_timeout_s = deadline - anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, tasks.cancel_scope)
            # Not raised within the group, which would wrap it.
            with contextlib.suppress(RedisError):
                await super().run(task_status=task_status)
            tasks.cancel_scope.cancel()
        assert self._lost is not None
        raise self._lost

    async def _attend(self, started: Callable[[], None]) -> None:
        self._let_in.set()
        await super()._attend(started)

    async def _follow(self, scope: anyio.CancelScope) -> None:
        """Lose the link when there is another master: from the attempt to connect to the end.

        Who was asked for the master may have been the one who knew least; and a master that hung
        lets us in when it goes on, not knowing that it was replaced.
        """
        while True:
            later = await self._sentinels.find_later()
            # If none answers, that does no harm until one is needed.
            if later is not None and later != self._address:
                self._lose(
                    LinkLostError(f"{self._address}: the master is {later} by now", "demoted")
                )
                scope.cancel()
                return
            if self._let_in.is_set():
                await anyio.sleep(_LOOK_PERIOD_S)
            else:
                with anyio.move_on_after(_LOOK_PERIOD_OUTSIDE_S):
                    await self._let_in.wait()
