// The demo page of BandSync: a small but complete client of protocol version 1.
//
// Whatever others wrote reaches the page through textContent only, never as markup.

const $ = (id) => document.getElementById(id);

// Two cheap quartz clocks drift apart by at most this: milliseconds per millisecond.
const DRIFT = 1e-4;
// The server keeps a lost member for 10 s, so silence must be noticed well before that.
const PROBE_MS = 2000;
const SILENCE_MS = 6000;

let wanted = null; // {session, name} while we are in a session or on the way into one
let socket = null;
let online = false; // joined, on a connection that works
let attempts = 0; // to connect, since the last join that succeeded
let retryTimer = 0;
let heardAt = 0;
let drainUntil = 0;
let server = {};

let band = null; // the session as the last snapshot and the events since tell it
let catchingUp = false; // a version was missing and the snapshot is under way
let stats = new Map(); // memberId → the member's entry in the last room_stats
const requests = new Map(); // memberId → name of who asks for the lead
const pending = new Map(); // requestId → what to do once it is acknowledged
let lastRequest = 0;

const me = () => band?.members.get(band.me);
const leader = () => [...(band?.members.values() ?? [])].find(({ role }) => role === "leader");
const nameOf = (id) => band.members.get(id)?.displayName ?? "Somebody";

function setText(element, text) {
  // Writing what is there already would still make a live region speak and the browser lay out.
  if (element.textContent !== text) element.textContent = text;
}
const say = (text) => setText($("news"), text);
function status(text, trouble = false) {
  setText($("status"), text);
  $("status").classList.toggle("trouble", trouble);
}

// Private windows may refuse storage; the page then only forgets more.
function recall(storage, key) {
  try { return JSON.parse(window[storage].getItem(`bandsync.${key}`)); } catch { return null; }
}
function remember(storage, key, value) {
  try { window[storage].setItem(`bandsync.${key}`, JSON.stringify(value)); } catch { /* see above */ }
}

// The session clock, as far as this device knows it. performance.now() never steps, Date.now() does.
const clock = {
  offset: 0,
  samples: [],
  now() { return performance.now() + this.offset; },
  error(sample) { return sample.roundTrip / 2 + (performance.now() - sample.at) * DRIFT; },
  best() {
    return this.samples.reduce((a, b) => (this.error(b) < this.error(a) ? b : a), this.samples[0]);
  },
  add({ t0, t1, t2 }) {
    const t3 = performance.now();
    const roundTrip = Math.max(0, t3 - t0 - (t2 - t1));
    this.samples.push({ offset: (t1 - t0 + (t2 - t3)) / 2, roundTrip, at: t3 });
    this.samples = this.samples.slice(-30);
    this.offset = this.best().offset;
  },
  // The smallest of several round trips bounds the error best. The old offset stays in use
  // until the first answer.
  restart() {
    this.samples = [];
    for (let i = 0; i < 8; i++) setTimeout(probe, i * 80);
  },
};
const probe = () => send("clock_sync", { t0: performance.now() });

// --- Connection ---

function send(type, fields = {}) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}
// What a person asked for: its refusal is shown, its loss is admitted.
function command(type, fields = {}, done = () => {}) {
  const requestId = String(++lastRequest);
  pending.set(requestId, done);
  send(type, { ...fields, requestId });
}

function connect() {
  clearTimeout(retryTimer);
  heardAt = performance.now();
  const url = `${location.protocol.replace("http", "ws")}//${location.host}/ws/${wanted.session}`;
  const mine = (socket = new WebSocket(url));
  // A socket that was given up may still speak: only the current one is listened to.
  mine.onmessage = ({ data }) => {
    if (mine !== socket) return;
    heardAt = performance.now();
    receive(JSON.parse(data));
  };
  mine.onclose = ({ code }) => { if (mine === socket) lost(code); };
}

function join() {
  const kept = recall("sessionStorage", "resume");
  send("join_session", {
    requestId: "join",
    sessionId: wanted.session,
    displayName: wanted.name || undefined,
    resumeToken: kept?.session === wanted.session ? kept.token : undefined,
    ticks: false, // the beat is computed here, nothing needs to be sent for it
  });
}

