/**
 * This device's estimate of the session clock.
 *
 * `clock_sync` is the NTP exchange: `t0` is the local time of the request, `t1` its arrival and `t2`
 * the reply on the session clock, `t3` the local arrival of the reply. For any network delays, the
 * offset (session clock minus local clock) is at most t1 − t0 and at least t2 − t3. This gives
 *
 * - **the bound** (`errorMs`): the intersection of these intervals, widened by the possible drift. It
 *   assumes nothing about the network, in particular no symmetric delays.
 * - **the estimate**: the middle between the fastest request and the fastest reply, *of different
 *   exchanges*. With delays that jitter evenly by J, N exchanges are right to about J / N; the exchange
 *   with the smallest round trip is right only to about J / √N.
 *
 * The offset in use slews to the estimate, so that the clock never runs backwards.
 *
 * All times and offsets are milliseconds.
 *
 * @module
 */

/** Largest drift: the server slews by at most 500 ppm, crystals differ by 100 ppm. */
const MAX_DRIFT = 6e-4;
/** Typical drift. A wrong value makes the estimate worse, never the bound. */
const USUAL_DRIFT = 5e-5;

const WINDOW_MS = 30_000;
const MAX_EXCHANGES = 128;
/** Exchanges of the first burst. */
const BURST = 20;
/** Precision target: milliseconds of jitter per exchange in the window. */
const JITTER_PER_EXCHANGE = 0.3;
const MIN_EXCHANGES = 15;
const MOST_WANTED = 100;
/** Interval of the probes of a burst; `clock_sync` is limited to 20 a second. */
export const BURST_INTERVAL_MS = 80;

/** Coarsest clock of privacy-preserving browsers; measuring it would take too long. */
const COARSEST_MS = 100;

const STEP_MS = 250;
/** 20 ms per second: a tempo error of 2 % for a moment is inaudible. */
const SLEW = 0.02;

/**
 * One `clock_sync` exchange.
 *
 * @typedef {object} Exchange
 * @property {number} t0 when the probe was sent, local clock
 * @property {number} t1 when the server received it, session clock
 * @property {number} t2 when the server replied, session clock
 * @property {number} t3 when the reply arrived, local clock
 */

/**
 * The session clock, estimated from exchanges with the server.
 *
 * `BandSync` adds the exchanges; others only read it.
 */
export class SessionClock {
  #clock;
  #granularityMs;
  /** @type {{at: number, from: number, most: number, least: number}[]} oldest first */
  #exchanges = [];
  #since = -Infinity; // earlier exchanges are ignored
  #fresh = 0; // exchanges since the last restart
  #slewing = false; // after the first burst the offset slews
  #wanted = MIN_EXCHANGES;

  #offset = null; // offset in use at #slewedAt
  #target = null; // the estimate
  #slewedAt = 0;
  #latest = -Infinity; // the latest result of now()

  // upper = #most + MAX_DRIFT · t and lower = #least − MAX_DRIFT · t, at t, local clock
  #most = Infinity;
  #least = -Infinity;

  /**
   * @param {{now(): number, granularityMs?: number}} [clock] the local clock: milliseconds, never
   *   running backwards; its granularity is measured unless given
   */
  constructor(clock = performance) {
    this.#clock = clock;
    this.#granularityMs = clock.granularityMs ?? granularity(clock);
  }

