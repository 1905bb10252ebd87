/** Messages of the page, in sentences for musicians. */

const LEFT = {
  left: "left",
  timeout: "did not come back",
  server_lost: "was lost with a server",
  replaced: "came back in another place",
  slow_consumer: "was on too slow a connection",
};
const LEADS = { claimed: "took the lead", handed_over: "was given the lead" };
// Replacements where the server's sentence is for programmers.
const PLAINLY = {
  leader_present: "Somebody leads: ask for the lead.",
  not_leader: "Only the leader may do this.",
  not_connected: "This waits until the connection is back.",
  connection_lost: "The connection was lost: your last change may not have arrived.",
  rate_limited: "That was too fast. Once more?",
  conflict: "Others were faster. Once more?",
};

// Characters that write right to left, or change the direction of what follows.
const TURNS = /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufefc]/;

/** A name within a sentence, isolated so that right-to-left names do not reorder it. */
export const named = (name) => (TURNS.test(name) ? `\u2068${name}\u2069` : name);

/** The tempo, rounded to audible precision. */
export const rounded = (bpm) => String(Math.round(bpm * 10) / 10);

/**
 * @param {{type: string}} event of the session
 * @param {(memberId: string) => string} nameOf
 * @param {string} mine the member id of this page
 * @returns {string} a sentence, or nothing where there is nothing to say
 */
export function news(event, nameOf, mine) {
  switch (event.type) {
    case "user_joined":
      return `${named(event.member.displayName)} joined.`;
    case "user_left":
      return `${nameOf(event.memberId)} ${LEFT[event.reason] ?? "left"}.`;
    case "member_connection":
      if (event.memberId === mine) return "";
      return `${nameOf(event.memberId)} ${event.connected ? "is back" : "lost the connection"}.`;
    case "role_changed": {
      const who = event.memberId === mine ? "You" : nameOf(event.memberId);
      if (event.role === "leader") {
        const were = event.memberId === mine && event.reason === "handed_over";
        return were ? "You were given the lead." : `${who} ${LEADS[event.reason] ?? "took over the lead"}.`;
      }
      return event.reason === "stepped_down" ? `${who} gave up the lead.` : "";
    }
    case "play":
      return `${nameOf(event.by)} started the song.`;
    case "pause":
      return `${nameOf(event.by)} paused the song.`;
    case "stop":
      return `${nameOf(event.by)} stopped the song.`;
    case "seek":
      return `${nameOf(event.by)} moved in the song.`;
    case "tempo_changed": {
      const { beatsPerBar } = event.transport.next ?? event.transport;
      const what = event.oldTempoBpm === event.newTempoBpm ? `beats/bar to ${beatsPerBar}` : `${rounded(event.newTempoBpm)} BPM`;
      return `${nameOf(event.by)} set ${what}.`;
    }
    case "leader_denied":
      return `${named(event.displayName)} keeps the lead for now.`;
    default:
      return "";
  }
}

/** @param {{code: string, message: string}} error of a command */
export const refusal = ({ code, message }) => PLAINLY[code] ?? message;

/**
 * The current problem and what it means for the musician; "" when all is well.
 *
 * @param {BandSync} band
 * @param {boolean} outage whether the server had lost its storage before we came
 * @param {number} attempts to connect that have failed
 */
export function trouble(band, outage, attempts) {
  switch (band.status) {
    case "connecting":
      return attempts > 0 ? "The server does not answer yet; trying again." : "";
    case "resuming":
      return "Connection lost, coming back by itself. The beat goes on from this device's own clock.";
    case "draining":
      return "The server is about to restart; this page comes back by itself.";
    case "online": {
      if (!(band.storage.degraded ?? outage)) return "";
      const servers = new Set([...band.session.members.values()].map(({ serverId }) => serverId));
      return servers.size > 1
        ? "The server lost its storage. Play on: nothing is lost, but members on other servers are out of reach until it is back."
        : "The server lost its storage and keeps the session itself for now. Play on: nothing is lost.";
    }
    default:
      return "";
  }
}

/** The state of the connection in one or two words. */
export function stateOf(band) {
  switch (band?.status) {
    case "online":
    case "draining":
      return "connected";
    case "resuming":
      return "reconnecting";
    case "connecting":
      return "connecting";
    default:
      return "not connected";
  }
}
