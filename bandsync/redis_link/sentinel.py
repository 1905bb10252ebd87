"""Sentinel discovery, and a link that is lost when its server is no longer the master."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus
from msgspec.structs import asdict, replace
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, TimeoutError  # noqa: A004 -- the name redis-py gives it
from redis.retry import Retry
from redis.sentinel import Sentinel

from bandsync.redis_link.errors import LinkLostError
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress
from bandsync.redis_link.timeouts import Timeouts

# Between two queries of the Sentinels for a later master. Shorter while connecting: the Sentinels
# replace a master that hangs long before the connection attempt times out.
_QUERY_PERIOD_S = 5.0
_QUERY_PERIOD_CONNECTING_S = 1.0

T = TypeVar("T")

# redis-py does not annotate it.
_make_sentinel: Final = cast("Callable[..., Any]", Sentinel)


class _MasterState(NamedTuple):
    """The master as one Sentinel reports it.

    Attributes:
        host, port: its address.
        epoch: configuration epoch, the number of the failover that made it the master.
        alive: whether the Sentinel considers it up.
    """

    host: str
    port: int
    epoch: int
    alive: bool


class Sentinels:
    """Queries Sentinels for the master, with redis-py's blocking client in a thread.

    There is one thread at a time. A cancelled query leaves its thread behind; it ends by itself,
    because each Sentinel gets ``timeout_s`` to connect and as much to answer.

    Args:
        hosts: host and port of each Sentinel.
        master: the name under which they monitor it.
        template: credentials, database and TLS of the master. The Sentinels use the same TLS.
        password: that of the Sentinels.
        timeout_s: to connect to one Sentinel, and again for its answer.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        master: str,
        template: RedisAddress,
        *,
        password: str | None,
        timeout_s: float,
    ) -> None:
        self._hosts = hosts
        self._master = master
        self._template = template
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "password": password,
            "decode_responses": True,
        }
        if template.tls is not None:
            tls = asdict(template.tls)
            tls["password"] = tls.pop("key_password")
            options |= {"ssl": True} | {f"ssl_{name}": value for name, value in tls.items()}
        # Kept, because it queries first the Sentinel that answered last.
        self._sentinel = _make_sentinel(list(hosts), sentinel_kwargs=options)
        self._threads: anyio.CapacityLimiter | None = None
        # The latest known configuration epoch.
        self._epoch = 0

    def __str__(self) -> str:
        hosts = ", ".join(f"{host}:{port}" for host, port in self._hosts)
        return f"the master {self._master!r} of the Sentinels {hosts}"

    async def find(self) -> RedisAddress:
        """The master, according to the first Sentinel that answers and considers it up.

        A Sentinel with an epoch older than the latest known one counts only when no other answers:
        all of them may have been set up anew.

        Raises:
            LinkLostError: no Sentinel names a master that is up.
        """
        state = await self._in_thread(self._discover)
        self._epoch = state.epoch
        return self._address(state)

    async def find_later(self) -> RedisAddress | None:
        """The master of an epoch later than the latest known one; None if no Sentinel has one.

        A Sentinel that was partitioned may name an old master for some seconds. The first `find`
        cannot detect that; a `find` after this query can.
        """
        state = await self._in_thread(self._discover_later)
        if state is None:
            return None
        self._epoch = state.epoch
        return self._address(state)

    async def _in_thread(self, query: Callable[[], T]) -> T:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(query, abandon_on_cancel=True, limiter=self._threads)

    def _address(self, state: _MasterState) -> RedisAddress:
        return replace(self._template, host=state.host, port=state.port, path=None)

    def _discover(self) -> _MasterState:
        problems: list[str] = []
        outdated: list[_MasterState] = []
        with contextlib.closing(self._states(problems)) as states:
            for state in states:
                if not state.alive:
                    problems.append("it is down")
                elif state.epoch < self._epoch:
                    outdated.append(state)
                else:
                    return state
        if outdated:
            return max(outdated, key=lambda state: state.epoch)
        raise LinkLostError(f"{self}: {'; '.join(problems)}", "no_master")

    def _discover_later(self) -> _MasterState | None:
        later = [state for state in self._states([]) if state.epoch > self._epoch]
        return max(later, key=lambda state: state.epoch, default=None)

    def _states(self, problems: list[str]) -> Generator[_MasterState, None, None]:
        """The master's state according to each Sentinel that answers.

        redis-py's own `Sentinel.discover_master` does the same, but hides the errors.

        Args:
            problems: receives an error text for each Sentinel that does not answer.
        """
        clients = self._sentinel.sentinels
        try:
            for client in list(clients):
                try:
                    reported = client.sentinel_master(self._master)
                    # Queried after the epoch, so the address is never older than it.
                    address = client.sentinel_get_master_addr_by_name(self._master)
                    state = self._state(reported, *address)
                except RedisError as error:
                    problems.append(str(error))
                except (LookupError, TypeError, ValueError) as error:
                    # The server that answers is no Sentinel.
                    problems.append(f"an answer without meaning: {error!r}")
                else:
                    # Query it first next time.
                    clients.remove(client)
                    clients.insert(0, client)
                    yield state
        finally:
            for client in clients:
                client.close()

    def _state(self, reported: dict[str, Any], host: str, port: int) -> _MasterState:
        # Until all replicas follow a new master, `reported` has its epoch and the old address.
        replaced = (host, port) != (reported["ip"], reported["port"])
        alive = replaced or self._sentinel.check_master_state(reported, self._master)
        return _MasterState(host, port, int(reported["config-epoch"]), alive)


