// A SessionClock in a simulated world: both clocks, the network and the passing of time are made up.

import { SessionClock } from "/sessionclock.js";

const EPOCH = 1_800_000_000_000;

/** Even numbers in [0, 1), the same for the same seed (mulberry32). */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), 1 | state);
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * Let time pass and watch the clock every 16 ms, as a page does.
 *
 * world: {seed, durationMs, skewPpm, up, down, late, happenings}, where `up` and `down` are the least
 * and most delay of the ways, which keep their order, `late` is the chance that a way takes 400 ms more,
 * and a happening is {at, step} (the session clock jumps), {at, sleep} (ours stands still for so long, and
 * is asked anew, as the client does) or {at, deaf} (nothing comes for so long).
 *
 * Returns what was seen: samples {at, errorMs (true), boundMs, stepMs (what now() advanced by)}.
 */
export function simulate(world) {
  const random = generator(world.seed);
  const rate = 1 + (world.skewPpm ?? 0) * 1e-6;
  let at = 0;
  let slept = 0;
  let stepped = 0;
  let deafUntil = 0;
  const local = () => (at - slept) * rate + 5000;
  const session = () => EPOCH + at + stepped;
  const clock = new SessionClock({ now: local, granularityMs: 0 });
  clock.guess(session() - world.down[0]);
  clock.restart();

  const happenings = [...(world.happenings ?? [])];
  const travelling = []; // {due, do}
  const lastDue = { up: 0, down: 0 };
  const travel = (way, then) => {
    const [least, most] = world[way];
    const delay = least + random() * (most - least) + (random() < (world.late ?? 0) ? 400 : 0);
    lastDue[way] = Math.max(lastDue[way], at + delay);
    travelling.push({ due: lastDue[way], then });
  };
  const exchange = () => {
    const t0 = local();
    travel("up", () => {
      const t1 = session();
      travel("down", () => at >= deafUntil && clock.add({ t0, t1, t2: t1, t3: local() }));
    });
  };

  const seen = [];
  let nextProbe = 0;
  let nextLook = 0;
  let before = NaN;
  while (at < world.durationMs) {
    travelling.sort((a, b) => a.due - b.due);
    const times = [nextProbe, nextLook, travelling[0]?.due, happenings[0]?.at];
    at = Math.max(at, Math.min(...times.filter((time) => time !== undefined)));
    if (happenings.length > 0 && happenings[0].at <= at) {
      const { step = 0, sleep = 0, deaf = 0 } = happenings.shift();
      stepped += step;
      at += sleep;
      slept += sleep;
      deafUntil = at + deaf;
      if (sleep > 0) clock.forget();
      nextProbe = nextLook = at;
      before = NaN;
    } else if (travelling[0]?.due <= at) {
      travelling.shift().then();
    } else if (nextProbe <= at) {
      exchange();
      nextProbe = at + clock.probeIntervalMs;
    } else {
      const told = clock.now();
      seen.push({
        at,
        errorMs: told - session(),
        boundMs: clock.errorMs,
        stepMs: Number.isNaN(before) ? null : told - before,
        probeIntervalMs: clock.probeIntervalMs,
      });
      before = told;
      nextLook = at + 16;
    }
  }
  return seen;
}

/** The seconds from the start on: the largest true error in each. */
export function worstBySecond(seen) {
  const worst = [];
  for (const { at, errorMs } of seen) {
    const second = Math.floor(at / 1000);
    worst[second] = Math.max(worst[second] ?? 0, Math.abs(errorMs));
  }
  return worst;
}

/** How often the true error was outside the bound; without a bound it cannot be. */
export function dishonest(seen, slackMs = 1e-6) {
  return seen.filter(({ errorMs, boundMs }) => boundMs !== null && Math.abs(errorMs) > boundMs + slackMs)
    .length;
}

/** How often now() ran backwards. */
export function backwards(seen) {
  return seen.filter(({ stepMs }) => stepMs !== null && stepMs < 0).length;
}

/** The most that now() advanced between two looks, 16 ms apart, after the first burst. */
export function fastest(seen) {
  return Math.max(...seen.filter(({ at }) => at > 3000).map(({ stepMs }) => stepMs ?? 0));
}
