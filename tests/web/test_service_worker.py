"""The kept page, in a real browser: what opens when the network is away, hangs, or is upgraded."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from scripts.testbed.browsers import LOST_CONNECTIONS, PATIENCE_MS, BrowserPages
from scripts.testbed.server_process import ServerProcess
from tests.support.stage_pages import open_stage, shows
from tests.support.web_files import WEB_FILES

if TYPE_CHECKING:
    from playwright.sync_api import Page

TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "png": "image/png",
    "svg": "image/svg+xml",
    "webmanifest": "application/manifest+json",
}
# There is no server of sessions behind these pages.
TOLERATED = re.compile(rf"{LOST_CONNECTIONS.pattern}|Failed to load resource|status of \d+")


class House:
    """Serves the files of the page, and can be upgraded, slow, broken or hung.

    Two of the files say of which version they are, so that a page of two halves is noticed.

    Attributes:
        version: of all the files.
        asked: the paths, in order.
        hung: these are not answered before `release`.
        lost: the connection of who asks for these is closed.
        status: what ``/`` is answered with.
        upgrade_after: once this was sent, the version is the next one.
        worker: stands at the end of the worker's file.
    """

    def __init__(self) -> None:
        self.version = 1
        self.asked: list[str] = []
        self.hung: set[str] = set()
        self.lost: set[str] = set()
        self.status = 200
        self.upgrade_after: str | None = None
        self.worker = ""
        self._release = threading.Event()
        house = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                house.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer, or not."""
        path = request.path.partition("?")[0]
        self.asked.append(path)
        if path in self.hung:
            self._release.wait()
        if path in self.lost:
            request.close_connection = True
            return
        body, kind = self._file(path)
        status = self.status if path == "/" else 200 if kind else 404
        if status != 200:
            body, kind = f"<title>{status}</title>".encode(), "text/html"
        request.send_response(status)
        if status == 302:
            request.send_header("Location", "/login")
        request.send_header("Content-Type", kind)
        request.send_header("Cache-Control", "no-cache")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
        if path == self.upgrade_after:
            self.upgrade_after = None
            self.version += 1

    def release(self) -> None:
        """Answer what hangs, and hang no more."""
        self.hung.clear()
        self._release.set()
        self._release = threading.Event()

    def close(self) -> None:
        """End, whatever hangs."""
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def _file(self, path: str) -> tuple[bytes, str]:
        if path == "/login":
            return b'<!doctype html><html lang="en"><title>Log in</title></html>', "text/html"
        name = path.removeprefix("/") or "index.html"
        file = WEB_FILES.get(name)
        if file is None:
            return b"", ""
        text = file.read_bytes()
        if name == "words.js":
            text += f"\nexport const words{self.version} = {self.version};".encode()
        if name == "stage.js":
            text += f"""
                import {{ words{self.version} as words }} from "./words.js";
                document.documentElement.dataset.made = `{self.version} ${{words}}`;""".encode()
        if name == "sw.js":
            text += self.worker.encode()
        return text, TYPES[name.rpartition(".")[2]]


@pytest.fixture
def house() -> Iterator[House]:
    started = House()
    yield started
    started.close()


def alive(page: "Page", version: int) -> None:
    """Wait until the page runs, and is of this version from head to foot."""
    page.wait_for_function(
        "(made) => document.documentElement.dataset.made === made",
        arg=f"{version} {version}",
        timeout=PATIENCE_MS,
    )
    assert page.locator("#session").input_value()


def kept_page(open_page: BrowserPages, house: House) -> "Page":
    """A page that was opened once, and is kept."""
    page = open_page(f"{house.url}/", tolerate=TOLERATED)
    page.evaluate("() => navigator.serviceWorker.ready")
    alive(page, house.version)
    return page


def versions(page: "Page") -> list[list[str]]:
    """The versions of the files in each kept set, the oldest first."""
    found: list[list[str]] = page.evaluate(
        """async () => {
          const found = [];
          for (const name of await caches.keys()) {
            const cache = await caches.open(name);
            const texts = await Promise.all(["/stage.js", "/words.js"].map(
              async (path) => (await cache.match(path))?.text() ?? ""));
            found.push(texts.map((text) => /words(\\d)/.exec(text)?.[1] ?? "none"));
          }
          return found;
        }"""
    )
    return found


