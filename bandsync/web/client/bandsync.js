/**
 * BandSync for JavaScript: join a session, receive its events, compute position and beat.
 *
 * ```js
 * import { BandSync } from "/bandsync.js";
 *
 * const band = new BandSync({ sessionId: "rehearsal", displayName: "Ada" });
 * band.addEventListener("chat_message", ({ detail }) => console.log(detail.displayName, detail.text));
 * await band.join(); // it then reconnects by itself
 *
 * if (band.isLeader) {
 *   await band.setTempo(96, { beatsPerBar: 4 });
 *   await band.play({ countInBeats: 4 });
 * }
 * requestAnimationFrame(function draw() {
 *   document.title = `beat ${Math.floor(band.beatAt())}`;
 *   requestAnimationFrame(draw);
 * });
 * ```
 *
 * Plain ES modules without dependencies: this one and the modules beside it that it imports. They run
 * in browsers and in any other runtime with `WebSocket` and `EventTarget` (Node 22 and later).
 *
 * Instants are milliseconds since the Unix epoch on the *session clock* (`band.clock`), which is the
 * same for the whole band. Positions are milliseconds, beats are counted from the start of the song.
 *
 * Over 400 lines, because connect, join, resync, drain and retry are one state machine over private
 * fields; the state itself, the commands and the link are modules of their own.
 *
 * @module
 */

import { BandSyncError } from "./bandsyncerror.js";
import { CLOSE_CODES, mayReconnect } from "./closecodes.js";
import { BandView } from "./bandview.js";
import { Link, webSocketUrl } from "./link.js";
import { Membership } from "./membership.js";
import { backoff, onWakeUp } from "./retry.js";
import { SessionClock } from "./sessionclock.js";
import { isCommitted } from "./sessionstate.js";

export { BandSyncError, SessionClock };
export { beatAt, instantOfBeat, positionAt, segmentAt } from "./sessionstate.js";

/** @typedef {"idle" | "connecting" | "online" | "draining" | "resuming" | "closed"} Status */

const PROTOCOL = 1;
const SESSION_ID = /^[A-Za-z0-9._-]{1,64}$/;

/** A connection that lasts longer than this resets the backoff. */
const GOOD_MS = 5000;
const MAX_CONNECT_MS = 10_000;
const SYNC_RETRY_MS = 1000;
const LEAVE_MS = 1000;
/** Time after a loss in which this member may still fill the session: the resume grace and a margin. */
const OWN_GRACE_MS = 15_000;

/** Refusals of a join that are temporary. */
const TEMPORARY = new Set(["rate_limited", "conflict", "internal", "connection_lost"]);

/**
 * A member of a session.
 *
 * Its events are `CustomEvent`s. Every message of the server is dispatched under its own type (`play`,
 * `user_joined`, `chat_message`, `room_stats`, …), with the message as `detail`, after it was applied to
 * the state. The other events are:
 *
 * - `status`: `{status, attempts, retryInMs}`; `retryInMs` is null unless a retry is scheduled
 * - `joined`: `{resumed, snapshot}`; `resumed: false` after the first join means that the member was
 *   removed meanwhile and joined anew. Store `resumeToken` here to survive a reload
 * - `gap`: a version is missing; a resync has been requested
 * - `change`: some part of the state has changed, once per burst of changes
 */
export class BandSync extends BandView {
  /** @type {string} */
  sessionId;
  #options;
  #url;
  #local;
  #link = null;
  #listeners = null; // AbortController of the listeners on window and document
  #joining = null; // {promise, resolve, reject} of join()

  #status = "idle";
  #closeReason = null;
  #member; // the state, see Membership

  #joined = false; // on the current link
  #joinedAt = 0;
  #lostAt = -Infinity;
  #attempts = 0; // failed connections since the last good one
  #retryTimer;
  #retryAt = null; // when the scheduled retry is due; null without one
  #mayRetryEarly = true; // whether a wake-up may replace the scheduled retry
  #drainUntil = -Infinity; // when the draining server asked to reconnect
  #resyncing = false;
  #resyncTimer;
  #awaited = []; // {version, resolve} of acknowledged changes whose events have not arrived
  #changeQueued = false;

