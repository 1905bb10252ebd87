/** The list of members: roles, connection quality and clock errors. */

const $ = (id) => document.getElementById(id);

export class Members {
  #rows = new Map(); // memberId → row; reused, so that the focus stays
  #list = $("members");
  #handOver;

  /** @param {(memberId: string) => void} handOver asked for by the leader. */
  constructor(handOver) {
    this.#handOver = handOver;
  }

  /** @param {BandSync} band joined */
  show(band) {
    const { members } = band.session;
    for (const [id, row] of this.#rows) {
      if (members.has(id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
    for (const member of members.values()) this.#show(this.#row(member), member, band);
    $("bandTitle").textContent = `Band (${members.size})`;
    $("together").textContent = together(band);
  }

  #row({ memberId }) {
    let row = this.#rows.get(memberId);
    if (row === undefined) {
      row = $("memberRow").content.firstElementChild.cloneNode(true);
      row.querySelector("button").onclick = () => this.#handOver(memberId);
      this.#rows.set(memberId, row);
      this.#list.append(row);
    }
    return row;
  }

  #show(row, { memberId, displayName, connected }, band) {
    const mine = memberId === band.memberId;
    const stats = band.stats.get(memberId);
    const part = (selector) => row.querySelector(selector);
    row.classList.toggle("away", !connected);
    part(".quality").dataset.quality = connected ? (stats?.quality ?? "unknown") : "unknown";
    part(".name").textContent = mine ? `${displayName} (you)` : displayName;
    part(".badge").hidden = memberId !== band.session.leaderId;
    part(".detail").textContent = details(connected, stats);
    const button = part("button");
    button.hidden = !band.isLeader || mine || !connected;
    button.disabled = band.status !== "online";
    button.setAttribute("aria-label", `Hand over the lead to ${displayName}`);
  }
}

function details(connected, stats) {
  if (!connected) return "away; the place is kept for a moment";
  const words = [];
  if (stats?.latencyMs != null) words.push(`${stats.quality}, ${stats.latencyMs.toFixed(0)} ms`);
  if (stats?.syncErrorMs != null) words.push(`beat ±${stats.syncErrorMs.toFixed(1)} ms`);
  return words.join(" · ") || "connected";
}

/** The largest clock error bound among the connected members. */
function together(band) {
  const connected = [...band.session.members.values()].filter((member) => member.connected);
  const bounds = connected.map(({ memberId }) => band.stats.get(memberId)?.syncErrorMs);
  const known = bounds.filter((bound) => bound != null);
  if (connected.length < 2 || known.length < connected.length) return "";
  return `all within ±${Math.max(...known).toFixed(1)} ms`;
}
