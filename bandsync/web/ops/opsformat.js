/** Numbers, durations and instants for people. @module */

const numbers = [0, 1, 2, 3].map(
  (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }),
);
const seconds = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const minutes = new Intl.DateTimeFormat("en-GB", { timeStyle: "short" });
const days = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

/**
 * A quantity with about three significant digits.
 * @param {number} value
 * @returns {string}
 */
export function number(value) {
  const size = Math.abs(value);
  const digits = Number.isInteger(value) || size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3;
  return numbers[digits].format(value).replace("-", "−");
}

/**
 * A duration.
 * @param {number} ms milliseconds
 * @returns {string} such as "4.2 s", "2 min 5 s" or "3 d 4 h"
 */
export function duration(ms) {
  if (ms < 1000) return `${number(Math.round(ms))} ms`;
  if (ms < 9950) return `${numbers[1].format(ms / 1000)} s`;
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  let rest = Math.round(ms / 1000);
  const first = parts.findIndex(([size]) => rest >= size);
  return parts
    .slice(first, first + 2)
    .map(([size, unit]) => {
      const count = Math.floor(rest / size);
      rest -= count * size;
      return count ? `${count} ${unit}` : "";
    })
    .filter(Boolean)
    .join(" ");
}

/**
 * The time of day, with the date if that is not today's.
 * @param {number} at milliseconds since the Unix epoch
 * @param {number} now likewise
 * @returns {string}
 */
export function clockTime(at, now) {
  const time = seconds.format(at);
  return days.format(at) === days.format(now) ? time : `${days.format(at)} ${time}`;
}

/**
 * The time of day to the minute; to the second for short spans, the date for long ones.
 * @param {number} at milliseconds since the Unix epoch
 * @param {number} stepMs distance of the marks
 * @returns {string}
 */
export function axisTime(at, stepMs) {
  if (stepMs < 60_000) return seconds.format(at);
  return stepMs < 86_400_000 ? minutes.format(at) : days.format(at);
}

/**
 * @param {number} count
 * @param {string} noun in the singular, with a regular plural
 * @returns {string}
 */
export function counted(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}
