/**
 * The operator's screen: queries `/api/ops` once a second and shows the result; it makes no other
 * requests. When the server does not answer, the history stays and the queries continue. It never
 * claims a state that it does not know: not in a background tab, whose timers browsers throttle, and
 * not when the screen itself fails.
 * @module
 */

import { Chart } from "./opschart.js";
import { axisTime, clockTime, counted, duration, number } from "./opsformat.js";
import { Past } from "./opspast.js";
import { modeName, Timeline } from "./opstimeline.js";

const PERIOD_MS = 1000;
// Period in a hidden tab, whose title is still visible.
const HIDDEN_PERIOD_MS = 5000;
const PATIENCE_MS = 3000;
// Timeout of a query, while timers are not throttled.
const STALE_MS = 10_000;
// A single late answer is not a failure.
const SILENT_MS = 2500;
const MARKS = {
  good: "M7 12.5l3.4 3.4 6.6-7.4",
  warn: "M12 6.5v7M12 17v.2",
  bad: "M8.2 8.2l7.6 7.6M15.8 8.2l-7.6 7.6",
  wait: "M7.5 12h.2M12 12h.2M16.5 12h.2",
};
const MEBIBYTE = 1024 * 1024;

// Rates of a period that was not exactly one second.
const rate = (value) => number(value >= 10 ? Math.round(value) : Math.round(value * 10) / 10);

/** @type {import("./opschart.js").Plan[]} */
const PLANS = [
  { title: "Connections", unit: "", least: 5, format: number, series: [
    { name: "joined", value: (each) => each.connections }, { name: "joined", value: (each) => each.members }] },
  { title: "Sessions", unit: "", least: 5, format: number, series: [
    { name: "kept", value: (each) => each.sessions }, { name: "with members", value: (each) => each.rooms }] },
  { title: "Deliveries", unit: "per s", least: 10, format: rate, series: [
    { name: "sent", value: (each) => each.deliveriesPerS }] },
  { title: "Received", unit: "per s", least: 10, format: rate, series: [
    { name: "received", value: (each) => each.receivedPerS }] },
  { title: "Commit latency", unit: "ms", least: 1, tenfold: true, format: number, series: [
    { name: "mean", value: (each) => each.commit?.meanMs }, { name: "longest", value: (each) => each.commit?.maxMs }] },
  { title: "Command latency", unit: "ms", least: 1, tenfold: true, format: number, series: [
    { name: "mean", value: (each) => each.command?.meanMs }, { name: "longest", value: (each) => each.command?.maxMs }] },
  { title: "Loop lag", unit: "ms", least: 1, tenfold: true, format: number, series: [
    { name: "longest", value: (each) => each.loopLagMs }] },
  { title: "Slow consumers", unit: "let go", least: 2, format: rate, series: [
    { name: "let go", value: (each) => each.slowConsumers }, { name: "frames dropped", value: (each) => each.droppedPerS }] },
  { title: "Redis round trip", unit: "ms", least: 1, tenfold: true, format: number, series: [
    { name: "round trip", value: (each) => each.roundTripMs }] },
  { title: "Clock error", unit: "ms", least: 0.5, format: number, signed: true,
    bounds: ({ clockErrorMs, clockUncertaintyMs }) =>
      Number.isFinite(clockErrorMs) && Number.isFinite(clockUncertaintyMs)
        ? [clockErrorMs - clockUncertaintyMs, clockErrorMs + clockUncertaintyMs] : null,
    series: [{ name: "error", value: (each) => each.clockErrorMs }] },
  { title: "Memory", unit: "MiB", least: 64, format: number, series: [
    { name: "resident", value: (each) => (each.memoryBytes === null ? null : each.memoryBytes / MEBIBYTE) }] },
  { title: "Processor", unit: "% of one", least: 10, format: number, series: [
    { name: "busy", value: (each) => each.cpu * 100 }] },
];

const at = (id) => document.getElementById(id);
const past = new Past();
const timeline = new Timeline();
const charts = PLANS.map((plan) => new Chart(plan));
const now = () => latest.overview.now + performance.now() - latest.heardMs;

/** The last answer, and when it came (`performance.now()`). @type {{overview: object, heardMs: number} | null} */
let latest = null;
/** Why there is no answer; null while there are answers. */
let trouble = null;
/** The failure of this screen at the last answer; null without one. @type {Error | null} */
let failure = null;
let span = "recent";
/** Where the pointer is in the charts: a share of their span, or null. */
let looking = null;
let shownEvents = "";
let wake = () => {};

