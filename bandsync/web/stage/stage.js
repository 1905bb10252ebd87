/**
 * The stage: wires the parts of the page together. The session itself is in bandsync.js.
 *
 * Text from other members is set through textContent only, never as markup.
 */

import { BandSync } from "./bandsync.js";
import { BeatLight } from "./beat.js";
import { Chat } from "./chat.js";
import { Click } from "./click.js";
import { Conductor } from "./conduct.js";
import { Preferences, WakeLock, keepPage, savedMember, showTheme } from "./device.js";
import { Members } from "./members.js";
import { invite } from "./share.js";
import { named, news, refusal, stateOf, trouble } from "./words.js";

const $ = (id) => document.getElementById(id);
const NEWS = [
  "user_joined", "user_left", "member_connection", "role_changed", "play", "pause", "stop", "seek",
  "tempo_changed", "leader_denied",
];
const WORDS = [
  ["amber", "blue", "bright", "calm", "golden", "green", "loud", "quick", "silver", "warm"],
  ["bass", "cello", "drum", "flute", "guitar", "harp", "horn", "organ", "piano", "viola"],
];

const preferences = new Preferences();
const requests = new Map(); // memberId → name, for requests of the lead
const names = new Map(); // memberId → displayName, of recent members too
let band = null; // null outside of a session
let pass = "";
let outage = false; // the server had lost its storage before the join
let attempts = 0; // failed attempts to connect
let transport = null; // transport of the scheduled clicks
let headline = ""; // content of its field

const setText = (element, text) => {
  // An unchanged live region must not be written: it would be read again.
  if (element.textContent !== text) element.textContent = text;
};
const say = (text) => text && setText($("news"), text);
const nameOf = (memberId) => named(names.get(memberId) ?? "Somebody");

/** Show why a command was refused. Success is visible by itself. */
async function run(command) {
  try {
    await command;
    return true;
  } catch (error) {
    say(refusal(error));
    return false;
  }
}

// --- Join and leave ---

/** Parse `#session` or `#session&pass=TOKEN`. */
function fromLink() {
  const [sessionId, ...rest] = location.hash.slice(1).split("&");
  const given = new URLSearchParams(rest.join("&")).get("pass") ?? "";
  return { sessionId: /^[A-Za-z0-9._-]{1,64}$/.test(sessionId) ? sessionId : "", given };
}

/** A session name that is easy to say. */
function freshSession() {
  const drawn = crypto.getRandomValues(new Uint32Array(3));
  return `${WORDS[0][drawn[0] % 10]}-${WORDS[1][drawn[1] % 10]}-${10 + (drawn[2] % 90)}`;
}

async function enter(sessionId, displayName, resumeToken) {
  $("problem").hidden = true;
  const mine = (band = new BandSync({
    sessionId,
    displayName: displayName || undefined,
    token: pass || undefined,
    resumeToken,
  }));
  const keep = () =>
    savedMember.set({ sessionId, displayName, pass, resumeToken: mine.resumeToken });
  listen(mine, keep);
  // The link is shared: remove this member's token.
  if (location.hash !== `#${sessionId}`) history.replaceState(null, "", `#${sessionId}`);
  render();
  try {
    await mine.join();
  } catch (error) {
    if (band === mine) leave(error);
  }
}

function listen(mine, keep) {
  const on = (type, act) =>
    mine.addEventListener(type, ({ detail }) => { if (band === mine) act(detail); });
  let joined = false;
  on("joined", ({ resumed, snapshot }) => {
    keep();
    names.clear();
    snapshot.members.forEach(({ memberId, displayName }) => names.set(memberId, displayName));
    if (joined && !resumed) say("Connected again, as a new member: you were away too long.");
    joined = true;
    preferences.set("session", mine.sessionId);
    askForOutage(mine);
  });
  on("user_joined", ({ member }) => names.set(member.memberId, member.displayName));
  for (const type of NEWS) on(type, (event) => say(news(event, nameOf, mine.memberId)));
  on("leader_requested", ({ memberId, displayName }) => {
    requests.set(memberId, displayName);
    showRequests();
  });
  on("status", (status) => {
    attempts = status.attempts;
    if (mine.status === "closed") leave(mine.closeReason);
    else render();
  });
  on("change", () => {
    if (transport !== mine.session?.transport) click.replan();
    transport = mine.session?.transport;
    render();
  });
}

