#!/usr/bin/env python3
"""Make the README's pictures with a real server, real pages, and a Redis that is killed.

Needs the test extra, a Chromium and a redis-server.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.testbed.browsers import INSTALL_BROWSER, BrowserPages, chromium, find_browser
from scripts.testbed.redis_server import RedisServer
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = Path(__file__).resolve().parent / "screenshots"
BAND = ["Ann (keys)", "Bob (drums)", "Chiara (bass)", "Dele (voice)"]
CHAT = [
    ("Bob (drums)", "click is on, ready when you are"),
    ("Dele (voice)", "from the bridge?"),
    ("Ann (keys)", "from the top, two bars in"),
]
WIDE = {"width": 1200, "height": 860}
PHONE = {"width": 390, "height": 844}


def join(pages: BrowserPages, server: ServerProcess, name: str, **options: Any) -> "Page":  # noqa: ANN401  # playwright's
    """Open a page with playwright's context options, and join the session."""
    page = pages(f"{server.url}/#amber-organ-42", **options)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Join").click()
    page.locator("#stage").wait_for()
    return page


def send_chat(page: "Page", text: str) -> None:
    """Send a chat message from a page."""
    page.evaluate("document.querySelector('#views [data-view=chat]').click()")
    page.get_by_label("Say something").fill(text)
    page.get_by_label("Say something").press("Enter")
    page.wait_for_function("() => document.getElementById('text').value === ''")
    page.evaluate("document.querySelector('#views [data-view=play]').click()")


def wait_for_beat(page: "Page", place: int) -> None:
    """Wait until the page has just shown this beat of a bar."""
    page.evaluate(
        """(place) => new Promise((shown) => {
          document.addEventListener("beat", function onBeat({ detail }) {
            if (detail.place !== place) return;
            document.removeEventListener("beat", onBeat);
            requestAnimationFrame(() => requestAnimationFrame(shown));
          });
        })""",
        place,
    )


def take_session_pictures(pages: BrowserPages, server: ServerProcess) -> None:
    """Take the pictures of a playing session: the leader's wide screen and a follower's phone."""
    ann = join(pages, server, BAND[0], viewport=WIDE, color_scheme="dark")
    others = [
        join(pages, server, name, viewport=PHONE, color_scheme="dark", device_scale_factor=2)
        for name in BAND[1:]
    ]
    ann.get_by_label("Message to the band").fill("Verse 2: softly, then all in")
    ann.get_by_role("button", name="Show").click()
    by_name = dict(zip(BAND, [ann, *others], strict=True))
    for name, text in CHAT:
        send_chat(by_name[name], text)
    ann.get_by_label("BPM", exact=True).fill("96")
    ann.get_by_label("BPM", exact=True).press("Enter")
    ann.get_by_label("To bar").fill("17")
    ann.locator("#barForm button", has_text="Go").click()
    ann.get_by_role("button", name="Play").click()
    # All clock errors are known, to within a few milliseconds.
    ann.wait_for_function(
        "() => /^all within ±[0-4][.]/.test(document.getElementById('together').textContent)",
        timeout=60_000,
    )
    ann.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    wait_for_beat(ann, 0)
    ann.screenshot(path=PICTURES / "stage.png")
    wait_for_beat(others[0], 2)
    others[0].screenshot(path=PICTURES / "phone.png")


def take_outage_picture(pages: BrowserPages, server: ServerProcess, redis: RedisServer) -> None:
    """Take the picture of the operator's screen during the second outage of Redis."""
    ops = pages(f"{server.url}/ops", viewport=WIDE, color_scheme="dark")
    time.sleep(20)  # The charts need history.
    redis.kill()
    time.sleep(8)
    redis.start()
    time.sleep(25)
    redis.kill()
    time.sleep(6)
    ops.screenshot(path=PICTURES / "ops.png", full_page=True)


def main() -> int:
    """Take all pictures; return 1 without a browser."""
    executable = find_browser()
    if executable is None:
        print(INSTALL_BROWSER, file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        server = stack.enter_context(ServerProcess(REDIS_ENABLED="true", REDIS_URL=redis.url()))
        pages = BrowserPages(stack.enter_context(chromium(executable)))
        take_session_pictures(pages, server)
        take_outage_picture(pages, server, redis)
        pages.close()
    print(f"Pictures in {PICTURES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
