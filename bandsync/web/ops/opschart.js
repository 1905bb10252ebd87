/** Small live charts, drawn as SVG. Colours come from the style sheet. @module */

import { duration } from "./opsformat.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 104;
// Background while the storage is degraded.
const SHADES = { away: "away", memory: "memory", migrating: "memory" };
const EDGE = { top: 8, right: 2, bottom: 18, left: 2 };

/**
 * An SVG element.
 * @param {string} name
 * @param {Record<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 * @returns {SVGElement}
 */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/**
 * The smallest of 1, 2, 5, 10, 20, … that is at least `value`.
 * @param {number} value above 0
 * @returns {number}
 */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999) ?? value;
}

/**
 * @typedef {object} Series
 * @property {string} name
 * @property {(sample: object) => number | null | undefined} value
 */

/**
 * @typedef {object} Plan content of a chart
 * @property {string} title
 * @property {string} unit
 * @property {Series[]} series one or two: the second is drawn dashed, or as an area up to it
 * @property {(value: number) => string} format without the unit
 * @property {number} least minimum top of the scale
 * @property {(sample: object) => [number, number] | null} [bounds] an area around the first series
 * @property {boolean} [signed] whether the scale has zero in the middle
 * @property {boolean} [tenfold] logarithmic scale, for values that are tiny and sometimes
 *   huge
 */

/** One chart: a title, the current figures, and a line over time. */
export class Chart {
  /** @param {Plan} plan */
  constructor(plan) {
    this.plan = plan;
    this.element = document.createElement("figure");
    this.element.className = "card chart";
    this.caption = document.createElement("figcaption");
    const title = document.createElement("h3");
    title.textContent = plan.title;
    this.current = document.createElement("p");
    this.current.className = "current number";
    this.range = document.createElement("p");
    this.range.className = "range number";
    this.caption.append(title, this.current, this.range);
    this.drawing = svg("svg", { role: "img", height: HEIGHT, class: "drawing" });
    this.element.append(this.caption, this.drawing);
    this.width = 0;
  }

  /**
   * Redraws.
   * @param {object} view
   * @param {object[]} view.samples those to show, in order
   * @param {number} view.from the left edge, session clock, milliseconds
   * @param {number} view.to the right edge
   * @param {(earlier: object, later: object) => boolean} view.parted whether there is a gap between
   * @param {object | null} view.looked the sample under the pointer
   * @param {boolean} view.live whether the last sample is current
   * @param {import("./opspast.js").Stretch[]} view.stretches of the storage
   * @param {number[]} view.starts starts of the server
   */
  draw(view) {
    const { plan } = this;
    const shown = view.looked ?? (view.live ? view.samples.at(-1) : undefined);
    this.#figures(shown, view.samples);
    // A hidden chart has no size.
    if (this.width < 40) return;
    const lines = plan.series.map((series) => view.samples.map(series.value));
    const bounds = plan.bounds === undefined ? [] : view.samples.map(plan.bounds);
    const sizes = [...lines, ...bounds].flat().filter(Number.isFinite).map(Math.abs);
    // No spread: ten minutes of several series would be too many arguments.
    const top = roundUp(sizes.reduce((most, size) => Math.max(most, size), plan.least));
    const tiny = sizes.reduce((least, size) => (size > 0 ? Math.min(least, size) : least), plan.least);
    const bottom = plan.tenfold ? 10 ** Math.floor(Math.log10(Math.min(tiny, top / 10))) : plan.signed ? -top : 0;
    const width = this.width - EDGE.left - EDGE.right;
    const height = HEIGHT - EDGE.top - EDGE.bottom;
    const x = (at) => EDGE.left + ((at - view.from) / (view.to - view.from)) * width;
    const scale = plan.tenfold ? (value) => Math.log(Math.max(value, bottom)) : (value) => value;
    const y = (value) => EDGE.top + (1 - (scale(value) - scale(bottom)) / (scale(top) - scale(bottom))) * height;
    const parts = this.#ground(view, x, y, top, bottom);
    const pairs = (low, high) =>
      low.map((value, index) => [value, high[index]]).map((pair) => (pair.every(Number.isFinite) ? pair : null));
    if (plan.bounds !== undefined) {
      parts.push(svg("path", { class: "bounds", d: area(view, bounds, x, y) }));
    } else if (plan.tenfold && lines.length > 1) {
      parts.push(svg("path", { class: "bounds", d: area(view, pairs(lines[0], lines[1]), x, y) }));
    } else if (!plan.tenfold) {
      parts.push(svg("path", { class: "under", d: area(view, pairs(lines[0].map(() => 0), lines[0]), x, y) }));
    }
    if (!plan.tenfold && lines.length > 1) parts.push(svg("path", { class: "line line1", d: path(view, lines[1], x, y) }));
    parts.push(svg("path", { class: "line line0", d: path(view, lines[0], x, y) }));
    if (view.looked) {
      const at = x(view.looked.at).toFixed(1);
      parts.push(svg("path", { class: "look", d: `M${at} ${EDGE.top}V${HEIGHT - EDGE.bottom}` }));
    }
    this.drawing.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.drawing.replaceChildren(...parts, ...this.#ticks(view, top, bottom));
  }

  #ground(view, x, y, top, bottom) {
    const { plan } = this;
    const floor = HEIGHT - EDGE.bottom;
    const parts = [];
    for (const stretch of view.stretches) {
      const [left, right] = [Math.max(x(stretch.from), EDGE.left), x(stretch.to)];
      const kind = SHADES[stretch.mode];
      if (kind === undefined || right <= left) continue;
      const size = { x: left.toFixed(1), y: EDGE.top, width: (right - left).toFixed(1), height: floor - EDGE.top };
      parts.push(svg("rect", { class: `shade ${kind}`, ...size }));
    }
    const level = (value, name) => {
      const where = Math.round(y(value)) + 0.5;
      parts.push(svg("path", { class: name, d: `M${EDGE.left} ${where}H${this.width - EDGE.right}` }));
    };
    level(top, "grid");
    if (plan.tenfold) {
      for (let value = bottom * 10; value < top; value *= 10) level(value, "grid");
    } else {
      level(plan.signed ? 0 : top / 2, "grid");
    }
    level(bottom, "axis");
    for (const start of view.starts) {
      const at = x(start);
      if (at > EDGE.left) parts.push(svg("path", { class: "start", d: `M${at.toFixed(1)} ${EDGE.top}V${floor}` }));
    }
    return parts;
  }

