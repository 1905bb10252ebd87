/** The invitation: a link, also as a QR code. */

import { qrPath } from "./qr.js";

const $ = (id) => document.getElementById(id);
const HERE = new Set(["localhost", "127.0.0.1", "[::1]"]);

/** The link to a session on this server, without this member's secrets. */
export function linkTo(sessionId) {
  return `${location.origin}/#${sessionId}`;
}

/** Show the invitation to a session. */
export function invite(sessionId) {
  const url = linkTo(sessionId);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const code = qrPath(url);
  path.setAttribute("d", code.path);
  $("qr").setAttribute("viewBox", `0 0 ${code.size} ${code.size}`);
  $("qr").replaceChildren(path);
  $("link").href = url;
  $("link").textContent = url;
  $("localOnly").hidden = !HERE.has(location.hostname);
  $("copied").textContent = "";
  $("send").hidden = !("share" in navigator);
  $("send").onclick = () => navigator.share({ title: `BandSync: ${sessionId}`, url }).catch(() => {});
  $("copy").onclick = () => copy(url);
  $("close").onclick = () => $("invitation").close();
  $("invitation").showModal();
}

async function copy(url) {
  try {
    await navigator.clipboard.writeText(url);
    $("copied").textContent = "Copied.";
  } catch {
    // Without https there is no clipboard API: select the text instead.
    getSelection().selectAllChildren($("link"));
    $("copied").textContent = "Marked: copy it by hand.";
  }
}
