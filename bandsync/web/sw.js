// The page opens even while the network is away: what it was made of last time is kept.
//
// The network always comes first, so that a server that was updated never meets an old page.

const KEPT = "bandsync-page";
const PAGE = [
  "/", "/manifest.webmanifest", "/icon.svg", "/theme.css", "/stage.css", "/stage.js", "/bandsync.js",
  "/bandsyncerror.js", "/beat.js", "/chat.js", "/click.js", "/conduct.js", "/device.js", "/link.js",
  "/members.js", "/qr.js", "/sessionclock.js", "/sessionstate.js", "/share.js", "/tap.js", "/words.js",
];
// Long enough for a slow network, short enough for somebody on a stage.
const PATIENCE_MS = 3000;

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(PAGE)));
  self.skipWaiting();
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  if (event.request.method !== "GET" || origin !== self.location.origin) return;
  if (PAGE.includes(pathname)) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(KEPT);
  try {
    const response = await fetch(request, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}