/** Sets a text, if it is another one: who selects or listens to it is not disturbed. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

async function ask() {
  const since = past.since;
  let overview;
  try {
    const query = since === null ? "" : `?since=${since}`;
    const answer = await fetch(`/api/ops${query}`, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (answer.status === 401) {
      trouble = "token";
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    overview = await answer.json();
  } catch (error) {
    // Any failure means no answer; the next query follows.
    trouble ??= error.name;
    return;
  }
  if (past.take(overview)) {
    latest = { overview, heardMs: performance.now() };
    trouble = null;
  } else {
    trouble = "stranger";
  }
}

async function run() {
  for (;;) {
    const started = performance.now();
    try {
      await ask();
      failure = null;
    } catch (error) {
      fail(error);
    }
    draw();
    await new Promise((resolve) => {
      wake = resolve;
      const period = document.hidden ? HIDDEN_PERIOD_MS : PERIOD_MS;
      setTimeout(resolve, Math.max(100, period - (performance.now() - started)));
    });
  }
}

function fail(error) {
  failure = error;
  console.error(error);
}

function draw() {
  try {
    if (latest !== null) {
      drawServer();
      drawStorage();
      drawPast();
    }
  } catch (error) {
    fail(error);
  }
  drawState();
}

function isAway() {
  if (trouble === null) return false;
  return latest === null || trouble === "token" || silentMs() > SILENT_MS;
}

function silentMs() {
  return latest === null ? 0 : performance.now() - latest.heardMs;
}

/** The headline of the screen; null before the first answer. */
function state() {
  const asOf = latest === null ? "" : `What is shown is as of ${duration(silentMs())} ago.`;
  const since = latest === null ? null : latest.overview.now;
  if (failure !== null) {
    return { level: "bad", text: "This screen cannot show the server's answer.", meaning: `Load it again: the server may be newer than it. (${failure})`, since: null, others: [] };
  }
  if (!isAway()) {
    if (latest === null) return null;
    if (silentMs() > STALE_MS) return { level: "wait", text: "Asking the server …", meaning: asOf, since: null, others: [] };
    const { level, text, meaning, since, others = [] } = latest.overview.verdict;
    return { level: Object.hasOwn(MARKS, level) ? level : "warn", text: `${text}`, meaning: `${meaning}`, since, others };
  }
  switch (trouble) {
    case "token":
      return { level: "bad", text: "This screen needs the operators' token.", meaning: "Load it again, and give ADMIN_TOKEN as the password, with any name.", since: null, others: [] };
    case "stranger":
      return { level: "warn", text: "Another server answers here.", meaning: `This screen shows ${past.serverId}: open /ops at the address of one server, not of a load balancer.`, since, others: [] };
    default:
      return { level: "bad", text: "The server does not answer.", meaning: `The screen asks again every second. ${asOf} Members reconnect by themselves, and resume on another server if there is one.`, since, others: [] };
  }
}

function drawState() {
  try {
    show(state());
  } catch (error) {
    fail(error);
    show(state());
  }
}

function show(verdict) {
  if (verdict === null) return;
  const { level, text, meaning, since, others } = verdict;
  const lasts = since === null ? "" : `since ${clockTime(since, now())} · ${duration(now() - since)}`;
  const where = latest === null ? "BandSync" : latest.overview.serverId;
  const said = level === "good" ? "All is well" : text.replace(/\.$/, "");
  // A background tab may be stopped at any time: show the time of the last answer.
  const when = document.hidden ? ` (${axisTime(Date.now(), 60_000)})` : "";
  const title = `${said}${when} · ${where}`;
  const further = others.map((other) => `${other.text} ${other.meaning}`);
  // Show nothing until everything is known.
  at("state").dataset.level = level;
  at("mark").setAttribute("d", MARKS[level]);
  say(at("sentence"), text);
  say(at("meaning"), meaning);
  say(at("since"), lasts);
  const list = at("others");
  if (list.childElementCount !== further.length) {
    list.replaceChildren(...further.map(() => document.createElement("li")));
  }
  further.forEach((line, index) => say(list.children[index], line));
  if (document.title !== title) document.title = title;
}

function drawServer() {
  const { overview } = latest;
  say(at("serverId"), overview.serverId);
  say(at("version"), overview.version);
  say(at("uptime"), isAway() ? "–" : duration(overview.uptimeMs));
  say(at("time"), clockTime(now(), now()));
}

function drawStorage() {
  const away = isAway();
  const { storage } = latest.overview;
  const failed = storage.mode !== "memory (disabled)";
  say(at("mode"), away ? "–" : mode(storage));
  say(at("address"), storage.redisStatus.address ?? "not configured");
  say(at("link"), away ? "–" : link(storage));
  say(at("listening"), away || !failed ? "–" : storage.listening ? "connected" : "not connected");
  say(at("kept"), away ? "–" : counted(storage.keptInMemory, "session"));
  const happenings = past.happenings();
  const from = span === "recent" ? now() - past.spanMs(now()) : Math.min(now() - 60_000, firstEvent());
  timeline.draw(past.stretches(now()), happenings, from, now());
  const described = JSON.stringify(happenings);
  if (described === shownEvents) return;
  shownEvents = described;
  at("events").replaceChildren(...happenings.map(row));
  at("events").closest("table").hidden = !happenings.length;
  at("noEvents").hidden = happenings.length > 0;
  say(at("noEvents"), failed ? "Redis has not been in use yet." : "Redis is not used.");
}

