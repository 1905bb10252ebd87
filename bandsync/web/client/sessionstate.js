/**
 * The state of a session, and how messages change it: pure functions without a clock.
 *
 * A transport is an anchor, not a sample: the position at any instant follows from it, so nothing has
 * to be sent while the song plays. Instants are milliseconds since the Unix epoch on
 * the session clock.
 *
 * @module
 */

/**
 * A part of the song from an instant on, playing at one tempo or stopped.
 *
 * @typedef {object} Segment
 * @property {boolean} isPlaying
 * @property {number} positionMs at `anchorTime`, milliseconds from the start of the song
 * @property {number} anchorTime the instant of position and beat
 * @property {number} tempoBpm quarter notes per minute
 * @property {number} beat at `anchorTime`, beats from the start of the song
 * @property {number} beatsPerBar
 */

/**
 * The segment in force, and the one scheduled change, if there is one.
 *
 * @typedef {Segment & {next: Segment | null}} Transport
 */

/**
 * @typedef {object} Member
 * @property {string} memberId stays the same across reconnections
 * @property {string} displayName
 * @property {"leader" | "follower"} role
 * @property {number} joinedAt
 * @property {boolean} connected false during the grace after a lost connection
 * @property {string} serverId
 */

/**
 * @typedef {object} ChatMessage
 * @property {string} messageId
 * @property {string} memberId
 * @property {string} displayName of the sender, who may have left
 * @property {string} text
 * @property {number} sentAt
 */

/**
 * A session at one version. Immutable: each event creates a new object.
 *
 * @typedef {object} Session
 * @property {string} sessionId
 * @property {string} epoch id of this life of the session; versions compare within one epoch
 * @property {number} version
 * @property {string} message the headline
 * @property {Transport} transport
 * @property {number | null} countInFrom the instant at which the count-in of the scheduled start begins;
 *   null without a count-in, and while it is unknown
 * @property {string | null} leaderId
 * @property {ReadonlyMap<string, Member>} members by id, in the order in which they joined
 * @property {readonly ChatMessage[]} chat the last 50, oldest first
 * @property {{maxMembers: number}} settings
 * @property {number} createdAt
 */

/** The position stops here (milliseconds); the beat goes on. */
export const MAX_POSITION_MS = 86_400_000;
/** Chat messages that a session keeps. */
export const MAX_CHAT = 50;

/**
 * The segment in force at an instant.
 *
 * @param {Transport} transport
 * @param {number} t
 * @returns {Segment}
 */
export function segmentAt(transport, t) {
  const { next } = transport;
  return next && t >= next.anchorTime ? next : transport;
}

/**
 * Milliseconds from the start of the song at an instant.
 *
 * @param {Transport} transport
 * @param {number} t
 * @returns {number}
 */
export function positionAt(transport, t) {
  const { isPlaying, positionMs, anchorTime } = segmentAt(transport, t);
  return isPlaying ? Math.min(positionMs + (t - anchorTime), MAX_POSITION_MS) : positionMs;
}

/**
 * Beats from the start of the song at an instant: 0.0 is the first downbeat.
 *
 * @param {Transport} transport
 * @param {number} t
 * @returns {number}
 */
export function beatAt(transport, t) {
  const { isPlaying, beat, anchorTime, tempoBpm } = segmentAt(transport, t);
  return isPlaying ? beat + ((t - anchorTime) * tempoBpm) / 60_000 : beat;
}

/**
 * The instant at which a beat is reached.
 *
 * @param {Transport} transport
 * @param {number} beat beats from the start of the song, whole or not
 * @param {number} after no earlier than this instant
 * @returns {number | null} the first such instant; null if none is scheduled
 */
export function instantOfBeat(transport, beat, after) {
  const { next } = transport;
  const now = whenReached(transport, beat, after);
  if (now !== null && !(next && now >= next.anchorTime)) return now;
  return next ? whenReached(next, beat, Math.max(after, next.anchorTime)) : null;
}

function whenReached({ isPlaying, beat, anchorTime, tempoBpm }, wanted, after) {
  if (!isPlaying) return null;
  const instant = anchorTime + ((wanted - beat) * 60_000) / tempoBpm;
  return instant >= after ? instant : null;
}

/**
 * The session of a `snapshot` message.
 *
 * @param {object} message
 * @param {Session | null} [before] the previous state: a snapshot has no count-in
 * @returns {Session}
 */
export function fromSnapshot(message, before = null) {
  const { sessionId, epoch, version, transport, leaderId, settings, createdAt } = message;
  const start = transport.next?.anchorTime;
  const sameStart = start !== undefined && start === before?.transport.next?.anchorTime;
  return {
    countInFrom: sameStart ? before.countInFrom : null,
    sessionId,
    epoch,
    version,
    message: message.message,
    transport,
    leaderId,
    members: new Map(message.members.map((member) => [member.memberId, member])),
    chat: message.chat.slice(-MAX_CHAT),
    settings,
    createdAt,
  };
}

/**
 * Whether a message is a committed change, with a version of its own.
 *
 * @param {{type: string}} message
 * @returns {boolean}
 */
export function isCommitted(message) {
  return Object.hasOwn(CHANGES, message.type);
}

/**
 * The session after a committed change, which must be the next one.
 *
 * @param {Session} session
 * @param {object} message
 * @returns {Session}
 */
export function afterChange(session, message) {
  return { ...session, ...CHANGES[message.type](session, message), version: message.version };
}

const moved = ({ countInFrom }, { transport }) => ({
  transport,
  countInFrom: !transport.isPlaying && transport.next?.isPlaying ? countInFrom : null,
});

const CHANGES = {
  play(_session, { transport, countInBeats = 0 }) {
    const { next } = transport;
    const counted = countInBeats > 0 && next !== null;
    return {
      transport,
      countInFrom: counted ? next.anchorTime - (countInBeats * 60_000) / next.tempoBpm : null,
    };
  },
  pause: moved,
  stop: moved,
  seek: moved,
  tempo_changed: moved,
  position_sync: moved,
  user_joined: ({ members, leaderId }, { member }) => ({
    members: new Map(members).set(member.memberId, member),
    leaderId: member.role === "leader" ? member.memberId : leaderId,
  }),
  user_left({ members, leaderId }, { memberId }) {
    const rest = new Map(members);
    rest.delete(memberId);
    return { members: rest, leaderId: leaderId === memberId ? null : leaderId };
  },
  member_connection: ({ members }, { memberId, connected }) => ({
    members: withMember(members, memberId, { connected }),
  }),
  role_changed({ members, leaderId }, { memberId, role }) {
    const leads = role === "leader";
    const others = leaderId === memberId ? null : leaderId;
    return {
      members: withMember(members, memberId, { role }),
      leaderId: leads ? memberId : others,
    };
  },
  message_updated: (_session, { message }) => ({ message }),
  chat_message({ chat }, { messageId, memberId, displayName, text, sentAt }) {
    const entry = { messageId, memberId, displayName, text, sentAt };
    return { chat: [...chat, entry].slice(-MAX_CHAT) };
  },
};

function withMember(members, memberId, changes) {
  const member = members.get(memberId);
  return member ? new Map(members).set(memberId, { ...member, ...changes }) : members;
}
