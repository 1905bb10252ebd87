/**
 * The click: beats are scheduled on the audio clock ahead of time, so that neither timers nor a busy
 * page delay them. (The method: Chris Wilson, "A Tale of Two Clocks", 2013.)
 */

import { inBar } from "./beat.js";

const LOOK_EVERY_MS = 50;
// Timers of a hidden page fire once a second.
const AHEAD_MS = 1500;
// When the clock estimate changes by more than this, scheduled clicks move, except imminent ones.
const MOVED_S = 0.003;
const SETTLED_S = 0.06;
// A click later than this is dropped: late is worse than silent.
const LATEST_S = 0.015;
const KEPT_MS = 1000;
const LENGTH_S = 0.035;
// Float noise of instants, in beats or milliseconds.
const NOISE = 1e-4;

export class Click {
  #read;
  #onChange;
  #context = null;
  #gain = null;
  #timer = 0;
  #planned = new Map(); // beat → {node, at, when}

  /**
   * @param {() => {transport: object, countInFrom: number | null, now: number,
   *   toLocal: (t: number) => number, trimMs: number} | null} read as of the session; `toLocal` gives
   *   `performance.now()` of an instant.
   * @param {() => void} onChange called when `on` or `silent` has changed
   */
  constructor(read, onChange) {
    this.#read = read;
    this.#onChange = onChange;
    // A call or another app may suspend the audio; browsers need a touch to resume it.
    for (const type of ["visibilitychange", "pointerdown", "keydown"]) {
      document.addEventListener(type, () => { if (this.silent) this.#context.resume(); });
    }
  }

  get on() {
    return this.#timer !== 0;
  }

  /** Whether it is on, but suspended by the device. */
  get silent() {
    return this.on && this.#context.state !== "running";
  }

  /** How long before its beat a click must be scheduled, milliseconds. */
  get latencyMs() {
    return this.on ? (this.#context.outputLatency || this.#context.baseLatency || 0) * 1000 : 0;
  }

  /** Turn it on. Call it from a click or key handler: browsers need a gesture. */
  async start(volume) {
    if (this.#context === null) {
      this.#context = new AudioContext({ latencyHint: "interactive" });
      this.#context.addEventListener("statechange", () => this.#onChange());
      this.#gain = this.#context.createGain();
      this.#gain.connect(this.#context.destination);
    }
    this.volume = volume;
    if (this.#timer === 0) this.#timer = setInterval(() => this.#plan(), LOOK_EVERY_MS);
    this.#onChange();
    await this.#context.resume();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#forget();
    this.#context?.suspend();
    this.#onChange();
  }

  /** From 0 to 1. */
  set volume(volume) {
    if (this.#gain !== null) this.#gain.gain.value = volume ** 2;
  }

  /** Reschedule: the transport or this device's trim has changed. */
  replan() {
    if (!this.on) return;
    this.#forget();
    this.#plan();
  }

  /** Cancel clicks that have not started to sound. */
  #forget() {
    for (const [beat, { node, when }] of this.#planned) {
      if (when <= this.#context.currentTime) continue;
      node.stop();
      this.#planned.delete(beat);
    }
  }

  #plan() {
    const state = this.#read();
    if (state === null || this.silent) return this.#forget();
    const { transport, countInFrom, now, toLocal, trimMs } = state;
    const audible = now + trimMs;
    const whenOf = (at) => this.#audioTime(toLocal(at - trimMs));
    const time = this.#context.currentTime;
    for (const [beat, { node, at, when }] of this.#planned) {
      const moved = when > time + SETTLED_S && Math.abs(whenOf(at) - when) > MOVED_S;
      if (moved) node.stop();
      if (moved || at < audible - KEPT_MS) this.#planned.delete(beat);
    }
    for (const { beat, at, first, period } of upcoming(transport, audible, audible + AHEAD_MS, countInFrom)) {
      const known = this.#planned.get(beat);
      // The same number much later is another beat, after a seek backwards.
      if (known && Math.abs(known.at - at) < period / 2) continue;
      const when = whenOf(at);
      if (when < time - LATEST_S) continue;
      this.#planned.set(beat, { at, when, node: this.#sound(Math.max(when, time), first) });
    }
  }

  /** The audio time at which a sound must start to be heard at `local` (`performance.now()`). */
  #audioTime(local) {
    const context = this.#context;
    const { contextTime, performanceTime } = context.getOutputTimestamp?.() ?? {};
    if (performanceTime > 0) return contextTime + (local - performanceTime) / 1000;
    const latency = context.outputLatency ?? context.baseLatency ?? 0;
    return context.currentTime + (local - performance.now()) / 1000 - latency;
  }

  #sound(when, first) {
    const context = this.#context;
    const node = context.createOscillator();
    const envelope = context.createGain();
    node.frequency.value = first ? 1760 : 1175;
    envelope.gain.setValueAtTime(0, when);
    envelope.gain.linearRampToValueAtTime(1, when + 0.001);
    envelope.gain.exponentialRampToValueAtTime(0.001, when + LENGTH_S);
    node.connect(envelope).connect(this.#gain);
    node.start(when);
    node.stop(when + LENGTH_S);
    return node;
  }
}

/**
 * The beats of a transport between two instants, count-in included.
 *
 * @param {object} transport as in PROTOCOL.md
 * @param {number} from milliseconds, session clock
 * @param {number} till not included
 * @param {number | null} countInFrom as of the session
 * @returns {{beat: number, at: number, first: boolean, period: number}[]} `at` on the session clock;
 *   `first` of their bar; `period` milliseconds from one to the next
 */
export function upcoming(transport, from, till, countInFrom = null) {
  return stretches(transport, countInFrom).flatMap((stretch) => {
    const { anchorTime, tempoBpm, beatsPerBar } = stretch;
    const period = 60_000 / tempoBpm;
    const start = Math.max(from, stretch.from);
    const end = Math.min(till, stretch.till);
    const beats = [];
    for (let beat = Math.ceil(stretch.beat + (start - anchorTime) / period - NOISE); ; beat++) {
      const at = anchorTime + (beat - stretch.beat) * period;
      if (at >= end - NOISE) return beats;
      beats.push({ beat, at, first: inBar(beat, beatsPerBar) === 0, period });
    }
  });
}

/** Segments with beats and their time ranges; before a start, the count-in. */
function stretches({ next, ...now }, countInFrom) {
  const change = next?.anchorTime ?? Infinity;
  const found = [];
  if (now.isPlaying) found.push({ ...now, from: -Infinity, till: change });
  else if (next?.isPlaying && countInFrom !== null) {
    found.push({ ...next, from: countInFrom - NOISE, till: change });
  }
  if (next?.isPlaying) found.push({ ...next, from: change, till: Infinity });
  return found;
}
