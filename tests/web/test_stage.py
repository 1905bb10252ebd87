"""The stage, as musicians use it: real pages in a real browser on real servers."""

import io
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import zxingcpp
from PIL import Image

from scripts.testbed.browsers import LOST_CONNECTIONS, PATIENCE_MS, Pages
from scripts.testbed.network import Network
from scripts.testbed.redis_server import RedisServer
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


def stage(open_page: Pages, server: ServerProcess, name: str, **options: Any) -> "Page":
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


@pytest.fixture
def house(start_process: Start) -> ServerProcess:
    """A server without Redis."""
    return start_process()


@pytest.fixture
def redis_house(start_process: Start, redis_server: RedisServer) -> ServerProcess:
    """A server with a Redis of its own."""
    return start_process(REDIS_ENABLED="true", REDIS_URL=redis_server.url())


def test_two_phones_play_together(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann", **PHONE)
    assert ann.url == f"{house.url}/#song"
    bob = stage(open_page, house, "Bob", **PHONE)
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


def test_the_leader_conducts(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
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
def test_tapping_sets_the_tempo(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    # Events carry their own times, so that a busy page does not falsify them.
    ann.evaluate(
        """() => [0, 400, 800, 1200].forEach((at) => {
          const tap = new PointerEvent("pointerdown", { bubbles: true });
          Object.defineProperty(tap, "timeStamp", { value: 5000 + at });
          document.getElementById("tap").dispatchEvent(tap);
        })"""
    )
    shows(bob, "#tempo", "150")


def test_the_lead_is_asked_for_refused_and_handed_over(
    open_page: Pages, house: ServerProcess
) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    bob.get_by_role("button", name="Ask for the lead").click()
    shows(bob, "#news", "You asked for the lead.")
    ann.get_by_role("button", name="Not now").click()
    shows(bob, "#news", "Ann keeps the lead for now.")
    ann.locator("#requests p").wait_for(state="detached")

    bob.get_by_role("button", name="Ask for the lead").click()
    ann.locator("#requests").get_by_role("button", name="Hand over").click()
    shows(bob, "#news", "You were given the lead.")
    shows(ann, "#reason", "Only Bob, who leads, can use these.")
    assert bob.locator("#play").is_enabled()
    assert ann.locator("#play").is_disabled()
    # Back, from the list of members; then by giving it up.
    bob.get_by_role("button", name="Hand over the lead to Ann").click()
    shows(ann, "#reason", "You lead: the band follows.")
    ann.get_by_role("button", name="Give up the lead").click()
    shows(bob, "#reason", "You lead: the band follows.")


@pytest.mark.slow
def test_the_lead_can_be_taken_where_it_is_open(open_page: Pages, start_process: Start) -> None:
    server = start_process(LEADERSHIP="open")
    ann = stage(open_page, server, "Ann")
    bob = stage(open_page, server, "Bob")
    bob.get_by_role("button", name="Take the lead").click()
    shows(bob, "#reason", "You lead: the band follows.")
    shows(ann, "#news", "Bob took the lead.")


@pytest.mark.slow
def test_a_lead_that_is_held_cannot_be_taken(open_page: Pages, house: ServerProcess) -> None:
    stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    bob.get_by_role("button", name="Take the lead").click()
    shows(bob, "#news", "Somebody leads: ask for the lead.")


@pytest.mark.slow
def test_the_lead_of_somebody_away_is_free(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    ann.close()
    shows(bob, "#reason", "Ann leads, and is away.")
    bob.get_by_role("button", name="Lead now").click()
    shows(bob, "#reason", "You lead: the band follows.")


def test_chat_is_text_and_unread_is_shown(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "<b>Bob</b>", **PHONE)
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
def test_members_are_shown_with_their_quality(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    stage(open_page, house, "Bob")
    until(
        ann,
        """() => [...document.querySelectorAll("#members .detail")].filter((each) =>
          /^\\w+, \\d+ ms · beat ±[\\d.]+ ms$/.test(each.textContent)
        ).length === 2""",
    )
    shows(ann, "#together", re.compile(r"^all within ±[\d.]+ ms$"))
    shows(ann, "#bandTitle", "Band (2)")


@pytest.mark.slow
def test_a_lost_network_is_resumed_by_itself(
    open_page: Pages, house: ServerProcess, network_to: Callable[[int], Network]
) -> None:
    network = network_to(house.port)
    ann = enter(open_page(f"{network.url}/#song", tolerate=LOST_CONNECTIONS), "Ann")
    bob = stage(open_page, house, "Bob")
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_role("button", name="Play").click()
    shows(ann, "#state", "playing")
    ann.evaluate(WATCH_BEATS)
    network.cut()
    shows(ann, "#banner", re.compile("^Connection lost"))
    assert ann.locator("#play").is_disabled()
    wait_for_beats(ann, 4)
    network.heal()
    shows(ann, "#status", "connected")
    shows(ann, "#banner", "")
    shows(ann, "#reason", "You lead: the band follows.")
    shows(bob, "#bandTitle", "Band (2)")
    assert_in_step(wait_for_beats(ann, 8))


def assert_in_step(beats: list[dict[str, Any]]) -> None:
    """No beat missing, none shown twice."""
    numbers = [beat["beat"] for beat in beats]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.slow
def test_redis_dies_and_no_beat_is_missed(
    open_page: Pages, redis_house: ServerProcess, redis_server: RedisServer
) -> None:
    ann = stage(open_page, redis_house, "Ann")
    bob = stage(open_page, redis_house, "Bob")
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_label("BPM", exact=True).fill("240")
    ann.get_by_label("BPM", exact=True).press("Enter")
    ann.get_by_role("button", name="Play").click()
    for page in (ann, bob):
        shows(page, "#state", "playing")
        page.evaluate(WATCH_BEATS)
        wait_for_beats(page, 4)
    redis_server.kill()
    for page in (ann, bob):
        shows(page, "#banner", re.compile("^The server lost its storage.* nothing is lost"))
        wait_for_beats(page, 8)
    ann.get_by_label("Message to the band").fill("Still here")
    ann.get_by_role("button", name="Show").click()
    shows(bob, "#headline", "Still here")
    redis_server.start()
    for page in (ann, bob):
        shows(page, "#banner", "")
        before = page.evaluate("() => window.beats.length")
        assert_in_step(wait_for_beats(page, before + 8))
    shows(bob, "#headline", "Still here")


@pytest.mark.slow
def test_the_server_is_restarted(open_page: Pages, redis_house: ServerProcess) -> None:
    ann = stage(open_page, redis_house, "Ann", tolerate=LOST_CONNECTIONS)
    bob = stage(open_page, redis_house, "Bob", tolerate=LOST_CONNECTIONS)
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_role("button", name="Play").click()
    shows(bob, "#state", "playing")
    bob.evaluate(WATCH_BEATS)
    redis_house.stop()
    shows(ann, "#banner", re.compile("coming back by itself|comes back by itself"))
    wait_for_beats(bob, 3)
    redis_house.start()
    for page in (ann, bob):
        shows(page, "#status", "connected")
    shows(ann, "#reason", "You lead: the band follows.")
    shows(bob, "#reason", "Only Ann, who leads, can use these.")
    shows(bob, "#bandTitle", "Band (2)")
    assert_in_step(wait_for_beats(bob, 6))


def test_a_reload_comes_back_as_the_same_member(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    ann.reload()
    shows(ann, "#reason", "You lead: the band follows.")
    shows(ann, "#bandTitle", "Band (2)")
    shows(bob, "#bandTitle", "Band (2)")
    # Leaving is for good.
    ann.get_by_role("button", name="Leave the session").click()
    assert ann.locator("#join").is_visible()
    shows(bob, "#news", re.compile("Ann left|You took over the lead"))
    ann.reload()
    assert ann.locator("#join").is_visible()
    assert ann.get_by_label("Your name").input_value() == "Ann"


@pytest.mark.slow
def test_two_tabs_do_not_fight_over_one_seat(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    seat = ann.evaluate("() => sessionStorage.getItem('bandsync.seat')")
    other = open_page()
    other.add_init_script(f"sessionStorage.setItem('bandsync.seat', {seat!r})")
    other.goto(f"{house.url}/#song")
    shows(other, "#reason", "You lead: the band follows.")
    shows(ann, "#problem", re.compile("another tab"))
    assert ann.locator("#join").is_visible()


def test_the_invitation_can_be_scanned(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann", session="Our.Song_2-b", **PHONE)
    ann.get_by_role("button", name="Invite").click()
    picture = Image.open(io.BytesIO(ann.locator("#qr").screenshot()))
    codes = zxingcpp.read_barcodes(picture)
    assert [code.text for code in codes] == [f"{house.url}/#Our.Song_2-b"]
    assert ann.locator("#localOnly").is_visible()
    bob = open_page(codes[0].text)
    assert bob.get_by_label("Session").input_value() == "Our.Song_2-b"
    ann.keyboard.press("Escape")
    assert ann.locator("#invitation").is_hidden()


@pytest.mark.slow
def test_a_pass_is_asked_for_and_taken_from_a_link(open_page: Pages, start_process: Start) -> None:
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
    # Neither the address bar nor the invitation gives it away.
    assert bob.url == f"{server.url}/#song"
    bob.get_by_role("button", name="Invite").click()
    assert bob.locator("#link").inner_text() == f"{server.url}/#song"
    bob.reload()
    shows(bob, "#status", "connected")


@pytest.mark.slow
def test_trims_and_colours_stay_on_the_device(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    ann.get_by_label("Shift the light").fill("-40")
    shows(ann, "#lightTrimText", "40 ms later")
    ann.get_by_label("Shift the click").fill("150")
    shows(ann, "#clickTrimText", "150 ms earlier")
    ann.get_by_label("Colours").select_option("light")
    ann.reload()
    shows(ann, "#lightTrimText", "40 ms later")
    shows(ann, "#clickTrimText", "150 ms earlier")
    assert ann.evaluate("() => document.documentElement.dataset.theme") == "light"


def test_the_page_is_small_and_asks_nobody_else(open_page: Pages, house: ServerProcess) -> None:
    page = open_page(service_workers="block")
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    sizes: list[float] = []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(house.url, wait_until="networkidle")
    assert page.get_by_role("button", name="Join").is_visible()
    assert len(sizes) > 5
    assert sum(sizes) < 100_000
    assert all(url.startswith((house.url, "data:")) for url in urls)


@pytest.mark.parametrize("width", [320, *(pytest.param(w, marks=pytest.mark.slow) for w in (390, 768, 1280))])
def test_nothing_is_wider_than_the_screen(
    open_page: Pages, house: ServerProcess, width: int
) -> None:
    long = "W" * 64
    page = stage(open_page, house, long, session="s" * 64, viewport={"width": width, "height": 720})
    page.get_by_label("Message to the band").wait_for(state="attached")
    overflow = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    for button in page.locator("#views button").all():
        if button.is_visible():
            button.click()
        assert page.evaluate(overflow) <= 0
    page.get_by_role("button", name="Invite").click()
    assert page.evaluate(overflow) <= 0


TURNED = [
    (568, 320),
    pytest.param(667, 375, marks=pytest.mark.slow),
    pytest.param(844, 390, marks=pytest.mark.slow),
    pytest.param(932, 430, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("width", "height"), TURNED)
def test_a_phone_on_its_side(
    open_page: Pages, house: ServerProcess, width: int, height: int
) -> None:
    page = stage(open_page, house, "Ann", viewport={"width": width, "height": height})
    for name in ("play", "band", "chat", "device"):
        page.locator(f"#views [data-view={name}]").click()
        shown = [each for each in page.locator("#stage > section").all() if each.is_visible()]
        assert [each.get_attribute("id") for each in shown] == [f"view-{name}"]
    page.locator("#views [data-view=play]").click()
    light = page.locator("#light").bounding_box()
    position = page.locator("#position").bounding_box()
    assert light is not None
    assert position is not None
    # Beside each other, and the light is on the screen.
    if width >= 576:
        assert light["x"] + light["width"] <= position["x"]
    assert light["y"] + light["height"] <= height


@pytest.mark.slow
def test_scrolling_with_a_thumb_on_the_scrubber_moves_no_song(
    open_page: Pages, house: ServerProcess
) -> None:
    ann = stage(open_page, house, "Ann", **PHONE)
    bob = stage(open_page, house, "Bob")
    box = ann.locator("#scrubber").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2
    touch = ann.context.new_cdp_session(ann)

    def finger(kind: str, *points: dict[str, float]) -> None:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    finger("touchStart", {"x": x, "y": y})
    for step in range(1, 9):
        finger("touchMove", {"x": x, "y": y - 12 * step})
    finger("touchEnd")
    # What would have been sent is overtaken by what is sent now.
    ann.evaluate(
        """() => {
          document.getElementById("text").value = "done";
          document.getElementById("chatForm").requestSubmit();
        }"""
    )
    shows(bob, "#chat p", re.compile("done"))
    assert bob.locator("#position").inner_text() == "0:00.0"
    # And the slider goes with the song again.
    until(ann, "() => document.getElementById('scrubber').value === '0'")


@pytest.mark.slow
def test_nothing_moves_under_a_finger(
    open_page: Pages, redis_house: ServerProcess, redis_server: RedisServer
) -> None:
    """Neither when somebody asks for the lead, nor when the server has news of its storage."""
    ann = stage(open_page, redis_house, "Ann", **PHONE)
    bob = stage(open_page, redis_house, "Bob", **PHONE)
    shows(ann, "#bandTitle", "Band (2)")
    before = ann.locator("#slower").bounding_box()
    bob.get_by_role("button", name="Ask for the lead").click()
    ann.locator("#requests p").wait_for()
    assert ann.locator("#slower").bounding_box() == before
    redis_server.kill()
    shows(ann, "#banner", re.compile("^The server lost"))
    assert ann.locator("#slower").bounding_box() == before
    ann.get_by_role("button", name="Not now").click()
    shows(bob, "#news", "Ann keeps the lead for now.")


@pytest.mark.slow
def test_a_band_on_two_servers_is_told_what_an_outage_means(
    open_page: Pages, redis_server: RedisServer, start_process: Start
) -> None:
    ours, theirs = (
        start_process(REDIS_ENABLED="true", REDIS_URL=redis_server.url(), SERVER_ID=name)
        for name in ("left", "right")
    )
    ann = stage(open_page, ours, "Ann")
    bob = stage(open_page, theirs, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    redis_server.kill()
    for page in (ann, bob):
        shows(page, "#banner", re.compile("members on other servers are out of reach"))
    # Who comes now is told as well.
    cid = stage(open_page, ours, "Cid")
    shows(cid, "#banner", re.compile("^The server lost its storage"))


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for_or_not(open_page: Pages, house: ServerProcess) -> None:
    # There is nobody to give the worker that keeps the page, either.
    page = open_page(f"{house.url}/#song", tolerate=LOST_CONNECTIONS, service_workers="block")
    house.kill()
    page.get_by_role("button", name="Join").click()
    shows(page, "#banner", re.compile("does not answer yet"))
    page.get_by_role("button", name="Cancel").click()
    assert page.locator("#join").is_visible()
    shows(page, "#banner", "")
    page.get_by_role("button", name="Join").click()
    house.start()
    shows(page, "#status", "connected")


@pytest.mark.slow
def test_a_pass_that_expired_costs_nobody_the_place(
    open_page: Pages, start_process: Start, network_to: Callable[[int], Network]
) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    server = start_process(JOIN_SECRET=secret)
    network = network_to(server.port)
    expires = time.time_ns() / 1e9 + 5
    token = jwt.encode({"sub": "ann", "session": "song", "exp": expires}, secret)
    ann = open_page(f"{network.url}/#song&pass={token}", tolerate=LOST_CONNECTIONS)
    enter(ann, "Ann")
    until(ann, f"() => Date.now() > {expires * 1000 + 100}")
    ann.evaluate(
        """() => new MutationObserver(() => { window.away = true; })
          .observe(document.getElementById("status"), { childList: true, subtree: true })"""
    )
    network.reset()
    until(ann, "() => window.away")
    shows(ann, "#status", "connected")
    shows(ann, "#reason", "You lead: the band follows.")


@pytest.mark.slow
def test_a_draft_is_not_wiped_by_others(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    ann.get_by_label("Message to the band").fill("Bridge, then")
    ann.evaluate("() => document.activeElement.blur()")
    bob.get_by_label("Say something").fill("hello")
    bob.get_by_role("button", name="Send", exact=True).click()
    shows(ann, "#chat p", re.compile("hello"))
    assert ann.get_by_label("Message to the band").input_value() == "Bridge, then"


@pytest.mark.slow
def test_fast_fingers_lose_no_step(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    bob = stage(open_page, house, "Bob")
    ann.evaluate("() => { for (let i = 0; i < 5; i++) document.getElementById('faster').click(); }")
    shows(bob, "#tempo", "125")


@pytest.mark.slow
def test_bar_of_the_tempo_that_comes(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
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
def test_a_stray_link_takes_nobody_off_the_stage(open_page: Pages, house: ServerProcess) -> None:
    ann = stage(open_page, house, "Ann")
    ann.evaluate("() => { location.hash = '#other&pass=secret'; }")
    shows(ann, "#news", "To go to other, leave this one first.")
    assert ann.url == f"{house.url}/#song"
    # An address without a session is still that of one's place.
    ann.evaluate("() => history.replaceState(null, '', '/')")
    ann.reload()
    shows(ann, "#reason", "You lead: the band follows.")


@pytest.mark.slow
def test_a_name_turns_no_sentence_around(open_page: Pages, house: ServerProcess) -> None:
    stage(open_page, house, "\u202eevil")
    bob = stage(open_page, house, "Bob")
    shows(bob, "#reason", "Only \u2068\u202eevil\u2069, who leads, can use these.")
