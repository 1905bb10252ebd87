/**
 * The state of a member: its session, its identity, and what the server has sent about both.
 *
 * Messages change the state here; nothing is sent, and no clock is read.
 *
 * @module
 */

import { afterChange, fromSnapshot } from "./sessionstate.js";

/** @typedef {import("./sessionstate.js").Session} Session */
/** @typedef {{memberId: string, latencyMs: number | null, syncErrorMs: number | null, quality: string}} Stats */
/** @typedef {{storageType: "redis" | "memory" | null, degraded: boolean | null, reason: string | null}} Storage */

/** The state that a client keeps across its connections. */
export class Membership {
  /** The session; null before the first join. @type {Session | null} */
  session = null;
  /** @type {string | null} */
  memberId = null;
  /** The latest resume token, a secret. @type {string | null} */
  resumeToken;
  /** Connection statistics by member id. @type {ReadonlyMap<string, Stats>} */
  stats = new Map();
  /** The latest `welcome`. @type {object | null} */
  server = null;
  /** Storage of the server; `degraded` is null until the server has reported it. @type {Storage} */
  storage = { storageType: null, degraded: null, reason: null };

  /** @param {string | null} resumeToken of an earlier connection */
  constructor(resumeToken) {
    this.resumeToken = resumeToken;
  }

  /** Drop the session and the identity: the member has left. */
  reset() {
    this.session = this.memberId = this.resumeToken = null;
    this.stats = new Map();
  }

  /**
   * A `welcome`: storage of another server is unknown until it reports it.
   *
   * @param {object} message
   */
  welcome(message) {
    const { serverId, storageType } = message;
    const same = this.server?.serverId === serverId;
    this.server = message;
    if (!same || this.storage.storageType !== storageType) {
      this.storage = { storageType, degraded: null, reason: null };
    }
  }

  /**
   * A `snapshot`. One that answers a join (`you`) applies whatever its version, because another
   * server may be ahead or behind. Any other one must not be older than the state.
   *
   * @param {object} message
   * @returns {boolean} whether it was applied
   */
  snapshot(message) {
    const { you, epoch, version } = message;
    const known = this.session;
    if (!you && known.epoch === epoch && version < known.version) return false;
    this.session = fromSnapshot(message, known);
    if (you) {
      this.memberId = you.memberId;
      this.resumeToken = you.resumeToken;
    }
    return true;
  }

  /**
   * A committed change.
   *
   * @param {object} message
   * @returns {"applied" | "stale" | "gap"} `gap`: a version is missing
   */
  commit(message) {
    if (message.version <= this.session.version) return "stale";
    if (message.version > this.session.version + 1) return "gap";
    this.session = afterChange(this.session, message);
    return "applied";
  }

  /**
   * A transport for the current version.
   *
   * @param {{epoch?: string, version: number, transport: object}} message
   * @returns {boolean} whether it was applied
   */
  reanchor({ epoch, version, transport }) {
    const known = this.session;
    if (version !== known.version || (epoch ?? known.epoch) !== known.epoch) return false;
    this.session = { ...known, transport };
    return true;
  }
}
