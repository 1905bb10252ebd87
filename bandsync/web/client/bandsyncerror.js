/**
 * What can go wrong between a client and its server.
 *
 * @module
 */

/**
 * A refusal of the server, or the loss of the way to it.
 *
 * `code` is one of the protocol's (`not_leader`, `invalid_field`, `session_full`, `unauthorized`, …) or
 *
 * - `not_connected`: there is no connection, nothing was sent
 * - `connection_lost`: the connection went before the answer came; it may or may not have been done
 * - `message_too_large`: longer than the server takes; nothing was sent
 * - `superseded`: this member went on in another place (another tab, mostly)
 * - `unsupported_protocol`: the server speaks another version of the protocol
 * - `invalid_url`: there can be no WebSocket at this address
 * - `closed`: closed by the server, with `closeCode`, or by `close()`
 */
export class BandSyncError extends Error {
  /**
   * @param {string} code
   * @param {string} message a sentence that says what to do about it
   * @param {{context?: object, closeCode?: number}} [more]
   */
  constructor(code, message, { context, closeCode } = {}) {
    super(message);
    this.name = "BandSyncError";
    /** @type {string} */
    this.code = code;
    /** @type {object | undefined} such as `{field: "tempoBpm"}` */
    this.context = context;
    /** @type {number | undefined} of the WebSocket */
    this.closeCode = closeCode;
  }

  /**
   * The one that an `error` message tells.
   *
   * @param {{code: string, message: string, context?: object}} message
   * @returns {BandSyncError}
   */
  static of({ code, message, context }) {
    return new BandSyncError(code, message, { context });
  }
}