function lost(code) {
  socket?.close();
  socket = null;
  online = false;
  catchingUp = false;
  if (pending.size) say("Your last change may not have arrived.");
  pending.clear();
  if (code === 4001) return giveUp("You went on in another tab or window. Join to go on here.");
  if (code === 1008) return giveUp("The server refused this page.");
  // Random, so that a band that lost its server does not come back as one wave; slower when full.
  const base = 300 * 2 ** (attempts++ + (code === 1013 ? 3 : 0));
  const delay = Math.max(drainUntil - performance.now(), Math.min(8000, base) * (0.5 + Math.random() / 2));
  retryTimer = setTimeout(connect, delay);
  const keeps = band ? " The beat goes on from this device's own clock." : "";
  if (drainUntil > performance.now()) status(`The server restarts; reconnecting in a moment.${keeps}`, true);
  else status(`No connection; trying again.${keeps}`, true);
  render();
}

// Back to the form: only a person can decide what happens next.
function giveUp(reason) {
  clearTimeout(retryTimer);
  const old = socket;
  socket = null;
  old?.close();
  wanted = band = null;
  online = false;
  pending.clear();
  requests.clear();
  status(reason, true);
  render();
}

// A dead network does not close a socket for minutes, so silence counts as a loss.
setInterval(() => {
  if (!socket) return;
  if (performance.now() - heardAt > SILENCE_MS) return lost(1006);
  if (!online) return; // a connection that does not get as far as a session is silent, too
  probe();
  if (clock.samples.length) {
    const errorMs = clock.error(clock.best());
    send("sync_report", { errorMs });
    setText($("about"), `Server ${server.serverId}, storage ${server.storageType}, this clock within ±${errorMs.toFixed(1)} ms.`);
  }
}, PROBE_MS);

// A device that slept may have stopped its clock, and waited with its timers.
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState !== "visible" || !wanted) return;
  clock.restart();
  catchUp();
});
window.addEventListener("online", () => { if (wanted && !socket) connect(); });

// --- What the server says ---

function catchUp() {
  if (!online || catchingUp) return;
  catchingUp = true;
  send("sync_request", { version: band.version, epoch: band.epoch, requestId: "sync" });
}

function receive(message) {
  if (message.sessionId !== undefined && message.sessionId !== wanted?.session) return;
  if (message.type in committed) {
    // Older: the snapshot had it. Newer than the next: something is missing, a snapshot heals it.
    if (!band || message.version <= band.version) return;
    if (message.version > band.version + 1) return catchUp();
    band.version = message.version;
    committed[message.type](message);
  } else {
    direct[message.type]?.(message);
  }
  if (message.type !== "clock_sync") render();
}

function moved(news) {
  return (message) => {
    band.transport = message.transport;
    fillTempo();
    if (news) say(news(message));
  };
}
const LEFT = {
  left: "left", timeout: "did not come back", server_lost: "was lost with a server",
  replaced: "came back in another place", slow_consumer: "was on too slow a connection",
};
// Where the server's sentence speaks to programmers.
const PLAINLY = { leader_present: "Somebody leads; ask for the lead.", not_leader: "Only the leader may do this." };
const LEADS = { claimed: "took the lead", handed_over: "was given the lead" };

// Changes of the session: each has the next version.
const committed = {
  __proto__: null,
  user_joined({ member }) {
    band.members.set(member.memberId, member);
    say(`${member.displayName} joined.`);
  },
  user_left({ memberId, reason }) {
    say(`${nameOf(memberId)} ${LEFT[reason] ?? "left"}.`);
    band.members.delete(memberId);
    answered(memberId);
  },
  member_connection({ memberId, connected }) {
    const member = band.members.get(memberId);
    if (member) member.connected = connected;
    if (memberId !== band.me) say(`${nameOf(memberId)} ${connected ? "is back" : "lost the connection"}.`);
  },
  role_changed({ memberId, role, reason }) {
    const member = band.members.get(memberId);
    if (member) member.role = role;
    const who = memberId === band.me ? "You" : nameOf(memberId);
    if (role === "leader") say(`${who} ${LEADS[reason] ?? "took over the lead"}.`);
    else if (reason === "stepped_down") say(`${who} stepped down.`);
    if (me()?.role !== "leader") requests.clear();
    answered(memberId);
  },
  play: moved(({ by }) => `${nameOf(by)} started the song.`),
  pause: moved(({ by }) => `${nameOf(by)} paused the song.`),
  stop: moved(({ by }) => `${nameOf(by)} stopped the song.`),
  seek: moved(({ by }) => `${nameOf(by)} moved in the song.`),
  tempo_changed: moved(({ by, newTempoBpm }) => `${nameOf(by)} set ${round(newTempoBpm)} BPM.`),
  position_sync: moved(),
  message_updated({ message }) { band.message = message; },
  chat_message: showChat,
};

