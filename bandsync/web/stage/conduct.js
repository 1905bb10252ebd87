/** The leader's controls. For followers they are disabled, with the reason. */

import { clockFace } from "./beat.js";
import { segmentAt } from "./bandsync.js";
import { TapTempo } from "./tap.js";
import { named, rounded } from "./words.js";

const $ = (id) => document.getElementById(id);
// A song has no known length: the scrubber grows in steps of this.
const SCRUBBER_S = 300;
const MIN_BPM = 20;
const MAX_BPM = 300;
// Lead of a start: it must reach every member, and the slowest loudspeaker must play its first click
// in time.
const LEAD_MS = 250;
const LEAD_MARGIN_MS = 150;
const MOST_LEAD_MS = 1500;

export class Conductor {
  #band = () => null;
  #run;
  #taps = new TapTempo();
  #ownDelayMs;
  #scrubbing = false;
  #spoken = "";
  #tempo = "";
  #wanted = null; // BPM of a tempo command in flight

  /**
   * @param {() => BandSync | null} band
   * @param {(command: Promise) => Promise<boolean>} run shows why a command was refused
   * @param {() => number} ownDelayMs how much ahead of its beat this device must act, milliseconds
   */
  constructor(band, run, ownDelayMs) {
    this.#band = band;
    this.#run = run;
    this.#ownDelayMs = ownDelayMs;
    this.#listen();
    setInterval(() => this.#follow(), 250);
  }

  /** After a change: enable or disable the controls, with the reason. */
  show() {
    const band = this.#band();
    const { leader, isLeader, status } = band;
    const online = status === "online" || status === "draining";
    const absent = leader === null || !leader.connected;
    $("conduct").disabled = !online || !isLeader;
    $("reason").textContent = reason(online, isLeader, leader);
    $("ask").hidden = isLeader || absent;
    // The lead can be claimed when there is no leader, or when the leader is disconnected or may be
    // unreachable.
    $("claim").hidden = isLeader || !(absent || band.storage?.degraded);
    for (const id of ["ask", "claim"]) $(id).disabled = !online;
    const playing = this.#playing();
    $("play").querySelector("use").setAttribute("href", playing ? "#i-pause" : "#i-play");
    $("play").querySelector("span").textContent = playing ? "Pause" : "Play";
    this.#showTempo();
  }

  #playing() {
    const { transport } = this.#band().session;
    return (transport.next ?? transport).isPlaying;
  }

  /** Show the latest tempo, unless the user is typing one. */
  #showTempo() {
    const { transport } = this.#band().session;
    const { tempoBpm, beatsPerBar } = transport.next ?? transport;
    const tempo = `${tempoBpm} ${beatsPerBar}`;
    if (tempo === this.#tempo) return;
    this.#tempo = tempo;
    if (document.activeElement !== $("bpm")) $("bpm").value = rounded(tempoBpm);
    if (document.activeElement !== $("beats")) $("beats").value = beatsPerBar;
  }