/** Query the storage status: `storage_status` is sent only when it changes. */
async function askForOutage(mine) {
  try {
    const { degraded, lastFailover } = await (await fetch("/api/storage/status")).json();
    outage = degraded && lastFailover !== null;
  } catch {
    outage = false;
  }
  if (band === mine) render();
}

/** Return to the form: only a person can decide how to continue. */
function leave(error = null) {
  const old = band;
  band = null;
  old?.close();
  savedMember.set(null);
  reset();
  if (error !== null) {
    setText($("problem"), explained(error));
    $("problem").hidden = false;
    $("passLabel").hidden = error.code !== "unauthorized";
  }
  render();
  $(error?.code === "unauthorized" ? "pass" : "name").focus();
}

/** Clear everything of the previous session. */
function reset() {
  requests.clear();
  names.clear();
  showRequests();
  outage = false;
  attempts = 0;
  transport = null;
  headline = $("message").value = $("text").value = "";
  setText($("news"), "");
  $("chatNews").hidden = true;
  $("invitation").close();
  showView("play");
  click.stop();
}

function explained({ code, message }) {
  if (code === "superseded") return "You went on in another tab or window. Join to go on here.";
  if (code === "session_full") return "This session is full: somebody has to leave first.";
  if (code === "unauthorized") return `This session needs a pass, from the person who invited you. (${message})`;
  return message;
}

// --- Rendering ---

function render() {
  const joined = band !== null && band.session !== null;
  $("join").hidden = band !== null;
  for (const id of ["stage", "views", "invite", "click", "pulse"]) $(id).hidden = !joined;
  $("cancel").hidden = band === null || joined;
  setText($("title"), band === null ? "BandSync" : band.sessionId);
  document.title = band === null ? "BandSync" : `${band.sessionId} – BandSync`;
  setText($("status"), stateOf(band));
  setText($("banner"), band === null ? "" : trouble(band, outage, attempts));
  wakeLock.wanted = joined;
  if (!joined) return;
  const { session } = band;
  setText($("headline"), session.message);
  if (session.message !== headline) headline = $("message").value = session.message;
  conductor.show();
  members.show(band);
  if (chat.show(session.chat) && $("stage").dataset.view !== "chat") $("chatNews").hidden = false;
  $("message").disabled = $("show").disabled = !band.isLeader || band.status !== "online";
  $("say").disabled = $("take").disabled = band.status !== "online";
  $("take").hidden = band.isLeader;
  $("stepDown").hidden = !band.isLeader || session.members.size < 2;
  for (const id of requests.keys()) {
    if (!session.members.has(id) || session.leaderId === id || !band.isLeader) requests.delete(id);
  }
  showRequests();
  setText($("about"), about());
}

function about() {
  const { clock, server, storage } = band;
  const bound = clock.errorMs === null ? "not known yet" : `within ±${clock.errorMs.toFixed(1)} ms`;
  return `Clock ${bound} of the session's. Server ${server?.serverId ?? "–"}, storage ${storage?.storageType ?? "–"}.`;
}

function showRequests() {
  const rows = $("requests");
  const shown = [...rows.children].map((row) => row.dataset.id).join();
  if (shown === [...requests.keys()].join()) return; // keeps the focus
  rows.replaceChildren(...[...requests].map(([memberId, name]) => {
    const row = document.createElement("p");
    row.dataset.id = memberId;
    row.append(
      `${named(name)} asks for the lead.`,
      requestButton("Hand over", () => run(band.handOver(memberId))),
      requestButton("Not now", async () => {
        if (!(await run(band.denyLeader(memberId)))) return;
        requests.delete(memberId);
        showRequests();
      }),
    );
    return row;
  }));
  $("bandNews").hidden = requests.size === 0;
}

function requestButton(text, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", act);
  return button;
}

function showClick() {
  $("click").setAttribute("aria-pressed", String(click.on));
  const whenOn = click.silent ? "Touch to hear" : "Click on";
  setText($("click"), click.on ? whenOn : "Click off");
}

function showTrims() {
  for (const name of ["clickTrim", "lightTrim"]) {
    const ms = preferences.get(name);
    $(name).value = ms;
    setText($(`${name}Text`), ms === 0 ? "not at all" : `${Math.abs(ms)} ms ${ms > 0 ? "earlier" : "later"}`);
  }
}