  /**
   * The session clock's time, milliseconds since the Unix epoch.
   *
   * Never runs backwards, except by a step of more than 250 ms when the estimate was that wrong.
   * `NaN` before the first `welcome`.
   *
   * @returns {number}
   */
  now() {
    if (this.#offset === null) return NaN;
    const local = this.#clock.now();
    this.#slew(local);
    this.#latest = Math.max(this.#latest, local + this.#offset);
    return this.#latest;
  }

  /**
   * Convert an instant of the session clock to the local clock.
   *
   * @param {number} sessionMs milliseconds since the Unix epoch on the session clock
   * @returns {number} milliseconds on `performance.now()`; `NaN` before the first `welcome`
   */
  toLocal(sessionMs) {
    return sessionMs - this.offsetMs;
  }

  /**
   * Session clock minus local clock, in use now; `NaN` before the first `welcome`.
   *
   * @type {number}
   */
  get offsetMs() {
    if (this.#offset === null) return NaN;
    this.#slew(this.#clock.now());
    return this.#offset;
  }

  /**
   * Upper bound on the error of `now()`; null before the first exchange.
   *
   * @type {number | null}
   */
  get errorMs() {
    if (this.#exchanges.length === 0) return null;
    const local = this.#clock.now();
    this.#slew(local);
    // After a correction now() may hold still.
    const used = Math.max(this.#offset, this.#latest - local);
    const { lower, upper } = this.#bounds(local);
    return Math.max(upper - used, used - lower, 0);
  }

  /**
   * Number of exchanges in use.
   *
   * @type {number}
   */
  get samples() {
    return this.#exchanges.length;
  }

  /**
   * Whether there are enough exchanges for the jitter of this network.
   *
   * @type {boolean}
   */
  get settled() {
    return this.#fresh >= BURST && this.#exchanges.length >= this.#wanted;
  }

  /**
   * Delay until the next probe, milliseconds.
   *
   * @type {number}
   */
  get probeIntervalMs() {
    return this.settled ? WINDOW_MS / this.#wanted : BURST_INTERVAL_MS;
  }

  /**
   * Use the time in a message as a first estimate; it is late by the network delay.
   *
   * @param {number} serverTime on the session clock
   */
  guess(serverTime) {
    if (this.#offset !== null) return;
    const local = this.#clock.now();
    this.#offset = this.#target = serverTime - local;
    this.#slewedAt = local;
  }

  /** Start a new burst of probes: something may have changed. */
  restart() {
    this.#fresh = 0;
  }

  /**
   * Discard all exchanges, those in flight included, because one of the clocks is another one now. The
   * offset stays in use until new exchanges rule it out.
   */
  forget() {
    this.#exchanges = [];
    this.#since = this.#clock.now();
    this.restart();
  }

  /**
   * Add an exchange. An impossible one is ignored.
   *
   * @param {Exchange} exchange
   */
  add({ t0, t1, t2, t3 }) {
    if (![t0, t1, t2, t3].every(Number.isFinite) || t3 < t0 || t2 < t1) return;
    if (t0 < this.#since) return;
    const g = this.#granularityMs;
    this.#exchanges.push({ at: t3, from: t0, most: t1 - t0 + g, least: t2 - t3 - g });
    this.#fresh += 1;
    this.#prune(t3);
    this.#measure();
    const { lower, upper } = this.#bounds(t3);
    if (lower > upper) {
      // No drift explains this: a clock was stepped, or stopped while the device slept.
      this.#exchanges = this.#exchanges.slice(-1);
      this.#fresh = 1;
      this.#measure();
    }
    this.#correct(t3);
  }

  #prune(local) {
    const old = this.#exchanges.findIndex(({ at }) => at > local - WINDOW_MS);
    const many = this.#exchanges.length - MAX_EXCHANGES;
    if (Math.max(old, many) > 0) this.#exchanges.splice(0, Math.max(old, many));
  }

  /** Compute bounds, estimate and the wanted number of exchanges. */
  #measure() {
    const all = this.#exchanges;
    this.#most = Math.min(...all.map(({ most, from }) => most - MAX_DRIFT * from));
    this.#least = Math.max(...all.map(({ least, from }) => least + MAX_DRIFT * from));
    const there = all.map(({ most, from }) => most - USUAL_DRIFT * from);
    const back = all.map(({ least, at }) => -least - USUAL_DRIFT * at);
    // The elapsed time adds to one and subtracts from the other: it cancels.
    this.#target = (Math.min(...there) - Math.min(...back)) / 2;
    const jitter = Math.max(spread(there), spread(back));
    this.#wanted = clamp(Math.ceil(jitter / JITTER_PER_EXCHANGE), MIN_EXCHANGES, MOST_WANTED);
  }

  #bounds(local) {
    return { lower: this.#least - MAX_DRIFT * local, upper: this.#most + MAX_DRIFT * local };
  }

  /** Bring the estimate into use: by a step where slewing takes too long, otherwise by `#slew`. */
  #correct(local) {
    if (this.#offset !== null) this.#slew(local);
    if (this.#offset === null || Math.abs(this.#target - this.#offset) > STEP_MS) {
      this.#latest = -Infinity;
      this.#slewing = false;
    }
    if (!this.#slewing) {
      this.#offset = this.#target;
      this.#slewedAt = local;
      this.#slewing = this.#fresh >= BURST;
    } else if (this.#fresh < BURST && this.#isPossible(local)) {
      // A few exchanges are less precise than the offset in use, unless they rule it out.
      this.#target = this.#offset;
    }
  }

  #isPossible(local) {
    const { lower, upper } = this.#bounds(local);
    return lower <= this.#offset && this.#offset <= upper;
  }

  #slew(local) {
    const most = Math.max(0, local - this.#slewedAt) * SLEW;
    this.#offset += clamp(this.#target - this.#offset, -most, most);
    this.#slewedAt = local;
  }
}

/** Smallest difference between readings of a clock: browsers coarsen it. */
function granularity(clock) {
  let smallest = COARSEST_MS;
  for (let round = 0; round < 3; round += 1) {
    const before = clock.now();
    let after = before;
    for (let look = 0; after === before && look < 20_000; look += 1) after = clock.now();
    if (after > before) smallest = Math.min(smallest, after - before);
  }
  return smallest;
}

/** Median minus minimum. */
function spread(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1] - sorted[0];
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