  #listen() {
    const onClick = (id, act) => $(id).addEventListener("click", () => this.#band() && act());
    const onSubmit = (id, act) =>
      $(id).addEventListener("submit", (event) => {
        event.preventDefault();
        if (this.#band()) act();
      });
    const onChange = (id, act) =>
      $(id).addEventListener("change", () => {
        if (this.#band() && $(id).reportValidity()) act($(id).valueAsNumber);
      });
    onClick("play", () => this.#playOrPause());
    onClick("stop", () => this.#run(this.#band().stop()));
    onClick("slower", () => this.#nudge(-1));
    onClick("faster", () => this.#nudge(1));
    // On pointerdown, not on pointerup.
    $("tap").addEventListener("pointerdown", ({ timeStamp }) => this.#tap(timeStamp));
    $("tap").addEventListener("keydown", ({ key, repeat, timeStamp }) => {
      if ((key === " " || key === "Enter") && !repeat) this.#tap(timeStamp);
    });
    onChange("bpm", (bpm) => this.#setTempo(bpm));
    onChange("beats", (beatsPerBar) => this.#setTempo(this.#tempoBpm(), { beatsPerBar }));
    onSubmit("tempoForm", () => {}); // The change events of its fields have fired already.
    onSubmit("barForm", () => this.#goToBar($("bar").valueAsNumber));
    this.#listenToScrubber();
    document.addEventListener("keydown", (event) => this.#shortcut(event));
  }

  /** A gesture that scrolls the page, or returns to its start, must not seek. */
  #listenToScrubber() {
    const scrubber = $("scrubber");
    const end = () => { this.#scrubbing = false; };
    scrubber.addEventListener("input", () => { this.#scrubbing = true; });
    scrubber.addEventListener("change", () => this.#seek());
    scrubber.addEventListener("pointercancel", end);
    // A `change` event, if there is one, comes first.
    scrubber.addEventListener("pointerup", () => setTimeout(end));
    scrubber.addEventListener("blur", end);
  }

  /** The space bar, unless a control or a text field has the focus. */
  #shortcut(event) {
    if (event.key !== " " || event.repeat || event.target !== document.body) return;
    if (!this.#band()?.isLeader) return;
    event.preventDefault();
    this.#playOrPause();
  }

  #playOrPause() {
    const band = this.#band();
    if (this.#playing()) return this.#run(band.pause());
    const { beatsPerBar } = segmentAt(band.session.transport, band.clock.now());
    const countInBeats = Math.min(32, Number($("countIn").value) * beatsPerBar);
    return this.#run(band.play({ countInBeats, startInMs: this.#leadMs() }));
  }

  #leadMs() {
    const latencies = [...this.#band().stats.values()].map(({ latencyMs }) => latencyMs ?? 0);
    const slowest = Math.max(0, ...latencies) + LEAD_MARGIN_MS;
    return Math.min(MOST_LEAD_MS, Math.max(LEAD_MS, slowest) + this.#ownDelayMs());
  }

  #tap(at) {
    // A disabled button still receives pointer events.
    const bpm = this.#band() && !$("conduct").disabled && this.#taps.tap(at);
    if (bpm) this.#run(this.#band().setTempo(Math.round(bpm)));
  }

  /** The latest tempo. */
  #tempoBpm() {
    const { transport } = this.#band().session;
    return (transport.next ?? transport).tempoBpm;
  }

  /** Relative to the latest requested tempo: fast taps do not wait for the server. */
  async #nudge(by) {
    const bpm = Math.round(this.#wanted ?? this.#tempoBpm()) + by;
    if (bpm < MIN_BPM || bpm > MAX_BPM) return;
    this.#wanted = bpm;
    await this.#setTempo(bpm);
    if (this.#wanted === bpm) this.#wanted = null;
  }

  #setTempo(bpm, fields = {}) {
    return this.#run(this.#band().setTempo(bpm, { ...fields, at: $("at").value }));
  }

  /** The server computes beats with the tempo in force at that instant. */
  #goToBar(bar) {
    const band = this.#band();
    const at = $("at").value;
    const { transport } = band.session;
    const now = segmentAt(transport, band.clock.now());
    const there = at !== "now" && now.isPlaying ? (transport.next ?? now) : now;
    const { tempoBpm, beatsPerBar } = there;
    const positionMs = ((bar - 1) * beatsPerBar * 60_000) / tempoBpm;
    this.#run(band.seek(positionMs, { at }));
  }

  #seek() {
    if (!this.#scrubbing) return; // cancelled
    this.#scrubbing = false;
    const positionMs = $("scrubber").valueAsNumber * 1000;
    this.#run(this.#band().seek(positionMs, { at: $("at").value }));
  }

  /** Position of the scrubber while it is dragged, milliseconds; null otherwise. */
  get heldMs() {
    return this.#scrubbing ? $("scrubber").valueAsNumber * 1000 : null;
  }

  /** Move the scrubber with the song, unless it is dragged. */
  #follow() {
    const band = this.#band();
    const scrubber = $("scrubber");
    if (!band?.session || document.hidden) return;
    // Coarse steps: a screen reader would read every one, and keys step from the current value.
    if (!this.#scrubbing && scrubber.matches(":focus-visible")) return;
    const seconds = this.#scrubbing ? scrubber.valueAsNumber : band.positionAt() / 1000;
    if (!this.#scrubbing) {
      scrubber.max = Math.ceil((seconds + 30) / SCRUBBER_S) * SCRUBBER_S;
      scrubber.value = seconds;
    }
    const spoken = clockFace(seconds * 1000).split(".")[0];
    if (spoken !== this.#spoken) scrubber.setAttribute("aria-valuetext", spoken);
    this.#spoken = spoken;
  }
}

function reason(online, isLeader, leader) {
  if (!online) return "These wait until the connection is back.";
  if (isLeader) return "You lead: the band follows.";
  if (leader === null) return "Nobody leads. Lead, to use these.";
  if (!leader.connected) return `${named(leader.displayName)} leads, and is away.`;
  return `Only ${named(leader.displayName)}, who leads, can use these.`;
}
