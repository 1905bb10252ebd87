"""A real headless Chromium for tests and screenshots, with a fresh context for each page.

The functions use playwright's synchronous interface. Servers for the pages therefore run in
processes of their own (`scripts.testbed.server_process`).
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

INSTALL_BROWSER = (
    "no browser: install Debian's chromium (apt install chromium) or name another Chromium in "
    "BROWSER, and pip install playwright"
)

INSTALL_AXE = "no axe-core: npm install axe-core, and name its axe.min.js in AXE_CORE"

# Chromium's console messages for a failed connection, whether or not the page handles it.
LOST_CONNECTIONS = re.compile(r"WebSocket connection to '[^']*' failed|net::ERR_")

# Generous, because CI shares its cores. No test asserts this time.
PATIENCE_MS = 20_000

_HTML = "text/html"
# Without an icon of its own a page requests /favicon.ico, and logs an error.
_BLANK = '<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>Blank</title></html>'

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = [
    # CI runs as root, where the sandbox cannot work. All pages are our own.
    "--no-sandbox",
    # Containers have a small /dev/shm. A page that fills it crashes.
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
    # Chromium treats a page fulfilled by playwright as a foreign origin, because it has no address.
    "--disable-features=LocalNetworkAccessChecks",
    # A headless page is never in the foreground. Keep its timers at full speed.
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
]


def find_browser() -> Path | None:
    """The Chromium that BROWSER names, else the first one on PATH; None without playwright."""
    try:
        import playwright.sync_api  # noqa: F401  # only whether it is installed
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


def find_axe() -> Path | None:
    """The ``axe.min.js`` that AXE_CORE names; None without one."""
    script = os.environ.get("AXE_CORE")
    return Path(script) if script else None


def accessibility_violations(page: "Page", script: Path) -> list[str]:
    """Accessibility violations that axe-core finds: WCAG 2.2 A and AA, and its best practices.

    Args:
        page: the page to check.
        script: the path of ``axe.min.js``.
    """
    # Evaluated by playwright, because the page's policy admits no foreign script.
    page.evaluate(script.read_text())
    found = page.evaluate("() => window.axe.run()")
    assert found["passes"], "axe-core ran no rule"
    return [
        f"{rule['id']} {node['target']}: {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


class BrowserPages:
    """Opens pages, each in a context of its own, and collects their console errors.

    ``pages(url)`` opens one. Options of playwright's ``new_context`` set the viewport, the colour
    scheme and so on.

    Attributes:
        problems: console errors and uncaught exceptions.
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
        **options: Any,  # noqa: ANN401  # forty options of playwright
    ) -> "Page":
        """Open a page, and load ``url`` unless it is None.

        Args:
            url: the address to load.
            tolerate: errors that the test causes on purpose, such as `LOST_CONNECTIONS`.
            options: passed to playwright's ``new_context``.
        """
        context = self._browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        self._contexts.append(context)
        page = context.new_page()

        def add_problem(text: str) -> None:
            if tolerate is None or not tolerate.search(text):
                self.problems.append(text)

        def on_console(message: "ConsoleMessage") -> None:
            if message.type == "error":
                add_problem(f"{message.text} ({message.location.get('url')})")

        page.on("console", on_console)
        page.on("pageerror", lambda error: add_problem(str(error)))
        page.on("crash", lambda _: add_problem("the page crashed"))
        if url is not None:
            page.goto(url)
        return page

    def blank(self, origin: str, *files: Path, tolerate: re.Pattern[str] | None = None) -> "Page":
        """Open an empty page of ``origin``, which may import that server's modules.

        Args:
            origin: scheme, host and port, such as ``http://127.0.0.1:3001``.
            files: served by ``origin`` under their bare names. With these, no server need exist.
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


def evaluate(page: "Page", function: str, argument: object = None) -> Any:  # noqa: ANN401  # any JSON
    """Run a JavaScript function in a page; return its result, or the result of its promise.

    Args:
        page: where it runs.
        function: its source.
        argument: its only argument; any JSON value.

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
