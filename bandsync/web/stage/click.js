/**
 * The click: every beat is given to the audio clock ahead of time, so that no timer and no busy
 * page can make it late. (The method: Chris Wilson, "A Tale of Two Clocks", 2013.)
 */

import { inBar } from "./beat.js";

const LOOK_EVERY_MS = 50;
// Timers of a hidden page come once a second.
const AHEAD_MS = 1500;
// Clocks learn: what was planned is moved by so much, but nothing is at the last moment.
const MOVED_S = 0.003;
const SETTLED_S = 0.06;
// A click later than this is left out: late is worse than silent.
const LATEST_S = 0.015;
const KEPT_MS = 1000;
const LENGTH_S = 0.035;
// Of float arithmetic with instants, in beats or milliseconds.
const NOISE = 1e-4;

export class Click {
  #read;
  #tell;
  #context = null;
  #gain = null;
  #timer = 0;
  #planned = new Map(); // beat → {node, at, when}

  /**
   * @param {() => {transport: object, countInFrom: number | null, now: number,
   *   toLocal: (t: number) => number, trimMs: number} | null} read as of the session; `toLocal` gives
   *   `performance.now()` of an instant.
   * @param {() => void} tell that `on` or `silent` has changed
   */
  constructor(read, tell) {
    this.#read = read;
    this.#tell = tell;
    // A call, or another app, may have silenced us; browsers want a touch to begin again.
    for (const type of ["visibilitychange", "pointerdown", "keydown"]) {
      document.addEventListener(type, () => { if (this.silent) this.#context.resume(); });
    }
  }

  get on() {
    return this.#timer !== 0;
  }

  /** On, but the device does not let it sound. */
  get silent() {
    return this.on && this.#context.state !== "running";
  }

  /** How much earlier than its beat a click must be decided on, milliseconds. */
  get latencyMs() {
    return this.on ? (this.#context.outputLatency || this.#context.baseLatency || 0) * 1000 : 0;
  }

  /** Turn it on; from a click or a key, or browsers stay silent. */
  async start(volume) {
    if (this.#context === null) {
      this.#context = new AudioContext({ latencyHint: "interactive" });
      this.#context.addEventListener("statechange", () => this.#tell());
      this.#gain = this.#context.createGain();
      this.#gain.connect(this.#context.destination);
    }
    this.volume = volume;
    if (this.#timer === 0) this.#timer = setInterval(() => this.#plan(), LOOK_EVERY_MS);
    this.#tell();
    await this.#context.resume();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#forget();
    this.#context?.suspend();
    this.#tell();
  }

  /** From 0 to 1. */
  set volume(volume) {
    if (this.#gain !== null) this.#gain.gain.value = volume ** 2;
  }

  /** What was planned counts no more: the transport, or this device's trim, has changed. */
  replan() {
    if (!this.on) return;
    this.#forget();
    this.#plan();
  }

  /** Drop what has not begun to sound. */
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
    const heard = now + trimMs;
    const whenOf = (at) => this.#audioTime(toLocal(at - trimMs));
    const time = this.#context.currentTime;
    for (const [beat, { node, at, when }] of this.#planned) {
      const moved = when > time + SETTLED_S && Math.abs(whenOf(at) - when) > MOVED_S;
      if (moved) node.stop();
      if (moved || at < heard - KEPT_MS) this.#planned.delete(beat);
    }
    for (const { beat, at, first, period } of upcoming(transport, heard, heard + AHEAD_MS, countInFrom)) {
      const known = this.#planned.get(beat);
      // The same number much later is another beat: somebody went back in the song.
      if (known && Math.abs(known.at - at) < period / 2) continue;
      const when = whenOf(at);
      if (when < time - LATEST_S) continue;
      this.#planned.set(beat, { at, when, node: this.#sound(Math.max(when, time), first) });
    }
  }

  /** When the context must play what is to be heard at `local`, as `performance.now()`. */
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
 * The beats of a transport between two instants: those of the song, and those that count it in.
 *
 * @param {object} transport of protocol.md section 1
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

/** Segments that have beats, and from when till when; before a start they may count up to it. */
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