def wait_for_versions(page: "Page", wanted: Callable[[list[list[str]]], bool]) -> None:
    """Wait until the kept sets are so; the worker goes on after the page is there."""
    for _ in range(PATIENCE_MS // 100):
        if wanted(versions(page)):
            return
        page.wait_for_timeout(100)
    raise AssertionError(versions(page))


def test_the_page_opens_without_a_network(
    open_page: BrowserPages, start_process: Callable[..., ServerProcess]
) -> None:
    server = start_process()
    ann = open_stage(open_page, server, "Ann", tolerate=LOST_CONNECTIONS)
    ann.evaluate("() => navigator.serviceWorker.ready")
    server.kill()
    ann.reload()
    shows(ann, "#status", re.compile("reconnecting|connecting"))
    server.start()
    shows(ann, "#status", "connected")


def test_service_worker_keeps_all_requested_files(
    open_page: BrowserPages, start_process: Callable[..., ServerProcess]
) -> None:
    server = start_process()
    asked: list[str] = []
    page = open_page()
    page.on("request", lambda request: asked.append(request.url.removeprefix(server.url)))
    page.goto(f"{server.url}/")
    page.evaluate("() => navigator.serviceWorker.ready")
    keys = page.evaluate(
        """async () => {
          const [name, ...others] = await caches.keys();
          if (others.length) throw new Error(`${others}`);
          const requests = await (await caches.open(name)).keys();
          return requests.map(({ url }) => new URL(url).pathname);
        }"""
    )
    assert {"/", "/stage.js", "/stage.css"} <= set(asked) - {"/sw.js"} <= set(keys)


@pytest.mark.slow
def test_hanging_server_delays_the_kept_page_once(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    house.hung = {"/", *(f"/{name}" for name in WEB_FILES)}
    house.asked.clear()
    page.reload()
    alive(page, 1)
    # Nothing else was asked for, so nothing else was waited for.
    assert set(house.asked) - {"/sw.js"} == {"/"}


@pytest.mark.parametrize(
    "status",
    [
        502,
        pytest.param(500, marks=pytest.mark.slow),
        pytest.param(503, marks=pytest.mark.slow),
    ],
)
def test_gateway_error_opens_the_kept_page(
    open_page: BrowserPages, house: House, status: int
) -> None:
    page = kept_page(open_page, house)
    house.status = status
    page.reload()
    alive(page, 1)


@pytest.mark.slow
def test_query_does_not_change_the_kept_page(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    page.goto(f"{house.url}/?from=a+friend#song")
    alive(page, 1)
    assert versions(page) == [["1", "1"]]
    house.lost = {"/"}
    page.goto(f"{house.url}/?from=another#song")
    alive(page, 1)


def test_an_upgrade_is_seen_at_once(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    for version in (2, 3, 2):
        house.version = version
        page.reload()
        alive(page, version)
    # Only the latest two sets are kept; open pages may need the older one.
    assert versions(page) == [["3", "3"], ["2", "2"]]
    house.lost = {"/"}
    page.reload()
    alive(page, 2)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["/words.js", "/stage.js", "/stage.css"])
def test_slow_upgrade_is_shown_at_the_next_load(
    open_page: BrowserPages, house: House, file: str
) -> None:
    page = kept_page(open_page, house)
    house.version = 2
    house.hung = {file}
    page.reload()
    alive(page, 1)
    house.release()
    wait_for_versions(page, lambda found: found[-1] == ["2", "2"])
    page.reload()
    alive(page, 2)


@pytest.mark.slow
def test_network_lost_during_an_upgrade_keeps_the_old_page(
    open_page: BrowserPages, house: House
) -> None:
    page = kept_page(open_page, house)
    house.version = 2
    house.lost = {"/words.js"}
    page.reload()
    alive(page, 1)
    assert versions(page) == [["1", "1"]]


@pytest.mark.parametrize("file", ["/stage.js", pytest.param("/words.js", marks=pytest.mark.slow)])
def test_mixed_versions_are_not_kept(open_page: BrowserPages, house: House, file: str) -> None:
    page = kept_page(open_page, house)
    # A file of the version before has changed already, so that there is something to keep.
    house.version = 2
    house.upgrade_after = file
    page.reload()
    page.wait_for_function("() => document.documentElement.dataset.made", timeout=PATIENCE_MS)
    made = page.evaluate("() => document.documentElement.dataset.made.split(' ')")
    assert made[0] == made[1]
    assert all(stage_js == words_js for stage_js, words_js in versions(page))
    page.reload()
    alive(page, 3)


@pytest.mark.slow
@pytest.mark.parametrize("status", [302, 403])
def test_redirect_or_denial_is_shown_and_not_kept(
    open_page: BrowserPages, house: House, status: int
) -> None:
    page = kept_page(open_page, house)
    house.status = status
    page.reload()
    assert page.title() == {302: "Log in", 403: "403"}[status]
    house.status = 200
    page.goto(f"{house.url}/")
    alive(page, 1)
    assert versions(page) == [["1", "1"]]


@pytest.mark.slow
def test_service_worker_ignores_other_pages(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    page.goto(f"{house.url}/login")
    assert page.title() == "Log in"
    house.version = 2
    text = page.evaluate("async () => (await fetch('/words.js')).text()")
    assert "words2" in text


@pytest.mark.slow
def test_new_service_worker_waits_for_open_pages(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    page.reload()
    alive(page, 1)
    house.version = 2
    house.worker = "// Another one."
    found = page.evaluate(
        """async () => {
          const before = navigator.serviceWorker.controller;
          const registration = await navigator.serviceWorker.getRegistration();
          await registration.update();
          const fresh = registration.installing ?? registration.waiting ?? registration.active;
          while (["parsed", "installing"].includes(fresh.state)) {
            await new Promise((resolve) => {
              fresh.addEventListener("statechange", resolve, { once: true });
            });
          }
          // Time enough for one that does not wait.
          for (let asked = 0; asked < 3; asked += 1) await registration.update();
          return [fresh.state, before === navigator.serviceWorker.controller, before.state];
        }"""
    )
    assert found == ["installed", True, "activated"]
    page.reload()
    alive(page, 2)


@pytest.mark.slow
def test_two_pages_at_once(open_page: BrowserPages, house: House) -> None:
    page = kept_page(open_page, house)
    house.version = 2
    with ExitStack() as stack:
        others = [page.context.new_page() for _ in range(3)]
        for other in others:
            stack.callback(other.close)
            other.goto(f"{house.url}/", wait_until="commit")
        for other in others:
            alive(other, 2)
    wait_for_versions(page, lambda found: found[-1] == ["2", "2"])
