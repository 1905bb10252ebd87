/**
 * One WebSocket connection to a BandSync server, from its first packet to its loss.
 *
 * A lost link is not reused. It sends clock probes, which are also its liveness probes: a dead network
 * does not close a socket for minutes, so silence counts as a loss.
 *
 * @module
 */

import { BandSyncError } from "./bandsyncerror.js";
import { BURST_INTERVAL_MS } from "./sessionclock.js";

/** After this time without a reply to a probe the connection is dead. The resume grace is 10 s. */
const SILENCE_MS = 4500;
/** The same while other messages arrive: the upstream is dead or far too slow. */
const MUTE_MS = 9000;
/** The same as `SILENCE_MS` after the device slept or the network changed. */
const DOUBT_MS = 2500;
/** Timeout of a request on a live connection. */
const REQUEST_MS = 15_000;
const REPORT_INTERVAL_MS = 5000;
/** A timer that fires this late was frozen, throttled or asleep. */
const LATE_MS = 2000;
/** Above this number of unanswered probes, more would only lengthen the queue. */
const MAX_UNANSWERED = 25;
const UNANSWERED_INTERVAL_MS = 1000;
const MAX_BUFFERED_BYTES = 8192;
const MAX_PENDING = 256;

/**
 * Callbacks of a link. None is called after `Link.close`.
 *
 * @typedef {object} LinkOwner
 * @property {(message: {type: string}) => void} onMessage every message, in order
 * @property {(closeCode: number, reason: string) => void} onLost once, at the end; 1006 when no close
 *   frame came
 * @property {() => void} onWake the device slept, or its timers were frozen
 */

/** A connection, with requests matched to their replies. */
export class Link {
  #socket;
  #owner;
  #clock;
  #local;
  #pending = new Map(); // requestId → {resolve, reject, at}
  #lastRequest = 0;
  #maxBytes = 16_384;
  #welcomed = false;
  #reporting = false;

  #timer;
  #due = 0; // when the timer should fire, local clock
  #dueWall = 0; // the same on the wall clock, which also runs while the device sleeps
  #silentSince; // the first probe after the last received message; null if there is none
  #patience; // how long the silence may last
  #unansweredSince = null; // the first probe after the last answer
  #excused = false; // a late timer has found it dead once
  #unanswered = 0;
  #probedAt = -Infinity;
  #reportedAt = -Infinity;
  #reportedSettled = false;

  /**
   * Open a connection.
   *
   * @param {string} url of the WebSocket
   * @param {object} parts
   * @param {import("./sessionclock.js").SessionClock} parts.clock that receives the probes
   * @param {{now(): number}} parts.local the local clock
   * @param {number} parts.connectTimeoutMs the longest wait for the server's welcome
   * @param {LinkOwner} parts.owner
   * @throws {SyntaxError | SecurityError} the URL is invalid, or the page may not use it
   */
  constructor(url, { clock, local, connectTimeoutMs, owner }) {
    this.#clock = clock;
    this.#local = local;
    this.#owner = owner;
    this.#silentSince = local.now();
    this.#patience = connectTimeoutMs;
    const socket = (this.#socket = new WebSocket(url));
    socket.onmessage = ({ data }) => this.#received(data);
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    this.#schedule();
  }

  /**
   * Send a message without a reply.
   *
   * @param {string} type
   * @param {object} [fields]
   */
  send(type, fields = {}) {
    if (this.#socket.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify({ type, ...fields }));
    }
  }

  /**
   * Send a message that is acknowledged.
   *
   * @param {string} type
   * @param {object} [fields]
   * @returns {Promise<{version?: number}>} the `ack`
   * @throws {BandSyncError} (as a rejection) with the code of the server's `error`;
   *   `message_too_large`; `rate_limited`, also with too many requests in flight;
   *   `connection_lost`: it may or may not have been applied
   */
  request(type, fields = {}) {
    if (this.#pending.size >= MAX_PENDING) {
      const many = `${MAX_PENDING} requests are in flight.`;
      return Promise.reject(new BandSyncError("rate_limited", many));
    }
    const requestId = String((this.#lastRequest += 1));
    const text = JSON.stringify({ type, ...fields, requestId });
    if (bytesOf(text) > this.#maxBytes) {
      const large = `The server accepts messages of at most ${this.#maxBytes} bytes.`;
      return Promise.reject(new BandSyncError("message_too_large", large));
    }
    return new Promise((resolve, reject) => {
      this.#pending.set(requestId, { resolve, reject, at: this.#local.now() });
      if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(text);
    });
  }

  /** Start to report the clock error: this connection has joined. */
  startReports() {
    this.#reporting = true;
  }

  /** Check soon whether the connection is alive. */
  doubt() {
    if (!this.#welcomed) return;
    this.#silentSince = this.#local.now();
    this.#patience = DOUBT_MS;
    // Soon, but not more often than in a burst.
    this.#schedule(Math.max(0, this.#probedAt + BURST_INTERVAL_MS - this.#local.now()));
  }

  /**
   * Close the connection; the owner gets no more callbacks.
   *
   * @param {number} [code] for the close frame
   */
  close(code = 1000) {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    socket.onmessage = socket.onclose = null;
    socket.close(code);
    const lost = "The connection was lost; this may or may not have been applied.";
    for (const { reject } of this.#pending.values()) {
      reject(new BandSyncError("connection_lost", lost));
    }
    this.#pending.clear();
  }

  #lost(code, reason) {
    this.close();
    this.#owner.onLost(code, reason);
  }

  #received(data) {
    const t3 = this.#local.now();
    this.#silentSince = null;
    this.#patience = SILENCE_MS;
    this.#excused = false;
    const message = parsed(data);
    if (message === null) return this.#lost(1006, "invalid message");
    if (message.type === "clock_sync") this.#measured(message, t3);
    else if (message.type === "welcome") this.#begin(message);
    this.#owner.onMessage(message);
    // Probe at once, now that the clock has the server's time.
    if (message.type === "welcome") this.#schedule(0);
    // Last, so that the awaiting caller sees the state that arrived before the reply.
    if (message.type === "ack") this.#answer(message)?.resolve(message);
    else if (message.type === "error") this.#answer(message)?.reject(BandSyncError.of(message));
  }

  #answer({ requestId }) {
    const request = this.#pending.get(requestId);
    this.#pending.delete(requestId);
    return request;
  }

  #measured({ t0, t1, t2 }, t3) {
    this.#unanswered = 0;
    this.#unansweredSince = null;
    this.#clock.add({ t0, t1, t2, t3 });
    this.#report();
  }

