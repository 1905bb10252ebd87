/**
 * The session clock, as far as this device knows it.
 *
 * The server's `clock_sync` is the NTP exchange: `t0` is read here and sent, the server notes `t1` on
 * arrival and `t2` as it answers, `t3` is read here again. Without knowing how long either way took,
 * one thing is certain: the offset (session clock minus ours) was at most t1 − t0, and is at least
 * t2 − t3. Two things are made of that:
 *
 * - **the bound** (`errorMs`): every exchange narrows the interval in which the offset must lie, by as
 *   much as the two clocks can have drifted apart since. It is honest: it assumes nothing about the
 *   network, least of all that both ways take the same time.
 * - **the estimate**: the middle between the quickest way there and the quickest way back, *of
 *   different exchanges*. On a network whose delay jitters evenly by J, N exchanges find it to within
 *   about J / N; the exchange with the smallest round trip is only right to within J / √N.
 *
 * The offset in use follows the estimate by slewing, so that the time it tells never runs backwards.
 *
 * All times and offsets are milliseconds.
 *
 * @module
 */

/** How far two clocks may drift apart: the server slews by 500 ppm at most, crystals are 100 ppm off. */
const MAX_DRIFT = 6e-4;
/** How far apart they drift in fact. A wrong guess makes the estimate worse, never the bound. */
const USUAL_DRIFT = 5e-5;

const WINDOW_MS = 30_000;
const MAX_EXCHANGES = 128;
/** Exchanges after which a first impression is over. */
const BURST = 20;
/** How precise the estimate shall be: so many milliseconds of jitter per exchange in the window. */
const JITTER_PER_EXCHANGE = 0.3;
const MIN_EXCHANGES = 15;
const MOST_WANTED = 100;
/** Between the probes of a burst; `clock_sync` is limited to 20 a second. */
export const BURST_INTERVAL_MS = 80;

/** What the most private of browsers make of a clock; trying would take too long to find it out. */
const COARSEST_MS = 100;

const STEP_MS = 250;
/** 20 ms per second: a tempo that is wrong by 2 % for a moment is not heard. */
const SLEW = 0.02;

/**
 * One `clock_sync` exchange.
 *
 * @typedef {object} Exchange
 * @property {number} t0 when the probe was sent, on our clock
 * @property {number} t1 when the server received it, on the session clock
 * @property {number} t2 when the server answered, on the session clock
 * @property {number} t3 when the answer arrived, on our clock
 */

/**
 * A clock that tells the session clock's time from exchanges with the server.
 *
 * `BandSync` feeds it; others only read it.
 */
export class SessionClock {
  #clock;
  #granularityMs;
  /** @type {{at: number, from: number, most: number, least: number}[]} oldest first */
  #exchanges = [];
  #since = -Infinity; // exchanges from before count no more
  #fresh = 0; // exchanges since the last restart
  #slewing = false; // a first burst is over: from now on it slews
  #wanted = MIN_EXCHANGES;

  #offset = null; // in use at #slewedAt
  #target = null; // the estimate
  #slewedAt = 0;
  #told = -Infinity; // the latest time that now() told

  // upper = #most + MAX_DRIFT · t and lower = #least − MAX_DRIFT · t, at t on our clock
  #most = Infinity;
  #least = -Infinity;

  /**
   * @param {{now(): number, granularityMs?: number}} [clock] ours: milliseconds since whenever, never
   *   running backwards; how coarse it is, is found by trying unless it says so
   */
  constructor(clock = performance) {
    this.#clock = clock;
    this.#granularityMs = clock.granularityMs ?? granularity(clock);
  }