// Everything else: for this connection or this member, without a version of its own.
const direct = {
  __proto__: null,
  welcome(message) {
    if (message.protocol !== 1) return giveUp("The server speaks another version; reload this page.");
    server = message;
    // Right to within the way here, until clock_sync knows better. Another server, another clock.
    clock.offset = message.serverTime - performance.now();
    clock.restart();
    join();
  },
  snapshot(message) {
    const { you } = message;
    if (message.epoch !== band?.epoch) $("chat").replaceChildren();
    band = {
      epoch: message.epoch,
      version: message.version,
      message: message.message,
      transport: message.transport,
      members: new Map(message.members.map((member) => [member.memberId, member])),
      me: you?.memberId ?? band?.me,
    };
    catchingUp = false;
    message.chat.forEach(showChat);
    fillTempo();
    for (const id of requests.keys()) if (!band.members.has(id)) requests.delete(id);
    if (me()?.role !== "leader") requests.clear();
    showRequests();
    if (!you) return;
    remember("sessionStorage", "resume", { ...wanted, token: you.resumeToken });
    const away = attempts > 0 && !you.resumed;
    status(away ? "Connected again, as a new member: you were away too long." : "Connected.");
    online = true;
    attempts = drainUntil = 0;
  },
  sync_response(message) { // nothing was missed but time
    catchingUp = false;
    band.transport = message.transport;
  },
  drift_correction({ transport }) { band.transport = transport; },
  room_stats({ members }) { stats = new Map(members.map((entry) => [entry.memberId, entry])); },
  leader_requested({ memberId, displayName }) {
    requests.set(memberId, displayName);
    showRequests();
  },
  leader_denied({ displayName }) { say(`${displayName} keeps the lead for now.`); },
  clock_sync(message) { clock.add(message); },
  storage_status({ storageType, degraded }) {
    server.storageType = storageType;
    say(degraded ? "The server lost its storage and plays on from memory." : "The server has its storage back.");
  },
  server_draining({ reconnectInMs }) {
    drainUntil = performance.now() + reconnectInMs;
    status("The server is about to restart; this page comes back by itself.", true);
  },
  ack({ requestId }) {
    pending.get(requestId)?.();
    pending.delete(requestId);
  },
  error({ code, message, requestId }) {
    if (requestId === "join") {
      // The first group passes by itself; the rest needs another name, session or token.
      if (["rate_limited", "conflict", "internal"].includes(code)) return lost(1006);
      return giveUp(message);
    }
    if (requestId === "sync") setTimeout(() => { catchingUp = false; catchUp(); }, 1000);
    else if (pending.delete(requestId)) say(PLAINLY[code] ?? message);
    if (code === "not_joined" && wanted) join();
  },
  // Nobody here asks for these: scroll_tick (ticks: false), latency_response, heartbeat.
};

// --- The page between beats ---

const round = (bpm) => String(Math.round(bpm * 10) / 10);

function render() {
  $("join").hidden = wanted !== null;
  $("stage").hidden = band === null;
  if (!band) return;
  const first = leader();
  const leading = first !== undefined && first.memberId === band.me;
  setText($("headline"), band.message);
  $("conduct").disabled = !online || !leading;
  setText($("why"), !online ? "These wait until the connection is back."
    : leading ? "You lead: the band follows."
    : first ? `Only the leader can use these, and ${first.displayName} leads. You can ask for the lead.`
    : "Nobody leads. Take the lead to use these.");
  $("ask").hidden = $("claim").hidden = leading;
  $("stepDown").hidden = !leading;
  for (const id of ["ask", "claim", "stepDown", "say"]) $(id).disabled = !online;
  $("link").href = location.href;
  setText($("link"), location.href);
  showMembers(leading);
}

