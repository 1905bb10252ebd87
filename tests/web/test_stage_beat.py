"""The beat light and the click: the arithmetic of the page, and real audio."""

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from scripts.testbed.browsers import BrowserPages
from scripts.testbed.server_process import ServerProcess
from tests.support.stage_pages import Start, enter, shows, until

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
def page(open_page: BrowserPages, house: ServerProcess) -> "Page":
    """A page that can import the stage's modules."""
    return open_page.blank(house.url)


def segment(**fields: Any) -> dict[str, Any]:
    return SEGMENT | fields


def transport(following: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return segment(**fields) | {"next": following}


def test_a_count_in_runs_up_to_the_start(page: "Page") -> None:
    """The song stands before the count-in: the band waits for its slowest member."""
    start = segment(isPlaying=True, anchorTime=1_002_300, beat=8, positionMs=4000)
    shown = page.evaluate(
        """async (transport) => {
          const { moment } = await import("/beat.js");
          const at = [1_000_200, 1_000_300, 1_002_299, 1_002_300, 1_002_800];
          return at.map((t) => moment(transport, t, 1_000_300));
        }""",
        transport(start, beat=8, positionMs=4000),
    )
    assert [each["beats"] for each in shown] == pytest.approx([8, 4, 7.998, 8, 9])
    assert [each["countIn"] for each in shown] == [False, True, True, False, False]
    assert [each["running"] for each in shown] == [False, True, True, True, True]
    assert [each["state"] for each in shown] == ["starting"] * 3 + ["playing"] * 2
    # The song stands at its start until then.
    assert [each["positionMs"] for each in shown] == [4000, 4000, 4000, 4000, 4500]


def test_beat_is_shown_once_when_the_clock_slews_back(page: "Page") -> None:
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


def test_seeks_do_not_add_flashes(page: "Page") -> None:
    """Each may begin a beat anew: more than three in a second are not let through."""
    began = page.evaluate(
        """async () => {
          const { FlashGuard } = await import("/beat.js");
          const guard = new FlashGuard();
          const began = [];
          let before = 0;
          for (let at = 0; at < 5000; at += 10) {
            const glow = guard.allowed(Math.max(0, 1 - (at % 120) / 80), at);
            if (glow > before + 0.1) began.push(at);
            before = glow;
          }
          return began;
        }"""
    )
    assert len(began) == 15
    assert all(later - earlier >= 1000 for earlier, later in zip(began, began[3:], strict=False))


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


def upcoming(
    page: "Page",
    song: dict[str, Any],
    start: float,
    end: float,
    count_in_from: float | None = None,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate(
        """async ([song, from, till, countInFrom]) =>
          (await import("/click.js")).upcoming(song, from, till, countInFrom)""",
        [song, start, end, count_in_from],
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
    """No beat is lost or clicked twice at the border of two segments."""
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
    # Queries for short spans find the same beats.
    pieces = [
        each for at in range(1_000_000, 1_001_600, 50) for each in upcoming(page, song, at, at + 50)
    ]
    assert [each["beat"] for each in pieces] == [0, 1, 2, 3, 4]


def test_count_in_clicks_from_its_first_beat(page: "Page") -> None:
    song = transport(segment(isPlaying=True, anchorTime=1_002_400))
    found = upcoming(page, song, 1_000_000, 1_003_000, count_in_from=1_000_400)
    assert [each["beat"] for each in found] == [-4, -3, -2, -1, 0, 1]
    assert [each["first"] for each in found] == [True, False, False, False, True, False]
    assert found[0]["at"] == 1_000_400
    alone = upcoming(page, song, 1_000_000, 1_003_000)
    assert [each["beat"] for each in alone] == [0, 1]


# Records each click, with its start on `performance.now()`, and the clicks cut while sounding.
HEAR = """() => {
  window.heard = [];
  window.cut = 0;
  const start = OscillatorNode.prototype.start;
  OscillatorNode.prototype.start = function (when) {
    const { contextTime, performanceTime } = this.context.getOutputTimestamp();
    const at = performanceTime + (when - contextTime) * 1000;
    window.heard.push({ at, when, first: this.frequency.value > 1500, node: this });
    return start.call(this, when);
  };
  const stop = OscillatorNode.prototype.stop;
  OscillatorNode.prototype.stop = function (when) {
    if (when === undefined) {
      const planned = window.heard.find(({ node }) => node === this);
      if (planned.when <= this.context.currentTime) window.cut += 1;
      window.heard = window.heard.filter(({ node }) => node !== this);
    }
    return stop.call(this, when);
  };
}"""


def clicking(open_page: BrowserPages, server: ServerProcess, bpm: int, trim: int = 0) -> "Page":
    """A leader alone whose click is on, and whose clock is known."""
    page = open_page()
    page.add_init_script(f"({HEAR})()")
    page.add_init_script(
        """window.seen = [];
        document.addEventListener("beat", ({ detail }) =>
          window.seen.push({ ...detail, local: performance.now() }));"""
    )
    page.goto(f"{server.url}/#song")
    enter(page, "Ann")
    page.get_by_label("BPM", exact=True).fill(str(bpm))
    page.get_by_label("BPM", exact=True).press("Enter")
    page.get_by_label("Shift the click").fill(str(trim))
    page.get_by_role("button", name="Click off").click()
    shows(page, "#click", "Click on")
    shows(page, "#members .detail", re.compile("beat ±"))
    return page


def sounded(page: "Page", count: int) -> list[dict[str, Any]]:
    """Wait for this many clicks; all that have sounded so far."""
    until(
        page, f"() => window.heard.filter(({{ at }}) => at < performance.now()).length >= {count}"
    )
    found: list[dict[str, Any]] = page.evaluate(
        """() => window.heard.filter(({ at }) => at < performance.now())
          .map(({ at, first }) => ({ at, first }))"""
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trim", [0, 150])
def test_the_click_falls_on_the_beat(
    open_page: BrowserPages, start_process: Start, trim: int
) -> None:
    """On the audio clock, from the first beat on, where the light has them; earlier by the trim.

    Somebody chats meanwhile, which must not touch it.
    """
    page = clicking(open_page, start_process(), 100, trim)
    page.get_by_label("Count-in").select_option("0")
    page.get_by_role("button", name="Play").click()
    for line in range(8):
        page.get_by_label("Say something").fill(f"line {line}")
        page.get_by_role("button", name="Send", exact=True).click()
        until(page, "() => document.getElementById('text').value === ''")
    heard = sounded(page, 9)
    gaps = [later["at"] - earlier["at"] for earlier, later in itertools.pairwise(heard)]
    # One beat each: the arithmetic is exact, only the estimate of the clock may move.
    assert gaps == pytest.approx([600] * len(gaps), abs=30)
    assert [each["first"] for each in heard] == [index % 4 == 0 for index in range(len(heard))]
    assert page.evaluate("() => window.cut") == 0
    # Each has its beat; a busy page draws late, but hardly every time.
    seen = page.evaluate("() => window.seen")
    apart = [light["local"] - each["at"] - trim for each, light in zip(heard, seen, strict=False)]
    assert min(abs(each) for each in apart) < 40
    assert all(-60 < each < 500 for each in apart)

    page.get_by_role("button", name="Pause").click()
    shows(page, "#state", "paused")
    # Planned clicks are dropped, so nothing sounds after the end.
    later = page.evaluate("() => window.heard.filter(({ at }) => at > performance.now()).length")
    assert later == 0
    page.get_by_role("button", name="Click on").click()
    shows(page, "#click", "Click off")


@pytest.mark.slow
def test_count_in_sounds_every_beat(open_page: BrowserPages, start_process: Start) -> None:
    page = clicking(open_page, start_process(), 240)
    page.get_by_label("Count-in").select_option("1")
    page.get_by_role("button", name="Play").click()
    heard = sounded(page, 6)
    seen = page.evaluate("() => window.seen")
    assert [each["first"] for each in heard[:6]] == [True, False, False, False, True, False]
    assert [each["countIn"] for each in seen[:5]] == [True, True, True, True, False]


@pytest.mark.slow
def test_seek_back_clicks_at_once(open_page: BrowserPages, start_process: Start) -> None:
    """The first bar again, whose beats have just sounded."""
    page = clicking(open_page, start_process(), 240)
    page.get_by_label("Count-in").select_option("0")
    page.get_by_label("To bar").fill("1")
    page.evaluate(
        """() => document.addEventListener("beat", function look({ detail }) {
          if (detail.beat !== 2) return;
          document.removeEventListener("beat", look);
          window.back = performance.now();
          document.getElementById("barForm").requestSubmit();
        })"""
    )
    page.get_by_role("button", name="Play").click()
    until(page, "() => performance.now() > window.back + 1600")
    heard = page.evaluate("() => window.heard.map(({ at }) => at - window.back)")
    found = sorted(at for at in heard if -400 < at < 1500)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    # No hole of two beats or more, the jump itself included.
    assert max(gaps) < 550


@pytest.mark.slow
def test_tempo_change_cuts_no_sounding_click(open_page: BrowserPages, start_process: Start) -> None:
    """A tempo change plans future clicks anew and leaves sounding ones alone."""
    page = clicking(open_page, start_process(), 120)
    page.get_by_label("Count-in").select_option("0")
    page.get_by_role("button", name="Play").click()
    sounded(page, 2)
    for bpm in range(121, 133):
        page.get_by_role("button", name="One BPM faster").click()
        shows(page, "#tempo", str(bpm))
    sounded(page, 6)
    assert page.evaluate("() => window.cut") == 0


@pytest.mark.slow
def test_suspended_audio_resumes_at_the_next_touch(
    open_page: BrowserPages, start_process: Start
) -> None:
    """A phone call suspends audio: the button says so, and the next touch resumes it."""
    page = open_page()
    page.add_init_script(
        """const Original = AudioContext;
        window.AudioContext = class extends Original {
          constructor(options) { super(options); window.audio = this; }
        };"""
    )
    page.goto(f"{start_process().url}/#song")
    enter(page, "Ann")
    page.get_by_role("button", name="Click off").click()
    shows(page, "#click", "Click on")
    page.evaluate("() => window.audio.suspend()")
    shows(page, "#click", "Touch to hear")
    page.locator("#light").click()
    shows(page, "#click", "Click on")


@pytest.mark.slow
def test_the_light_itself_flashes_no_more_than_is_safe(page: "Page") -> None:
    """Eight seeks a second do not exceed the limit of three flashes."""
    flashes = page.evaluate(
        """async () => {
          const { BeatLight } = await import("/beat.js");
          const names = ["light", "ring", "flash", "pulse", "beatNumber", "barNumber", "position",
            "state", "tempo"];
          const part = (name) => [name, document.createElement("p")];
          const parts = Object.fromEntries(names.map(part));
          const segment = { isPlaying: true, positionMs: 0, tempoBpm: 60, beat: 0, beatsPerBar: 4 };
          new BeatLight(parts, () => {
            const now = performance.now();
            const anchorTime = now - (now % 125);
            const transport = { ...segment, anchorTime, next: null };
            return { transport, countInFrom: null, now, trimMs: 0, heldMs: null };
          });
          const flashes = [];
          let before = 0;
          const began = performance.now();
          while (performance.now() < began + 4000) {
            const at = await new Promise(requestAnimationFrame);
            const glow = Number(parts.flash.style.opacity);
            if (glow > before + 0.1) flashes.push(at);
            before = glow;
          }
          return flashes;
        }"""
    )
    assert flashes
    assert all(later - earlier >= 990 for earlier, later in zip(flashes, flashes[3:], strict=False))
