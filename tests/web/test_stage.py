"""The stage, as musicians use it: real pages in a real browser on real servers."""

import io
import re
from typing import TYPE_CHECKING

import jwt
import pytest
import zxingcpp
from PIL import Image

from scripts.testbed.browsers import BrowserPages
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    pass
from tests.support.stage_pages import (
    PHONE,
    WATCH_BEATS,
    Start,
    open_stage,
    shows,
    until,
    wait_for_beats,
)


def test_two_phones_play_together(open_page: BrowserPages, server_process: ServerProcess) -> None:
    ann = open_stage(open_page, server_process, "Ann", **PHONE)
    assert ann.url == f"{server_process.url}/#song"
    bob = open_stage(open_page, server_process, "Bob", **PHONE)
    shows(ann, "#news", "Bob joined.")
    shows(ann, "#reason", "You lead: the band follows.")
    shows(bob, "#reason", "Only Ann, who leads, can use these.")
    assert ann.locator("#play").is_enabled()
    assert bob.locator("#play").is_disabled()

    bob.evaluate(WATCH_BEATS)
    ann.get_by_label("Count-in").select_option("1")
    ann.get_by_role("button", name="Play").click()
    shows(bob, "#state", "starting")
    shows(bob, "#state", "playing")
    shows(ann, "#play", "Pause")
    counted = [beat for beat in wait_for_beats(bob, 6) if beat["countIn"]]
    assert counted
    assert all(beat["beat"] < 0 for beat in counted)

    ann.get_by_role("button", name="Pause").click()
    shows(bob, "#state", "paused")
    assert bob.locator("#position").inner_text() == ann.locator("#position").inner_text()
    ann.get_by_role("button", name="Stop").click()
    shows(bob, "#position", "0:00.0")
    shows(bob, "#barNumber", "Bar 1")


def test_the_leader_conducts(open_page: BrowserPages, server_process: ServerProcess) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    ann.get_by_label("BPM", exact=True).fill("90")
    ann.get_by_label("BPM", exact=True).press("Enter")
    shows(bob, "#tempo", "90")
    shows(bob, "#news", "Ann set 90 BPM.")
    ann.get_by_label("Beats/bar").fill("3")
    ann.get_by_label("Beats/bar").press("Tab")
    until(bob, "() => document.querySelectorAll('#ring path').length === 3")
    shows(bob, "#news", "Ann set beats/bar to 3.")
    ann.get_by_role("button", name="One BPM faster").click()
    shows(bob, "#tempo", "91")
    ann.get_by_label("To bar").fill("5")
    ann.locator("#barForm button", has_text="Go").click()
    shows(bob, "#barNumber", "Bar 5")
    # The scrubber, by the keyboard as by a thumb.
    ann.get_by_label("Position in the song").fill("60")
    shows(bob, "#position", "1:00.0")
    until(bob, "() => document.getElementById('scrubber').ariaValueText === '1:00'")
    ann.get_by_label("Message to the band").fill("Verse 2, softly")
    ann.get_by_role("button", name="Show").click()
    shows(bob, "#headline", "Verse 2, softly")
    # The space bar plays, but not where it writes.
    ann.get_by_label("Say something").press("Space")
    shows(ann, "#play", "Play")
    ann.evaluate("() => document.activeElement.blur()")
    ann.keyboard.press("Space")
    shows(bob, "#state", "playing")


@pytest.mark.slow
def test_tapping_sets_the_tempo(open_page: BrowserPages, server_process: ServerProcess) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    # Events carry their own times, so that a busy page does not falsify them.
    ann.evaluate(
        """() => [0, 400, 800, 1200].forEach((at) => {
          const tap = new PointerEvent("pointerdown", { bubbles: true });
          Object.defineProperty(tap, "timeStamp", { value: 5000 + at });
          document.getElementById("tap").dispatchEvent(tap);
        })"""
    )
    shows(bob, "#tempo", "150")


def test_chat_is_text_and_unread_is_shown(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "<b>Bob</b>", **PHONE)
    markup = '<img src=x onerror="alert(1)"> hello'
    ann.get_by_label("Say something").fill(markup)
    ann.get_by_role("button", name="Send", exact=True).click()
    until(ann, "() => document.getElementById('text').value === ''")
    shows(bob, "#chat p", re.compile(re.escape("Ann" + markup)))
    dot = bob.locator("#chatNews")
    assert dot.is_visible()
    bob.locator("#views").get_by_role("button", name="Chat").click()
    assert dot.is_hidden()
    assert bob.locator("#view-chat").is_visible()
    assert bob.locator("#view-play").is_hidden()
    shows(ann, "#members li:nth-child(2) .name", "<b>Bob</b>")


