"""The stage on screens of every size, its local settings, and its weight."""

import re
from typing import TYPE_CHECKING

import pytest

from scripts.testbed.browsers import BrowserPages
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    pass
from tests.support.stage_pages import PHONE, open_stage, shows, until


@pytest.mark.slow
def test_trims_and_colours_survive_a_reload(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    ann.get_by_label("Shift the light").fill("-40")
    shows(ann, "#lightTrimText", "40 ms later")
    ann.get_by_label("Shift the click").fill("150")
    shows(ann, "#clickTrimText", "150 ms earlier")
    ann.get_by_label("Colours").select_option("light")
    ann.reload()
    shows(ann, "#lightTrimText", "40 ms later")
    shows(ann, "#clickTrimText", "150 ms earlier")
    assert ann.evaluate("() => document.documentElement.dataset.theme") == "light"


def test_the_page_is_small_and_asks_nobody_else(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    page = open_page(service_workers="block")
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    sizes: list[float] = []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server_process.url, wait_until="networkidle")
    assert page.get_by_role("button", name="Join").is_visible()
    assert len(sizes) > 5
    assert sum(sizes) < 100_000
    assert all(url.startswith((server_process.url, "data:")) for url in urls)


@pytest.mark.parametrize(
    "width", [320, *(pytest.param(w, marks=pytest.mark.slow) for w in (390, 768, 1280))]
)
def test_nothing_is_wider_than_the_screen(
    open_page: BrowserPages, server_process: ServerProcess, width: int
) -> None:
    long = "W" * 64
    page = open_stage(
        open_page, server_process, long, session="s" * 64, viewport={"width": width, "height": 720}
    )
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
def test_landscape_phone_shows_light_and_position(
    open_page: BrowserPages, server_process: ServerProcess, width: int, height: int
) -> None:
    page = open_stage(open_page, server_process, "Ann", viewport={"width": width, "height": height})
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
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann", **PHONE)
    bob = open_stage(open_page, server_process, "Bob")
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
    # A seek sent by the touch would arrive before this message.
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
