/**
 * QR codes (ISO/IEC 18004), the subset that a link needs: bytes, error correction level M,
 * versions 1 to 10 (213 bytes).
 */

// Level M, by version: error correction codewords per block, and data codewords of each block.
const BLOCKS = [
  null,
  [10, [16]],
  [16, [28]],
  [26, [44]],
  [18, [32, 32]],
  [24, [43, 43]],
  [16, [27, 27, 27, 27]],
  [18, [31, 31, 31, 31]],
  [22, [38, 38, 39, 39]],
  [22, [36, 36, 36, 37, 37]],
  [26, [43, 43, 43, 43, 44]],
];
const ALIGNMENT = [
  null, [], [6, 18], [6, 22], [6, 26], [6, 30], [6, 34], [6, 22, 38], [6, 24, 42], [6, 26, 46],
  [6, 28, 50],
];
const MASKS = [
  (x, y) => (x + y) % 2 === 0,
  (x, y) => y % 2 === 0,
  (x) => x % 3 === 0,
  (x, y) => (x + y) % 3 === 0,
  (x, y) => (Math.floor(y / 2) + Math.floor(x / 3)) % 2 === 0,
  (x, y) => ((x * y) % 2) + ((x * y) % 3) === 0,
  (x, y) => (((x * y) % 2) + ((x * y) % 3)) % 2 === 0,
  (x, y) => (((x + y) % 2) + ((x * y) % 3)) % 2 === 0,
];

/**
 * @param {string} text
 * @returns {boolean[][]} rows of modules, true is dark; without the quiet zone of four.
 * @throws {RangeError} the text is longer than 213 bytes of UTF-8.
 */
export function qrCode(text) {
  const bytes = new TextEncoder().encode(text);
  const version = BLOCKS.findIndex((_, v) => v > 0 && bytes.length + overhead(v) <= room(v));
  if (version < 0) throw new RangeError(`${bytes.length} bytes are too long for a QR code here`);
  const grid = new Grid(version);
  grid.fill(interleaved(bytes, version));
  return grid.masked();
}

/**
 * @param {string} text
 * @returns {{size: number, path: string}} for an SVG: the width of the view box, quiet zone
 *   included, and the path that is dark.
 */
export function qrPath(text) {
  const rows = qrCode(text);
  const quiet = 4;
  const path = rows
    .flatMap((row, y) => row.map((dark, x) => (dark ? `M${x + quiet} ${y + quiet}h1v1h-1z` : "")))
    .join("");
  return { size: rows.length + 2 * quiet, path };
}

const room = (version) => BLOCKS[version][1].reduce((sum, count) => sum + count, 0);
// The mode takes 4 bits and the length 8, from version 10 on 16.
const overhead = (version) => (version < 10 ? 1.5 : 2.5);

function codewords(bytes, version) {
  const bits = [];
  const put = (value, length) => {
    for (let bit = length - 1; bit >= 0; bit--) bits.push((value >>> bit) & 1);
  };
  put(0b0100, 4);
  put(bytes.length, version < 10 ? 8 : 16);
  bytes.forEach((byte) => put(byte, 8));
  put(0, Math.min(4, room(version) * 8 - bits.length));
  while (bits.length % 8) bits.push(0);
  const words = [];
  for (let at = 0; at < bits.length; at += 8) {
    words.push(bits.slice(at, at + 8).reduce((byte, bit) => byte * 2 + bit, 0));
  }
  for (let pad = 0xec; words.length < room(version); pad ^= 0xec ^ 0x11) words.push(pad);
  return words;
}

function interleaved(bytes, version) {
  const words = codewords(bytes, version);
  const [corrections, sizes] = BLOCKS[version];
  const blocks = sizes.map((size) => words.splice(0, size));
  const generator = reedSolomonGenerator(corrections);
  const checks = blocks.map((block) => reedSolomonRemainder(block, generator));
  const mixed = [];
  for (let at = 0; at < Math.max(...sizes); at++) {
    for (const block of blocks) if (at < block.length) mixed.push(block[at]);
  }
  for (let at = 0; at < corrections; at++) for (const check of checks) mixed.push(check[at]);
  return mixed;
}

// GF(256) with x^8 + x^4 + x^3 + x^2 + 1.
function multiply(a, b) {
  let product = 0;
  for (let bit = 7; bit >= 0; bit--) {
    product = (product << 1) ^ ((product >>> 7) * 0x11d);
    product ^= ((b >>> bit) & 1) * a;
  }
  return product;
}
function reedSolomonGenerator(degree) {
  const coefficients = new Array(degree).fill(0);
  coefficients[degree - 1] = 1;
  let root = 1;
  for (let i = 0; i < degree; i++) {
    for (let j = 0; j < degree; j++) {
      coefficients[j] = multiply(coefficients[j], root) ^ (coefficients[j + 1] ?? 0);
    }
    root = multiply(root, 2);
  }
  return coefficients;
}
function reedSolomonRemainder(data, generator) {
  const remainder = new Array(generator.length).fill(0);
  for (const byte of data) {
    const factor = byte ^ remainder.shift();
    remainder.push(0);
    generator.forEach((coefficient, i) => { remainder[i] ^= multiply(coefficient, factor); });
  }
  return remainder;
}

