/** The leader's controls. Followers see the same, greyed, with the reason. */

import { clockFace } from "./beat.js";
import { segmentAt } from "./bandsync.js";
import { TapTempo } from "./tap.js";
import { rounded } from "./words.js";

const $ = (id) => document.getElementById(id);
// A session has no length: the scrubber has as many times this as the song has come.
const SCRUBBER_S = 300;
const MIN_BPM = 20;
const MAX_BPM = 300;

export class Conductor {
  #band = () => null;
  #run;
  #taps = new TapTempo();
  #scrubbing = false;
  #tempo = "";

  /**
   * @param {() => BandSync | null} band
   * @param {(command: Promise) => void} run shows why a command was refused
   */
  constructor(band, run) {
    this.#band = band;
    this.#run = run;
    this.#listen();
    setInterval(() => this.#follow(), 250);
  }

  /** After a change: who may do what, and why not. */
  show() {
    const band = this.#band();
    const { leader, isLeader, status } = band;
    const online = status === "online" || status === "draining";
    const absent = leader === null || !leader.connected;
    $("conduct").disabled = !online || !isLeader;
    $("reason").textContent = reason(online, isLeader, leader);
    $("ask").hidden = isLeader || absent;
    // Leadership may be claimed when nobody has it at hand, or when the leader may be out of reach.
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

  /** The tempo that was set last, but never over what somebody is typing. */
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
    // When the finger lands, not when it leaves.
    $("tap").addEventListener("pointerdown", ({ timeStamp }) => this.#tap(timeStamp));
    $("tap").addEventListener("keydown", ({ key, repeat, timeStamp }) => {
      if ((key === " " || key === "Enter") && !repeat) this.#tap(timeStamp);
    });
    onChange("bpm", (bpm) => this.#setTempo(bpm));
    onChange("beats", (beatsPerBar) => this.#setTempo(this.#tempoBpm(), { beatsPerBar }));
    onSubmit("tempoForm", () => {}); // Its fields have changed by then.
    onSubmit("barForm", () => this.#goToBar($("bar").valueAsNumber));
    $("scrubber").addEventListener("input", () => { this.#scrubbing = true; });
    $("scrubber").addEventListener("change", () => this.#seek());
    document.addEventListener("keydown", (event) => this.#shortcut(event));
  }

  /** The space bar, where it does not press or write something else. */
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
    return this.#run(band.play({ countInBeats }));
  }

  #tap(at) {
    const bpm = this.#band() && this.#taps.tap(at);
    if (bpm) this.#run(this.#band().setTempo(Math.round(bpm)));
  }

  /** The tempo that was set last. */
  #tempoBpm() {
    const { transport } = this.#band().session;
    return (transport.next ?? transport).tempoBpm;
  }

  #nudge(by) {
    const bpm = Math.round(this.#tempoBpm()) + by;
    if (bpm >= MIN_BPM && bpm <= MAX_BPM) this.#setTempo(bpm);
  }

  #setTempo(bpm, fields = {}) {
    this.#run(this.#band().setTempo(bpm, { ...fields, at: $("at").value }));
  }

  #goToBar(bar) {
    const band = this.#band();
    const { tempoBpm, beatsPerBar } = segmentAt(band.session.transport, band.clock.now());
    const positionMs = ((bar - 1) * beatsPerBar * 60_000) / tempoBpm;
    this.#run(band.seek(positionMs, { at: $("at").value }));
  }

  #seek() {
    this.#scrubbing = false;
    const positionMs = $("scrubber").valueAsNumber * 1000;
    this.#run(this.#band().seek(positionMs, { at: $("at").value }));
  }

  /** The scrubber goes with the song, unless a thumb is on it. */
  #follow() {
    const band = this.#band();
    const scrubber = $("scrubber");
    if (!band?.session || document.hidden) return;
    const seconds = this.#scrubbing ? scrubber.valueAsNumber : band.positionAt() / 1000;
    if (!this.#scrubbing) {
      scrubber.max = Math.ceil((seconds + 30) / SCRUBBER_S) * SCRUBBER_S;
      scrubber.value = seconds;
    }
    scrubber.setAttribute("aria-valuetext", clockFace(seconds * 1000));
    if (this.#scrubbing) $("position").textContent = clockFace(seconds * 1000);
  }
}

function reason(online, isLeader, leader) {
  if (!online) return "These wait until the connection is back.";
  if (isLeader) return "You lead: the band follows.";
  if (leader === null) return "Nobody leads. Lead, to use these.";
  if (!leader.connected) return `${leader.displayName} leads, and is away.`;
  return `Only ${leader.displayName}, who leads, can use these.`;
}
