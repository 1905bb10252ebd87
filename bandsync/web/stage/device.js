/** State of this device: settings, resume token, wake lock. */

/** Private windows may refuse storage; the page then keeps nothing across reloads. */
function recall(storage, key) {
  try {
    return JSON.parse(window[storage].getItem(`bandsync.${key}`));
  } catch {
    return null;
  }
}
function remember(storage, key, value) {
  try {
    window[storage].setItem(`bandsync.${key}`, JSON.stringify(value));
  } catch { /* see above */ }
}

const DEFAULTS = { name: "", session: "", volume: 0.7, clickTrim: 0, lightTrim: 0, theme: "" };

/** Settings of this device, kept in local storage. */
export class Preferences {
  #values = { ...DEFAULTS, ...recall("localStorage", "device") };

  get(name) {
    return this.#values[name];
  }

  set(name, value) {
    this.#values[name] = value;
    remember("localStorage", "device", this.#values);
  }
}

/**
 * The membership of this tab, so that a reload resumes the same member. It is kept per tab, because
 * two tabs with one resume token would supersede each other for ever.
 */
export const savedMember = {
  /** @returns {{sessionId: string, displayName: string, resumeToken: string, pass: string} | null} */
  get() {
    return recall("sessionStorage", "seat");
  },
  set(value) {
    remember("sessionStorage", "seat", value);
  },
};

/** Apply a colour scheme: "dark", "light", or "" for that of the device. */
export function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** Keeps the screen on while requested, if the browser allows it. */
export class WakeLock {
  #wanted = false;
  #lock = null;
  #notify;

  /** @param {(text: string) => void} notify receives a sentence about the screen. */
  constructor(notify) {
    this.#notify = notify;
    document.addEventListener("visibilitychange", () => this.#update());
  }

  set wanted(wanted) {
    if (wanted === this.#wanted) return;
    this.#wanted = wanted;
    this.#update();
  }

  async #update() {
    if (!this.#wanted) {
      await this.#lock?.release();
      this.#lock = null;
      return;
    }
    if (document.visibilityState !== "visible") return; // Browsers release the lock of hidden pages.
    if (!("wakeLock" in navigator)) {
      this.#notify(
        isSecureContext
          ? "This browser cannot keep the screen on: set the device not to sleep."
          : "The screen can only be kept on over https: set the device not to sleep.",
      );
      return;
    }
    try {
      this.#lock = await navigator.wakeLock.request("screen");
      this.#notify("The screen stays on while you are in the session.");
    } catch {
      this.#notify("The device does not let the page keep the screen on; a low battery is a reason.");
    }
  }
}

/** Register the service worker, which lets the page open without a network. */
export async function keepPage() {
  try {
    await navigator.serviceWorker?.register("/sw.js");
  } catch { /* Private windows, or an address without https. */ }
}
