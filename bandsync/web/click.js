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
const SETTLED_MS = 60;
// A click later than this is left out: late is worse than silent.
const LATEST_S = 0.015;
const LENGTH_S = 0.035;
// Of float arithmetic, in beats or milliseconds.
const NOISE = 1e-6;

export class Click {
  #read;
  #context = null;
  #gain = null;
  #timer = 0;
  #planned = new Map(); // beat → {node, at, when}

  /**
   * @param {() => {transport: object, now: number, toLocal: (t: number) => number, trimMs: number}
   *   | null} read as of the session; `toLocal` gives `performance.now()` of an instant.
   */
  constructor(read) {
    this.#read = read;
  }

  get on() {
    return this.#timer !== 0;
  }

  /** Turn it on; from a click or a key, or browsers stay silent. */
  async start(volume) {
    this.#context ??= new AudioContext({ latencyHint: "interactive" });
    if (this.#gain === null) {
      this.#gain = this.#context.createGain();
      this.#gain.connect(this.#context.destination);
    }
    this.volume = volume;
    if (this.#timer === 0) this.#timer = setInterval(() => this.#plan(), LOOK_EVERY_MS);
    await this.#context.resume();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#forget(-Infinity);
    this.#context?.suspend();
  }

  /** From 0 to 1. */
  set volume(volume) {
    if (this.#gain !== null) this.#gain.gain.value = volume ** 2;
  }

  /** What was planned counts no more: the transport, or this device's trim, has changed. */
  replan() {
    if (!this.on) return;
    const state = this.#read();
    this.#forget(state === null ? -Infinity : state.now + state.trimMs);
    this.#plan();
  }

  /** Drop what is planned for after an instant; what sounds already must not sound twice. */
  #forget(after) {
    for (const [beat, { node, at }] of this.#planned) {
      if (at <= after) continue;
      node.stop();
      this.#planned.delete(beat);
    }
  }

  #plan() {
    const state = this.#read();
    if (state === null || this.#context.state !== "running") return this.#forget(-Infinity);
    const heard = state.now + state.trimMs;
    const whenOf = (at) => this.#audioTime(state.toLocal(at - state.trimMs));
    for (const [beat, { node, at, when }] of this.#planned) {
      const moved = at > heard + SETTLED_MS && Math.abs(whenOf(at) - when) > MOVED_S;
      if (moved) node.stop();
      if (moved || at < heard - 1000) this.#planned.delete(beat);
    }
    for (const { beat, at, first } of upcoming(state.transport, heard, heard + AHEAD_MS)) {
      const when = whenOf(at);
      if (this.#planned.has(beat) || when < this.#context.currentTime - LATEST_S) continue;
      this.#planned.set(beat, { at, when, node: this.#sound(Math.max(when, 0), first) });
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
 * @returns {{beat: number, at: number, first: boolean}[]} `at` on the session clock; `first` of
 *   their bar.
 */
export function upcoming(transport, from, till) {
  return stretches(transport).flatMap((stretch) => {
    const { anchorTime, tempoBpm, beatsPerBar } = stretch;
    const period = 60_000 / tempoBpm;
    const start = Math.max(from, stretch.from);
    const end = Math.min(till, stretch.till);
    const beats = [];
    for (let beat = Math.ceil(stretch.beat + (start - anchorTime) / period - NOISE); ; beat++) {
      const at = anchorTime + (beat - stretch.beat) * period;
      if (at >= end - NOISE) return beats;
      beats.push({ beat, at, first: inBar(beat, beatsPerBar) === 0 });
    }
  });
}

/** Segments that have beats, and from when till when; before a start they count up to it. */
function stretches({ next, ...now }) {
  const change = next?.anchorTime ?? Infinity;
  const found = [];
  if (now.isPlaying) found.push({ ...now, from: -Infinity, till: change });
  else if (next?.isPlaying) found.push({ ...next, from: -Infinity, till: change });
  if (next?.isPlaying) found.push({ ...next, from: change, till: Infinity });
  return found;
}