@pytest.mark.slow
def test_members_are_shown_with_their_quality(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    open_stage(open_page, server_process, "Bob")
    until(
        ann,
        """() => [...document.querySelectorAll("#members .detail")].filter((each) =>
          /^\\w+, \\d+ ms · beat ±[\\d.]+ ms$/.test(each.textContent)
        ).length === 2""",
    )
    shows(ann, "#together", re.compile(r"^all within ±[\d.]+ ms$"))
    shows(ann, "#bandTitle", "Band (2)")


def test_the_invitation_can_be_scanned(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann", session="Our.Song_2-b", **PHONE)
    ann.get_by_role("button", name="Invite").click()
    picture = Image.open(io.BytesIO(ann.locator("#qr").screenshot()))
    codes = zxingcpp.read_barcodes(picture)
    assert [code.text for code in codes] == [f"{server_process.url}/#Our.Song_2-b"]
    assert ann.locator("#localOnly").is_visible()
    bob = open_page(codes[0].text)
    assert bob.get_by_label("Session").input_value() == "Our.Song_2-b"
    ann.keyboard.press("Escape")
    assert ann.locator("#invitation").is_hidden()


@pytest.mark.slow
def test_pass_is_requested_or_read_from_the_link(
    open_page: BrowserPages, start_process: Start
) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    server = start_process(JOIN_SECRET=secret)
    token = jwt.encode({"sub": "ann", "session": "song", "exp": 4_000_000_000}, secret)
    ann = open_page(f"{server.url}/#song")
    ann.get_by_role("button", name="Join").click()
    shows(ann, "#problem", re.compile("needs a pass"))
    ann.get_by_label("Pass").fill(token)
    ann.get_by_role("button", name="Join").click()
    shows(ann, "#status", "connected")

    bob = open_page(f"{server.url}/#song&pass={token}")
    bob.get_by_role("button", name="Join").click()
    shows(bob, "#status", "connected")
    # The pass is in neither the address bar nor the invitation.
    assert bob.url == f"{server.url}/#song"
    bob.get_by_role("button", name="Invite").click()
    assert bob.locator("#link").inner_text() == f"{server.url}/#song"
    bob.reload()
    shows(bob, "#status", "connected")


@pytest.mark.slow
def test_draft_survives_changes_of_others(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    ann.get_by_label("Message to the band").fill("Bridge, then")
    ann.evaluate("() => document.activeElement.blur()")
    bob.get_by_label("Say something").fill("hello")
    bob.get_by_role("button", name="Send", exact=True).click()
    shows(ann, "#chat p", re.compile("hello"))
    assert ann.get_by_label("Message to the band").input_value() == "Bridge, then"


@pytest.mark.slow
def test_rapid_clicks_all_count(open_page: BrowserPages, server_process: ServerProcess) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    ann.evaluate("() => { for (let i = 0; i < 5; i++) document.getElementById('faster').click(); }")
    shows(bob, "#tempo", "125")


@pytest.mark.slow
def test_bar_of_the_tempo_that_comes(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_role("button", name="Play").click()
    shows(ann, "#state", "playing")
    ann.get_by_label("Changes").select_option("bar")
    ann.get_by_label("BPM", exact=True).fill("60")
    ann.get_by_label("BPM", exact=True).press("Enter")
    shows(ann, "#news", "Ann set 60 BPM.")
    ann.get_by_label("To bar").fill("9")
    ann.locator("#barForm button", has_text="Go").click()
    shows(ann, "#barNumber", "Bar 9")


@pytest.mark.slow
def test_link_to_another_session_keeps_the_current_one(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    ann.evaluate("() => { location.hash = '#other&pass=secret'; }")
    shows(ann, "#news", "To go to other, leave this one first.")
    assert ann.url == f"{server_process.url}/#song"
    # An address without a session is still that of one's place.
    ann.evaluate("() => history.replaceState(null, '', '/')")
    ann.reload()
    shows(ann, "#reason", "You lead: the band follows.")


@pytest.mark.slow
def test_bidirectional_name_is_isolated(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    open_stage(open_page, server_process, "\u202eevil")
    bob = open_stage(open_page, server_process, "Bob")
    shows(bob, "#reason", "Only \u2068\u202eevil\u2069, who leads, can use these.")
