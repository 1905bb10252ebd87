/**
 * When to connect again: the delay of the backoff, and the events after which waiting is pointless.
 *
 * @module
 */

const FIRST_MS = 300;
const LAST_MS = 8000;
/** After TRY_AGAIN_LATER the server is overloaded: the backoff starts with this many doublings. */
const OVERLOAD_DOUBLINGS = 3;

/**
 * Exponential backoff with jitter, which avoids a thundering herd after the loss of a server.
 *
 * @param {number} attempts failed connections since the last good one
 * @param {boolean} overloaded whether the server closed with TRY_AGAIN_LATER
 * @returns {number} milliseconds
 */
export function backoff(attempts, overloaded) {
  const doublings = attempts + (overloaded ? OVERLOAD_DOUBLINGS : 0);
  return Math.min(LAST_MS, FIRST_MS * 2 ** doublings) * (0.5 + Math.random() / 2);
}

/**
 * Call back when the page becomes visible, is restored, or has a network again.
 *
 * @param {() => void} callback
 * @param {AbortSignal} signal removes the listeners
 */
export function onWakeUp(callback, signal) {
  const { document } = globalThis;
  const onVisible = () => document.visibilityState === "visible" && callback();
  document?.addEventListener("visibilitychange", onVisible, { signal });
  // Restored from the back-forward cache, where sockets do not survive.
  globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && callback(), { signal });
  globalThis.addEventListener?.("online", callback, { signal });
}
