/**
 * WebSocket close codes, and whether the client reconnects by itself after each.
 *
 * The same table as the server's `CloseCode`. After any other code the client reconnects.
 *
 * @module
 */

/** @type {Readonly<Record<string, {code: number, reconnect: boolean}>>} */
export const CLOSE_CODES = Object.freeze({
  PROTOCOL_ERROR: { code: 1002, reconnect: true },
  INVALID_PAYLOAD: { code: 1007, reconnect: true },
  POLICY_VIOLATION: { code: 1008, reconnect: false },
  MESSAGE_TOO_BIG: { code: 1009, reconnect: true },
  INTERNAL_ERROR: { code: 1011, reconnect: true },
  SERVICE_RESTART: { code: 1012, reconnect: true },
  TRY_AGAIN_LATER: { code: 1013, reconnect: true },
  CONNECTION_TIMEOUT: { code: 4000, reconnect: true },
  SESSION_TAKEN: { code: 4001, reconnect: false },
});

/** Codes that a socket reports itself: a normal close, and an end without a close frame. */
export const NORMAL_CLOSURE = 1000;
export const ABNORMAL_CLOSURE = 1006;

const FINAL = new Set(
  Object.values(CLOSE_CODES).filter(({ reconnect }) => !reconnect).map(({ code }) => code),
);

/**
 * Whether the client may reconnect after a close with this code.
 *
 * @param {number} code
 * @returns {boolean}
 */
export function mayReconnect(code) {
  return !FINAL.has(code);
}
