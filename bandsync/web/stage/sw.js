// The page opens even while the network is away, hangs, or is lost half way.
//
// A page is made of one whole set of files, never of two halves: of the network's, so that a server
// that was updated does not meet an old page, or, where that does not come in time, of the set that
// was kept last. What belongs to it is what `/` names, and what those files import.
//
// No skipWaiting and no claim: a new worker leaves open pages to the one that opened them.

const OURS = "bandsync-page";
// Long enough for a slow network, short enough for somebody on a stage.
const PATIENCE_MS = 3000;
// What takes longer is not waited for to be kept either.
const LIMIT_MS = 20_000;
// What does not name it is somebody else's page: a login before the server, for one.
const HEART = "/stage.js";
const NAMED = /(?:href|src)="(\/[\w.-]+)"|(?:from|import) "\.(\/[\w.-]+)"/g;

/** Of which set each page is made: the name of a cache by the id of the client; the last few. */
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
  if (kept instanceof Response) throw new Error("What answers is not the page.");
}

/** The answer to a navigation; decides what the rest of the page is made of. */
async function open(event) {
  const kept = await newest();
  if (kept === undefined) return fetch(event.request);
  // It goes on after our patience: what is too late for this page is in time for the next.
  const coming = refresh(event.request).catch(() => kept);
  event.waitUntil(coming);
  const patience = new Promise((resolve) => { setTimeout(resolve, PATIENCE_MS, kept); });
  const found = await Promise.race([coming, patience]);
  if (found instanceof Response) return found;
  opened.set(event.resultingClientId, found);
  if (opened.size > MAX_OPENED) opened.delete(opened.keys().next().value);
  return (await file("/", found)) ?? fetch(event.request);
}

/** Keeps what the network has now, and returns its name; or the answer, if that is no page of ours. */
async function refresh(request) {
  const signal = AbortSignal.timeout(LIMIT_MS);
  const answer = await fetch(request, { signal });
  if (answer.status >= 500) throw new Error(`status ${answer.status}`);
  if (!answer.ok || !(await answer.clone().text()).includes(HEART)) return answer;
  const { files, digest } = await look(answer, signal);
  const kept = await newest();
  if (kept?.includes(digest)) return kept;
  // Files of two versions, fetched while the server was replaced, are not the same once more.
  const again = await look(await fetch("/", { signal }), signal);
  if (again.digest !== digest) throw new Error("The server is being replaced.");
  // The last one stays: a page may just be made of it.
  for (const old of await names()) if (old !== kept) await caches.delete(old);
  const name = `${OURS} ${digest} ${Date.now()}`;
  const cache = await caches.open(name);
  // In this order, `/` is there last: a set that has it is whole.
  for (const path of [...files.keys()].reverse()) await cache.put(path, files.get(path).response);
  return name;
}

/** All files that the page is made of, `/` first, and a digest of them. */
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

/** Our caches, the oldest first. */
async function names() {
  return (await caches.keys()).filter((name) => name.startsWith(OURS));
}

/** The name of the last set that is whole; undefined if there is none. */
async function newest() {
  for (const name of (await names()).reverse()) {
    if ((await file("/", name)) !== undefined) return name;
  }
  return undefined;
}

/** A file of a set, whatever its query was; undefined if it is not there. */
function file(pathname, set) {
  return caches.match(pathname, { cacheName: set });
}
