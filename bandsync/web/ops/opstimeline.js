/** The storage's modes over time, as two lanes: up is Redis, down is memory. @module */

import { axisTime, clockTime, duration } from "./opsformat.js";
import { svg } from "./opschart.js";

const LANES = { redis: 20, memory: 46 };
const BAR = 14;
const LABELS = [78, 93];
const HEIGHT = 126;
const LEFT = 68;
const RIGHT = 12;
const AXIS = HEIGHT - 20;
const STEPS_MS = [10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400, 604_800].map((s) => s * 1000);
// Approximate width of a character of a label.
const CHARACTER = 6.6;

const MODES = {
  redis: "Redis",
  memory: "memory",
  migrating: "on the way to Redis",
  "memory (disabled)": "memory, as configured",
  away: "no answer",
};

/**
 * Name of a storage mode.
 * @param {string} mode
 * @returns {string} the mode itself, if only a newer server knows it
 */
export const modeName = (mode) => MODES[mode] ?? mode;

/** The timeline of one server. */
export class Timeline {
  constructor() {
    this.element = svg("svg", { role: "img", height: HEIGHT, class: "drawing" });
    this.width = 0;
  }

  /**
   * Redraws.
   * @param {import("./opspast.js").Stretch[]} stretches
   * @param {ReturnType<import("./opspast.js").Past["happenings"]>} happenings
   * @param {number} from the left edge, session clock, milliseconds
   * @param {number} to the right edge
   */
  draw(stretches, happenings, from, to) {
    const shown = stretches.filter((stretch) => stretch.to >= from);
    this.element.setAttribute("aria-label", spoken(shown, from, to));
    if (this.width < 160) return;
    const x = (at) => LEFT + ((Math.max(at, from) - from) / (to - from)) * (this.width - LEFT - RIGHT);
    const parts = [
      svg("text", { class: "lane", x: 0, y: LANES.redis + 11 }, "Redis"),
      svg("text", { class: "lane", x: 0, y: LANES.memory + 11 }, "Memory"),
      ...Object.values(LANES).map((y) => svg("path", { class: "rail", d: `M${LEFT} ${y + BAR / 2}H${this.width - RIGHT}` })),
      ...this.#axis(x, from, to),
      ...shown.flatMap((stretch) => bar(stretch, x)),
      ...this.#marks(happenings.filter(({ event }) => event.at >= from), x, to),
    ];
    this.element.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.element.replaceChildren(...parts);
  }

  #axis(x, from, to) {
    const room = Math.max(2, Math.floor((this.width - LEFT - RIGHT) / 90));
    const step = STEPS_MS.find((each) => (to - from) / each <= room) ?? STEPS_MS.at(-1);
    const parts = [svg("path", { class: "axis", d: `M${LEFT} ${AXIS}.5H${this.width - RIGHT}` })];
    // Marks at round local times.
    const shift = new Date(to).getTimezoneOffset() * 60_000;
    for (let at = Math.ceil((from - shift) / step) * step + shift; at <= to; at += step) {
      const where = x(at).toFixed(1);
      parts.push(svg("path", { class: "axis", d: `M${where} ${AXIS}v4` }));
      if (x(at) < this.width - RIGHT - 48) {
        parts.push(svg("text", { class: "tick", x: where, y: HEIGHT - 3, "text-anchor": "middle" }, axisTime(at, step)));
      }
    }
    parts.push(svg("text", { class: "tick", x: this.width - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, "now"));
    return parts;
  }

  #marks(happenings, x, to) {
    const parts = [];
    // From the right, so that the latest events get labels; the table has all.
    const free = LABELS.map(() => this.width);
    for (const { event, tookMs, lasts } of happenings) {
      const where = x(event.at);
      if (!Object.hasOwn(SIGNS, event.kind)) continue;
      parts.push(svg("path", { class: `mark ${event.kind}`, d: SIGNS[event.kind](where) }));
      if (event.kind === "recovery") continue;
      const took = lasts ? to - event.at : tookMs;
      const text = event.kind === "start" ? `started after ${duration(Math.max(took, 0))}` : [event.reason, took === null ? "" : duration(took)].filter(Boolean).join(" · ");
      const room = text.length * CHARACTER;
      const left = Math.max(LEFT, Math.min(where, this.width - RIGHT - room));
      const line = free.findIndex((edge) => left + room < edge);
      if (line < 0) continue;
      parts.push(svg("text", { class: "label", x: left.toFixed(1), y: LABELS[line] }, text));
      free[line] = left - 8;
    }
    return parts;
  }
}

/** A triangle points to where sessions go; a line is a start of the server. */
const SIGNS = {
  failover: (x) => `M${x.toFixed(1)} ${LANES.memory - 1}l-5 -8h10z`,
  recovery: (x) => `M${x.toFixed(1)} ${LANES.redis + BAR + 1}l-5 8h10z`,
  start: (x) => `M${x.toFixed(1)} ${LANES.redis - 8}V${LANES.memory + BAR}`,
};

/** The bar of one stretch, and what stands in it. */
function bar(stretch, x) {
  const [left, right] = [x(stretch.from), x(stretch.to)];
  const lane = stretch.mode.startsWith("memory") ? LANES.memory : LANES.redis;
  const known = Object.hasOwn(MODES, stretch.mode);
  const whole = stretch.mode === "away" || stretch.mode === "migrating" || !known;
  const size = {
    x: left.toFixed(1),
    y: whole ? LANES.redis : lane,
    // Even the shortest period is visible.
    width: Math.max(right - left, stretch.event?.kind === "failover" ? 3 : 0.5).toFixed(1),
    height: whole ? LANES.memory + BAR - LANES.redis : BAR,
    rx: 2,
  };
  const name = !known ? "unknown" : stretch.mode === "memory (disabled)" ? "disabled" : stretch.mode;
  const title = `${modeName(stretch.mode)}, ${clockTime(stretch.from, stretch.to)}, ${duration(stretch.to - stretch.from)}`;
  const parts = [svg("rect", { class: `stretch ${name}`, ...size }, svg("title", {}, title))];
  if (name === "away" && right - left > MODES.away.length * CHARACTER) {
    const middle = { x: ((left + right) / 2).toFixed(1), y: (LANES.redis + LANES.memory + BAR) / 2 + 4 };
    parts.push(svg("text", { class: "lane", "text-anchor": "middle", ...middle }, MODES.away));
  }
  return parts;
}

function spoken(stretches, from, to) {
  const lost = stretches.filter((stretch) => stretch.event?.kind === "failover" && stretch.from >= from);
  const current = stretches.at(-1);
  const now = current === undefined ? "nothing is known yet" : `now ${modeName(current.mode)}, since ${clockTime(current.from, to)}`;
  const times = lost.length === 1 ? "once" : `${lost.length} times`;
  const used = stretches.some((stretch) => stretch.mode === "redis");
  const redis = lost.length ? `was lost ${times}` : used ? "was lost at no time" : "was not in use";
  return `Timeline from ${clockTime(from, to)}: ${now}; Redis ${redis}. The table has the details.`;
}
