"""The pages under axe-core, in both schemes and every state that people meet."""

import pytest

from scripts.testbed.browsers import LOST_CONNECTIONS, BrowserPages
from tests.support.accessibility import violations
from tests.support.stage_pages import PHONE, Start, enter, shows

SCHEMES = ["dark", pytest.param("light", marks=pytest.mark.slow)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stage(open_page: BrowserPages, start_process: Start, scheme: str) -> None:
    server = start_process()
    ann = open_page(f"{server.url}/#song", color_scheme=scheme)
    assert violations(ann) == []
    enter(ann, "Ann")
    ann.get_by_label("Message to the band").fill("Verse 2")
    ann.get_by_role("button", name="Show").click()
    ann.get_by_label("Say something").fill("Hello")
    ann.get_by_role("button", name="Send", exact=True).click()
    # A follower, with controls that are greyed; and the leader with a request on the screen.
    bob = enter(open_page(f"{server.url}/#song", color_scheme=scheme, **PHONE), "Bob")
    bob.get_by_role("button", name="Ask for the lead").click()
    shows(bob, "#news", "You asked for the lead.")
    ann.locator("#requests p").wait_for()
    assert violations(ann) == []
    for name in ("Beat", "Band", "Chat", "Device"):
        bob.locator("#views").get_by_role("button", name=name).click()
        assert violations(bob) == []
    ann.get_by_role("button", name="Invite").click()
    assert violations(ann) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stage_in_trouble(open_page: BrowserPages, start_process: Start, scheme: str) -> None:
    server = start_process(MAX_MEMBERS="1")
    lost = LOST_CONNECTIONS
    ann = enter(open_page(f"{server.url}/#song", color_scheme=scheme, tolerate=lost), "Ann")
    bob = open_page(f"{server.url}/#song", color_scheme=scheme)
    bob.get_by_role("button", name="Join").click()
    bob.locator("#problem").wait_for()
    assert violations(bob) == []
    server.drain()
    ann.locator("#banner").wait_for()
    assert violations(ann) == []


def test_keyboard_alone_joins_and_plays(open_page: BrowserPages, start_process: Start) -> None:
    """From the address to a playing song with the keyboard alone."""
    server = start_process()
    page = open_page(f"{server.url}/#song")
    keys = page.keyboard
    page.get_by_label("Your name").focus()
    keys.type("Ann")
    keys.press("Enter")
    page.locator("#stage").wait_for()
    for _ in range(20):
        keys.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "play":
            break
    keys.press("Enter")
    shows(page, "#play", "Pause")
    # And where it is can be seen.
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
