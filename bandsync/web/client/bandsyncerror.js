/**
 * The errors of the client.
 *
 * @module
 */

/**
 * A refusal of the server, or the loss of the connection.
 *
 * `code` is one of the protocol's (`not_leader`, `invalid_field`, `session_full`, `unauthorized`, …) or
 *
 * - `not_connected`: there is no connection; nothing was sent
 * - `connection_lost`: the connection was lost before the reply; it may or may not have been applied
 * - `message_too_large`: longer than the server accepts; nothing was sent
 * - `superseded`: this member resumed on another connection (mostly another tab)
 * - `unsupported_protocol`: the server speaks another version of the protocol
 * - `invalid_url`: the address is not that of a WebSocket
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
   * The error of an `error` message.
   *
   * @param {{code: string, message: string, context?: object}} message
   * @returns {BandSyncError}
   */
  static of({ code, message, context }) {
    return new BandSyncError(code, message, { context });
  }
}
