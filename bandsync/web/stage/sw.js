// Service worker: the page opens even while the network is down, hangs, or breaks halfway.
//
// A page is loaded from one complete set of files, never from a mix. It is the network's set, so that
// an updated server never meets an old page. If that does not arrive in time, it is the latest cached
// set. A set is `/`, the files that it names, and the files that those import.
//
// No skipWaiting and no claim: open pages keep the worker that they started with.

const OURS = "bandsync-page";
// How long a page load waits for the network before it uses the cache.
const PATIENCE_MS = 3000;
// A refresh of the cache that takes longer is aborted.
const LIMIT_MS = 20_000;
// A document without this file is not ours, but for example a captive portal.
const HEART = "/stage.js";
const NAMED = /(?:href|src)="(\/[\w.-]+)"|(?:from|import) "\.(\/[\w.-]+)"/g;

/** The cache of each open page, by client id; the last few. */
const opened = new Map();
const MAX_OPENED = 50;

self.addEventListener("install", (event) => event.waitUntil(install()));

self.addEventListener("fetch", (event) => {
  const { request, clientId, resultingClientId } = event;
  const { pathname, origin } = new URL(request.url);
  if (request.method !== "GET" || origin !== self.location.origin) return;
  if (request.mode === "navigate") {
    if (pathname === "/" && resultingClientId) event.respondWith(open(event));
  } else if (opened.has(clientId)) {
    event.respondWith(file(pathname, opened.get(clientId)).then((kept) => kept ?? fetch(request)));
  }
});

async function install() {
  const kept = await refresh(new Request("/", { redirect: "manual" }));
  if (kept instanceof Response) throw new Error("The response is not the page.");
}

/** Answer a navigation, and select the set for the rest of the page. */
async function open(event) {
  const kept = await newest();
  if (kept === undefined) return fetch(event.request);
  // The refresh continues after the timeout, for the next page load.
  const coming = refresh(event.request).catch(() => kept);
  event.waitUntil(coming);
  const patience = new Promise((resolve) => { setTimeout(resolve, PATIENCE_MS, kept); });
  const found = await Promise.race([coming, patience]);
  if (found instanceof Response) return found;
  opened.set(event.resultingClientId, found);
  if (opened.size > MAX_OPENED) opened.delete(opened.keys().next().value);
  return (await file("/", found)) ?? fetch(event.request);
}

/** Cache the network's set and return its name; or the response, if it is not our page. */
async function refresh(request) {
  const signal = AbortSignal.timeout(LIMIT_MS);
  const answer = await fetch(request, { signal });
  if (answer.status >= 500) throw new Error(`status ${answer.status}`);
  if (!answer.ok || !(await answer.clone().text()).includes(HEART)) return answer;
  const { files, digest } = await look(answer, signal);
  const kept = await newest();
  if (kept?.includes(digest)) return kept;
  // Fetch twice: a mix of two versions, during an upgrade, does not repeat.
  const again = await look(await fetch("/", { signal }), signal);
  if (again.digest !== digest) throw new Error("The server is being replaced.");
  // Keep the previous set: a page may be loading from it.
  for (const old of await names()) if (old !== kept) await caches.delete(old);
  const name = `${OURS} ${digest} ${Date.now()}`;
  const cache = await caches.open(name);
  // `/` is stored last: a set that has it is complete.
  for (const path of [...files.keys()].reverse()) await cache.put(path, files.get(path).response);
  return name;
}

/** All files of the page, `/` first, and a digest of them. */
async function look(root, signal) {
  const files = new Map();
  const visit = async (path, coming) => {
    files.set(path, null);
    const response = await coming;
    if (!response.ok) throw new Error(`${path}: status ${response.status}`);
    const body = await response.clone().arrayBuffer();
    files.set(path, { response, body });
    const named = [...new TextDecoder().decode(body).matchAll(NAMED)].map((match) => match[1] ?? match[2]);
    const missing = [...new Set(named)].filter((each) => !files.has(each));
    await Promise.all(missing.map((each) => visit(each, fetch(each, { signal, cache: "no-cache" }))));
  };
  await visit("/", root);
  const parts = [...files.keys()].sort().flatMap((path) => [path, files.get(path).body]);
  const hash = await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer());
  return { files, digest: [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, "0")).join("") };
}

/** The caches of this worker, oldest first. */
async function names() {
  return (await caches.keys()).filter((name) => name.startsWith(OURS));
}

/** The name of the latest complete set; undefined if there is none. */
async function newest() {
  for (const name of (await names()).reverse()) {
    if ((await file("/", name)) !== undefined) return name;
  }
  return undefined;
}

/** A file of a set, ignoring the query; undefined if it is missing. */
function file(pathname, set) {
  return caches.match(pathname, { cacheName: set });
}