  /**
   * @param {object} options
   * @param {string} options.sessionId 1 – 64 of `A–Z a–z 0–9 . _ -`
   * @param {string} [options.url] `ws://host` or `wss://host`; by default the page's origin
   * @param {string} [options.displayName] 1 – 64 characters
   * @param {"leader" | "follower"} [options.role] `leader` claims a vacant lead
   * @param {string | (() => string | Promise<string>)} [options.token] a join token, or a function that
   *   returns a fresh one for each connection
   * @param {string} [options.resumeToken] the latest one of an earlier connection, to resume its member
   * @param {{now(): number}} [options.clock] the local clock, by default `performance`
   */
  constructor({ sessionId, url, displayName, role, token, resumeToken, clock = performance }) {
    const membership = new Membership(resumeToken ?? null);
    super(membership, new SessionClock(clock), (type, fields) => this.#command(type, fields));
    this.#member = membership;
    this.sessionId = sessionId;
    this.#local = clock;
    this.#options = { displayName, role, token };
    this.#url = webSocketUrl(url ?? globalThis.location?.origin, sessionId);
  }

  // --- Join and leave ---

  /**
   * Connect and join. It then reconnects and resumes by itself, for ever.
   *
   * @returns {Promise<object>} the first `snapshot`
   * @throws {BandSyncError} (as a rejection) when only a person can help: `unauthorized`,
   *   `invalid_field`, `session_full`, `unsupported_protocol`, `invalid_url`, `superseded`, or `closed`,
   *   with `closeCode` 1008 when the server refuses this page. After all other failures it retries, as
   *   the `status` events report
   */
  join() {
    if (this.#joining) return this.#joining.promise;
    const joining = Promise.withResolvers?.() ?? withResolvers();
    this.#joining = joining;
    this.#closeReason = null;
    this.#attempts = 0;
    this.#drainUntil = this.#lostAt = -Infinity;
    if (SESSION_ID.test(this.sessionId)) {
      this.#listeners = new AbortController();
      onWakeUp(() => this.#wake(), this.#listeners.signal);
      this.#connect();
    } else {
      const field = { context: { field: "sessionId" } };
      const hint = "`sessionId` must be 1 to 64 of the characters A-Z a-z 0-9 . _ -";
      this.#end(new BandSyncError("invalid_field", hint, field));
    }
    return joining.promise;
  }

  /**
   * Leave the session at once, without a grace, and close.
   *
   * @returns {Promise<void>} when the server has confirmed it, or after a second
   */
  async leave() {
    const link = this.#joined ? this.#link : null;
    // Keep the link open for the message below, but ignore what it receives.
    if (link) this.#link = null;
    this.#end(null);
    this.#member.reset();
    this.#changed();
    if (!link) return;
    await Promise.race([link.request("leave_session").catch(() => {}), sleep(LEAVE_MS)]);
    link.close();
  }

  /**
   * Close without leaving: the member can be resumed within 10 s, by `join()` or its `resumeToken`.
   */
  close() {
    this.#end(null);
  }

  // --- State ---

  /**
   * `idle` before `join()`; `connecting` until the first join; then `online`, `draining` (online, but
   * the server is about to restart) or `resuming`; `closed` at the end: see `closeReason`.
   *
   * @type {Status}
   */
  get status() {
    return this.#status;
  }

  /** Why it is closed; null if it is not, or was closed by the caller. @type {BandSyncError | null} */
  get closeReason() {
    return this.#closeReason;
  }

  // --- Connect and reconnect ---

  #connect() {
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#joined = false;
    this.#mayRetryEarly = true;
    const owner = {
      onMessage: (message) => this.#dispatch(link, message),
      onLost: (code, reason) => link === this.#link && this.#lost(code, reason),
      onWake: () => link === this.#link && this.#wokeUp(),
    };
    const connectTimeoutMs = Math.min(MAX_CONNECT_MS, 5000 + 1000 * this.#attempts);
    let link;
    try {
      link = new Link(this.#url, { clock: this.clock, local: this.#local, connectTimeoutMs, owner });
    } catch (error) {
      return this.#end(new BandSyncError("invalid_url", error.message));
    }
    this.#link = link;
    this.#setStatus(this.session ? "resuming" : "connecting");
  }

  #lost(closeCode, reason) {
    if (closeCode === CLOSE_CODES.SESSION_TAKEN.code) {
      const elsewhere = "You joined in another place; join to continue here.";
      return this.#end(new BandSyncError("superseded", elsewhere, { closeCode }));
    }
    // The join itself was too big: a retry would send it again.
    const joinTooBig = closeCode === CLOSE_CODES.MESSAGE_TOO_BIG.code && !this.#joined;
    if (joinTooBig || !mayReconnect(closeCode)) {
      const text = `The server refused this connection: ${reason || closeCode}`;
      return this.#end(new BandSyncError("closed", text, { closeCode }));
    }
    this.#retry(closeCode);
  }

  /** Schedule the next connection, with jittered exponential backoff. */
  #retry(closeCode) {
    const now = this.#local.now();
    if (this.#joined) {
      this.#lostAt = now;
      if (now - this.#joinedAt > GOOD_MS) this.#attempts = 0;
    }
    this.#dropLink();
    const overloaded = closeCode === CLOSE_CODES.TRY_AGAIN_LATER.code;
    const drained = this.#drainUntil - now;
    const retryInMs = Math.max(backoff(this.#attempts, overloaded), drained);
    this.#attempts += 1;
    this.#mayRetryEarly = !overloaded && drained <= 0;
    this.#retryAt = now + retryInMs;
    this.#retryTimer = setTimeout(() => this.#connect(), retryInMs);
    this.#setStatus(this.session ? "resuming" : "connecting");
  }

  /** Close for good: with an error, or null when the caller closed it. */
  #end(error) {
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#dropLink();
    this.#listeners?.abort();
    this.#closeReason = error;
    this.#joining?.reject(error ?? new BandSyncError("closed", "It was closed before the join."));
    // A caller that does not await join() gets the status event; this is not an unhandled rejection.
    this.#joining?.promise.catch(() => {});
    this.#joining = null;
    this.#setStatus("closed");
  }

  #dropLink() {
    clearTimeout(this.#resyncTimer);
    this.#resyncing = false;
    this.#joined = false;
    const link = this.#link;
    this.#link = null;
    link?.close();
    this.#resolveUpTo(Infinity);
  }

  /** The device may have slept, or has a network again: check now instead of waiting for timers. */
  #wake() {
    if (this.#retryAt !== null) {
      if (this.#mayRetryEarly) this.#connect();
      return;
    }
    this.clock.restart();
    this.#link?.doubt();
    if (this.#joined) this.#resync();
  }

  /** Timers were late by seconds: the local clock may have stopped meanwhile. */
  #wokeUp() {
    this.clock.forget();
    this.#wake();
  }

  async #sendJoin(link) {
    const { token, ...fields } = this.#options;
    try {
      await link.request("join_session", {
        ...fields,
        sessionId: this.sessionId,
        token: typeof token === "function" ? await token() : token,
        resumeToken: this.resumeToken ?? undefined,
        // Position and beat are computed locally.
        ticks: false,
      });
    } catch (error) {
      if (link === this.#link) this.#joinRefused(error);
    }
  }

  #joinRefused(error) {
    // The session may be full because this member, before the loss, still counts.
    const ownGrace =
      error.code === "session_full" && this.#local.now() - this.#lostAt < OWN_GRACE_MS;
    if (!(error instanceof BandSyncError) || TEMPORARY.has(error.code) || ownGrace) this.#retry();
    else this.#end(error);
  }

  // --- Received messages ---

  #dispatch(link, message) {
    const { type, sessionId } = message;
    if (link !== this.#link) return;
    if (sessionId !== undefined && sessionId !== this.sessionId) return;
    const changed = isCommitted(message) ? this.#committed(message) : this.#direct(link, message);
    if (changed === false) return;
    this.#emit(type, message);
    if (type === "snapshot" && message.you) {
      this.#emit("joined", { resumed: message.you.resumed, snapshot: message });
    }
    if (changed) this.#changed();
  }

  /** Apply a committed change. False if it is stale or a version is missing. */
  #committed(message) {
    // Before the snapshot of this connection there is no state to change.
    if (!this.#joined) return false;
    const have = this.session.version;
    const outcome = this.#member.commit(message);
    if (outcome === "gap" && this.#resync()) this.#emit("gap", { have, got: message.version });
    if (outcome !== "applied") return false;
    this.#resolveUpTo(message.version);
    return true;
  }

  /** Apply any other message. True if the state changed, false if the message is ignored. */
  #direct(link, message) {
    switch (message.type) {
      case "welcome":
        return this.#welcomed(link, message);
      case "snapshot":
        return this.#snapshot(link, message);
      case "sync_response":
        this.#resyncing = false;
        return this.#reanchored(message);
      case "drift_correction":
        return this.#reanchored(message);
      case "room_stats":
        this.#member.stats = new Map(message.members.map((entry) => [entry.memberId, entry]));
        return true;
      case "storage_status": {
        const { storageType, degraded, reason } = message;
        this.#member.storage = { storageType, degraded, reason };
        // A server that reaches its Redis may step its clock, once.
        if (storageType === "redis") this.clock.forget();
        return true;
      }
      case "server_draining":
        this.#drainUntil = this.#local.now() + message.reconnectInMs;
        if (this.#joined) this.#setStatus("draining");
        return undefined;
      case "error":
        // The server no longer has this member: reconnect and join anew.
        if (message.code === "not_joined" && this.#joined) this.#retry();
        return undefined;
      default:
        return undefined;
    }
  }

  #welcomed(link, message) {
    if (message.protocol !== PROTOCOL) {
      const text = `The server speaks protocol version ${message.protocol}, this client ${PROTOCOL}.`;
      this.#end(new BandSyncError("unsupported_protocol", text));
      return false;
    }
    this.#member.welcome(message);
    this.#drainUntil = -Infinity;
    // The clock of another server, or of a new process, may differ a little.
    this.clock.forget();
    this.clock.guess(message.serverTime);
    void this.#sendJoin(link);
    return true;
  }

  #snapshot(link, message) {
    this.#resyncing = false;
    const { you, epoch, version } = message;
    if (!you && !this.#joined) return false;
    const sameEpoch = this.session?.epoch === epoch;
    if (!this.#member.snapshot(message)) return false;
    this.#resolveUpTo(sameEpoch ? version : Infinity);
    if (!you) return true;
    this.#joined = true;
    this.#joinedAt = this.#local.now();
    link.startReports();
    this.#setStatus(this.#drainUntil > this.#joinedAt ? "draining" : "online");
    this.#joining.resolve(message);
    return true;
  }

  #reanchored(message) {
    return this.#joined && this.#member.reanchor(message);
  }

  /** Request missing versions. False if a request is in flight. */
  #resync() {
    if (this.#resyncing) return false;
    this.#resyncing = true;
    clearTimeout(this.#resyncTimer);
    const { version, epoch } = this.session;
    const link = this.#link;
    link.request("sync_request", { version, epoch }).catch(() => {
      if (link !== this.#link) return;
      this.#resyncTimer = setTimeout(() => {
        this.#resyncing = false;
        this.#resync();
      }, SYNC_RETRY_MS);
    });
    return true;
  }

  // --- Commands ---

  async #command(type, fields) {
    const link = this.#link;
    if (!this.#joined) {
      throw new BandSyncError("not_connected", "There is no connection; nothing was sent.");
    }
    const { version } = await link.request(type, fields);
    if (version === undefined) return {};
    if (link === this.#link && version > this.session.version) await this.#reached(version);
    return { version };
  }

  /** Resolves when the state has this version, or the connection is lost. */
  #reached(version) {
    return new Promise((resolve) => this.#awaited.push({ version, resolve }));
  }

  #resolveUpTo(version) {
    const due = this.#awaited.filter((each) => each.version <= version);
    if (due.length === 0) return;
    this.#awaited = this.#awaited.filter((each) => each.version > version);
    for (const { resolve } of due) resolve();
  }

  // --- Events ---

  #setStatus(status) {
    this.#status = status;
    const retryInMs = this.#retryAt === null ? null : Math.max(0, this.#retryAt - this.#local.now());
    this.#emit("status", { status, attempts: this.#attempts, retryInMs });
    this.#changed();
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #changed() {
    if (this.#changeQueued) return;
    this.#changeQueued = true;
    queueMicrotask(() => {
      this.#changeQueued = false;
      this.#emit("change", null);
    });
  }
}

function withResolvers() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  return parts;
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
