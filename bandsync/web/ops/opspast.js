/**
 * History of the screen, across restarts of the server: samples, and periods of each storage mode.
 * No DOM, no clock: `now` is an argument.
 * @module
 */

const BOOTS = 20;
const SPANS_MS = [60_000, 120_000, 300_000];
// Behind a load balancer another server may answer. After this many in a row, switch to it.
const STRANGERS = 10;
// Gap after which the server counts as away: two missing samples.
const GAP_PERIODS = 2.5;

/**
 * @typedef {object} Stretch
 * @property {number} from session clock, milliseconds
 * @property {number} to likewise
 * @property {string} mode "redis", "memory", "migrating", "memory (disabled)", or "away"
 * @property {object | null} event at its start, as in `/api/ops`
 */

/** The past of one server, however often it was started again. */
export class Past {
  constructor() {
    /** @type {object[]} as in `/api/ops`, in order, the last `keptMs` of them */
    this.samples = [];
    /** @type {{bootId: string, startedAt: number, heardAt: number, events: object[]}[]} */
    this.boots = [];
    this.periodMs = 1000;
    this.keptMs = 600_000;
    /** Answers of other servers since the last one of ours. */
    this.strangers = 0;
    this.serverId = null;
  }

  /** The instant after which samples are missing, or null for all that there are. */
  get since() {
    return this.samples.at(-1)?.at ?? null;
  }

  /**
   * Start of the visible range: not before the first start of the server, and in steps, so that the
   * scale does not change all the time.
   * @param {number} now session clock, milliseconds
   * @returns {number} milliseconds
   */
  spanMs(now) {
    const age = now - this.boots[0].startedAt;
    return SPANS_MS.find((span) => span >= age && span < this.keptMs) ?? this.keptMs;
  }

  /** Boot id of the server that answered last, or null. */
  get boot() {
    return this.boots.at(-1) ?? null;
  }

  /**
   * Adds an answer of `/api/ops`.
   * @param {object} overview
   * @returns {boolean} whether it was ours: false if another server answered, and ours is waited for
   */
  take(overview) {
    if (this.serverId !== overview.serverId) {
      this.strangers += 1;
      if (this.serverId !== null && this.strangers < STRANGERS) return false;
      this.serverId = overview.serverId;
      this.samples = [];
      this.boots = [];
    }
    this.strangers = 0;
    this.periodMs = overview.periodMs;
    this.keptMs = overview.keptMs;
    let { samples } = overview;
    if (this.boot?.bootId !== overview.bootId) {
      // Samples of a new server from before the last sample are its own history.
      if (overview.now > this.since) samples = samples.filter((each) => each.at > this.since);
      this.boots.push({ bootId: overview.bootId, startedAt: 0, heardAt: 0, events: [] });
      this.boots.splice(0, this.boots.length - BOOTS);
    }
    const boot = this.boot;
    boot.startedAt = overview.now - overview.uptimeMs;
    boot.heardAt = overview.now;
    boot.events = overview.events;
    // After the server's clock was set back, its history is reloaded.
    if (samples.length) this.samples = this.samples.filter((each) => each.at < samples[0].at).concat(samples);
    const oldest = overview.now - this.keptMs;
    this.samples = this.samples.filter((each) => each.at >= oldest);
    return true;
  }

  /** Whether there is a hole between two samples that follow each other. */
  parted(earlier, later) {
    return later.at - later.lastedMs - earlier.at > (GAP_PERIODS - 1) * this.periodMs;
  }

  /**
   * The periods of each storage mode in order, and those without an answer.
   * @param {number} now session clock, milliseconds
   * @returns {Stretch[]}
   */
  stretches(now) {
    const found = [];
    this.boots.forEach((boot, index) => {
      const next = this.boots[index + 1];
      const silent = next !== undefined || now - boot.heardAt > GAP_PERIODS * this.periodMs;
      const end = silent ? boot.heardAt : now;
      boot.events.forEach((event, position) => {
        const to = boot.events[position + 1]?.at ?? Math.max(end, event.at);
        found.push({ from: event.at, to, mode: event.mode, event });
      });
      if (silent) {
        found.push({ from: end, to: next?.startedAt ?? now, mode: "away", event: null });
      }
    });
    return found.filter((stretch) => stretch.to > stretch.from || stretch.event);
  }

  /**
   * Failovers, recoveries, starts, and unknown events of a newer server; latest first.
   * @returns {{event: object, tookMs: number | null, lasts: boolean}[]} `tookMs`: how long Redis, or
   *   before a start the server, was away; null if unknown; `lasts`: it is still away
   */
  happenings() {
    const found = [];
    this.boots.forEach((boot, index) => {
      const events = boot.events;
      events.forEach((event, position) => {
        if (event.kind === "migration" || (event.kind === "start" && index === 0)) return;
        if (event.kind === "recovery") {
          found.push({ event, tookMs: event.outageMs, lasts: false });
          return;
        }
        if (event.kind !== "failover" && event.kind !== "start") {
          found.push({ event, tookMs: null, lasts: false });
          return;
        }
        if (event.kind === "start") {
          found.push({ event, tookMs: boot.startedAt - this.boots[index - 1].heardAt, lasts: false });
          return;
        }
        const recovery = events.slice(position).find((each) => each.kind === "recovery");
        const tookMs = recovery ? recovery.at - event.at : null;
        found.push({ event, tookMs, lasts: !recovery && boot === this.boot });
      });
    });
    return found.reverse();
  }
}
