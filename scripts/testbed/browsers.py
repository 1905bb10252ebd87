"""A real Chromium for tests: one for a module, a fresh context for each page.

The fixtures are in conftest.py: `browser`, `open_page`. What uses them is a plain function, as
playwright's synchronous interface wants it, and its servers are processes
(`scripts.testbed.server_process`).
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

INSTALL_BROWSER = (
    "no browser: install Debian's chromium (apt install chromium) or name another Chromium in "
    "BROWSER, and pip install playwright"
)

INSTALL_AXE = "no axe-core: npm install axe-core, and name its axe.min.js in AXE_CORE"

# What Chromium writes to the console when a connection fails, whatever the page makes of it.
LOST_CONNECTIONS = re.compile(r"WebSocket connection to '[^']*' failed|net::ERR_")

# Generous, because CI shares its cores. Never asserted on.
PATIENCE_MS = 20_000

_HTML = "text/html"
# Without an icon of its own a page asks for /favicon.ico, and complains.
_BLANK = '<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>Blank</title></html>'

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = [
    # CI runs as root, where the sandbox cannot work; the pages are our own.
    "--no-sandbox",
    # Containers have a small /dev/shm, and a page that fills it dies.
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
    # A page that playwright made up has no address, and so is taken for a stranger from outside.
    "--disable-features=LocalNetworkAccessChecks",
    # A headless page is never in front: none of the tests is about what that does to timers.
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
]


def find_browser() -> Path | None:
    """The Chromium that BROWSER names, else the first one on PATH; None without playwright."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return None
    for name in (os.environ.get("BROWSER"), *_NAMES):
        found = name and shutil.which(name)
        if found:
            return Path(found)
    return None


@contextmanager
def chromium(executable: Path) -> Iterator["Browser"]:
    """A headless Chromium that runs until the end of the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_ARGUMENTS)
        yield browser
        browser.close()


def violations(page: "Page") -> list[str]:
    """What axe-core finds wrong with a page, by WCAG 2.2 A and AA and its own best practices.

    Skips where there is no axe-core; fails where there must be.
    """
    script = os.environ.get("AXE_CORE")
    if not script:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(INSTALL_AXE)
        pytest.skip(INSTALL_AXE)
    # Around the page's policy, which lets no foreign script in.
    page.evaluate(Path(script).read_text())
    found = page.evaluate("() => window.axe.run()")
    assert found["passes"], "axe looked at nothing"
    return [
        f"{rule['id']} {node['target']}: {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


class Pages:
    """Opens pages, each in a context of its own, and remembers what they complain about.

    ``pages(url)`` opens one; with options of playwright's ``new_context`` as a phone, in the dark,
    and so on.

    Attributes:
        problems: what the console called an error, and exceptions that nobody caught.
    """

    def __init__(self, browser: "Browser") -> None:
        self.problems: list[str] = []
        self._browser = browser
        self._contexts: list[BrowserContext] = []

    def __call__(
        self,
        url: str | None = None,
        *,
        tolerate: re.Pattern[str] | None = None,
        **options: Any,
    ) -> "Page":
        """Open a page, at ``url`` unless None.

        Args:
            tolerate: errors that the test causes on purpose, as `LOST_CONNECTIONS`.
            options: of the context.
        """
        context = self._browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        self._contexts.append(context)
        page = context.new_page()

        def complained(text: str) -> None:
            if tolerate is None or not tolerate.search(text):
                self.problems.append(text)

        def on_console(message: "ConsoleMessage") -> None:
            if message.type == "error":
                complained(f"{message.text} ({message.location.get('url')})")

        page.on("console", on_console)
        page.on("pageerror", lambda error: complained(str(error)))
        page.on("crash", lambda _: complained("the page crashed"))
        if url is not None:
            page.goto(url)
        return page

    def blank(self, origin: str, *files: Path, tolerate: re.Pattern[str] | None = None) -> "Page":
        """Open an empty page of ``origin``, which may import that server's modules.

        Args:
            origin: as ``http://127.0.0.1:3001``.
            files: what ``origin`` also has, under their bare names; with these, it need not exist.
            tolerate: as in a call.
        """
        page = self(tolerate=tolerate)
        page.route(f"{origin}/blank", lambda route: route.fulfill(body=_BLANK, content_type=_HTML))
        for file in files:
            _serve(page, f"{origin}/{file.name}", file)
        page.goto(f"{origin}/blank")
        return page

    def close(self) -> None:
        """Close all pages."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()


def evaluate(page: "Page", function: str, argument: object = None) -> Any:
    """What a JavaScript function returns in a page, or what its promise brings.

    Args:
        argument: of the function; anything that JSON can say.

    Raises:
        playwright.sync_api.Error: it threw, or its promise takes longer than `PATIENCE_MS`.
    """
    late = f"setTimeout(() => reject(new Error('no result in {PATIENCE_MS} ms')), {PATIENCE_MS})"
    return page.evaluate(
        f"(argument) => Promise.race([({function})(argument), new Promise((_, reject) => {late})])",
        argument,
    )


def _serve(page: "Page", url: str, file: Path) -> None:
    page.route(url, lambda route: route.fulfill(path=file))
