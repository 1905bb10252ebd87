/**
 * The commands of a member, as methods that send the messages of the protocol.
 *
 * @module
 */

/** Base of `BandSync`: one method per command. Most of them are for the leader only. */
export class Commands extends EventTarget {
  /**
   * The session clock as this device estimates it.
   *
   * @type {import("./sessionclock.js").SessionClock}
   */
  clock;

  #send;

  /**
   * @param {import("./sessionclock.js").SessionClock} clock
   * @param {(type: string, fields?: object) => Promise<{version?: number}>} send sends a command and
   *   resolves as the commands do
   */
  constructor(clock, send) {
    super();
    this.clock = clock;
    this.#send = send;
  }

  /**
   * Start the song.
   *
   * Resolves, like all commands, when the server has committed it and the local state shows it.
   *
   * @param {object} [options]
   * @param {number} [options.positionMs] start position; by default the current one
   * @param {number} [options.startInMs] lead in milliseconds, 0 – 10 000; by default long enough
   *   for the slowest member
   * @param {number} [options.countInBeats] beats of count-in after the lead, 0 – 32
   * @returns {Promise<{version?: number}>} the version of the change; none if nothing changed
   * @throws {BandSyncError} (as a rejection) with the server's code (`not_leader`, `invalid_field`, …);
   *   `not_connected`: nothing was sent; `connection_lost`: it may or may not have been applied
   */
  play({ positionMs, startInMs, countInBeats } = {}) {
    return this.#send("play", { positionMs, startInMs, countInBeats });
  }

  /** Pause at the current position. @returns {Promise<{version?: number}>} */
  pause() {
    return this.#send("pause");
  }

  /** Stop, and return to the start of the song. @returns {Promise<{version?: number}>} */
  stop() {
    return this.#send("stop");
  }

  /**
   * Seek to a position.
   *
   * @param {number} positionMs milliseconds from its start
   * @param {{at?: "now" | "beat" | "bar"}} [options] while playing: now, on the next beat or bar
   * @returns {Promise<{version?: number}>}
   */
  seek(positionMs, { at } = {}) {
    return this.#send("seek", { positionMs, at });
  }

  /**
   * Change the tempo; position and beat stay continuous.
   *
   * @param {number} tempoBpm 20 – 300 quarter notes per minute
   * @param {{beatsPerBar?: number, at?: "now" | "beat" | "bar"}} [options]
   * @returns {Promise<{version?: number}>}
   */
  setTempo(tempoBpm, { beatsPerBar, at } = {}) {
    return this.#send("set_tempo", { tempoBpm, beatsPerBar, at });
  }

  /** Request the lead; the leader receives `leader_requested`. @returns {Promise<{version?: number}>} */
  requestLeader() {
    return this.#send("request_leader");
  }

  /**
   * Deny the lead to a member that requested it.
   *
   * @param {string} memberId
   * @returns {Promise<{version?: number}>}
   */
  denyLeader(memberId) {
    return this.#send("deny_leader", { memberId });
  }

  /** Claim the lead, if there is no leader or it is disconnected. @returns {Promise<{version?: number}>} */
  takeLead() {
    return this.#send("set_role", { role: "leader" });
  }

  /** Give the lead up; the longest-connected other member is elected. @returns {Promise<{version?: number}>} */
  stepDown() {
    return this.#send("set_role", { role: "follower" });
  }

  /**
   * Hand the lead over to another member.
   *
   * @param {string} memberId
   * @returns {Promise<{version?: number}>}
   */
  handOver(memberId) {
    return this.#send("set_role", { role: "leader", memberId });
  }

  /**
   * Change the session's headline.
   *
   * @param {string} text up to 500 characters
   * @returns {Promise<{version?: number}>}
   */
  updateMessage(text) {
    return this.#send("update_message", { message: text });
  }

  /**
   * Send a chat message to everybody.
   *
   * @param {string} text 1 – 1000 characters
   * @returns {Promise<{version?: number}>}
   */
  chat(text) {
    return this.#send("chat_message", { text });
  }

  /**
   * Report the position of a local source that plays the song.
   *
   * From the leader it re-anchors the transport; a follower receives `drift_correction` when it is
   * off.
   *
   * @param {number} positionMs
   * @param {number} [timestamp] the instant of that position, at most 10 s ago
   * @returns {Promise<{version?: number}>}
   */
  positionSync(positionMs, timestamp = this.clock.now()) {
    return this.#send("position_sync", { positionMs, timestamp });
  }
}