function mode({ mode, migration }) {
  const name = modeName(mode).replace(/^./, (first) => first.toUpperCase());
  return migration ? `${name}: ${migration.moved} of ${migration.total}` : name;
}

function link(storage) {
  const { connected, connectionAttempts, outstanding } = storage.redisStatus;
  if (!connected) return connectionAttempts ? `none, attempt ${number(connectionAttempts)}` : "none";
  const roundTrip = storage.linkRoundTripMs === null ? "" : `${number(storage.linkRoundTripMs)} ms`;
  return [roundTrip, outstanding ? `${number(outstanding)} waiting` : ""].filter(Boolean).join(", ") || "open";
}

/** When the timeline of all events begins: a little before the first that is remembered. */
function firstEvent() {
  const first = past.boots[0].events.find((event) => event.kind !== "start") ?? past.boots[0].events[0];
  return first.at - (now() - first.at) * 0.05;
}

function row({ event, tookMs, lasts }) {
  const cells = {
    failover: () => ["Redis lost", event.inWords, event.detail, lasts ? "not back yet" : tookMs === null ? "–" : duration(tookMs)],
    recovery: () => [
      tookMs === null ? "Redis in use" : "Redis back",
      event.sessions ? `${counted(event.sessions, "session")} moved in ${duration(event.migrationMs)}` : "no session had to move",
      "",
      tookMs === null ? "–" : duration(tookMs),
    ],
    start: () => ["Server started", "it did not answer before", "", duration(Math.max(tookMs, 0))],
  };
  // Unknown kind, from a newer server.
  const other = () => [event.kind, event.inWords ?? "", event.detail ?? "", "–"];
  const [what, why, detail, took] = (cells[event.kind] ?? other)();
  const line = document.createElement("tr");
  line.className = event.kind;
  const time = document.createElement("td");
  time.textContent = clockTime(event.at, now());
  const kind = document.createElement("th");
  kind.scope = "row";
  kind.textContent = what;
  const reason = document.createElement("td");
  reason.textContent = why;
  if (detail) {
    const small = document.createElement("span");
    small.className = "quiet";
    small.textContent = ` ${detail}`;
    reason.append(small);
  }
  const length = document.createElement("td");
  length.textContent = took;
  line.append(time, kind, reason, length);
  return line;
}

function drawPast() {
  const to = now();
  const spanMs = past.spanMs(to);
  const from = to - spanMs;
  say(at("chartsTitle"), spanMs > 60_000 ? `The last ${number(spanMs / 60_000)} minutes` : "The last minute");
  const samples = past.samples.filter((each) => each.at >= from);
  const looked = looking === null ? null : nearest(samples, from + looking * (to - from));
  const stretches = past.stretches(to).filter((each) => each.to > from);
  const starts = past.boots.slice(1).map((boot) => boot.startedAt).filter((each) => each > from);
  const view = { samples, from, to, parted: past.parted.bind(past), looked, live: !isAway(), stretches, starts };
  for (const chart of charts) chart.draw(view);
  say(at("reading"), looked === null ? "" : `at ${clockTime(looked.at, to)}`);
}

function nearest(samples, instant) {
  const later = samples.findIndex((each) => each.at >= instant);
  const found = samples[later < 0 ? samples.length - 1 : later];
  return found !== undefined && Math.abs(found.at - instant) < 2 * PERIOD_MS ? found : null;
}

function look(event) {
  const drawing = event.target.closest?.(".chart .drawing");
  const box = drawing?.getBoundingClientRect();
  looking = box === undefined ? null : (event.clientX - box.left) / box.width;
  draw();
}

const measure = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const drawn = target === timeline.element ? timeline : charts.find((chart) => chart.drawing === target);
    drawn.width = contentRect.width;
  }
  draw();
});

at("timeline").append(timeline.element);
at("charts").append(...charts.map((chart) => chart.element));
for (const element of [timeline.element, ...charts.map((chart) => chart.drawing)]) measure.observe(element);
at("charts").addEventListener("pointermove", look);
at("charts").addEventListener("pointerleave", look);
at("spans").addEventListener("click", ({ target }) => {
  if (!target.dataset.span) return;
  span = target.dataset.span;
  for (const button of at("spans").children) button.setAttribute("aria-pressed", String(button === target));
  draw();
});
document.addEventListener("visibilitychange", () => {
  drawState();
  wake();
});
run();