class Grid {
  constructor(version) {
    this.version = version;
    this.size = 17 + 4 * version;
    this.dark = Array.from({ length: this.size }, () => new Array(this.size).fill(false));
    this.fixed = Array.from({ length: this.size }, () => new Array(this.size).fill(false));
    this.#patterns();
  }

  #set(x, y, dark) {
    this.dark[y][x] = dark;
    this.fixed[y][x] = true;
  }

  #patterns() {
    const { size } = this;
    for (let i = 0; i < size; i++) {
      this.#set(6, i, i % 2 === 0);
      this.#set(i, 6, i % 2 === 0);
    }
    this.#finder(3, 3);
    this.#finder(size - 4, 3);
    this.#finder(3, size - 4);
    const centres = ALIGNMENT[this.version];
    const last = centres.at(-1);
    for (const x of centres) {
      for (const y of centres) {
        const corner = (x === 6 && y === 6) || (x === 6 && y === last) || (x === last && y === 6);
        if (!corner) this.#rings(x, y, 2, (ring) => ring !== 1);
      }
    }
    this.#format(0); // reserves the modules
    if (this.version >= 7) this.#versionBits();
  }

  #finder(x, y) {
    this.#rings(x, y, 4, (ring) => ring !== 2 && ring !== 4);
  }

  #rings(x, y, reach, isDark) {
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const inside = x + dx >= 0 && x + dx < this.size && y + dy >= 0 && y + dy < this.size;
        if (inside) this.#set(x + dx, y + dy, isDark(Math.max(Math.abs(dx), Math.abs(dy))));
      }
    }
  }

  #format(mask) {
    const data = (0b00 << 3) | mask; // 00 is level M.
    let remainder = data;
    for (let i = 0; i < 10; i++) remainder = (remainder << 1) ^ ((remainder >>> 9) * 0x537);
    const bits = ((data << 10) | remainder) ^ 0x5412;
    const bit = (i) => ((bits >>> i) & 1) === 1;
    const { size } = this;
    for (let i = 0; i <= 5; i++) this.#set(8, i, bit(i));
    this.#set(8, 7, bit(6));
    this.#set(8, 8, bit(7));
    this.#set(7, 8, bit(8));
    for (let i = 9; i < 15; i++) this.#set(14 - i, 8, bit(i));
    for (let i = 0; i < 8; i++) this.#set(size - 1 - i, 8, bit(i));
    for (let i = 8; i < 15; i++) this.#set(8, size - 15 + i, bit(i));
    this.#set(8, size - 8, true);
  }

  #versionBits() {
    let remainder = this.version;
    for (let i = 0; i < 12; i++) remainder = (remainder << 1) ^ ((remainder >>> 11) * 0x1f25);
    const bits = (this.version << 12) | remainder;
    for (let i = 0; i < 18; i++) {
      const dark = ((bits >>> i) & 1) === 1;
      const far = this.size - 11 + (i % 3);
      const near = Math.floor(i / 3);
      this.#set(far, near, dark);
      this.#set(near, far, dark);
    }
  }

  /** Two columns at a time, from the right, alternating up and down; column 6 has the timing. */
  fill(words) {
    let at = 0;
    for (let right = this.size - 1; right >= 1; right -= 2) {
      if (right === 6) right = 5;
      const upwards = ((right + 1) & 2) === 0;
      for (let step = 0; step < this.size; step++) {
        const y = upwards ? this.size - 1 - step : step;
        for (const x of [right, right - 1]) {
          if (this.fixed[y][x]) continue;
          this.dark[y][x] = ((words[at >>> 3] >>> (7 - (at & 7))) & 1) === 1;
          at++;
        }
      }
    }
  }

  /** Apply the mask with the smallest penalty. */
  masked() {
    let best = null;
    for (let mask = 0; mask < MASKS.length; mask++) {
      this.#format(mask);
      const rows = this.dark.map((row, y) =>
        row.map((dark, x) => (this.fixed[y][x] ? dark : dark !== MASKS[mask](x, y))),
      );
      const cost = penalty(rows);
      if (best === null || cost < best.cost) best = { rows, cost };
    }
    return best.rows;
  }
}

function penalty(rows) {
  const size = rows.length;
  const columns = rows.map((_, x) => rows.map((row) => row[x]));
  let cost = 0;
  let dark = 0;
  for (const line of [...rows, ...columns]) {
    const text = line.map((module) => (module ? "1" : "0")).join("");
    for (const run of text.match(/(0{5,}|1{5,})/g) ?? []) cost += run.length - 2;
    for (let x = 0; x + 11 <= size; x++) {
      const part = text.slice(x, x + 11);
      if (part === "10111010000" || part === "00001011101") cost += 40;
    }
  }
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      dark += rows[y][x];
      if (x + 1 === size || y + 1 === size) continue;
      const same = rows[y][x] === rows[y][x + 1] && rows[y][x] === rows[y + 1][x];
      if (same && rows[y][x] === rows[y + 1][x + 1]) cost += 3;
    }
  }
  return cost + 10 * Math.floor(Math.abs((dark * 20) / (size * size) - 10));
}
