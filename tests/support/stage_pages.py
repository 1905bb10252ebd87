"""The stage in a browser, as musicians use it: open it, join, and wait for what it shows."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scripts.testbed.browsers import PATIENCE_MS, BrowserPages
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}

Start = Callable[..., ServerProcess]

# Collects the beats that the light shows.
WATCH_BEATS = """() => {
  window.beats = [];
  document.addEventListener("beat", ({ detail }) => window.beats.push(detail));
}"""


def enter(page: "Page", name: str) -> "Page":
    """Fill in the form, as somebody does who has opened the link."""
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Join").click()
    page.locator("#stage").wait_for()
    return page


def open_stage(open_page: BrowserPages, server: ServerProcess, name: str, **options: Any) -> "Page":
    """A page whose owner has joined the session ``song``."""
    session = options.pop("session", "song")
    return enter(open_page(f"{server.url}/#{session}", **options), name)


def shows(page: "Page", selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element shows this."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=PATIENCE_MS)


def until(page: "Page", script: str) -> None:
    """Wait until an expression is true in the page."""
    page.wait_for_function(script, timeout=PATIENCE_MS)


def wait_for_beats(page: "Page", count: int) -> list[dict[str, Any]]:
    """The beats that the light has shown since `WATCH_BEATS`, at least so many."""
    until(page, f"() => window.beats.length >= {count}")
    beats: list[dict[str, Any]] = page.evaluate("() => window.beats")
    return beats


def assert_in_step(beats: list[dict[str, Any]]) -> None:
    """No beat missing, none shown twice."""
    numbers = [beat["beat"] for beat in beats]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
