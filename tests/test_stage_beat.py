"""What the light shows and when the click sounds: the page's own arithmetic, and real audio."""

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browsers import Pages
from tests.server_processes import ServerProcess
from tests.test_stage import Start, enter, shows, until

if TYPE_CHECKING:
    from playwright.sync_api import Page

SEGMENT = {
    "isPlaying": False,
    "positionMs": 0,
    "anchorTime": 1_000_000,
    "tempoBpm": 120,
    "beat": 0,
    "beatsPerBar": 4,
}


@pytest.fixture(scope="module")
def house() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        yield server


@pytest.fixture
def page(open_page: Pages, house: ServerProcess) -> "Page":
    """A page that can import the stage's modules."""
    return open_page.blank(house.url)


def segment(**fields: Any) -> dict[str, Any]:
    return SEGMENT | fields


def transport(following: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return segment(**fields) | {"next": following}


def test_a_count_in_runs_up_to_the_start(page: "Page") -> None:
    start = segment(isPlaying=True, anchorTime=1_002_000, beat=8, positionMs=4000)
    counted = page.evaluate(
        """async (transport) => {
          const { moment } = await import("/beat.js");
          return [1_000_000, 1_001_999, 1_002_000, 1_002_500].map((t) => moment(transport, t));
        }""",
        transport(start, beat=8, positionMs=4000),
    )
    assert [each["beats"] for each in counted] == pytest.approx([4, 7.998, 8, 9])
    assert [each["countIn"] for each in counted] == [True, True, False, False]
    assert all(each["running"] for each in counted)
    # The song stands at its start until then.
    assert [each["positionMs"] for each in counted] == [4000, 4000, 4000, 4500]


def test_a_beat_is_not_shown_twice_for_a_hair(page: "Page") -> None:
    shown = page.evaluate(
        """async (cases) => {
          const { beatNumber } = await import("/beat.js");
          return cases.map(([beats, last]) => beatNumber(beats, last));
        }""",
        [[4.9999999, None], [4.99, 5], [4.94, 5], [3.99, 5], [5.2, 5], [6.0, 5], [-1e-9, -1]],
    )
    # A song that goes back by more than a hair was moved.
    assert shown == [5, 5, 4, 3, 5, 6, 0]


def test_no_tempo_flashes_more_than_three_times_a_second(page: "Page") -> None:
    """WCAG 2.3.1, for every metre, at every tempo: rising edges in any one second."""
    worst = page.evaluate(
        """async () => {
          const { brightness } = await import("/beat.js");
          let worst = 0;
          for (let tempoBpm = 20; tempoBpm <= 300; tempoBpm += 10) {
            for (let beatsPerBar = 1; beatsPerBar <= 16; beatsPerBar++) {
              const edges = [];
              let before = 1;
              for (let ms = 1; ms <= 6000; ms++) {
                const beats = (ms * tempoBpm) / 60000;
                const now = brightness({ running: true, beats, beatsPerBar, tempoBpm });
                if (before < 0.1 && now >= 0.1) edges.push(ms);
                before = now;
              }
              edges.forEach((from) => {
                const within = edges.filter((at) => at >= from && at < from + 1000);
                worst = Math.max(worst, within.length);
              });
            }
          }
          return worst;
        }"""
    )
    assert worst == 3


def test_ordinary_tempos_flash_on_every_beat(page: "Page") -> None:
    lit = page.evaluate(
        """async () => {
          const { brightness } = await import("/beat.js");
          const at = (beats, tempoBpm, running = true) =>
            brightness({ running, beats, tempoBpm, beatsPerBar: 4 });
          return [at(3.01, 120), at(3.7, 120), at(5.01, 240), at(4.01, 240), at(3.01, 120, false)];
        }"""
    )
    assert lit == [pytest.approx(0.967, abs=0.01), 0, 0, pytest.approx(0.967, abs=0.01), 0]


def upcoming(page: "Page", song: dict[str, Any], start: float, end: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate(
        """async ([song, from, till]) => (await import("/click.js")).upcoming(song, from, till)""",
        [song, start, end],
    )
    return found


def test_the_clicks_of_a_song(page: "Page") -> None:
    playing = transport(isPlaying=True, beat=2.5)
    found = upcoming(page, playing, 1_000_000, 1_001_800)
    assert [(each["beat"], each["at"], each["first"]) for each in found] == [
        (3, 1_000_250, False),
        (4, 1_000_750, True),
        (5, 1_001_250, False),
        (6, 1_001_750, False),
    ]
    assert upcoming(page, transport(), 1_000_000, 1_010_000) == []


def test_the_clicks_around_a_change_of_tempo(page: "Page") -> None:
    """Neither beat is lost nor clicked twice where one stretch follows the other."""
    faster = segment(isPlaying=True, anchorTime=1_001_000, beat=2, tempoBpm=240)
    song = transport(faster, isPlaying=True)
    found = upcoming(page, song, 1_000_000, 1_001_600)
    assert [(each["beat"], each["at"]) for each in found] == [
        (0, 1_000_000),
        (1, 1_000_500),
        (2, 1_001_000),
        (3, 1_001_250),
        (4, 1_001_500),
    ]
    # Asked for piece by piece, they are the same.
    pieces = [
        each for at in range(1_000_000, 1_001_600, 50) for each in upcoming(page, song, at, at + 50)
    ]
    assert [each["beat"] for each in pieces] == [0, 1, 2, 3, 4]


def test_a_count_in_is_clicked(page: "Page") -> None:
    song = transport(segment(isPlaying=True, anchorTime=1_002_000))
    found = upcoming(page, song, 1_000_001, 1_002_600)
    assert [each["beat"] for each in found] == [-3, -2, -1, 0, 1]
    assert [each["first"] for each in found] == [False, False, False, True, False]


HEAR = """() => {
  window.heard = [];
  const start = OscillatorNode.prototype.start;
  OscillatorNode.prototype.start = function (when) {
    const { contextTime, performanceTime } = this.context.getOutputTimestamp();
    window.heard.push({
      at: performanceTime + (when - contextTime) * 1000,
      first: this.frequency.value > 1500,
      node: this,
    });
    return start.call(this, when);
  };
  const stop = OscillatorNode.prototype.stop;
  OscillatorNode.prototype.stop = function (when) {
    if (when === undefined) window.heard = window.heard.filter(({ node }) => node !== this);
    return stop.call(this, when);
  };
}"""


@pytest.mark.parametrize("trim", [0, 150])
def test_the_click_falls_on_the_beat(open_page: Pages, start_process: Start, trim: int) -> None:
    """On the audio clock, evenly, where the light has its beats; earlier by the trim."""
    server = start_process()
    page = open_page()
    page.add_init_script(f"({HEAR})()")
    page.add_init_script(
        """window.seen = [];
        document.addEventListener("beat", () => window.seen.push(performance.now()));"""
    )
    page.goto(f"{server.url}/#song")
    enter(page, "Ann")
    page.get_by_label("BPM", exact=True).fill("100")
    page.get_by_label("BPM", exact=True).press("Enter")
    page.get_by_label("Shift the click").fill(str(trim))
    page.get_by_role("button", name="Click off").click()
    shows(page, "#click", "Click on")
    page.get_by_label("Count-in").select_option("0")
    # The clock has been compared with the server's by then.
    shows(page, "#members .detail", re.compile("beat ±"))
    page.get_by_role("button", name="Play").click()
    until(page, "() => window.heard.length >= 9")
    heard = page.evaluate("() => window.heard.map(({ at, first }) => ({ at, first }))")
    seen = page.evaluate("() => window.seen")
    gaps = [b["at"] - a["at"] for a, b in itertools.pairwise(heard)]
    # Of one beat each: the arithmetic is exact, what may move is the estimate of the clock.
    assert gaps == pytest.approx([600] * len(gaps), abs=30)
    bars = [index for index, each in enumerate(heard) if each["first"]]
    assert [b - a for a, b in itertools.pairwise(bars)] == [4] * (len(bars) - 1)
    # A busy page draws late, but hardly every time.
    apart = [abs(light - each["at"] - trim) for each in heard for light in seen]
    assert min(apart) < 40
    page.get_by_role("button", name="Pause").click()
    shows(page, "#state", "paused")
    # What was planned is dropped, so nothing sounds after the end.
    assert (
        page.evaluate("() => window.heard.filter(({ at }) => at > performance.now()).length") == 0
    )
    page.get_by_role("button", name="Click on").click()
    shows(page, "#click", "Click off")