  #begin({ limits }) {
    this.#welcomed = true;
    this.#maxBytes = limits?.maxMessageBytes ?? this.#maxBytes;
  }

  #probe() {
    if (this.#socket.bufferedAmount > MAX_BUFFERED_BYTES) return;
    this.#unanswered += 1;
    this.#probedAt = this.#local.now();
    this.#silentSince ??= this.#local.now();
    this.#unansweredSince ??= this.#local.now();
    this.send("clock_sync", { t0: this.#local.now() });
  }

  #report() {
    const { errorMs, settled } = this.#clock;
    const now = this.#local.now();
    const better = settled && !this.#reportedSettled;
    if (!this.#reporting || errorMs === null) return;
    if (!better && now - this.#reportedAt < REPORT_INTERVAL_MS) return;
    this.#reportedAt = now;
    this.#reportedSettled = settled;
    this.send("sync_report", { errorMs });
  }

  #schedule(delay = this.#interval()) {
    if (this.#socket.onclose === null) return;
    clearTimeout(this.#timer);
    this.#due = this.#local.now() + delay;
    this.#dueWall = Date.now() + delay;
    this.#timer = setTimeout(() => this.#tick(), delay);
  }

  #interval() {
    if (!this.#welcomed) return this.#patience;
    if (this.#unanswered > MAX_UNANSWERED) return UNANSWERED_INTERVAL_MS;
    return this.#clock.probeIntervalMs;
  }

  #tick() {
    const now = this.#local.now();
    const late = Math.max(now - this.#due, Date.now() - this.#dueWall) > LATE_MS;
    if (this.#isDead(now, late)) return this.#lost(1006, "no answer");
    if (this.#welcomed) this.#probe();
    this.#schedule();
    if (late) this.#owner.onWake();
  }

  #isDead(now, late) {
    if (late) return this.#isDeadAgain(now);
    if (this.#silentSince !== null && now - this.#silentSince >= this.#patience) return true;
    if (this.#unansweredSince !== null && now - this.#unansweredSince >= MUTE_MS) return true;
    const [oldest] = this.#pending.values();
    return oldest !== undefined && now - oldest.at >= REQUEST_MS;
  }

  /** Messages that arrived while the timer was late may still be queued: check once more. */
  #isDeadAgain(now) {
    const again = this.#excused && this.#silentSince !== null;
    this.#excused = true;
    if (this.#silentSince !== null) this.#silentSince = now;
    if (this.#unansweredSince !== null) this.#unansweredSince = now;
    return again;
  }
}

/** The message; null if it is invalid. */
function parsed(data) {
  try {
    const message = JSON.parse(data);
    return typeof message?.type === "string" ? message : null;
  } catch {
    return null;
  }
}

const encoder = new TextEncoder();

function bytesOf(text) {
  return encoder.encode(text).length;
}

/**
 * The URL of the WebSocket of a session.
 *
 * @param {string} base the server: `ws://`, `wss://`, `http://` or `https://`
 * @param {string} sessionId
 * @returns {string}
 */
export function webSocketUrl(base, sessionId) {
  const host = String(base).replace(/^http/, "ws").replace(/\/+$/, "");
  // Browsers resolve a path of dots; the join names the session in any case.
  return /^\.*$/.test(sessionId) ? `${host}/ws` : `${host}/ws/${sessionId}`;
}
