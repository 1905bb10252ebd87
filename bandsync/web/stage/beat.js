/**
 * The light: the current beat, drawn in every frame from the extrapolated transport.
 *
 * There are no timers. A late frame shows the state at its own instant.
 */

import { segmentAt } from "./bandsync.js";

// Float noise between two computations of one beat: it must not be shown twice.
const NOISE = 1e-6;
// A re-anchored transport may place the beat just shown slightly in the future.
const HAIR = 0.05;
// More than three flashes in a second can trigger seizures (WCAG 2.3.1). This tempo leaves a margin
// for frames that come early.
const MOST_FLASHES = 3;
const FLASHES_IN_MS = 1000;
const FASTEST_BPM = 170;
const SVG = "http://www.w3.org/2000/svg";

/**
 * The beats to draw at an instant of the session.
 *
 * @param {object} transport as in PROTOCOL.md
 * @param {number} t milliseconds, session clock
 * @param {number | null} countInFrom as of the session
 * @returns {{state: "stopped" | "paused" | "starting" | "playing", running: boolean,
 *   countIn: boolean, beats: number, beatsPerBar: number, tempoBpm: number, positionMs: number}}
 *   `beats` from the start of the song; in a count-in they run up to the start. Before the count-in
 *   they do not move: that is the lead for the slowest member.
 */
export function moment(transport, t, countInFrom = null) {
  const segment = segmentAt(transport, t);
  const { next } = transport;
  if (!segment.isPlaying && next?.isPlaying && t < next.anchorTime) {
    const { tempoBpm, beatsPerBar, positionMs } = next;
    const countIn = countInFrom !== null && t >= countInFrom;
    const ahead = countIn ? ((next.anchorTime - t) * tempoBpm) / 60_000 : 0;
    const beats = next.beat - ahead;
    return { state: "starting", running: countIn, countIn, beats, beatsPerBar, tempoBpm, positionMs };
  }
  const { isPlaying, tempoBpm, beatsPerBar } = segment;
  const since = isPlaying ? t - segment.anchorTime : 0;
  const standing = segment.positionMs > 0 ? "paused" : "stopped";
  return {
    state: isPlaying ? "playing" : standing,
    running: isPlaying,
    countIn: false,
    beats: segment.beat + (since * tempoBpm) / 60_000,
    beatsPerBar,
    tempoBpm,
    positionMs: Math.min(segment.positionMs + since, 86_400_000),
  };
}

/** The number of the beat at `beats`, without stepping back by float noise. */
export function beatNumber(beats, last) {
  const number = Math.floor(beats + NOISE);
  return number === last - 1 && last - beats < HAIR ? last : number;
}

/** The place of a beat in its bar, from 0; also before the start of the song. */
export function inBar(beat, beatsPerBar) {
  return ((beat % beatsPerBar) + beatsPerBar) % beatsPerBar;
}

