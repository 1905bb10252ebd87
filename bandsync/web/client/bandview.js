/**
 * Read access to the state of a member, and the position and beat at any instant.
 *
 * @module
 */

import { Commands } from "./commands.js";
import { beatAt, positionAt, segmentAt } from "./sessionstate.js";

/** @typedef {import("./sessionstate.js").Session} Session */
/** @typedef {import("./sessionstate.js").Member} Member */
/** @typedef {import("./sessionstate.js").Segment} Segment */
/** @typedef {import("./membership.js").Stats} Stats */

/** Base of `BandSync`: the state that its connection keeps up to date. */
export class BandView extends Commands {
  #membership;

  /**
   * @param {import("./membership.js").Membership} membership
   * @param {import("./sessionclock.js").SessionClock} clock
   * @param {(type: string, fields?: object) => Promise<{version?: number}>} send see `Commands`
   */
  constructor(membership, clock, send) {
    super(clock, send);
    this.#membership = membership;
  }

  /** The session; null before the first join. It stays while disconnected. @type {Session | null} */
  get session() {
    return this.#membership.session;
  }

  /** @type {string | null} */
  get memberId() {
    return this.#membership.memberId;
  }

  /** This member in the session. @type {Member | null} */
  get me() {
    return this.session?.members.get(this.memberId) ?? null;
  }

  /** The leader; null without one. @type {Member | null} */
  get leader() {
    return this.session?.members.get(this.session.leaderId) ?? null;
  }

  /** @type {boolean} */
  get isLeader() {
    return this.memberId !== null && this.session?.leaderId === this.memberId;
  }

  /** The latest resume token, a secret; each join returns a new one. @type {string | null} */
  get resumeToken() {
    return this.#membership.resumeToken;
  }

  /** Connection statistics by member id; updated every 5 s. @type {ReadonlyMap<string, Stats>} */
  get stats() {
    return this.#membership.stats;
  }

  /** The `welcome` of the latest server; null before the first. @type {object | null} */
  get server() {
    return this.#membership.server;
  }

  /**
   * The storage of the server; `degraded` is null until the server has reported it.
   *
   * @type {import("./membership.js").Storage}
   */
  get storage() {
    return this.#membership.storage;
  }

  /**
   * The segment of the transport in force at an instant.
   *
   * @param {number} [t]
   * @returns {Segment | null} null before the first join
   */
  transportAt(t = this.clock.now()) {
    return this.session && segmentAt(this.session.transport, t);
  }

  /**
   * The position at an instant: milliseconds from the start of the song.
   *
   * @param {number} [t]
   * @returns {number | null} null before the first join
   */
  positionAt(t = this.clock.now()) {
    return this.session && positionAt(this.session.transport, t);
  }

  /**
   * The beat at an instant, with its fraction; 0.0 is the first downbeat.
   *
   * @param {number} [t]
   * @returns {number | null} null before the first join
   */
  beatAt(t = this.clock.now()) {
    return this.session && beatAt(this.session.transport, t);
  }
}