class MasterLink(Link):
    """A link to the master. It is lost when the Sentinels name another one (demoted).

    Args:
        sentinels: queried before connecting, and every few seconds from then on.
        template: credentials, database and TLS of the master.
        on_found: called with the address of the master.
        name: as for a `Multiplexer`.
        timeouts: as for a `Multiplexer`; the time to connect includes the Sentinels' answer.
    """

    def __init__(
        self,
        sentinels: Sentinels,
        template: RedisAddress,
        *,
        on_found: Callable[[RedisAddress], None],
        name: str,
        timeouts: Timeouts,
    ) -> None:
        super().__init__(template, name=name, timeouts=timeouts)
        self._sentinels = sentinels
        self._on_found = on_found
        self._connected = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Find the master, connect, report that as started, and serve until cancelled.

        Raises:
            RedisError: no master is known, or the connection to it failed or was lost.
        """
        connect_s = self._timeouts.connect_s
        deadline = anyio.current_time() + connect_s
        with anyio.CancelScope(deadline=deadline) as scope:
            self._address = await self._sentinels.find()
        if scope.cancelled_caught:
            raise TimeoutError(f"{self._sentinels}: no answer within {connect_s:g} s")
        self._on_found(self._address)
        self._timeouts = replace(self._timeouts, connect_s=deadline - anyio.current_time())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_master, tasks.cancel_scope)
            # Raised below, outside of the group, which would wrap it.
            with contextlib.suppress(RedisError):
                await super().run(task_status=task_status)
            tasks.cancel_scope.cancel()
        assert self._lost is not None
        raise self._lost

    async def _use(self, started: Callable[[], None]) -> None:
        self._connected.set()
        await super()._use(started)

    async def _watch_master(self, scope: anyio.CancelScope) -> None:
        """Declare the link lost when there is a later master, from the connection attempt on.

        The Sentinel that answered first may have been outdated. And a master that hung accepts
        connections when it resumes, unaware that it was replaced.
        """
        while True:
            later = await self._sentinels.find_later()
            # No answer is no loss: the link still works.
            if later is not None and later != self._address:
                self._lose(LinkLostError(f"{self._address}: the master is now {later}", "demoted"))
                scope.cancel()
                return
            if self._connected.is_set():
                await anyio.sleep(_QUERY_PERIOD_S)
            else:
                with anyio.move_on_after(_QUERY_PERIOD_CONNECTING_S):
                    await self._connected.wait()