/** Milliseconds as minutes, seconds and tenths. */
export function clockFace(ms) {
  const tenths = Math.floor(ms / 100);
  const minutes = Math.floor(tenths / 600);
  return `${minutes}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}

/**
 * Brightness of the disc, from 0 to 1: a flash on each beat, on each bar when beats are too fast,
 * and none when bars are too fast.
 */
export function brightness({ running, beats, beatsPerBar, tempoBpm }) {
  if (!running) return 0;
  const unit = tempoBpm > FASTEST_BPM ? beatsPerBar : 1;
  if (tempoBpm / unit > FASTEST_BPM) return 0;
  const phase = inBar(beats, unit);
  return Math.max(0, 1 - phase / 0.6) ** 2;
}

/** Limits the flash rate to a safe one, also when seeks start many beats in a row. */
export class FlashGuard {
  #began = []; // starts of the last flashes, milliseconds
  #before = 0;
  #dark = false; // the current flash exceeds the limit

  /**
   * @param {number} glow wanted, 0 to 1
   * @param {number} at when, milliseconds, never less than the last time
   * @returns {number} what may be shown
   */
  allowed(glow, at) {
    // Rising brightness starts a new flash; then it falls.
    if (glow > this.#before + 0.1) {
      this.#dark = this.#began.length === MOST_FLASHES && at - this.#began[0] < FLASHES_IN_MS;
      if (!this.#dark) this.#began = [...this.#began, at].slice(-MOST_FLASHES);
    }
    this.#before = glow;
    return this.#dark ? 0 : glow;
  }
}

export class BeatLight {
  #elements;
  #read;
  #last = null;
  #shown = {};
  #segments = [];
  #frameMs = 16;
  #frameAt = 0;
  #guard = new FlashGuard();
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  /**
   * @param {Record<string, HTMLElement>} elements `light`, `ring`, `flash`, `pulse`,
   *   `beatNumber`, `barNumber`, `position`, `state`, `tempo`
   * @param {() => {transport: object, countInFrom: number | null, now: number, trimMs: number,
   *   heldMs: number | null} | null} read the transport and what counts it in, the session clock, how
   *   much earlier this screen shows it, and a position to show in place of the song's; null when
   *   there is nothing to show.
   */
  constructor(elements, read) {
    this.#elements = elements;
    this.#read = read;
    requestAnimationFrame((at) => this.#frame(at));
  }

  #frame(at) {
    requestAnimationFrame((next) => this.#frame(next));
    const passed = at - this.#frameAt;
    this.#frameAt = at;
    if (passed > 3 && passed < 50) this.#frameMs += (passed - this.#frameMs) / 16;
    const state = this.#read();
    if (state === null) {
      this.#last = null;
      return;
    }
    // A frame is visible one frame later.
    const t = state.now + state.trimMs + this.#frameMs;
    const { positionMs } = this.#draw(state, t, at);
    this.#text("position", clockFace(state.heldMs ?? positionMs));
  }

  #draw({ transport, countInFrom }, t, at) {
    const now = moment(transport, t, countInFrom);
    const { beatsPerBar, running, countIn } = now;
    const beat = beatNumber(now.beats, this.#last);
    const place = inBar(beat, beatsPerBar);
    const bar = Math.floor(beat / beatsPerBar) + 1;
    const { light, ring, flash, pulse } = this.#elements;

    this.#text("beatNumber", String(place + 1));
    this.#text("barNumber", countIn ? "Count-in" : `Bar ${bar}`);
    this.#text("state", now.state);
    this.#text("tempo", String(Math.round(now.tempoBpm * 10) / 10));

    if (this.#segments.length !== beatsPerBar) this.#segments = segments(ring, beatsPerBar);
    this.#once("segment", running ? place : -1, (lit) =>
      this.#segments.forEach((path, i) => path.classList.toggle("on", i === lit)));

    const glow = this.#calm.matches ? 0 : this.#guard.allowed(brightness(now), at);
    this.#once("glow", glow.toFixed(2), (value) => { flash.style.opacity = value; });
    this.#once("lit", glow > 0.6, (lit) => light.classList.toggle("lit", lit));
    this.#once("downbeat", place === 0, (first) =>
      [flash, pulse].forEach((element) => element.classList.toggle("downbeat", first)));
    const dim = running && inBar(now.beats, 1) < 0.3 ? 1 : 0.15;
    this.#once("pulse", dim, (value) => { pulse.style.opacity = value; });

    if (!running) {
      this.#last = null;
    } else if (beat !== this.#last) {
      this.#last = beat;
      document.dispatchEvent(new CustomEvent("beat", { detail: { beat, bar, place, countIn, t } }));
    }
    return now;
  }

  #text(id, text) {
    this.#once(id, text, () => { this.#elements[id].textContent = text; });
  }

  // Runs sixty times a second: write only what changed.
  #once(name, value, write) {
    if (this.#shown[name] === value) return;
    this.#shown[name] = value;
    write(value);
  }
}

/** One arc of the ring per beat of the bar, clockwise from the top. */
function segments(ring, count) {
  const gap = count === 1 ? 0.001 : Math.min(0.16, 1.2 / count);
  const turn = (2 * Math.PI) / count;
  const point = (angle) => `${100 + 92 * Math.sin(angle)} ${100 - 92 * Math.cos(angle)}`;
  const paths = Array.from({ length: count }, (_, i) => {
    const path = document.createElementNS(SVG, "path");
    const [from, till] = [i * turn + gap / 2, (i + 1) * turn - gap / 2];
    path.setAttribute("d", `M${point(from)}A92 92 0 ${till - from > Math.PI ? 1 : 0} 1 ${point(till)}`);
    return path;
  });
  ring.replaceChildren(...paths);
  return paths;
}