// --- Parts ---

const playing = (trim) => () => {
  if (!band?.session) return null;
  const { clock, session } = band;
  return {
    transport: session.transport,
    countInFrom: session.countInFrom,
    heldMs: conductor.heldMs,
    now: clock.now(),
    toLocal: (t) => clock.toLocal(t),
    trimMs: preferences.get(trim),
  };
};
const lightParts = ["light", "ring", "flash", "pulse", "beatNumber", "barNumber", "position", "state", "tempo"];
new BeatLight(Object.fromEntries(lightParts.map((id) => [id, $(id)])), playing("lightTrim"));
const click = new Click(playing("clickTrim"), showClick);
const conductor = new Conductor(() => (band?.session ? band : null), run, () =>
  Math.max(0, preferences.get("lightTrim"), click.on ? click.latencyMs + preferences.get("clickTrim") : 0));
const members = new Members((memberId) => run(band.handOver(memberId)));
const chat = new Chat();
const wakeLock = new WakeLock((text) => setText($("awake"), text));

// --- Controls ---

const onClick = (id, act) => $(id).addEventListener("click", act);
const onSubmit = (id, act) =>
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });

onSubmit("join", () => {
  const name = $("name").value.trim();
  preferences.set("name", name);
  pass = $("pass").value.trim();
  enter($("session").value, name);
});
for (const id of ["leave", "cancel"]) {
  onClick(id, () => {
    band.leave().catch(() => {}); // If this fails, the member leaves after its grace.
    leave();
  });
}
onClick("invite", () => invite(band.sessionId));
onClick("ask", async () => { if (await run(band.requestLeader())) say("You asked for the lead."); });
for (const id of ["claim", "take"]) onClick(id, () => run(band.takeLead()));
onClick("stepDown", () => run(band.stepDown()));
onSubmit("messageForm", () => run(band.updateMessage($("message").value)));
onSubmit("chatForm", async () => {
  const text = $("text").value;
  // Cleared only after the ack, unless more was typed meanwhile.
  if (await run(band.chat(text)) && $("text").value === text) $("text").value = "";
});
onClick("click", () => {
  // This touch resumes suspended audio.
  if (click.on && $("click").textContent === "Click on") click.stop();
  else click.start(preferences.get("volume"));
});
$("volume").addEventListener("input", () => {
  preferences.set("volume", $("volume").valueAsNumber);
  click.volume = $("volume").valueAsNumber;
});
for (const name of ["clickTrim", "lightTrim"]) {
  $(name).addEventListener("input", () => {
    preferences.set(name, $(name).valueAsNumber);
    showTrims();
    click.replan();
  });
}
$("theme").addEventListener("change", () => {
  preferences.set("theme", $("theme").value);
  showTheme($("theme").value);
});
for (const button of $("views").querySelectorAll("button")) {
  button.addEventListener("click", () => {
    showView(button.dataset.view);
    scrollTo(0, 0);
  });
}
function showView(view) {
  $("stage").dataset.view = view;
  for (const button of $("views").children) {
    if (button.dataset.view === view) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  if (view === "chat") $("chatNews").hidden = true;
}
setInterval(() => { if (band?.session) setText($("about"), about()); }, 1000);

addEventListener("hashchange", () => {
  const { sessionId, given } = fromLink();
  if (band !== null) {
    // Ignore a changed hash while in a session.
    if (sessionId !== band.sessionId) say(`To go to ${sessionId || "another session"}, leave this one first.`);
    history.replaceState(null, "", `#${band.sessionId}`);
    return;
  }
  if (sessionId) $("session").value = sessionId;
  pass = $("pass").value = given;
});

// --- Start ---

const { sessionId, given } = fromLink();
const kept = savedMember.get();
pass = $("pass").value = given;
$("name").value = preferences.get("name");
$("session").value = sessionId || kept?.sessionId || preferences.get("session") || freshSession();
$("volume").value = preferences.get("volume");
$("theme").value = preferences.get("theme");
showTheme(preferences.get("theme"));
showTrims();
showClick();
keepPage();
if (kept !== null && kept.sessionId === (sessionId || kept.sessionId)) {
  // A reload resumes the same member.
  pass = given || kept.pass;
  enter(kept.sessionId, kept.displayName, kept.resumeToken);
} else if (preferences.get("name")) {
  $("join").querySelector("button").focus();
}
