/**
 * BandSync for JavaScript: join a session, hear what the band does, know where the beat is.
 *
 * ```js
 * import { BandSync } from "/bandsync.js";
 *
 * const band = new BandSync({ sessionId: "rehearsal", displayName: "Ada" });
 * band.addEventListener("chat_message", ({ detail }) => console.log(detail.displayName, detail.text));
 * await band.join(); // from now on it stays connected by itself
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
 * Plain ES modules without dependencies: this one and those it imports from beside it. They run in
 * browsers and in any other runtime with `WebSocket` and `EventTarget` (Node 22 and later).
 *
 * Instants are milliseconds since the Unix epoch on the *session clock* (`band.clock`), which is the
 * same for the whole band. Positions are milliseconds, beats are counted from the start of the song.
 *
 * @module
 */

import { BandSyncError } from "./bandsyncerror.js";
import { Link } from "./link.js";
import { SessionClock } from "./sessionclock.js";
import { afterChange, beatAt, fromSnapshot, isCommitted, positionAt, segmentAt } from "./sessionstate.js";

export { BandSyncError, SessionClock };
export { beatAt, instantOfBeat, positionAt, segmentAt } from "./sessionstate.js";

/** @typedef {import("./sessionstate.js").Session} Session */
/** @typedef {import("./sessionstate.js").Member} Member */
/** @typedef {import("./sessionstate.js").Segment} Segment */
/** @typedef {"idle" | "connecting" | "online" | "draining" | "resuming" | "closed"} Status */
/** @typedef {{memberId: string, latencyMs: number | null, syncErrorMs: number | null, quality: string}} Stats */

const PROTOCOL = 1;
const SESSION_ID = /^[A-Za-z0-9._-]{1,64}$/;

const FIRST_RETRY_MS = 300;
const LAST_RETRY_MS = 8000;
/** After 1013 the server has no place: so many doublings of the wait are skipped. */
const FULL_DOUBLINGS = 3;
/** A connection that lasts so long was a good one, and the next loss starts counting anew. */
const GOOD_MS = 5000;
const MAX_CONNECT_MS = 10_000;
const SYNC_RETRY_MS = 1000;
const LEAVE_MS = 1000;
/** So long after a loss our own seat may still count as taken: the grace, and some more. */
const OWN_SEAT_MS = 15_000;

/** Refusals of a join that pass by themselves. */
const PASSING = new Set(["rate_limited", "conflict", "internal", "connection_lost"]);

/**
 * A member of a session.
 *
 * Its events are `CustomEvent`s. Every message of the server comes under its own type (`play`,
 * `user_joined`, `chat_message`, `room_stats`, …), with the message as `detail`, after the state here
 * has taken it in. Besides those:
 *
 * - `status`: `{status, attempts, retryInMs}`; `retryInMs` is null unless it waits to try again
 * - `joined`: `{resumed, snapshot}`; `resumed: false` after the first one means that the band lost this
 *   member in the meantime, and it is a new one now. Keep `resumeToken` here to survive a reload
 * - `gap`: a change was missed; it is being caught up with
 * - `change`: anything a page may show is different, once per burst of changes
 */
export class BandSync extends EventTarget {
  /** @type {string} */
  sessionId;
  /**
   * The session clock as this device knows it.
   *
   * @type {SessionClock}
   */
  clock;

  #options;
  #url;
  #local;
  #link = null;
  #listening = null; // AbortController of the listeners on window and document
  #joining = null; // {promise, resolve, reject} of join()

  #status = "idle";
  #closeReason = null;
  #session = null;
  #memberId = null;
  #resumeToken;
  #stats = new Map();
  #server = null;
  #storage = { storageType: null, degraded: null, reason: null };

  #joined = false; // on this link
  #joinedAt = 0;
  #lostAt = -Infinity;
  #attempts = 0;
  #retryTimer;
  #retryAt = null;
  #mayHurry = true;
  #drainUntil = -Infinity;
  #catchingUp = false;
  #catchUpTimer;
  #awaited = []; // {version, resolve} of acknowledged changes whose events are still to come
  #changeQueued = false;