const rows = new Map(); // memberId → row; kept, so that the focus stays where it is
function showMembers(leading) {
  for (const [id, row] of rows) {
    if (band.members.has(id)) continue;
    row.remove();
    rows.delete(id);
  }
  for (const { memberId, displayName, role, connected } of band.members.values()) {
    if (!rows.has(memberId)) {
      const row = $("memberRow").content.firstElementChild.cloneNode(true);
      row.querySelector("button").onclick = () => command("set_role", { role: "leader", memberId });
      rows.set(memberId, row);
      $("members").append(row);
    }
    const row = rows.get(memberId);
    const { latencyMs, syncErrorMs, quality } = stats.get(memberId) ?? {};
    const details = [role, connected ? "connected" : "away"];
    if (connected && latencyMs != null) details.push(`${quality}, ${latencyMs.toFixed(0)} ms`);
    if (connected && syncErrorMs != null) details.push(`clock ±${syncErrorMs.toFixed(1)} ms`);
    row.classList.toggle("away", !connected);
    setText(row.querySelector(".name"), memberId === band.me ? `${displayName} (you)` : displayName);
    setText(row.querySelector(".detail"), details.join(" · "));
    const button = row.querySelector("button");
    button.hidden = !leading || memberId === band.me || !connected;
    button.disabled = !online;
    button.setAttribute("aria-label", `Hand over to ${displayName}`);
  }
}

function answered(memberId) {
  requests.delete(memberId);
  showRequests();
}
function showRequests() {
  const button = (text, act) => {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = text;
    element.onclick = act;
    return element;
  };
  $("requests").replaceChildren(...[...requests].map(([memberId, name]) => {
    const row = document.createElement("li");
    row.append(
      `${name} asks for the lead.`,
      button("Hand over", () => command("set_role", { role: "leader", memberId })),
      button("Not now", () => command("deny_leader", { memberId }, () => answered(memberId))),
    );
    return row;
  }));
}

function showChat({ messageId, displayName, text, sentAt }) {
  const chat = $("chat");
  // A snapshot repeats what is shown already.
  if ([...chat.children].some((row) => row.dataset.id === messageId)) return;
  const row = document.createElement("li");
  const name = document.createElement("span");
  row.dataset.id = messageId;
  row.title = new Date(sentAt).toLocaleTimeString();
  name.className = "name";
  name.textContent = displayName;
  row.append(name, ` ${text}`);
  chat.append(row);
  if (chat.childElementCount > 200) chat.firstElementChild.remove();
  chat.scrollTop = chat.scrollHeight;
}

// Shows the tempo that was set last, but never overwrites what somebody is typing.
function fillTempo() {
  const { tempoBpm, beatsPerBar } = band.transport.next ?? band.transport;
  if (document.activeElement !== $("bpm")) $("bpm").value = round(tempoBpm);
  if (document.activeElement !== $("bar")) $("bar").value = beatsPerBar;
}

// --- The page on the beat ---

const calm = matchMedia("(prefers-reduced-motion: reduce)");

function inForce({ next, ...now }, t) {
  return next && t >= next.anchorTime ? next : now;
}

