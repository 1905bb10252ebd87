"""The operators' screen in a real browser, while real servers and a real Redis fail."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from scripts.testbed.browsers import LOST_CONNECTIONS, PATIENCE_MS, BrowserPages
from scripts.testbed.redis_server import RedisServer, free_port
from scripts.testbed.server_process import ServerProcess
from tests.support.accessibility import violations
from tests.support.stage_pages import open_stage, shows

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

Start = Callable[..., ServerProcess]

WELL = "All is well."
LOST = "Redis is lost: the bands play on from memory."
AWAY = "The server does not answer."
FAILS = "This screen cannot show the server's answer."
NONE = "\N{EN DASH}"
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
UNAUTHORIZED = re.compile("401")

# Remembers all that the live region says; a machine that is busy may say more.
LISTEN = """() => {
  window.said = [];
  const region = document.getElementById("sentence");
  const note = () => window.said.push(region.textContent);
  note();
  new MutationObserver(note).observe(region, {childList: true, characterData: true, subtree: true});
}"""
# Lets a test say that the tab is in the background.
MAY_HIDE = """Object.defineProperty(document, "hidden", { get: () => window.away === true });"""
HIDE = """(hidden) => {
  window.away = hidden;
  document.dispatchEvent(new Event("visibilitychange"));
}"""
# In the background all timers stand still, as after five minutes on a phone, but the time goes on.
SLEEPS_HIDDEN = """(() => {
  const { setTimeout } = window;
  window.asleep = 0;
  window.setTimeout = (act, ms) => setTimeout(() => {
    if (document.hidden) window.asleep += 1;
    else act();
  }, document.hidden ? 0 : ms);
  const now = performance.now.bind(performance);
  window.slept = 0;
  performance.now = () => now() + window.slept;
})();"""
# Every place where a script or a style could stand that the policy does not allow.
INLINE = """() => [...document.querySelectorAll("*")].filter((each) =>
  each.hasAttribute("style") || each.localName === "style" ||
  (each.localName === "script" && !each.src) ||
  [...each.attributes].some(({name}) => name.startsWith("on"))).map((each) => each.outerHTML)"""


def until(page: "Page", script: str, argument: object = None) -> None:
    """Wait until a function is true in the page."""
    page.wait_for_function(script, arg=argument, timeout=PATIENCE_MS)


def says(page: "Page", text: str) -> None:
    """Wait until it says this: as its sentence, or as something else that there is."""
    until(page, "(text) => document.getElementById('state').textContent.includes(text)", text)


def says_no_more(page: "Page", text: str) -> None:
    until(page, "(text) => !document.getElementById('state').textContent.includes(text)", text)


def rows(page: "Page") -> list[list[str]]:
    """The table of events: its cells, row by row."""
    lines = page.locator("#events tr")
    return [
        lines.nth(number).locator("th, td").all_inner_texts() for number in range(lines.count())
    ]


def stretches(page: "Page", mode: str) -> int:
    """How many bars of a mode the timeline has."""
    return page.locator(f"#timeline .stretch.{mode}").count()


@pytest.fixture
def on_redis(start_process: Start, redis_server: RedisServer) -> ServerProcess:
    return start_process(
        REDIS_ENABLED="true",
        REDIS_URL=redis_server.url(),
        REDIS_HEALTH_INTERVAL_MS="100",
        SERVER_ID="stage-left",
    )


def test_redis_is_killed_and_comes_back(
    open_page: BrowserPages, on_redis: ServerProcess, redis_server: RedisServer
) -> None:
    from playwright.sync_api import expect

    page = open_page(f"{on_redis.url}/ops")
    until(page, "() => document.getElementById('mode').textContent === 'Redis'")
    page.evaluate(LISTEN)
    assert stretches(page, "redis") == 1
    assert [row[1] for row in rows(page)] == ["Redis in use"]

    redis_server.kill()
    says(page, LOST)
    until(page, "() => document.querySelectorAll('#timeline .mark.failover').length === 1")
    assert page.locator("#mode").inner_text() == "Memory"
    assert stretches(page, "memory") == 2  # The first was the start, before Redis was found.
    lost = rows(page)[0]
    assert lost[1] == "Redis lost"
    assert "connection" in lost[2] or "address" in lost[2]
    assert lost[3] == "not back yet"
    assert page.locator("#timeline text.label").text_content()
    assert "since" in page.locator("#since").inner_text()
    assert "Redis was lost once" in (
        page.locator("#timeline svg").get_attribute("aria-label") or ""
    )
    # The round trip has a gap, not a zero.
    chart = page.locator("figure", has_text="Redis round trip")
    expect(chart.locator(".current")).to_have_text(f"{NONE}ms", timeout=PATIENCE_MS)
    assert page.title().startswith("Redis is lost")

    redis_server.start()
    says_no_more(page, LOST)
    until(page, "() => document.getElementById('mode').textContent === 'Redis'")
    until(page, "() => document.querySelectorAll('#events tr').length === 3")
    back, lost = rows(page)[:2]
    assert (back[1], lost[1]) == ("Redis back", "Redis lost")
    assert all(re.fullmatch(r"[\d.]+ (ms|s)", took) for took in (back[3], lost[3]))
    assert page.locator("#timeline .mark.recovery").count() == 2
    assert stretches(page, "redis") == 2

    # It did not chatter: what it said, it said once.
    said = page.evaluate("() => window.said")
    assert LOST in said
    assert all(earlier != later for earlier, later in pairwise(said))
    assert not any(re.search(r"\d", sentence) for sentence in said)


@pytest.mark.slow
def test_the_server_goes_away_and_comes_back(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    page = open_page(f"{server.url}/ops", tolerate=LOST_CONNECTIONS)
    until(page, "() => document.querySelector('.chart .line0')?.getAttribute('d').length > 20")
    server.kill()
    says(page, AWAY)
    assert page.title().startswith("The server does not answer")
    # The past is still there.
    assert page.locator("#serverId").inner_text() == "stage-left"
    assert stretches(page, "disabled") == 1
    until(page, "() => document.querySelectorAll('#timeline .stretch.away').length === 1")
    chart = page.locator("figure", has_text="Connections")
    assert len(chart.locator(".line0").get_attribute("d") or "") > 20
    assert chart.locator(".current").inner_text().startswith(NONE)

    server.start()
    says_no_more(page, AWAY)
    until(page, "() => document.querySelectorAll('.chart .start').length === 12")
    assert page.locator("#timeline .mark.start").count() == 1
    assert [row[1] for row in rows(page)] == ["Server started"]
    # Two lines: nobody knows what was in between.
    until(
        page,
        "() => document.querySelector('.chart .line0').getAttribute('d').match(/M/g).length === 2",
    )


def test_a_browser_gives_the_token(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process(ADMIN_TOKEN="höchst geheim")
    assert open_page().request.get(f"{server.url}/ops").status == 401
    page = open_page(http_credentials={"username": "ops", "password": "höchst geheim"})
    page.goto(f"{server.url}/ops")
    says(page, WELL)


@pytest.mark.slow
def test_rejected_token_is_shown(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process()
    page = open_page(f"{server.url}/ops", tolerate=UNAUTHORIZED)
    says(page, WELL)
    page.route("**/api/ops*", lambda route: route.fulfill(status=401, body="{}"))
    says(page, "This screen needs the operators' token.")
    page.unroute("**/api/ops*")
    says(page, WELL)


@pytest.mark.slow
def test_screen_ignores_answers_of_another_server(
    open_page: BrowserPages, start_process: Start
) -> None:
    server, other = start_process(SERVER_ID="left"), start_process(SERVER_ID="right")
    page = open_page(f"{server.url}/ops")
    says(page, WELL)

    def elsewhere(route: "Route") -> None:
        url = route.request.url.replace(server.url, other.url)
        route.fulfill(response=page.request.get(url))

    page.route("**/api/ops*", elsewhere)
    says(page, "Another server answers here.")
    assert page.locator("#serverId").inner_text() == "left"
    # The other has taken its place, name and all: the screen has seen enough.
    until(page, "() => document.getElementById('serverId').textContent === 'right'")
    says(page, WELL)


def hide(page: "Page", *, hidden: bool) -> None:
    """Put the tab in the background, or to the front: as far as the page can tell."""
    page.evaluate(
        HIDE,
        hidden,
    )


def altered(page: "Page", alter: Callable[[Any], None]) -> None:
    """Let the page hear something else than the server says."""

    def answer(route: "Route") -> None:
        answered = route.fetch()
        overview = answered.json()
        alter(overview)
        route.fulfill(response=answered, json=overview)

    page.route("**/api/ops*", answer)


@pytest.mark.slow
def test_background_tab_dates_its_title(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    page = open_page(tolerate=LOST_CONNECTIONS)
    page.add_init_script(MAY_HIDE)
    page.goto(f"{server.url}/ops")
    says(page, WELL)
    assert page.title() == "All is well · stage-left"
    hide(page, hidden=True)
    assert re.fullmatch(r"All is well \(\d\d:\d\d\) · stage-left", page.title())
    server.kill()
    until(page, "() => document.title.startsWith('The server does not answer')")
    server.start()
    until(page, "() => document.title.startsWith('All is well (')")
    hide(page, hidden=False)
    until(page, "() => document.title === 'All is well · stage-left'")


@pytest.mark.slow
def test_tab_that_slept_polls_before_it_claims_health(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process()
    page = open_page(tolerate=LOST_CONNECTIONS)
    page.add_init_script(MAY_HIDE)
    page.add_init_script(SLEEPS_HIDDEN)
    page.goto(f"{server.url}/ops")
    says(page, WELL)
    hide(page, hidden=True)
    until(page, "() => window.asleep > 0")
    page.evaluate("() => { window.slept = 60_000; }")
    # It hangs: whether all is well is not known yet.
    server.freeze()
    hide(page, hidden=False)
    assert page.locator("#sentence").inner_text() == "Asking the server …"
    assert page.title().startswith("Asking the server")
    says(page, AWAY)
    server.thaw()
    says(page, WELL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "alter",
    [
        lambda overview: overview.pop("events"),
        lambda overview: overview.pop("verdict"),
        lambda overview: overview.pop("samples"),
        lambda overview: overview.update(storage=None),
        lambda overview: overview["verdict"].update(since="yesterday"),
        lambda overview: overview["verdict"].update(others=[None]),
    ],
    ids=["events", "verdict", "samples", "storage", "since", "others"],
)
def test_screen_reports_its_own_failure_and_recovers(
    open_page: BrowserPages, start_process: Start, alter: Callable[[Any], None]
) -> None:
    server = start_process()
    page = open_page(f"{server.url}/ops", tolerate=re.compile("TypeError|RangeError"))
    says(page, WELL)
    altered(page, alter)
    says(page, FAILS)
    assert page.title().startswith("This screen cannot show")
    assert page.locator("#state").get_attribute("data-level") == "bad"
    # Not for a moment between two failures either: this is read out.
    page.evaluate(LISTEN)
    with page.expect_request("**/api/ops*"):
        pass
    with page.expect_response("**/api/ops*"):
        pass
    assert set(page.evaluate("() => window.said")) == {FAILS}
    page.unroute("**/api/ops*")
    says(page, WELL)


def test_unknown_values_of_a_newer_server_are_shown(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process()
    page = open_page()

    def newer(overview: Any) -> None:
        now = overview["now"]
        overview["events"] += [
            {"at": now - 20, "kind": "promotion", "mode": "two places", "why": "unheard of"},
            {"at": now - 10, "kind": "failover", "mode": "elsewhere", "reason": "new"},
        ]
        overview["storage"] |= {"mode": "elsewhere", "migration": None}
        overview["verdict"] |= {"level": "grave", "text": "Something new.", "others": None}
        del overview["verdict"]["others"]
        for each in overview["samples"]:
            for name in ("clockErrorMs", "memoryBytes", "commit", "cpu"):
                del each[name]
            each["mode"] = "elsewhere"

    altered(page, newer)
    page.goto(f"{server.url}/ops")
    says(page, "Something new.")
    assert page.locator("#state").get_attribute("data-level") == "warn"
    until(page, "() => document.querySelectorAll('#events tr').length === 2")
    assert [row[1] for row in rows(page)] == ["Redis lost", "promotion"]
    until(page, "() => document.querySelectorAll('#timeline .stretch.unknown').length === 2")
    assert page.locator("#mode").inner_text() == "Elsewhere"
    assert "NaN" not in page.content()
    assert "undefined" not in page.content()


@pytest.mark.slow
def test_redis_never_reached_is_not_shown_as_lost(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process(REDIS_ENABLED="true", REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    page = open_page(f"{server.url}/ops")
    says(page, "Redis is not there")
    assert page.locator("#noEvents").inner_text() == "Redis has not been in use yet."
    label = page.locator("#timeline svg").get_attribute("aria-label") or ""
    assert "Redis was not in use" in label
    assert "lost" not in label


@pytest.mark.slow
def test_bands_that_are_cut_apart(
    open_page: BrowserPages, redis_server: RedisServer, start_process: Start
) -> None:
    left, right = (
        start_process(
            REDIS_ENABLED="true",
            REDIS_URL=redis_server.url(),
            REDIS_HEALTH_INTERVAL_MS="100",
            SERVER_ID=name,
        )
        for name in ("left", "right")
    )
    ann = open_stage(open_page, left, "Ann")
    screen = open_page(f"{left.url}/ops")
    says(screen, WELL)
    open_stage(open_page, right, "Bob")
    shows(ann, "#bandTitle", re.compile("2"))
    until(screen, "() => document.querySelector('.chart .current').textContent.startsWith('1')")
    screen.wait_for_timeout(1500)  # A sample comes every second.
    redis_server.kill()
    says(screen, "Redis is lost: bands on several servers are cut apart.")
    assert "1 session has members on other servers too" in screen.locator("#meaning").inner_text()
    assert "notice nothing" not in screen.locator("#state").inner_text()
    redis_server.start()
    says(screen, WELL)


@pytest.mark.slow
def test_it_asks_for_what_is_new_only_and_nobody_else(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process()
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/ops")
    until(page, "() => document.querySelector('.chart .line0')?.getAttribute('d').length > 20")
    assert all(url.startswith(f"{server.url}/") for url in asked)
    questions = [url for url in asked if "/api/ops" in url]
    assert questions[0] == f"{server.url}/api/ops"
    assert "?since=" in questions[-1]
    assert page.evaluate(INLINE) == []


@pytest.mark.slow
def test_the_charts_can_be_read(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process()
    page = open_page(f"{server.url}/ops")
    until(page, "() => document.querySelector('.chart .line0')?.getAttribute('d').length > 40")
    labels = [
        drawing.get_attribute("aria-label") or "" for drawing in page.locator(".chart svg").all()
    ]
    assert len(labels) == 12
    assert labels[0].startswith("Connections: 0, joined 0, in this span from 0 to 0")
    # The figures are those of the instant under the pointer.
    page.locator(".chart svg").first.hover(position={"x": 200, "y": 50})
    box = page.locator(".chart svg").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 6, box["y"] + 50)
    until(page, "() => document.getElementById('reading').textContent.startsWith('at ')")
    assert page.locator(".chart .look").count() == 12
    page.mouse.move(2, 2)
    until(page, "() => document.getElementById('reading').textContent === ''")


@pytest.mark.slow
def test_the_span_of_the_timeline_by_keyboard(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process()
    page = open_page(f"{server.url}/ops")
    says(page, WELL)
    page.get_by_role("button", name="All events").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="All events").get_attribute("aria-pressed") == "true"
    assert page.get_by_role("button", name="Recent").get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("screen", ["phone", pytest.param("wide", marks=pytest.mark.slow)])
def test_it_is_accessible(
    open_page: BrowserPages,
    on_redis: ServerProcess,
    redis_server: RedisServer,
    scheme: str,
    screen: str,
) -> None:
    page = open_page(color_scheme=scheme, **(PHONE if screen == "phone" else {}))
    page.goto(f"{on_redis.url}/ops")
    until(page, "() => document.getElementById('mode').textContent === 'Redis'")
    assert violations(page) == []
    redis_server.kill()
    says(page, LOST)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