  /**
   * @param {object} options
   * @param {string} options.sessionId 1 – 64 of `A–Z a–z 0–9 . _ -`
   * @param {string} [options.url] `ws://host` or `wss://host`; where the page came from, if not given
   * @param {string} [options.displayName] 1 – 64 characters
   * @param {"leader" | "follower"} [options.role] what to be, if nobody leads
   * @param {string | (() => string | Promise<string>)} [options.token] a join token, or what gets a
   *   fresh one for each connection
   * @param {string} [options.resumeToken] the latest one that this member had, to be that member again
   * @param {{now(): number}} [options.clock] our own clock, by default `performance`
   */
  constructor({ sessionId, url, displayName, role, token, resumeToken, clock = performance }) {
    super();
    this.sessionId = sessionId;
    this.clock = new SessionClock(clock);
    this.#local = clock;
    this.#options = { displayName, role, token };
    this.#resumeToken = resumeToken ?? null;
    this.#url = webSocketUrl(url ?? globalThis.location?.origin, sessionId);
  }

  // --- Coming and going ---

  /**
   * Connect and join; from then on it keeps itself connected and resumes by itself, for ever.
   *
   * @returns {Promise<object>} the first `snapshot`
   * @throws {BandSyncError} (as a rejection) when only a person can help: `unauthorized`,
   *   `invalid_field`, `session_full`, `unsupported_protocol`, `invalid_url`, `superseded`, or `closed`,
   *   with `closeCode` 1008 when the server refuses this page. All other trouble is waited out, as
   *   `status` events tell
   */
  join() {
    if (this.#joining) return this.#joining.promise;
    const joining = Promise.withResolvers?.() ?? withResolvers();
    this.#joining = joining;
    this.#closeReason = null;
    this.#attempts = 0;
    this.#drainUntil = this.#lostAt = -Infinity;
    if (SESSION_ID.test(this.sessionId)) {
      this.#listen();
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
   * @returns {Promise<void>} when the server has heard it, or after a second
   */
  async leave() {
    const link = this.#joined ? this.#link : null;
    // Not to be closed yet, and not to be listened to any more.
    if (link) this.#link = null;
    this.#end(null);
    this.#session = this.#memberId = this.#resumeToken = null;
    this.#stats = new Map();
    this.#changed();
    if (!link) return;
    await Promise.race([link.request("leave_session").catch(() => {}), sleep(LEAVE_MS)]);
    link.close();
  }

  /**
   * Close without leaving: the band keeps this member's place for 10 s, for its `resumeToken`.
   *
   * `join()` resumes.
   */
  close() {
    this.#end(null);
  }

  // --- What to do: only the leader conducts ---

  /**
   * Start the song.
   *
   * Like all commands: resolves when the server has committed it, everybody will hear of it, and the
   * state here shows it.
   *
   * @param {object} [options]
   * @param {number} [options.positionMs] where; by default where it stands
   * @param {number} [options.startInMs] in how many milliseconds, 0 – 10 000; by default as soon as
   *   everybody can have heard of it
   * @param {number} [options.countInBeats] beats of count-in before that, 0 – 32
   * @returns {Promise<{version?: number}>} the version that it made; none if nothing changed
   * @throws {BandSyncError} (as a rejection) with the server's code (`not_leader`, `invalid_field`, …);
   *   `not_connected`: nothing was sent; `connection_lost`: it may or may not have happened
   */
  play({ positionMs, startInMs, countInBeats } = {}) {
    return this.#command("play", { positionMs, startInMs, countInBeats });
  }

  /** Freeze the song where it is. @returns {Promise<{version?: number}>} */
  pause() {
    return this.#command("pause");
  }

  /** Go back to the start of the song and stand there. @returns {Promise<{version?: number}>} */
  stop() {
    return this.#command("stop");
  }

  /**
   * Move in the song.
   *
   * @param {number} positionMs milliseconds from its start
   * @param {{at?: "now" | "beat" | "bar"}} [options] while it plays: at once, on the next beat or bar
   * @returns {Promise<{version?: number}>}
   */
  seek(positionMs, { at } = {}) {
    return this.#command("seek", { positionMs, at });
  }

  /**
   * Change the tempo; position and beat run on without a jump.
   *
   * @param {number} tempoBpm 20 – 300 quarter notes per minute
   * @param {{beatsPerBar?: number, at?: "now" | "beat" | "bar"}} [options]
   * @returns {Promise<{version?: number}>}
   */
  setTempo(tempoBpm, { beatsPerBar, at } = {}) {
    return this.#command("set_tempo", { tempoBpm, beatsPerBar, at });
  }

  /** Ask the leader for the lead, who hears `leader_requested`. @returns {Promise<{version?: number}>} */
  requestLeader() {
    return this.#command("request_leader");
  }

  /**
   * Refuse the lead to who asked for it.
   *
   * @param {string} memberId
   * @returns {Promise<{version?: number}>}
   */
  denyLeader(memberId) {
    return this.#command("deny_leader", { memberId });
  }

  /** Lead, if nobody does or who does is away. @returns {Promise<{version?: number}>} */
  takeLead() {
    return this.#command("set_role", { role: "leader" });
  }

  /** Lead no more; the one connected longest is elected. @returns {Promise<{version?: number}>} */
  stepDown() {
    return this.#command("set_role", { role: "follower" });
  }

  /**
   * Give the lead to somebody.
   *
   * @param {string} memberId
   * @returns {Promise<{version?: number}>}
   */
  handOver(memberId) {
    return this.#command("set_role", { role: "leader", memberId });
  }

  /**
   * Change the session's headline.
   *
   * @param {string} text up to 500 characters
   * @returns {Promise<{version?: number}>}
   */
  updateMessage(text) {
    return this.#command("update_message", { message: text });
  }

  /**
   * Say something to everybody.
   *
   * @param {string} text 1 – 1000 characters
   * @returns {Promise<{version?: number}>}
   */
  chat(text) {
    return this.#command("chat_message", { text });
  }

  /**
   * Tell where the song is according to this device, which plays it from a source of its own.
   *
   * From the leader it re-anchors the band; a follower hears `drift_correction` when it is off.
   *
   * @param {number} positionMs
   * @param {number} [timestamp] the instant of that, at most 10 s ago
   * @returns {Promise<{version?: number}>}
   */
  positionSync(positionMs, timestamp = this.clock.now()) {
    return this.#command("position_sync", { positionMs, timestamp });
  }

  // --- What is ---

  /**
   * `idle` before `join()`; `connecting` until the first join; then `online`, `draining` (online, but
   * the server is about to restart) or `resuming`; `closed` at the end, see `closeReason`.
   *
   * @type {Status}
   */
  get status() {
    return this.#status;
  }

  /** Why it is closed; null if it is not, or was asked to. @type {BandSyncError | null} */
  get closeReason() {
    return this.#closeReason;
  }

  /** The session; null before the first join. It stays while the connection is away. @type {Session | null} */
  get session() {
    return this.#session;
  }

  /** @type {string | null} */
  get memberId() {
    return this.#memberId;
  }

  /** This member, as the band sees it. @type {Member | null} */
  get me() {
    return this.#session?.members.get(this.#memberId) ?? null;
  }

  /** Who leads. @type {Member | null} */
  get leader() {
    return this.#session?.members.get(this.#session.leaderId) ?? null;
  }

  /** @type {boolean} */
  get isLeader() {
    return this.#memberId !== null && this.#session?.leaderId === this.#memberId;
  }

  /** The latest secret that makes a new connection this member; each join brings a new one. @type {string | null} */
  get resumeToken() {
    return this.#resumeToken;
  }

  /** How the members are connected, by id; renewed every 5 s. @type {ReadonlyMap<string, Stats>} */
  get stats() {
    return this.#stats;
  }

  /** The `welcome` of the latest server; null before the first. @type {object | null} */
  get server() {
    return this.#server;
  }

  /**
   * Where the server keeps the session, and whether that is second best. `degraded` is null as long as
   * the server has not said.
   *
   * @type {{storageType: "redis" | "memory" | null, degraded: boolean | null, reason: string | null}}
   */
  get storage() {
    return this.#storage;
  }

  /**
   * The part of the transport that counts at an instant.
   *
   * @param {number} [t]
   * @returns {Segment | null} null before the first join
   */
  transportAt(t = this.clock.now()) {
    return this.#session && segmentAt(this.#session.transport, t);
  }

  /**
   * Where the song is at an instant: milliseconds from its start.
   *
   * @param {number} [t]
   * @returns {number | null} null before the first join
   */
  positionAt(t = this.clock.now()) {
    return this.#session && positionAt(this.#session.transport, t);
  }

  /**
   * Which beat it is at an instant, with its fraction; 0.0 is the first downbeat.
   *
   * @param {number} [t]
   * @returns {number | null} null before the first join
   */
  beatAt(t = this.clock.now()) {
    return this.#session && beatAt(this.#session.transport, t);
  }

  // --- Connecting, again and again ---

  #connect() {
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#joined = false;
    this.#mayHurry = true;
    const owner = {
      onMessage: (message) => this.#received(link, message),
      onLost: (code, reason) => link === this.#link && this.#lost(code, reason),
      onWake: () => link === this.#link && this.#woke(),
    };
    const connectTimeoutMs = Math.min(MAX_CONNECT_MS, 5000 + 1000 * this.#attempts);
    let link;
    try {
      link = new Link(this.#url, { clock: this.clock, local: this.#local, connectTimeoutMs, owner });
    } catch (error) {
      return this.#end(new BandSyncError("invalid_url", error.message));
    }
    this.#link = link;
    this.#become(this.#session ? "resuming" : "connecting");
  }

  #lost(closeCode, reason) {
    if (closeCode === 4001) {
      const elsewhere = "You went on in another place; join to go on here.";
      return this.#end(new BandSyncError("superseded", elsewhere, { closeCode }));
    }
    const refused = closeCode === 1008 || (closeCode === 1009 && !this.#joined);
    if (refused) {
      const text = `The server refused this connection: ${reason || closeCode}`;
      return this.#end(new BandSyncError("closed", text, { closeCode }));
    }
    this.#retry(closeCode);
  }

  /** Wait and connect again. */
  #retry(closeCode) {
    const now = this.#local.now();
    if (this.#joined) {
      this.#lostAt = now;
      if (now - this.#joinedAt > GOOD_MS) this.#attempts = 0;
    }
    this.#dropLink();
    const full = closeCode === 1013;
    const doublings = this.#attempts + (full ? FULL_DOUBLINGS : 0);
    // Random, so that a band that lost its server does not come back as one wave.
    const wait = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** doublings) * (0.5 + Math.random() / 2);
    const drained = this.#drainUntil - now;
    const retryInMs = Math.max(wait, drained);
    this.#attempts += 1;
    this.#mayHurry = !full && drained <= 0;
    this.#retryAt = now + retryInMs;
    this.#retryTimer = setTimeout(() => this.#connect(), retryInMs);
    this.#become(this.#session ? "resuming" : "connecting");
  }

  /** Close for good, with the reason or because we were asked to. */
  #end(error) {
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#dropLink();
    this.#listening?.abort();
    this.#closeReason = error;
    this.#joining?.reject(error ?? new BandSyncError("closed", "It was closed before it had joined."));
    // Whoever does not wait for the join learns of it by the status.
    this.#joining?.promise.catch(() => {});
    this.#joining = null;
    this.#become("closed");
  }

  #dropLink() {
    clearTimeout(this.#catchUpTimer);
    this.#catchingUp = false;
    this.#joined = false;
    const link = this.#link;
    this.#link = null;
    link?.close();
    this.#release(Infinity);
  }

  #listen() {
    this.#listening = new AbortController();
    const { signal } = this.#listening;
    const { document } = globalThis;
    const onVisible = () => document.visibilityState === "visible" && this.#wake();
    document?.addEventListener("visibilitychange", onVisible, { signal });
    // Back from the back-forward cache, where sockets do not survive.
    globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && this.#wake(), { signal });
    globalThis.addEventListener?.("online", () => this.#wake(), { signal });
  }

  /** The device may have slept, or has a network again: do not wait for timers to find out. */
  #wake() {
    if (this.#retryAt !== null) {
      if (this.#mayHurry) this.#connect();
      return;
    }
    this.clock.restart();
    this.#link?.doubt();
    if (this.#joined) this.#catchUp();
  }

  /** Timers were late by seconds: our clock may have stood still all the while. */
  #woke() {
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
        resumeToken: this.#resumeToken ?? undefined,
        // The beat is computed here.
        ticks: false,
      });
    } catch (error) {
      if (link === this.#link) this.#joinRefused(error);
    }
  }