function frame() {
  requestAnimationFrame(frame);
  if (!band) return;
  const t = clock.now();
  const { next } = band.transport;
  const segment = inForce(band.transport, t);
  const { tempoBpm, beatsPerBar, isPlaying } = segment;
  const elapsed = isPlaying ? Math.max(0, t - segment.anchorTime) : 0;
  const countIn = !isPlaying && next?.isPlaying === true;
  // During the count-in the beats run up to the start: they are the song's, before it.
  const beats = countIn
    ? next.beat - ((next.anchorTime - t) * next.tempoBpm) / 60000
    : segment.beat + (elapsed * tempoBpm) / 60000;
  const beat = Math.floor(beats + 1e-6);
  const inBar = ((beat % beatsPerBar) + beatsPerBar) % beatsPerBar;

  setText($("count"), countIn ? `−${Math.ceil(next.beat - beats)}` : `${Math.floor(beat / beatsPerBar) + 1}:${inBar + 1}`);
  setText($("state"), countIn ? "count-in" : isPlaying ? "playing" : segment.positionMs > 0 ? "paused" : "stopped");
  const seconds = (segment.positionMs + elapsed) / 1000;
  setText($("position"), `${Math.floor(seconds / 60)}:${(Math.floor((seconds % 60) * 10) / 10).toFixed(1).padStart(4, "0")}`);
  setText($("tempo"), `${round(tempoBpm)} BPM`);

  const dots = $("dots");
  if (dots.childElementCount !== beatsPerBar) {
    dots.replaceChildren(...Array.from({ length: beatsPerBar }, () => document.createElement("i")));
  }
  const running = isPlaying || countIn;
  [...dots.children].forEach((dot, i) => dot.classList.toggle("on", running && i === inBar));

  // More than three flashes a second can trigger seizures (WCAG 2.3.1): fast songs flash per bar.
  const unit = tempoBpm <= 180 ? 1 : Math.max(2, beatsPerBar);
  const phase = (((beats / unit) % 1) + 1) % 1;
  const glow = calm.matches ? 0.5 : Math.max(0, 1 - (phase * unit) / 0.6) ** 2;
  $("flash").style.opacity = running ? glow.toFixed(2) : "0";
  $("flash").classList.toggle("downbeat", inBar === 0);
}

// --- What people do ---

function sessionInLink() {
  const id = location.hash.slice(1);
  return /^[A-Za-z0-9._-]{1,64}$/.test(id) ? id : "";
}

function start(session, name) {
  wanted = { session, name };
  remember("localStorage", "name", name);
  if (sessionInLink() !== session) history.replaceState(null, "", `#${session}`);
  attempts = 0;
  status("Connecting.");
  render();
  connect();
}
function leave(reason) {
  send("leave_session");
  remember("sessionStorage", "resume", null);
  giveUp(reason);
  status(reason);
}

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}
const onClick = (id, act) => $(id).addEventListener("click", act);

onSubmit("join", () => start($("session").value, $("name").value.trim()));
onClick("leave", () => leave("You left."));
onClick("play", () => {
  const { beatsPerBar } = inForce(band.transport, clock.now());
  command("play", { countInBeats: Number($("countIn").value) * beatsPerBar });
});
onClick("pause", () => command("pause"));
onClick("stop", () => command("stop"));
onSubmit("tempoForm", () => command("set_tempo", {
  tempoBpm: $("bpm").valueAsNumber, beatsPerBar: $("bar").valueAsNumber, at: $("at").value,
}));
onSubmit("seekForm", () => {
  const [seconds, minutes = 0] = $("target").value.split(":").map(Number).reverse();
  command("seek", { positionMs: (minutes * 60 + seconds) * 1000, at: $("at").value });
});
onSubmit("messageForm", () => command("update_message", { message: $("message").value }));
onSubmit("chatForm", () => {
  const text = $("text").value;
  // Kept until the server has it, and if more was typed meanwhile.
  command("chat_message", { text }, () => { if ($("text").value === text) $("text").value = ""; });
});
onClick("ask", () => command("request_leader", {}, () => { if (me()?.role !== "leader") say("You asked for the lead."); }));
onClick("claim", () => command("set_role", { role: "leader" }));
onClick("stepDown", () => command("set_role", { role: "follower" }));

let taps = [];
onClick("tap", ({ timeStamp }) => {
  if (timeStamp - taps.at(-1) > 3000) taps = []; // slower than 20 BPM: a new start
  taps = [...taps, timeStamp].slice(-6);
  if (taps.length < 2) return;
  const bpm = (60000 * (taps.length - 1)) / (timeStamp - taps[0]);
  if (bpm >= 20 && bpm <= 300) command("set_tempo", { tempoBpm: Math.round(bpm * 10) / 10 });
});

window.addEventListener("hashchange", () => {
  const session = sessionInLink();
  if (session === wanted?.session) return;
  if (wanted) leave("You left for another session.");
  $("session").value = session;
});

const random = crypto.getRandomValues(new Uint8Array(6));
$("name").value = recall("localStorage", "name") ?? "";
$("session").value = sessionInLink() || `band-${[...random].map((byte) => (byte % 36).toString(36)).join("")}`;
requestAnimationFrame(frame);

// A reload comes back as the same member.
const kept = recall("sessionStorage", "resume");
if (kept && kept.session === sessionInLink()) start(kept.session, kept.name);