  /**
   * The session clock's time, milliseconds since the Unix epoch.
   *
   * Never runs backwards, except by more than 250 ms, when the clock is found to be that wrong:
   * standing still for so long would be worse. `NaN` before the server has said anything.
   *
   * @returns {number}
   */
  now() {
    if (this.#offset === null) return NaN;
    const local = this.#clock.now();
    this.#slew(local);
    this.#told = Math.max(this.#told, local + this.#offset);
    return this.#told;
  }

  /**
   * When our own clock will show that instant of the session clock, as far as is known now.
   *
   * @param {number} sessionMs milliseconds since the Unix epoch on the session clock
   * @returns {number} milliseconds on `performance.now()`; `NaN` before the server has said anything
   */
  toLocal(sessionMs) {
    return sessionMs - this.offsetMs;
  }

  /**
   * Session clock minus ours, as in use now; `NaN` before the server has said anything.
   *
   * @type {number}
   */
  get offsetMs() {
    if (this.#offset === null) return NaN;
    this.#slew(this.#clock.now());
    return this.#offset;
  }

  /**
   * How wrong `now()` is at most; null as long as that is not known.
   *
   * @type {number | null}
   */
  get errorMs() {
    if (this.#exchanges.length === 0) return null;
    const local = this.#clock.now();
    this.#slew(local);
    // now() may be holding still after a correction.
    const used = Math.max(this.#offset, this.#told - local);
    const { lower, upper } = this.#bounds(local);
    return Math.max(upper - used, used - lower, 0);
  }

  /**
   * Exchanges that the estimate is made of.
   *
   * @type {number}
   */
  get samples() {
    return this.#exchanges.length;
  }

  /**
   * Whether enough exchanges have been made for what the network needs.
   *
   * @type {boolean}
   */
  get settled() {
    return this.#fresh >= BURST && this.#exchanges.length >= this.#wanted;
  }

  /**
   * How long to wait before the next probe.
   *
   * @type {number}
   */
  get probeIntervalMs() {
    return this.settled ? WINDOW_MS / this.#wanted : BURST_INTERVAL_MS;
  }

  /**
   * Take the time that a message carries, as a first impression: it is late by the message's way.
   *
   * @param {number} serverTime on the session clock
   */
  guess(serverTime) {
    if (this.#offset !== null) return;
    const local = this.#clock.now();
    this.#offset = this.#target = serverTime - local;
    this.#slewedAt = local;
  }

  /** Probe quickly for a while: something may have changed. */
  restart() {
    this.#fresh = 0;
  }

  /**
   * Forget all exchanges, those under way included: one of the clocks is not the one that they were
   * about. The offset stays in use until new ones prove it wrong.
   */
  forget() {
    this.#exchanges = [];
    this.#since = this.#clock.now();
    this.restart();
  }

  /**
   * Take an exchange. One that cannot be true is ignored.
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
      // No drift explains this: a clock was stepped, or stood still while the device slept.
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

  /** Derive from the exchanges the bounds, the estimate and how many exchanges are wanted. */
  #measure() {
    const all = this.#exchanges;
    this.#most = Math.min(...all.map(({ most, from }) => most - MAX_DRIFT * from));
    this.#least = Math.max(...all.map(({ least, from }) => least + MAX_DRIFT * from));
    const there = all.map(({ most, from }) => most - USUAL_DRIFT * from);
    const back = all.map(({ least, at }) => -least - USUAL_DRIFT * at);
    // What the passing of time adds to the one and takes from the other cancels.
    this.#target = (Math.min(...there) - Math.min(...back)) / 2;
    const jitter = Math.max(spread(there), spread(back));
    this.#wanted = clamp(Math.ceil(jitter / JITTER_PER_EXCHANGE), MIN_EXCHANGES, MOST_WANTED);
  }

  #bounds(local) {
    return { lower: this.#least - MAX_DRIFT * local, upper: this.#most + MAX_DRIFT * local };
  }

  /** Bring the estimate into use: at once where slewing would be no good, else by `#slew`. */
  #correct(local) {
    if (this.#offset !== null) this.#slew(local);
    if (this.#offset === null || Math.abs(this.#target - this.#offset) > STEP_MS) {
      this.#told = -Infinity;
      this.#slewing = false;
    }
    if (!this.#slewing) {
      this.#offset = this.#target;
      this.#slewedAt = local;
      this.#slewing = this.#fresh >= BURST;
    } else if (this.#fresh < BURST && this.#isPossible(local)) {
      // A few exchanges know less than what is in use, unless they prove it wrong.
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

/** How far apart different readings of a clock are at least: browsers make theirs coarse. */
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
