/** Tap tempo: the tempo of the last taps, by least squares. */

const MOST = 12;
/** Slower than 20 BPM: the next tap starts a new tempo. */
const PAUSE_MS = 3000;
/** A tap that is off the prediction by this much, in beats, starts a new tempo. */
const ASTRAY = 0.4;

export class TapTempo {
  #taps = [];

  /** Discard all taps. */
  reset() {
    this.#taps = [];
  }

  /**
   * @param {number} at when it was tapped: milliseconds on any steady clock, such as `timeStamp`
   *   of the event.
   * @returns {number | null} quarter notes per minute; null before the third tap, and outside of
   *   20 to 300.
   */
  tap(at) {
    const taps = this.#taps;
    const last = taps.at(-1);
    if (last !== undefined && (at - last > PAUSE_MS || at <= last)) taps.length = 0;
    if (taps.length >= 3) {
      const period = slope(taps);
      if (Math.abs((at - taps.at(-1)) / period - 1) > ASTRAY) taps.splice(0, taps.length - 1);
    }
    taps.push(at);
    if (taps.length > MOST) taps.shift();
    if (taps.length < 3) return null;
    const bpm = 60_000 / slope(taps);
    return bpm >= 20 && bpm <= 300 ? bpm : null;
  }
}

/** Linear regression of tap times on tap numbers: milliseconds per tap. */
function slope(taps) {
  const middle = (taps.length - 1) / 2;
  let above = 0;
  let below = 0;
  taps.forEach((at, number) => {
    above += (number - middle) * (at - taps[0]);
    below += (number - middle) ** 2;
  });
  return above / below;
}