  #ticks(view, top, bottom) {
    const { plan } = this;
    const spanMs = view.to - view.from;
    const marks = [
      [plan.signed ? `±${plan.format(top)}` : plan.format(top), "start", EDGE.left, EDGE.top + 11],
      [plan.tenfold ? plan.format(bottom) : "", "start", EDGE.left, HEIGHT - EDGE.bottom - 4],
      [`−${duration(spanMs)}`, "start", EDGE.left, HEIGHT - 4],
      [`−${duration(spanMs / 2)}`, "middle", this.width / 2, HEIGHT - 4],
      ["now", "end", this.width - EDGE.right, HEIGHT - 4],
    ];
    return marks.map(([text, anchor, x, y]) => svg("text", { class: "tick", x, y, "text-anchor": anchor }, text));
  }

  #figures(shown, samples) {
    const { plan } = this;
    const [main, second] = plan.series;
    const text = (value) => (Number.isFinite(value) ? plan.format(value) : "–");
    const value = shown === undefined ? null : main.value(shown);
    const unit = document.createElement("span");
    unit.className = "unit";
    unit.textContent = plan.unit;
    this.current.replaceChildren(text(value), unit);
    const aside = document.createElement("span");
    aside.className = "aside";
    if (plan.bounds !== undefined && shown !== undefined) {
      const bounds = plan.bounds(shown);
      aside.textContent = bounds ? `± ${plan.format((bounds[1] - bounds[0]) / 2)}` : "";
    } else if (second !== undefined) {
      aside.textContent = `${second.name} ${text(shown === undefined ? null : second.value(shown))}`;
    }
    this.current.append(aside);
    // The maximum of a second has the unit of the series; another quantity would not.
    const counted = plan.tenfold ? plan.series : [main];
    const values = counted.flatMap((series) => samples.map(series.value)).filter(Number.isFinite);
    const least = values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const ends = [["min ", least], [" – ", null], ["max ", most]];
    this.range.replaceChildren(
      ...(values.length ? ends.map(([word, end]) => (end === null ? word : labelled(word, text(end)))) : ["no figures yet"]),
    );
    const spoken = [
      `${plan.title}: ${Number.isFinite(value) ? `${text(value)} ${plan.unit}`.trim() : "no figure"}`,
      aside.textContent,
      values.length ? `in this span from ${text(least)} to ${text(most)}` : "",
    ];
    this.drawing.setAttribute("aria-label", `${spoken.filter(Boolean).join(", ")}.`);
  }
}

/** A word that narrow charts go without, and what follows it. */
function labelled(word, text) {
  const element = document.createElement("span");
  element.className = "word";
  element.textContent = word;
  const both = document.createDocumentFragment();
  both.append(element, text);
  return both;
}

/** A line through the values; broken where there are none. */
function path(view, values, x, y) {
  let text = "";
  let drawing = false;
  values.forEach((value, index) => {
    const sample = view.samples[index];
    const parted = index > 0 && view.parted(view.samples[index - 1], sample);
    if (!Number.isFinite(value)) {
      drawing = false;
      return;
    }
    const point = `${x(sample.at).toFixed(1)} ${y(value).toFixed(1)}`;
    // A line of length zero: with round caps a single value is a dot.
    text += drawing && !parted ? `L${point}` : `M${point}h0`;
    drawing = true;
  });
  return text;
}

/** The area between pairs of values. */
function area(view, pairs, x, y) {
  let text = "";
  let run = [];
  const close = () => {
    if (run.length > 1) {
      const upper = run.map(([at, , high]) => `${x(at).toFixed(1)} ${y(high).toFixed(1)}`);
      const lower = run.reverse().map(([at, low]) => `${x(at).toFixed(1)} ${y(low).toFixed(1)}`);
      text += `M${upper.join("L")}L${lower.join("L")}Z`;
    }
    run = [];
  };
  pairs.forEach((pair, index) => {
    const sample = view.samples[index];
    if (!pair || (index > 0 && view.parted(view.samples[index - 1], sample))) close();
    if (pair) run.push([sample.at, ...pair]);
  });
  close();
  return text;
}