  #joinRefused(error) {
    // A seat that is taken may be our own, from before the loss.
    const ownSeat =
      error.code === "session_full" && this.#local.now() - this.#lostAt < OWN_SEAT_MS;
    if (!(error instanceof BandSyncError) || PASSING.has(error.code) || ownSeat) this.#retry();
    else this.#end(error);
  }

  // --- What the server says ---

  #received(link, message) {
    const { type, sessionId } = message;
    if (link !== this.#link) return;
    if (sessionId !== undefined && sessionId !== this.sessionId) return;
    const news = isCommitted(message) ? this.#committed(message) : this.#direct(link, message);
    if (news === false) return;
    this.#emit(type, message);
    if (type === "snapshot" && message.you) {
      this.#emit("joined", { resumed: message.you.resumed, snapshot: message });
    }
    if (news) this.#changed();
  }

  /** A change of the session, with the next version. False if it tells nothing new. */
  #committed(message) {
    // Before the snapshot of this connection there is nothing that it could change.
    if (!this.#joined || message.version <= this.#session.version) return false;
    if (message.version > this.#session.version + 1) {
      const gap = { have: this.#session.version, got: message.version };
      if (this.#catchUp()) this.#emit("gap", gap);
      return false;
    }
    this.#session = afterChange(this.#session, message);
    this.#release(message.version);
    return true;
  }

  /** A message without a version of its own. True if it changes the state, false if it is to be ignored. */
  #direct(link, message) {
    switch (message.type) {
      case "welcome":
        return this.#welcomed(link, message);
      case "snapshot":
        return this.#snapshot(link, message);
      case "sync_response":
        this.#catchingUp = false;
        return this.#reanchored(message);
      case "drift_correction":
        return this.#reanchored(message);
      case "room_stats":
        this.#stats = new Map(message.members.map((entry) => [entry.memberId, entry]));
        return true;
      case "storage_status": {
        const { storageType, degraded, reason } = message;
        this.#storage = { storageType, degraded, reason };
        // A server that finds its Redis may put its clock right, once.
        if (storageType === "redis") this.clock.forget();
        return true;
      }
      case "server_draining":
        this.#drainUntil = this.#local.now() + message.reconnectInMs;
        if (this.#joined) this.#become("draining");
        return undefined;
      case "error":
        // The server does not know us any more, so this connection is of no use.
        if (message.code === "not_joined" && this.#joined) this.#retry();
        return undefined;
      default:
        return undefined;
    }
  }

  #welcomed(link, message) {
    if (message.protocol !== PROTOCOL) {
      const text = `The server speaks version ${message.protocol} of the protocol, this is ${PROTOCOL}.`;
      this.#end(new BandSyncError("unsupported_protocol", text));
      return false;
    }
    const { serverId, serverTime, storageType } = message;
    const same = this.#server?.serverId === serverId;
    this.#server = message;
    this.#drainUntil = -Infinity;
    if (!same || this.#storage.storageType !== storageType) {
      this.#storage = { storageType, degraded: null, reason: null };
    }
    // Another server's clock is another clock, though a close one, and so is that of a new process.
    this.clock.forget();
    this.clock.guess(serverTime);
    void this.#sendJoin(link);
    return true;
  }

  #snapshot(link, message) {
    this.#catchingUp = false;
    const { you, epoch, version } = message;
    if (!you && !this.#joined) return false;
    const known = this.#session;
    // The one that answers a join counts whatever its version; another server may be ahead or behind.
    if (!you && known.epoch === epoch && version < known.version) return false;
    this.#session = fromSnapshot(message, this.#session);
    this.#release(known?.epoch === epoch ? version : Infinity);
    if (!you) return true;
    this.#memberId = you.memberId;
    this.#resumeToken = you.resumeToken;
    this.#joined = true;
    this.#joinedAt = this.#local.now();
    link.startReports();
    this.#become(this.#drainUntil > this.#joinedAt ? "draining" : "online");
    this.#joining.resolve(message);
    return true;
  }

  #reanchored({ epoch, version, transport }) {
    const known = this.#session;
    if (!this.#joined || version !== known.version || (epoch ?? known.epoch) !== known.epoch) return false;
    this.#session = { ...known, transport };
    return true;
  }

  /** Ask for what is missing, if something is. False if it has been asked for. */
  #catchUp() {
    if (this.#catchingUp) return false;
    this.#catchingUp = true;
    clearTimeout(this.#catchUpTimer);
    const { version, epoch } = this.#session;
    const link = this.#link;
    link.request("sync_request", { version, epoch }).catch(() => {
      if (link !== this.#link) return;
      this.#catchUpTimer = setTimeout(() => {
        this.#catchingUp = false;
        this.#catchUp();
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
    if (link === this.#link && version > this.#session.version) await this.#reached(version);
    return { version };
  }

  /** When the state here has this version; also when it cannot be waited for any more. */
  #reached(version) {
    return new Promise((resolve) => this.#awaited.push({ version, resolve }));
  }

  #release(version) {
    const due = this.#awaited.filter((each) => each.version <= version);
    if (due.length === 0) return;
    this.#awaited = this.#awaited.filter((each) => each.version > version);
    for (const { resolve } of due) resolve();
  }

  // --- Telling ---

  #become(status) {
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

function webSocketUrl(base, sessionId) {
  const host = String(base).replace(/^http/, "ws").replace(/\/+$/, "");
  // A path of dots would be taken for another path; the join names the session in any case.
  return /^\.*$/.test(sessionId) ? `${host}/ws` : `${host}/ws/${sessionId}`;
}

function withResolvers() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  return parts;
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
