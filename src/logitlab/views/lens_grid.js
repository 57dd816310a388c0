// The lens grid: what a lens says at every site (rows) and position (columns), with one cell and one position in a panel.
//
// One module without a build step, for three hosts: the HTML page, the notebook widget (the default export), the app.
// What data holds is said in grid_data.py. Texts from the data only ever become text nodes or attribute values, never markup.
//
//   const grid = mount(element, data, { theme, state, address, link, title, compact, grow, actions });
//   grid.update(data, { title, actions }); grid.append(data); grid.select({ prompt, site, slot, pin }); grid.state(); grid.restore(text);
//   grid.setTheme("dark"); grid.scroll({ left, top }); grid.destroy();
//
// The element dispatches lens-select, lens-hover, lens-state, lens-action and lens-scroll for what the reader does, never for
// what the handle is told to do, so that two grids can follow each other. A cell is { prompt, site, slot, pin, siteName, position,
// token }; lens-select has pinned besides: whether the reader pinned the position, by a click or Enter, or only went there.

const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];  // distinct for colour-blind readers
const LINES_DARK = ["#56b4e9", "#ff8a3c", "#2fd0a0", "#e79bc8", "#f0d040"];
const DASHES = ["", "6 3", "2 2", "8 2 2 2", "1 3"];
const STRIDES = [[1, "all"], [2, "every 2nd"], [4, "every 4th"], [8, "every 8th"]];
const ROW = 23, HEAD = 42;  // heights in pixels, as in the style below
const STACKED = 860;  // up to this width the panel is below the grid, as in the style below
const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "circle", "text", "title", "rect"]);

function make(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// -- numbers as text ----------------------------------------------------------------------------
const whole = new Intl.NumberFormat("en").format;

function percent(p) {
  if (Number.isNaN(p)) return "–";
  if (p === 0) return "0%";
  if (p >= 0.0995) return (100 * p).toFixed(1) + "%";
  return p >= 0.0001 ? (100 * p).toPrecision(2) + "%" : p.toExponential(1);
}

const inNats = (v) => (Number.isNaN(v) ? "–" : v === Infinity ? "∞ nats" : v.toFixed(3) + " nats");
const withUnit = (text, unit) => (unit && unit !== "1" ? `${text} ${unit}` : text);
const short = (v) => (Number.isNaN(v) ? "–" : String(Number(v.toPrecision(4))));
const rankText = (r) => (r < 1 ? "–" : whole(r));

// A bound is never shown smaller than it is.
function upward(v) {
  const nearest = Number(v.toExponential(1)), half = 0.5 * 10 ** (Math.floor(Math.log10(v)) - 1);
  return (nearest >= v * (1 - 1e-6) ? nearest : v + half).toExponential(1);
}

function boundText(v) {
  if (Number.isNaN(v)) return "–";
  return v === 0 ? "0 (done in full)" : v === Infinity ? "∞ nats" : upward(v) + " nats";
}

// -- the table: arrays [site, position, width] with room for positions that are yet to come -----------
const ARRAYS = { u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };

function unpacked({ dtype, data }) {
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(data);
  else {
    const text = atob(data);
    bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  }
  return new ARRAYS[dtype](bytes.buffer);
}

function labelNumbers(packed) {
  const found = unpacked(packed), none = packed.dtype === "u2" ? 0xffff : 0xffffffff, numbers = new Int32Array(found.length);
  for (let i = 0; i < found.length; i++) numbers[i] = found[i] === none ? -1 : found[i];
  return numbers;
}

class Table {
  constructor(data) {
    for (const name of ["model", "lens", "verified", "independent", "noun", "sites", "siteNames", "targets", "targetIds", "k",
      "provenance", "colours", "categories", "others", "none", "threshold", "fewest"]) this[name] = data[name];
    this.labels = [...data.labels];
    this.ids = [...data.ids];
    const M = this.targets.length;
    this.widths = { top: this.k, logprob: this.k, entropy: 1, kl: 1, bound: 1, targetLogprob: M, targetRank: M, boxes: 4, heat: 1 };
    this.prompts = data.prompts.map((given) => {
      const prompt = { ...given, positions: [...given.positions], tokens: [...given.tokens], room: given.positions.length };
      for (const name of Object.keys(this.widths)) {
        if (name === "top") prompt.top = labelNumbers(given.top);
        else if (name === "heat") [prompt.heat, prompt.heatScale] = given.heat ? [unpacked(given.heat.values), given.heat] : [];
        else if (given[name]) prompt[name] = unpacked(given[name]);
      }
      return prompt;
    });
    this.ends = { entropy: 1, kl: 1, ranks: Array(M).fill(2) };  // the dark end of a scale
    this.open = {};  // whether some values lie beyond it
    this.measure();
  }

  // Few cells can be far from all others (the embeddings, say): a scale ends at the 95th percentile where the largest is far beyond.
  measure() {
    for (const name of ["entropy", "kl"]) {
      const known = Float32Array.from(this.prompts.flatMap((prompt) => [...(prompt[name] ?? [])].filter(Number.isFinite))).sort();
      const most = known.at(-1) ?? 0, usual = known[Math.floor(0.95 * (known.length - 1))] ?? 0;
      this.open[name] = known.length >= 100 && most > 1 && most > 1.5 * usual;
      this.ends[name] = Math.max(this.open[name] ? usual : most, 1);
    }
    const M = this.targets.length;
    for (const { targetRank: ranks = [] } of this.prompts) {
      for (let i = 0; i < ranks.length; i++) if (ranks[i] > this.ends.ranks[i % M]) this.ends.ranks[i % M] = ranks[i];
    }
  }

  label(number) { return number < 0 ? "–" : this.labels[number]; }

  // Twice the room, with what is not yet there missing.
  widen(prompt) {
    const S = this.sites.length, room = Math.max(16, 2 * prompt.room);
    for (const [name, width] of Object.entries(this.widths)) {
      const old = prompt[name];
      if (!old) continue;
      prompt[name] = new old.constructor(S * room * width).fill(old instanceof Float32Array ? NaN : -1);
      for (let s = 0; s < S; s++) {
        prompt[name].set(old.subarray(s * prompt.room * width, (s + 1) * prompt.room * width), s * room * width);
      }
    }
    prompt.room = room;
  }

  // Positions of another table of the same model come to the right of a prompt.
  append(other, n) {
    if (other.siteNames.join("\n") !== this.siteNames.join("\n") || other.k !== this.k || other.targetIds.join() !== this.targetIds.join())
      throw new Error("what is appended has other sites, targets or numbers of top tokens than the grid");
    this.numbers ??= new Map(this.labels.map((label, i) => [`${this.ids[i]} ${label}`, i]));
    const number = other.labels.map((label, i) => {
      const key = `${other.ids[i]} ${label}`;
      if (!this.numbers.has(key)) {
        this.numbers.set(key, this.labels.length);
        this.labels.push(label);
        this.ids.push(other.ids[i]);
      }
      return this.numbers.get(key);
    });
    const prompt = this.prompts[n], added = other.prompts[0];
    added.top = added.top.map((i) => (i < 0 ? -1 : number[i]));
    added.positions.forEach((position, p) => {
      const end = prompt.positions.length;
      if (end >= prompt.room) this.widen(prompt);
      for (const [name, width] of Object.entries(this.widths)) {
        if (!prompt[name] || !added[name]) continue;
        for (let s = 0; s < this.sites.length; s++) {
          const from = (s * added.room + p) * width;
          prompt[name].set(added[name].subarray(from, from + width), (s * prompt.room + end) * width);
        }
      }
      prompt.positions.push(position);
      prompt.tokens.push(added.tokens[p]);
    });
    prompt.answer = prompt.positions.length - 1;
  }
}

// How a cell can be shaded: a value from 0 to 1 (NaN where it is not known), and what the two ends of the scale mean.
function shades(table) {
  const modes = {}, { k: K, targets, ends, open } = table, M = targets.length, [first] = table.prompts;
  const heated = table.prompts.find((q) => q.heat)?.heatScale;
  if (heated) modes.heat = { name: heated.name,
    ends: (q) => [q.heatScale?.low ?? heated.low, q.heatScale?.high ?? heated.high].map((v) => withUnit(short(v), heated.unit)),
    value: (q, c) => (q.heat ? Math.min(Math.max((q.heat[c] - q.heatScale.low) / (q.heatScale.high - q.heatScale.low), 0), 1) : NaN) };
  if (K) modes.top = { name: "probability of the top " + table.noun, ends: () => ["0", "1"], value: (q, c) => Math.exp(q.logprob[c * K]) };
  for (const [name, title] of extras(table)) {
    modes[name] = { name: title, ends: () => ["0", (open[name] ? "≥ " : "") + ends[name].toFixed(1) + " nats"], value: (q, c) => Math.min(q[name][c] / ends[name], 1) };
  }
  if (first?.targetRank) targets.forEach((label, t) => {
    modes["p" + t] = { name: "probability of " + label, ends: () => ["0", "1"], value: (q, c) => Math.exp(q.targetLogprob[c * M + t]) };
    modes["r" + t] = { name: "rank of " + label, ends: () => [whole(ends.ranks[t]), "1"],
      value: (q, c) => (q.targetRank[c * M + t] < 1 ? NaN : 1 - Math.log(q.targetRank[c * M + t]) / Math.log(ends.ranks[t])) };
  });
  return modes;
}

const extras = (table) => [["entropy", "entropy"], ["kl", "KL to the final distribution"]].filter(([name]) => table.prompts[0]?.[name]);

// -- what all parts share: the table, the state, and what follows from both ------------------------
const within = (value, most) => Math.min(Math.max(Number.isInteger(value) ? value : 0, 0), Math.max(most, 0));

class Lens {
  constructor(data, options) {
    this.options = options;
    this.preferred = ["light", "dark"].includes(options.theme) ? options.theme : "";
    this.prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
    this.take(data);
    this.read("");
  }

  take(data) {
    this.table = data instanceof Table ? data : new Table(data);
    this.modes = shades(this.table);
  }

  get prompt() { return this.table.prompts[this.state.prompt]; }
  get count() { return this.prompt?.positions.length ?? 0; }
  get depth() { return this.table.sites.length; }
  get empty() { return !this.depth || !this.count; }
  get mode() { return this.modes[this.state.colour]; }
  get theme() { return this.state.theme || this.preferred || (this.prefersDark.matches ? "dark" : "light"); }
  get scale() { return this.table.colours[this.theme]; }
  get title() { return this.options.title ?? this.table.model; }
  get usual() { return "heat" in this.modes ? "heat" : "top"; }

  at(site, slot) { return site * this.prompt.room + slot; }

  // Sites as they are drawn, the last one first: it is always there, and the others are counted from it.
  get rows() { return Array.from({ length: Math.ceil(this.depth / this.state.stride) }, (_, r) => this.depth - 1 - r * this.state.stride); }
  rowOf(site) {
    const back = this.depth - 1 - site;
    return back % this.state.stride ? -1 : back / this.state.stride;
  }
  nearest(site) { return this.rows[within(Math.round((this.depth - 1 - site) / this.state.stride), this.rows.length - 1)]; }

  // Background and foreground of a cell; null where its value is missing.
  shade(c) {
    const v = this.mode.value(this.prompt, c);
    return Number.isNaN(v) ? null : this.scale[Math.round(v * (this.scale.length - 1))];
  }

  // What a cell says: its top token, or its heat where there are no tokens.
  words(c) {
    const { top, heat } = this.prompt, { k } = this.table;
    return k ? this.table.label(top[c * k]) : heat ? heat[c].toFixed(2) : "–";
  }

  spoken(site, slot) {
    const c = this.at(site, slot), { k } = this.table, chance = k ? " " + percent(Math.exp(this.prompt.logprob[c * k])) : "";
    return `site ${this.table.siteNames[site]}, position ${this.prompt.positions[slot]} ${this.prompt.tokens[slot]}: ${this.words(c)}${chance}`;
  }

  detail(site = this.state.site, slot = this.state.slot) {
    const { prompt, pin } = this.state, { positions, tokens } = this.prompt;
    return { prompt, site, slot, pin, siteName: this.table.siteNames[site], position: positions[slot], token: tokens[slot] };
  }

  // The state as text, in which only what is unusual is named, and back; what is not there is as at the start.
  write() {
    const { prompt, site, slot, pin, colour, stride, theme, picture, limit } = this.state;
    const parts = [`cell=${site},${slot}`, `pin=${pin}`];
    if (this.table.prompts.length > 1) parts.unshift(`prompt=${prompt}`);
    if (colour !== this.usual) parts.push(`colour=${colour}`);
    if (stride > 1) parts.push(`stride=${stride}`);
    if (theme) parts.push(`theme=${theme}`);
    if (picture) parts.push(`picture=${picture}`);
    if (limit !== Math.round(100 * this.table.threshold)) parts.push(`limit=${limit}`);
    return parts.join("&");
  }

  read(text) {
    const given = new URLSearchParams(text), { table } = this;
    const numbers = (name) => (given.get(name) || "").split(",").map((v) => (v === "" ? NaN : Number(v)));
    const state = (this.state = { overlay: this.state?.overlay ?? true });
    state.prompt = within(numbers("prompt")[0], table.prompts.length - 1);
    const [s, p] = numbers("cell"), end = this.count - 1;
    state.site = within(Number.isNaN(s) ? this.depth - 1 : s, this.depth - 1);
    state.slot = within(p === undefined || Number.isNaN(p) ? this.prompt?.answer : p, end);
    state.pin = within(given.has("pin") ? numbers("pin")[0] : state.slot, end);
    state.colour = Object.hasOwn(this.modes, given.get("colour")) ? given.get("colour") : this.usual;
    state.stride = STRIDES.some(([n]) => n === numbers("stride")[0]) ? numbers("stride")[0] : 1;
    state.theme = ["light", "dark"].includes(given.get("theme")) ? given.get("theme") : "";  // chosen here, not by the host
    state.picture = within(numbers("picture")[0], (this.prompt?.pictures.length ?? 0) - 1);
    if (state.stride > 1 && !this.empty) state.site = this.nearest(state.site);
    state.limit = given.has("limit") ? within(numbers("limit")[0], 100) : Math.round(100 * table.threshold);
  }

  // Another table: what is chosen stays chosen where it is still there.
  exchange(data) {
    const old = this.table, { site, slot, pin, prompt, colour, stride, theme, limit, picture } = this.state, name = old.siteNames[site];
    const usual = this.usual;
    this.take(data);
    const n = prompt < this.table.prompts.length ? prompt : 0, there = this.table.prompts[n]?.positions.length ?? 0;
    const found = this.table.siteNames.indexOf(name);
    this.read("");
    Object.assign(this.state, { prompt: n, stride, theme, limit });
    const answer = within(this.prompt?.answer, there - 1);
    Object.assign(this.state, {
      site: found < 0 ? Math.max(this.depth - 1, 0) : found, slot: slot < there ? slot : answer, pin: pin < there ? pin : answer,
      picture: within(picture, (this.prompt?.pictures.length ?? 0) - 1),
      colour: colour !== usual && Object.hasOwn(this.modes, colour) ? colour : this.usual });
    if (stride > 1 && !this.empty) this.state.site = this.nearest(this.state.site);
  }
}

// -- the matrix: only the rows and columns in view exist ---------------------------------------------
// A run holds elements for the numbers from..to in the order of the document. When it moves, what stays is left alone and
// what went out of view is used again for what came into it.
class Run {
  constructor(after, create, fill) { Object.assign(this, { after, create, fill, from: 0, items: [] }); }

  get to() { return this.from + this.items.length; }

  move(from, to, afresh = false) {
    const start = Math.max(from, this.from), end = Math.min(to, this.to), some = start < end;
    const kept = some ? this.items.slice(start - this.from, end - this.from) : [];
    const spare = some ? [...this.items.slice(0, start - this.from), ...this.items.slice(end - this.from)] : this.items;
    const filled = (low, high) => {
      const items = [];
      for (let i = low; i < high; i++) {
        const item = spare.pop() ?? this.create();
        this.fill(item, i);
        items.push(item);
      }
      return items;
    };
    if (afresh) kept.forEach((item, i) => this.fill(item, start + i));
    const before = filled(from, some ? start : to), behind = some ? filled(end, to) : [];
    for (const item of spare) item.el.remove();
    this.after.after(...before.map((item) => item.el));
    if (behind.length) kept.at(-1).el.after(...behind.map((item) => item.el));
    [this.from, this.items] = [from, [...before, ...kept, ...behind]];
  }
}

class Matrix {
  constructor(lens, act) {
    this.lens = lens;
    this.space = make("div", { class: "space", role: "presentation" });
    this.el = make("div", { class: "grid card" }, this.space);
    this.quiet = null;
    this.width = 80;
    this.el.addEventListener("keydown", (event) => this.press(event, act));
  }

  // Sizes and the header; all cells are made anew.
  layOut() {
    const { lens } = this;
    if (lens.empty) {
      for (const name of ["role", "aria-label", "aria-rowcount", "aria-colcount"]) this.el.removeAttribute(name);
      this.run = null;
      return this.space.replaceChildren(make("p", { class: "nothing" }, "nothing was read"));
    }
    this.measure();
    this.sites = lens.rows;
    this.el.setAttribute("role", "grid");
    this.el.setAttribute("aria-label", "sites by tokens; arrow keys move, Enter pins a position");
    this.el.setAttribute("aria-rowcount", this.sites.length + 1);
    const corner = make("div", { class: "side", role: "columnheader", "aria-colindex": 1, "aria-label": "site" });
    corner.style.width = this.side + "px";
    this.head = make("div", { class: "row head", role: "row", "aria-rowindex": 1 }, corner);
    this.tops = new Run(corner, () => this.createTop(), (item, p) => this.fillTop(item, p));
    this.run = new Run(this.head, () => this.createRow(), (row, r) => this.fillRow(row, r));
    this.space.replaceChildren(this.head);
    this.size();
  }

  measure() {
    const { lens } = this, { table, prompt } = lens;
    this.side = 12 + 8 * Math.max(3, ...table.sites.map((name) => name.length));
    const lengths = [...prompt.tokens.slice(0, 500), ...table.labels.slice(0, 500)].map((t) => t.length).sort((a, b) => a - b);
    const some = prompt.pictures[lens.state.picture]?.patches.length ? 11 : lengths[Math.floor(lengths.length * 0.9)] || 0;  // "patch 13,10"
    const room = (this.el.clientWidth - this.side - 2) / lens.count;
    this.width = Math.floor(Math.max(64, 14 + 7.3 * Math.min(some, 11), Math.min(room, 120)));
  }

  // After positions came to the right: columns are narrower where there is less room.
  extend() {
    const { width } = this;
    this.measure();
    if (this.width === width) this.size();
    else this.layOut();
  }

  size() {
    this.el.setAttribute("aria-colcount", this.lens.count + 1);
    this.space.style.width = this.side + this.width * this.lens.count + "px";
    this.space.style.height = HEAD + ROW * this.sites.length + "px";
  }

  createTop() {
    const number = make("small"), token = make("bdi"), el = make("div", { class: "top", role: "columnheader" }, number, token);
    return { el, number, token };
  }

  fillTop({ el, number, token }, p) {
    const { tokens, positions } = this.lens.prompt;
    this.put(el, p);
    [number.textContent, token.textContent, el.title] = [positions[p], tokens[p], tokens[p]];
  }

  createRow() {
    const side = make("div", { class: "side", role: "rowheader", "aria-colindex": 1 }), el = make("div", { class: "row", role: "row" }, side);
    side.style.width = this.side + "px";
    const row = { el, side, site: 0 };
    row.cells = new Run(side, () => ({ el: make("div", { class: "cell", role: "gridcell" }) }), (item, p) => this.fillCell(item.el, row.site, p));
    return row;
  }

  fillRow(row, r) {
    const { table } = this.lens;
    row.site = this.sites[r];
    row.el.style.top = HEAD + ROW * r + "px";
    row.el.setAttribute("aria-rowindex", r + 2);
    [row.side.textContent, row.side.title] = [table.sites[row.site], table.siteNames[row.site]];
    row.stale = true;
  }

  fillCell(el, site, p) {
    const { lens } = this, c = lens.at(site, p), shade = lens.shade(c);
    this.put(el, p);
    el.dataset.s = site;
    el.textContent = lens.words(c);
    el.setAttribute("aria-label", lens.spoken(site, p));
    [el.style.background, el.style.color] = shade ?? ["", ""];
    this.choose(el, site === lens.state.site && p === lens.state.slot);
  }

  put(el, p) {
    el.dataset.p = p;
    el.style.left = this.side + p * this.width + "px";
    el.style.width = this.width + "px";
    el.setAttribute("aria-colindex", p + 2);
  }

  choose(el, now) {
    el.classList.toggle("now", now);
    el.tabIndex = now ? 0 : -1;
    if (now) el.setAttribute("aria-selected", "true");
    else el.removeAttribute("aria-selected");
  }

  // Brings what is in view up to date; afresh: also the cells that were there.
  draw(afresh = false) {
    if (!this.run) return;
    const { el, lens, width } = this;
    const first = Math.max(0, Math.floor(el.scrollLeft / width) - 3);
    const last = Math.min(lens.count, Math.ceil((el.scrollLeft + el.clientWidth - this.side) / width) + 3);
    const from = Math.max(0, Math.floor(el.scrollTop / ROW) - 3);
    const to = Math.min(this.sites.length, Math.ceil((el.scrollTop + el.clientHeight - HEAD) / ROW) + 3);
    if (!afresh && first === this.tops.from && last === this.tops.to && from === this.run.from && to === this.run.to) return;
    const focused = el.contains(el.getRootNode().activeElement);
    this.tops.move(first, last, afresh);
    this.run.move(from, to, afresh);
    for (const row of this.run.items) {
      row.cells.move(first, last, afresh || row.stale);
      row.stale = false;
    }
    this.mark();
    if (focused) this.focus();
  }

  cellAt(site, slot) {
    const r = this.lens.rowOf(site), row = this.run?.items[r - this.run.from];
    return (r >= 0 && row?.cells.items[slot - row.cells.from]?.el) || null;
  }

  topAt(slot) { return this.tops.items[slot - this.tops.from]?.el; }

  // The chosen cell and the pinned position.
  mark() {
    if (!this.run) return;
    const { site, slot, pin } = this.lens.state, cell = this.cellAt(site, slot);
    for (const old of this.space.querySelectorAll(".cell.now")) if (old !== cell) this.choose(old, false);
    if (cell) this.choose(cell, true);
    for (const old of this.space.querySelectorAll(".top.pinned")) old.classList.remove("pinned");
    this.topAt(pin)?.classList.add("pinned");
    this.el.tabIndex = cell ? -1 : 0;  // the keyboard can always come in
  }

  point(site, slot) {
    if (!this.run) return;
    for (const node of this.space.querySelectorAll(".side.now, .top.now")) node.classList.remove("now");
    this.run.items[this.lens.rowOf(site) - this.run.from]?.side.classList.add("now");
    this.topAt(slot)?.classList.add("now");
  }

  focus() { (this.cellAt(this.lens.state.site, this.lens.state.slot) ?? this.el).focus({ preventScroll: true }); }

  // Scrolls as little as shows the chosen cell, then draws.
  reveal(quiet, afresh) {
    const { site, slot } = this.lens.state, { el } = this, left = slot * this.width, view = el.clientWidth - this.side;
    const to = { left: el.scrollLeft, top: el.scrollTop };
    if (left < to.left) to.left = left;
    else if (left + this.width > to.left + view) to.left = left + this.width - view;
    const above = ROW * this.lens.rowOf(site);
    if (above >= 0 && above < to.top) to.top = above;
    else if (above >= 0 && HEAD + above + ROW > to.top + el.clientHeight) to.top = HEAD + above + ROW - el.clientHeight;
    this.scroll(to, quiet, afresh);
  }

  scroll({ left = this.el.scrollLeft, top = this.el.scrollTop }, quiet, afresh = false) {
    const { el } = this, before = [el.scrollLeft, el.scrollTop];
    [el.scrollLeft, el.scrollTop] = [left, top];
    const moved = before[0] !== el.scrollLeft || before[1] !== el.scrollTop;
    if (moved) this.quiet = quiet ? { left: el.scrollLeft, top: el.scrollTop } : null;
    this.draw(afresh);
  }

  get atEnd() { return this.el.scrollLeft + this.el.clientWidth >= this.el.scrollWidth - 2; }

  press(event, act) {
    if (this.lens.empty || event.ctrlKey || event.altKey || event.metaKey) return;
    const { site, slot } = this.lens.state, end = this.lens.count - 1, { rows } = this.lens;
    const r = rows.indexOf(this.lens.nearest(site)), hidden = this.lens.rowOf(site) < 0;
    const up = hidden ? rows[r] : rows[Math.max(r - 1, 0)], down = hidden ? rows[r] : rows[Math.min(r + 1, rows.length - 1)];
    const moves = {
      ArrowLeft: { slot: Math.max(slot - 1, 0) }, ArrowRight: { slot: Math.min(slot + 1, end) }, ArrowUp: { site: up }, ArrowDown: { site: down },
      Home: { slot: 0 }, End: { slot: end }, PageUp: { site: rows[0] }, PageDown: { site: rows.at(-1) }, Enter: { pin: slot }, " ": { pin: slot } };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    act(moves[event.key], { say: !("pin" in moves[event.key]) });
    this.focus();
  }
}

// -- the panel: one cell, and one position over all sites ---------------------------------------------
class Panel {
  constructor(lens, fire) {
    this.lens = lens;
    this.fire = fire;
    this.detail = make("section", { class: "detail", "aria-label": "cell" });
    this.actions = make("div", { class: "actions" });
    this.heading = make("h3", { class: "over-title" });
    this.key = make("div", { class: "key" });
    this.charts = make("div", { class: "charts" });
    const over = make("section", { class: "over", "aria-label": "trajectories over the sites" }, this.heading, this.key, this.charts);
    this.el = make("div", { class: "panel card", role: "group", "aria-label": "the cell and its position", tabindex: 0 }, this.detail, this.actions, over);
  }

  clear() { for (const part of [this.detail, this.actions, this.heading, this.key, this.charts]) part.replaceChildren(); }

  showCell(site, slot) {
    const { lens } = this, { table, prompt } = lens, c = lens.at(site, slot), { k: K } = table, M = table.targets.length;
    const { tokens, positions, top, logprob, targetRank, targetLogprob, bound, heat, heatScale } = prompt;
    const bars = make("div", { class: "bars" });
    for (let i = c * K; i < c * K + K; i++) {
      if (top[i] < 0) continue;
      const bar = make("i"), value = Math.exp(logprob[i]), label = table.labels[top[i]];
      bar.style.width = 100 * (value || 0) + "%";
      bars.append(make("span", { class: "code", title: `${label}  (id ${table.ids[top[i]]})` }, label), make("span", {}, bar), make("span", {}, percent(value)));
    }
    const facts = extras(table).map(([name, title]) => [title, inNats(prompt[name][c])]);
    if (heat) facts.unshift([heatScale.name, withUnit(short(heat[c]), heatScale.unit)]);
    if (bound) facts.push(["screening: off by at most", boundText(bound[c])]);
    if (targetRank) table.targets.forEach((label, t) =>
      facts.push([label, `rank ${rankText(targetRank[c * M + t])}, ${percent(Math.exp(targetLogprob[c * M + t]))}`]));
    this.detail.replaceChildren(make("h3", {}, table.siteNames[site]),
      make("span", { class: "soft" }, `position ${positions[slot]} `), make("bdi", { class: "code" }, tokens[slot]),
      bars, make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  }

  // What a host offers to do with the chosen cell.
  showActions() {
    const { lens } = this, cell = lens.detail();
    const offered = (lens.options.actions ?? []).filter((action) => !action.when || action.when(cell));
    const focused = this.actions.contains(this.el.getRootNode().activeElement) ? this.el.getRootNode().activeElement.dataset.name : undefined;
    this.actions.replaceChildren(...offered.map(({ name, label, title }) => {
      const button = make("button", { type: "button", "data-name": name, ...(title ? { title } : {}) }, label);
      button.addEventListener("click", () => this.fire("lens-action", { name, ...lens.detail() }));
      return button;
    }));
    if (offered.length) this.actions.prepend(make("span", { class: "soft" }, `${cell.siteName}, position ${cell.position}: `));
    if (focused !== undefined) [...this.actions.children].find((node) => node.dataset.name === focused)?.focus({ preventScroll: true });
  }

  // The targets, or else the tokens whose probability peaks highest over the sites; these are known
  // only where they are among the top tokens, so the rest of their line stays open.
  lines(slot) {
    const { lens } = this, { table, prompt } = lens, { k: K } = table, M = table.targets.length, S = lens.depth;
    const sites = Array.from({ length: S }, (_, s) => lens.at(s, slot));
    if (M && prompt.targetRank) return table.targets.map((label, t) => ({ label,
      p: sites.map((c) => Math.exp(prompt.targetLogprob[c * M + t])), rank: sites.map((c) => prompt.targetRank[c * M + t]) }));
    const found = new Map();
    sites.forEach((c, s) => {
      for (let i = 0; i < K; i++) {
        const token = prompt.top[c * K + i], value = Math.exp(prompt.logprob[c * K + i]);
        if (token < 0 || Number.isNaN(value)) continue;
        if (!found.has(token)) found.set(token, { label: table.labels[token], p: Array(S).fill(NaN), rank: Array(S).fill(NaN), peak: 0 });
        const line = found.get(token);
        [line.p[s], line.rank[s], line.peak] = [value, i + 1, Math.max(line.peak, value)];
      }
    });
    return [...found.values()].sort((a, b) => b.peak - a.peak).slice(0, LINES.length);
  }

  lineColour(i) { return (this.lens.theme === "dark" ? LINES_DARK : LINES)[i % LINES.length]; }

  showCurves() {
    const { lens } = this, p = lens.state.pin, { tokens, positions, heat, heatScale } = lens.prompt, lines = this.lines(p);
    this.heading.replaceChildren(`Position ${positions[p]} `, make("bdi", { class: "code" }, tokens[p]), " over the sites");
    const worst = Math.max(2, ...lines.flatMap((l) => l.rank.filter((r) => r > 0)));
    const ranks = [1, 10, 100, 1000, 10000, 100000].filter((r) => r <= worst);
    if (worst < 10) ranks.push(worst);
    const charts = [], one = (values, label) => [{ label, values, stroke: "var(--soft)" }];
    const over = (values) => Array.from({ length: lens.depth }, (_, s) => values[lens.at(s, p)]).map((v) => (Number.isFinite(v) ? v : NaN));
    if (heat) {
      const values = over(heat), known = values.filter((v) => !Number.isNaN(v));
      const low = Math.min(heatScale.low, ...known), high = Math.max(heatScale.high, ...known);
      charts.push(this.chart(withUnit(heatScale.name, heatScale.unit && heatScale.unit !== "1" ? `(${heatScale.unit})` : ""), one(values, heatScale.name),
        (v) => (v - low) / (high - low || 1), [low, high], (v) => String(Number(v.toPrecision(3)))));
    }
    if (lines.length) charts.push(
      this.chart("probability", lines.map((l) => ({ label: l.label, values: l.p })), (v) => v, [0, 0.5, 1], (v) => percent(v).replace(".0%", "%")),
      this.chart("rank", lines.map((l) => ({ label: l.label, values: l.rank.map((r) => (r > 0 ? r : NaN)) })), (v) => 1 - Math.log(v) / Math.log(worst), ranks, whole));
    for (const [name, title] of extras(lens.table)) {
      const values = over(lens.prompt[name]), high = Math.max(1, ...values.filter((v) => v > 0));
      charts.push(this.chart(title + ", nats", one(values, title), (v) => v / high, [0, high], (v) => v.toFixed(1)));
    }
    this.charts.replaceChildren(...charts.flat());
    this.key.replaceChildren(...lines.map((l, i) => make("span", {},
      make("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, make("path", { d: "M0 4H22", stroke: this.lineColour(i), "stroke-width": 2.5, "stroke-dasharray": dash(i) })),
      make("bdi", { class: "code" }, l.label))));
  }

  chart(title, lines, y, ticks, show) {
    const { lens } = this, { sites, siteNames } = lens.table, S = sites.length;
    const W = 330, H = 118, L = 40, R = 8, T = 8, B = 18;
    const x = (s) => L + (S > 1 ? s / (S - 1) : 0.5) * (W - L - R), place = (v) => T + (1 - y(v)) * (H - T - B);
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title + " over the sites" });
    for (const tick of ticks)
      svg.append(make("line", { x1: L, x2: W - R, y1: place(tick), y2: place(tick), stroke: "var(--line)" }),
        make("text", { x: L - 5, y: place(tick) + 3.5, "text-anchor": "end" }, show(tick)));
    const named = S > 2 ? [0, Math.round((S - 1) / 2), S - 1] : [...Array(S).keys()];
    for (const s of named) svg.append(make("text", { x: x(s), y: H - 4, "text-anchor": S > 1 && s === S - 1 ? "end" : s ? "middle" : "start" }, sites[s]));
    const now = x(lens.state.site);
    svg.append(make("line", { x1: now, x2: now, y1: T, y2: H - B, stroke: "var(--accent)", "stroke-dasharray": "2 3" }));
    lines.forEach(({ label, values, stroke }, i) => {
      stroke ??= this.lineColour(i);
      let path = "";
      values.forEach((v, s) => { if (!Number.isNaN(v)) path += (s && !Number.isNaN(values[s - 1]) ? "L" : "M") + x(s).toFixed(1) + " " + place(v).toFixed(1); });
      svg.append(make("path", { d: path, fill: "none", stroke, "stroke-width": 1.8, "stroke-dasharray": dash(i), "stroke-linejoin": "round" }));
      values.forEach((v, s) => { if (!Number.isNaN(v)) svg.append(
        make("circle", { cx: x(s), cy: place(v), r: S > 60 ? 1 : 2, fill: stroke }, make("title", {}, `${label} at ${siteNames[s]}: ${show(v)}`))); });
    });
    return [make("h4", {}, title), svg];
  }
}

// After five lines the colours repeat with other dashes.
const dash = (i) => DASHES[(i + Math.floor(i / LINES.length)) % DASHES.length];

// -- the picture: its patches coloured at one site, or the boxes found there -----------------------------
const FAINT = 0.2, STRONG = 0.8, EVEN = 0.65;  // opacity at probability 0 and 1, and where the colour says it
const see = (hex, opacity) => hex + Math.round(255 * opacity).toString(16).padStart(2, "0");

class PictureView {
  constructor(lens, act, hover) {
    this.lens = lens;
    this.drawn = new Map();  // the element of a patch or a box, by slot
    this.marks = make("div", { class: "marks" });
    this.stage = make("div", { class: "stage" }, this.marks);
    this.choice = make("select", { class: "picture-choice", "aria-label": "picture" });
    this.layer = make("input", { class: "layer", type: "range", min: 0, step: 1 });
    this.layerName = make("output", { class: "layer-name" });
    this.limit = make("input", { class: "limit", type: "range", min: 0, max: 100, step: 1 });
    this.limitName = make("output", { class: "limit-name" });
    this.overlay = make("input", { class: "overlay", type: "checkbox" });
    this.overlayName = make("span");
    this.layers = make("label", { class: "slide layers" }, "site ", this.layer, this.layerName);
    this.limits = make("label", { class: "slide limits" }, "above ", this.limit, this.limitName);
    this.overlays = make("label", { class: "overlays" }, this.overlay, " ", this.overlayName);
    this.answer = make("p", { class: "answer" });
    this.swatches = make("ul", { class: "swatches" });
    this.note = make("p", { class: "note soft" });
    const steer = make("div", { class: "steer" }, this.choice, this.layers, this.limits, this.overlays, this.answer, this.swatches, this.note);
    this.el = make("section", { class: "view card", "aria-label": "picture" }, this.stage, steer);
    this.layer.addEventListener("input", () => act({ site: Number(this.layer.value) }));
    this.limit.addEventListener("input", () => act({ limit: Number(this.limit.value) }));
    this.overlay.addEventListener("change", () => act({ overlay: this.overlay.checked }));
    this.choice.addEventListener("change", () => act({ picture: Number(this.choice.value) }, { level: 2 }));
    const pin = (slot) => {
      act({ slot, pin: slot });
      this.drawn.get(slot)?.focus({ preventScroll: true });
    };
    for (const kind of ["mouseover", "focusin"]) this.marks.addEventListener(kind, (event) => {
      if (slotOf(event) >= 0) hover(lens.state.site, slotOf(event));
    });
    for (const kind of ["mouseleave", "focusout"]) this.marks.addEventListener(kind, () => hover());
    this.marks.addEventListener("click", (event) => { if (slotOf(event) >= 0) pin(slotOf(event)); });
    this.marks.addEventListener("keydown", (event) => this.press(event, pin));
  }

  get picture() { return this.lens.prompt?.pictures[this.lens.state.picture]; }
  get patches() { return this.picture?.patches ?? []; }
  get detector() { return this.lens.prompt?.boxes !== undefined; }

  press(event, pin) {
    const slot = slotOf(event), moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (slot < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") pin(slot);
    else if (Object.hasOwn(moves, event.key) && !this.detector) {
      const here = this.drawn.get(slot), { row, column } = here.dataset, [down, right] = moves[event.key];
      const next = this.marks.querySelector(`[data-row="${Number(row) + down}"][data-column="${Number(column) + right}"]`);
      if (next) [here.tabIndex, next.tabIndex] = [-1, 0];
      next?.focus({ preventScroll: true });
    } else return;
    event.preventDefault();
  }

  mark(slot) {
    for (const node of this.marks.querySelectorAll(".now")) node.classList.remove("now");
    this.drawn.get(slot)?.classList.add("now");
  }

  tint(palette, id) { return this.lens.table.categories[palette.indexOf(id)] ?? this.lens.table.others; }

  layOut() {
    const { picture, marks, lens } = this, pictures = lens.prompt?.pictures ?? [];
    const steered = !lens.empty && (this.detector || this.patches.length > 0);
    this.el.hidden = !picture && !this.detector;
    if (this.el.hidden) return;
    const [w, h] = picture ? picture.size : [1, 1];
    this.stage.style.aspectRatio = `${w} / ${h}`;
    this.stage.style.width = `min(100%, ${Math.round(Math.min(400 * w / h, 560))}px)`;
    this.photo?.remove();
    this.photo = picture && make("img", { class: "photo", alt: "the picture as the model saw it", src: "data:image/png;base64," + picture.png });
    if (this.photo) this.stage.prepend(this.photo);
    this.choice.hidden = pictures.length < 2;
    this.choice.replaceChildren(...pictures.map((_, i) => make("option", { value: i }, `picture ${i + 1} of ${pictures.length}`)));
    for (const part of [this.layers, this.overlays, this.answer, this.swatches, this.note]) part.hidden = !steered;
    this.limits.hidden = !steered || !this.detector;
    this.layer.max = lens.depth - 1;
    this.overlayName.textContent = this.detector ? "show the boxes" : "show the patches";
    marks.replaceChildren();
    marks.removeAttribute("role");
    this.drawn.clear();
    if (this.detector || !steered) return;
    marks.setAttribute("role", "grid");
    marks.setAttribute("aria-label", "patches of the picture; arrow keys move, Enter pins a position");
    const [down, across] = picture.grid, lines = new Map();
    for (const [slot, row, column] of this.patches) {
      const node = make("div", { class: "patch", role: "gridcell", tabindex: -1, "data-slot": slot, "data-row": row, "data-column": column });
      Object.assign(node.style, { left: 100 * column / across + "%", top: 100 * row / down + "%", width: 100 / across + "%", height: 100 / down + "%" });
      if (!lines.has(row)) lines.set(row, make("div", { role: "row" }));
      lines.get(row).append(node);
      this.drawn.set(slot, node);
    }
    marks.append(...lines.values());
  }

  draw() {
    const { lens } = this, { state, table } = lens;
    if (this.el.hidden) return;
    this.choice.value = state.picture;
    this.layer.value = state.site;
    this.layer.setAttribute("aria-valuetext", table.siteNames[state.site]);
    this.layerName.textContent = table.siteNames[state.site];
    this.limit.value = state.limit;
    this.limitName.textContent = state.limit + "%";
    this.overlay.checked = state.overlay;
    this.marks.hidden = !state.overlay;
    this.photo?.classList.toggle("muted", state.overlay && !this.detector && this.patches.length > 0);
    if (this.detector) this.drawBoxes();
    else if (this.patches.length) this.drawPatches();
    this.mark(state.slot);
  }

  showSwatches(found) {
    this.swatches.replaceChildren(...found.map(([shade, name, number]) => {
      const swatch = make("i");
      swatch.style.background = shade;
      return make("li", {}, swatch, make("bdi", { class: "code", title: name }, name), make("span", {}, String(number)));
    }));
  }

  drawPatches() {
    const { lens, picture: { palette } } = this, { table, state, mode } = lens, { top, logprob, tokens, answer } = lens.prompt, { k: K } = table;
    const byLabel = state.colour === "top", counts = new Map();
    const here = this.drawn.has(state.slot) ? state.slot : this.patches[0][0];
    for (const [slot] of this.patches) {
      const c = lens.at(state.site, slot), best = top[c * K], p = Math.exp(logprob[c * K]), node = this.drawn.get(slot), v = mode.value(lens.prompt, c);
      const shade = byLabel ? this.tint(palette, table.ids[best]) : lens.shade(c)?.[0];
      node.style.background = Number.isNaN(v) ? "none" : see(shade, byLabel ? FAINT + (STRONG - FAINT) * p : EVEN);
      node.setAttribute("aria-label", `${tokens[slot]}: ${table.label(best)} ${percent(p)}`);
      node.tabIndex = slot === here ? 0 : -1;
      if (best < 0) continue;
      const name = palette.includes(table.ids[best]) ? table.ids[best] : -1;
      counts.set(name, [shade, name < 0 ? "others" : table.label(best), (counts.get(name)?.[2] ?? 0) + 1]);
    }
    // In the order of the colours, the others last.
    const place = (name) => (name < 0 ? palette.length : palette.indexOf(name));
    this.showSwatches(byLabel ? [...counts].sort((a, b) => place(a[0]) - place(b[0])).map(([, entry]) => entry) : []);
    const c = lens.at(state.site, answer), best = top[c * K];
    this.answer.replaceChildren(make("span", { class: "soft" }, "answer at "), make("bdi", { class: "code" }, tokens[answer]), ": ",
      make("bdi", { class: "code" }, table.label(best)), " " + percent(Math.exp(logprob[c * K])));
    this.note.textContent = byLabel ? `colour: top ${table.noun} and its number of patches; opacity: its probability` : `shade: ${mode.name}`;
  }

  // Every query with its best class that is one; the probability of a target instead where that is shown.
  detections() {
    const { lens } = this, { table, state } = lens, { top, logprob, boxes, targetLogprob } = lens.prompt, { k: K } = table, found = [];
    const M = table.targets.length, t = /^p\d+$/.test(state.colour) ? Number(state.colour.slice(1)) : -1;
    for (let slot = 0; slot < lens.count; slot++) {
      const c = lens.at(state.site, slot), box = boxes.subarray(4 * c, 4 * c + 4);
      let i = c * K;
      while (i < c * K + K && (top[i] < 0 || table.none.includes(table.ids[top[i]]))) i++;
      if (!box.every(Number.isFinite) || (t < 0 && i === c * K + K)) continue;
      const p = Math.exp(t < 0 ? logprob[i] : targetLogprob[c * M + t]);
      if (Number.isNaN(p)) continue;
      found.push({ slot, box, p, id: t < 0 ? table.ids[top[i]] : table.targetIds[t], name: t < 0 ? table.label(top[i]) : table.targets[t] });
    }
    return found.sort((a, b) => b.p - a.p);
  }

  drawBoxes() {
    const { lens, marks } = this, { table, state } = lens, { tokens, palette } = lens.prompt;
    const found = this.detections(), above = found.filter((d) => d.p > state.limit / 100);
    const chosen = above.length ? above : found.slice(0, table.fewest), counts = new Map(), active = this.el.getRootNode().activeElement;
    const focused = marks.contains(active) ? Number(active.dataset.slot) : -1;
    marks.setAttribute("role", "group");
    marks.setAttribute("aria-label", "boxes of the queries; Enter pins a query");
    this.drawn.clear();
    const nodes = chosen.map(({ slot, box: [x, y, w, h], p, id, name }) => {
      const shade = this.tint(palette, id), tag = make("span", {}, `${name} ${percent(p)}`);
      const node = make("div", { class: above.length ? "box" : "box dashed", role: "button", tabindex: 0, "data-slot": slot,
        "aria-label": `${tokens[slot]}: ${name} ${percent(p)}` }, tag);
      Object.assign(node.style, { left: 100 * (x - w / 2) + "%", top: 100 * (y - h / 2) + "%", width: 100 * w + "%", height: 100 * h + "%", borderColor: shade });
      Object.assign(tag.style, { background: shade, color: ["#0072b2", "#d55e00"].includes(shade) ? "#ffffff" : "#000000" });
      this.drawn.set(slot, node);
      const key = shade === table.others ? -1 : id;
      counts.set(key, [shade, key < 0 ? "others" : name, (counts.get(key)?.[2] ?? 0) + 1]);
      return node;
    });
    // Large boxes come first, so that a small one inside can be pointed at.
    const area = (i) => chosen[i].box[2] * chosen[i].box[3];
    marks.replaceChildren(...[...nodes.keys()].sort((a, b) => area(b) - area(a)).map((i) => nodes[i]));
    // A tag that would cover a more probable one is shown only when its box is pointed at.
    const taken = [];
    for (const node of nodes) {
      const r = node.firstChild.getBoundingClientRect();
      if (taken.some((o) => r.left < o.right && o.left < r.right && r.top < o.bottom && o.top < r.bottom)) node.classList.add("covered");
      else taken.push(r);
    }
    if (focused >= 0) (this.drawn.get(focused) ?? this.layer).focus({ preventScroll: true });
    this.showSwatches([...counts.values()]);
    this.answer.textContent = above.length ? `${above.length} of ${lens.count} queries above ${state.limit}%`
      : `no query above ${state.limit}%; the ${chosen.length} best are dashed`;
    this.note.textContent = /^p\d+$/.test(state.colour) ? lens.mode.name : "colour: the best class of a query and its number of boxes";
  }
}

function slotOf(event) {
  const node = event.target instanceof Element && event.target.closest("[data-slot]");
  return node ? Number(node.dataset.slot) : -1;
}

// -- what can be taken along: text, rows, a drawing ----------------------------------------------------
const graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
const WIDE = /^[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u;
const columns = (text) => (/^[ -~]*$/.test(text) ? text.length : [...graphemes.segment(text)].reduce((n, { segment }) => n + (WIDE.test(segment) ? 2 : 1), 0));

// Text of at most so many columns of a fixed-width font.
function cut(text, most) {
  if (text.length <= most && columns(text) <= most) return text;
  let kept = "", used = 0;
  for (const { segment } of graphemes.segment(text)) {
    used += WIDE.test(segment) ? 2 : 1;
    if (used > most - 1) break;
    kept += segment;
  }
  return kept + "…";
}

// The cells as they are drawn, aligned for a fixed-width font.
function asText(lens) {
  const { table, prompt } = lens, sites = lens.rows, names = ["", "", ...sites.map((s) => table.sites[s])];
  const lines = names.map(() => []), add = (texts, right) => {
    const width = Math.max(...texts.map(columns));
    texts.forEach((text, i) => lines[i].push(right ? " ".repeat(width - columns(text)) + text : text + " ".repeat(width - columns(text))));
  };
  add(names, true);
  for (let p = 0; p < lens.count; p++)
    add([String(prompt.positions[p]), cut(prompt.tokens[p], 20), ...sites.map((s) => cut(lens.words(lens.at(s, p)), 20))]);
  return lines.map((line) => line.join("  ").trimEnd() + "\n").join("");
}

// A text in a table of others: quoted where it has to be, and never taken for a formula by a spreadsheet.
function field(text) {
  const safe = /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  return /[",\n\r']/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

// Seven digits are what a 32-bit float holds.
function number(v) {
  if (Number.isNaN(v)) return "";
  return Number.isFinite(v) ? String(Number(v.toPrecision(7))) : v > 0 ? "inf" : "-inf";
}

// One row a cell, with every site of the prompt.
function asRows(lens) {
  const { table, prompt } = lens, { k: K, targets } = table, M = targets.length, known = prompt.targetRank !== undefined;
  const ranks = Array.from({ length: K }, (_, i) => i), heat = prompt.heat ? [prompt.heatScale.name] : [];
  const names = ["entropy", "kl", "bound"].filter((name) => prompt[name]);
  const head = ["site", "position", "token", ...ranks.flatMap((i) => [`top_${i + 1}`, `prob_${i + 1}`]), ...names, ...heat,
    ...(known ? targets.flatMap((label) => ["probability of " + label, "rank of " + label]) : [])];
  const rows = [head.map(field).join(",")], quoted = table.labels.map(field);
  for (let s = 0; s < lens.depth; s++) {
    for (let p = 0; p < lens.count; p++) {
      const c = lens.at(s, p), row = [field(table.siteNames[s]), prompt.positions[p], field(prompt.tokens[p])];
      for (const i of ranks) row.push(prompt.top[c * K + i] < 0 ? "" : quoted[prompt.top[c * K + i]], number(Math.exp(prompt.logprob[c * K + i])));
      for (const name of names) row.push(number(prompt[name][c]));
      if (prompt.heat) row.push(number(prompt.heat[c]));
      if (known) targets.forEach((_, t) => row.push(number(Math.exp(prompt.targetLogprob[c * M + t])), prompt.targetRank[c * M + t] < 1 ? "" : prompt.targetRank[c * M + t]));
      rows.push(row.join(","));
    }
  }
  return rows.join("\n") + "\n";
}

const SIDE_MOST = 8192, AREA_MOST = 2 ** 25;  // pixels that browsers and viewers of pictures surely take
const PAPER = { light: { page: "#ffffff", ink: "#16191f", soft: "#5a6270" }, dark: { page: "#181d28", ink: "#e7eaf0", soft: "#9aa4b4" } };
const MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace", SANS = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

// The drawing as a list of what to paint, from the data: title, legend, header, names of sites, cells.
function drawing(lens, side, width) {
  const { table, prompt, mode, scale } = lens, sites = lens.rows, paper = PAPER[lens.theme], M = 16, TOP = 92;
  const w = Math.max(2 * M + side + width * lens.count, 420), h = TOP + HEAD + ROW * sites.length + M, items = [], letters = Math.floor((width - 9) / 7.3);
  const rect = (x, y, wide, high, fill) => items.push({ x, y, wide, high, fill });
  const text = (x, y, words, fill, { size = 12, font = MONO, weight = 400, anchor = "start" } = {}) => items.push({ x, y, words, fill, size, font, weight, anchor });
  rect(0, 0, w, h, paper.page);
  const fits = Math.floor((w - 2 * M) / 8);
  text(M, M + 14, cut(lens.title, fits), paper.ink, { size: 15, font: SANS, weight: 650 });
  text(M, M + 34, cut([table.lens, prompt.text].filter(Boolean).join(": "), fits), paper.soft, { font: SANS });
  const [low, high] = mode.ends(prompt), ramp = M + 7.3 * columns(low) + 6;
  text(M, M + 58, low, paper.ink);
  scale.forEach(([back], i) => rect(ramp + 2 * i, M + 48, 2, 12, back));
  text(ramp + 2 * scale.length + 6, M + 58, cut(`${high}  ${mode.name}`, Math.max(Math.floor((w - ramp - 2 * scale.length - 6 - M) / 7.3), 8)), paper.ink);
  const x = (p) => M + side + p * width;
  for (let p = 0; p < lens.count; p++) {
    text(x(p) + 5, TOP + 14, String(prompt.positions[p]), paper.soft, { size: 10 });
    text(x(p) + 5, TOP + 32, cut(prompt.tokens[p], letters), paper.ink);
  }
  sites.forEach((s, r) => {
    const y = TOP + HEAD + ROW * r;
    text(M + side - 8, y + 15, table.sites[s], paper.soft, { anchor: "end" });
    for (let p = 0; p < lens.count; p++) {
      const c = lens.at(s, p), shade = lens.shade(c);
      if (shade) rect(x(p), y, width - 1, ROW - 1, shade[0]);
      text(x(p) + 5, y + 15, cut(lens.words(c), letters), shade ? shade[1] : paper.ink);
    }
  });
  return { w, h, items };
}

// How much smaller it has to be drawn, at most 1.
const fitted = (w, h) => Math.min(1, SIDE_MOST / w, SIDE_MOST / h, Math.sqrt(AREA_MOST / (w * h)));

function asSvg({ w, h, items }, scale, title) {
  const svg = make("svg", { width: w * scale, height: h * scale, viewBox: `0 0 ${w} ${h}` }, make("title", {}, title));
  for (const { x, y, wide, high, fill, words, size, font, weight, anchor } of items) {
    if (words === undefined) svg.append(make("rect", { x, y, width: wide, height: high, fill }));
    else svg.append(make("text", { x, y, fill, "font-size": size, "font-family": font, "font-weight": weight, "text-anchor": anchor }, words));
  }
  return new XMLSerializer().serializeToString(svg) + "\n";
}

function asPng({ w, h, items }, scale) {
  const canvas = make("canvas", { width: Math.max(1, Math.floor(w * scale)), height: Math.max(1, Math.floor(h * scale)) }), paint = canvas.getContext("2d");
  paint.scale(scale, scale);
  paint.direction = "ltr";
  for (const { x, y, wide, high, fill, words, size, font, weight, anchor } of items) {
    paint.fillStyle = fill;
    if (words === undefined) paint.fillRect(x, y, wide, high);
    else if (size * scale >= 4) {  // smaller letters are only noise
      paint.font = `${weight} ${size}px ${font}`;
      paint.textAlign = anchor === "end" ? "right" : "left";
      paint.fillText(words, x, y);
    }
  }
  return new Promise((done, failed) => {
    canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("the browser made no picture of it"))), "image/png");
  });
}

// -- the menu in which they are offered -------------------------------------------------------------
class CopyMenu {
  constructor(lens, matrix, say) {
    Object.assign(this, { lens, matrix, say });
    this.button = make("button", { type: "button", class: "copy", "aria-haspopup": "menu", "aria-expanded": "false" }, "copy ▾");
    this.list = make("div", { class: "menu card", role: "menu", "aria-label": "copy" });
    this.list.hidden = true;
    this.el = make("div", { class: "copying" }, this.button, this.list);
    const kinds = [["text", "as text"], ["csv", "as CSV, a row a cell"], ["png", "as PNG"], ["svg", "as SVG"], ["link", "a link to this view"]];
    for (const [kind, label] of kinds) {
      if (kind === "link" && !lens.options.address && !lens.options.link) continue;
      const item = make("button", { type: "button", role: "menuitem", tabindex: -1, "data-kind": kind }, label);
      item.addEventListener("click", () => {
        this.close(true);
        this.take(kind).catch((error) => say(`could not be copied: ${error.message}`));
      });
      this.list.append(item);
    }
    this.button.addEventListener("click", () => (this.list.hidden ? this.open(0) : this.close(true)));
    this.button.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
      event.preventDefault();
      this.open(event.key === "ArrowDown" ? 0 : -1);
    });
    this.list.addEventListener("keydown", (event) => this.press(event));
    this.el.addEventListener("focusout", (event) => { if (!this.el.contains(event.relatedTarget)) this.close(false); });
  }

  get items() { return [...this.list.children]; }

  open(i) {
    if (this.lens.empty) return this.say("there is nothing to copy");
    this.list.hidden = false;
    this.list.style.translate = "";
    const edge = this.el.closest(".lens").getBoundingClientRect().left + 8, { left } = this.list.getBoundingClientRect();
    if (left < edge) this.list.style.translate = edge - left + "px";
    this.button.setAttribute("aria-expanded", "true");
    this.items.at(i).focus();
  }

  close(back) {
    this.list.hidden = true;
    this.button.setAttribute("aria-expanded", "false");
    if (back) this.button.focus();
  }

  press(event) {
    const { items } = this, i = items.indexOf(this.el.getRootNode().activeElement), n = items.length;
    const to = { ArrowDown: (i + 1) % n, ArrowUp: (i + n - 1) % n, Home: 0, End: n - 1 }[event.key];
    if (event.key === "Escape") this.close(true);
    else if (to !== undefined) items[to].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  async take(kind) {
    const { lens, matrix } = this, name = lens.title.replace(/[^\w.-]+/g, "-").replace(/^[-.]+|[-.]+$/g, "").slice(0, 80) || "lens";
    if (kind === "link") return this.give(this.lens.options.link?.() ?? window.location.href, "text/plain", name + ".txt", "the link was copied");
    if (kind === "text") return this.give(asText(lens), "text/plain", name + ".txt", "copied as text");
    if (kind === "csv") return this.give(asRows(lens), "text/csv", name + ".csv", `copied as CSV: ${whole(lens.depth * lens.count)} cells`);
    const drawn = drawing(lens, matrix.side, matrix.width), small = fitted(drawn.w, drawn.h);
    const size = small < 1 ? `, at ${(100 * small).toPrecision(2)}% of its size: more than ${whole(SIDE_MOST)} pixels are too many` : "";
    if (kind === "svg") return this.give(asSvg(drawn, small, lens.title), "image/svg+xml", name + ".svg", "copied as SVG" + size);
    const sharp = Math.min(2, SIDE_MOST / drawn.w, SIDE_MOST / drawn.h, Math.sqrt(AREA_MOST / (drawn.w * drawn.h)));
    return this.give(await asPng(drawn, sharp), "image/png", name + ".png", "copied as PNG" + size);
  }

  // To the clipboard where that is allowed, else as a file.
  async give(what, type, name, done) {
    try {
      if (document.featurePolicy?.allowsFeature("clipboard-write") === false) throw new DOMException("not in this frame", "NotAllowedError");
      if (typeof what === "string") await navigator.clipboard.writeText(what);
      else await navigator.clipboard.write([new ClipboardItem({ [type]: what })]);
      this.say(done);
    } catch (error) {
      const file = URL.createObjectURL(new Blob([what], { type })), link = make("a");
      [link.href, link.download] = [file, name];
      link.click();
      setTimeout(() => URL.revokeObjectURL(file), 60000);
      this.say(`${done.replace("copied", "saved")}: ${name} (no clipboard here: ${error.name})`);
    }
  }
}

// -- the whole -----------------------------------------------------------------------------------

export function mount(host, data, options = {}) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [style()];
  options = { ...options };  // titles change
  const lens = new Lens(data, options);
  const fire = (name, detail) => host.dispatchEvent(new CustomEvent(name, { detail, bubbles: true, composed: true }));
  const status = make("span", { class: "status soft", role: "status", "aria-live": "polite" });
  const live = make("div", { class: "live", "aria-live": "polite" });
  const say = (text) => { status.textContent = text; };

  // Level 0: another cell or pin; 1: another look of every cell; 2: another table, other sizes.
  // What is drawn anew may hold the focus: it comes back to the chosen cell.
  function withFocus(change) {
    const focused = matrix.el.contains(root.activeElement);
    change();
    if (focused && !matrix.el.contains(root.activeElement)) matrix.focus();
  }

  function show(level, how) {
    withFocus(() => draw(level, how));
  }

  function draw(level, { quiet = true, reveal = level !== 1 } = {}) {
    const { table, state } = lens;
    frame.dataset.theme = lens.theme;
    themeButton.textContent = lens.theme === "dark" ? "light theme" : "dark theme";
    [promptChoice.value, colourChoice.value, strideChoice.value] = [state.prompt, state.colour, state.stride];
    const [low, high] = lens.mode?.ends(lens.prompt) ?? ["", ""];
    [lowEnd.textContent, highEnd.textContent] = [low, high];
    ramp.style.background = `linear-gradient(to right, ${table.colours[lens.theme].map(([back]) => back).join(",")})`;
    if (level > 1) {
      view.layOut();
      main.classList.toggle("pictured", !view.el.hidden);
      matrix.layOut();
    }
    panel.el.hidden = lens.empty;
    if (lens.empty) return;
    view.draw();
    if (reveal) matrix.reveal(quiet, level > 0);
    else matrix.draw(level > 0);
    matrix.mark();
    point();
    panel.showActions();
    panel.showCurves();
  }

  function point(site = lens.state.site, slot = lens.state.slot) {
    panel.showCell(site, slot);
    matrix.point(site, slot);
    view.mark(slot);
  }

  // What the reader does.
  function act(change, { level, say: aloud = false } = {}) {
    const { site } = lens.state;
    Object.assign(lens.state, change);
    if ("stride" in change) lens.state.site = lens.nearest(site);
    const cell = ["prompt", "site", "slot", "pin"].some((name) => name in change) || lens.state.site !== site;
    const least = cell || "limit" in change || "overlay" in change ? 0 : 1;
    show(level ?? least, { quiet: false, reveal: cell || "stride" in change });
    if (aloud) live.textContent = lens.spoken(lens.state.site, lens.state.slot);
    keep();
    if (cell && !lens.empty) fire("lens-select", { ...lens.detail(), pinned: "pin" in change && !("prompt" in change) });
    fire("lens-state", { state: lens.write() });
  }

  function hover(site, slot) {
    if (lens.empty) return;
    point(site, slot);
    fire("lens-hover", site === undefined ? null : lens.detail(site, slot));
  }

  function keep() {
    if (options.address && window.location.protocol !== "about:") window.history.replaceState(null, "", "#" + lens.write());
  }

  // Parts
  const matrix = new Matrix(lens, act), panel = new Panel(lens, fire), view = new PictureView(lens, act, hover), menu = new CopyMenu(lens, matrix, say);
  const promptChoice = make("select", { class: "prompt", "aria-label": "prompt" });
  const colourChoice = make("select", { class: "colour" }), strideChoice = make("select", { class: "stride" });
  const [lowEnd, ramp, highEnd] = ["low", "ramp", "high"].map((name) => make("span", { class: name }));
  const themeButton = make("button", { type: "button", class: "theme" });
  const strides = make("label", { class: "strides" }, "layers ", strideChoice);
  const said = make("div", { class: "said" });
  const controls = make("div", { class: "controls" }, promptChoice, make("label", {}, "shade by ", colourChoice),
    make("span", { class: "legend" }, lowEnd, ramp, highEnd), strides, menu.el, ...(options.compact ? [] : [themeButton]));
  const provenance = make("dl", { tabindex: 0, "aria-label": "provenance" });
  const main = make("div", { class: "main" }, view.el, matrix.el, panel.el);
  const foot = make("div", { class: "foot" }, make("details", {}, make("summary", {}, "Provenance"), provenance), status);
  const frame = make("div", { class: "lens" }, make("div", { class: "header" }, said, controls), main, foot, live);

  // What is said about a table: header, choices, provenance.
  function describe() {
    const { table } = lens, words = [];
    if (!options.compact || options.title) words.push(make("h2", { class: "model" }, lens.title));
    if (!options.compact) words.push(make("span", { class: "facts soft" }, table.lens),
      make("span", { class: table.verified ? "verified" : "verified soft" }, table.verified ? "✓ " + table.verified : "not verified"),
      make("span", { class: "independent soft" }, table.independent));
    said.replaceChildren(...words);
    colourChoice.replaceChildren(...Object.entries(lens.modes).map(([value, mode]) => make("option", { value }, mode.name)));
    promptChoice.hidden = table.prompts.length < 2;
    promptChoice.replaceChildren(...table.prompts.map((p, n) => make("option", { value: n }, `${n + 1}: ${p.text.length > 60 ? p.text.slice(0, 59) + "…" : p.text}`)));
    const offered = STRIDES.filter(([n]) => n === 1 || n < lens.depth || n === lens.state.stride);
    strides.hidden = offered.length < 2;
    strideChoice.replaceChildren(...offered.map(([value, name]) => make("option", { value }, name)));
    provenance.replaceChildren(...table.provenance.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  // Events
  const place = (event) => {
    const node = event.target instanceof Element && event.target.closest("[data-p]");
    return node && { site: node.dataset.s === undefined ? lens.state.site : Number(node.dataset.s), slot: Number(node.dataset.p) };
  };
  matrix.el.addEventListener("click", (event) => {
    const cell = place(event);
    if (!cell) return;
    act({ ...cell, pin: cell.slot });
    matrix.focus();
  });
  matrix.el.addEventListener("mouseover", (event) => {
    const cell = place(event);
    if (cell) hover(cell.site, cell.slot);
  });
  matrix.el.addEventListener("mouseleave", () => hover());
  matrix.el.addEventListener("scroll", () => {
    const { scrollLeft: left, scrollTop: top } = matrix.el, { quiet } = matrix;
    matrix.draw();
    if (quiet && quiet.left === left && quiet.top === top) return;
    matrix.quiet = null;
    fire("lens-scroll", { left, top, column: left / matrix.width });
  }, { passive: true });
  promptChoice.addEventListener("change", () => {
    const prompt = Number(promptChoice.value), slot = lens.table.prompts[prompt].answer;
    act({ prompt, picture: 0, site: lens.depth - 1, slot, pin: slot }, { level: 2 });
  });
  colourChoice.addEventListener("change", () => act({ colour: colourChoice.value }));
  strideChoice.addEventListener("change", () => act({ stride: Number(strideChoice.value) }, { level: 2 }));
  themeButton.addEventListener("click", () => act({ theme: lens.theme === "dark" ? "light" : "dark" }));
  const onScheme = () => show(1), onHash = () => { lens.read(window.location.hash.slice(1)); show(2); };
  lens.prefersDark.addEventListener("change", onScheme);
  if (options.address) window.addEventListener("hashchange", onHash);

  // Start
  lens.read(options.address ? window.location.hash.slice(1) : options.state ?? "");
  root.replaceChildren(frame);
  describe();
  show(2);
  let seen = [matrix.el.clientWidth, matrix.el.clientHeight];
  const watch = new ResizeObserver(() => {
    const grown = Boolean(options.grow) && host.clientWidth <= STACKED + 36;  // with what is around the grid; no scroll bar counts
    host.toggleAttribute("data-stacked", grown);  // a host that may grow does so by a style of its own
    frame.style.setProperty("--tall", grown ? "100vh" : host.clientHeight + "px");
    const now = [matrix.el.clientWidth, matrix.el.clientHeight];
    if (now[0] !== seen[0] && !lens.empty && !seen[0]) show(2);  // it was not to be seen
    else if (now[0] !== seen[0] && !lens.empty) {
      const column = matrix.el.scrollLeft / matrix.width, { slot } = lens.state;
      const there = slot >= column && (slot + 1 - column) * matrix.width <= seen[0] - matrix.side + 1;
      withFocus(() => {
        matrix.layOut();
        matrix.scroll({ left: column * matrix.width }, true, true);
        if (there) matrix.reveal(true);  // the chosen cell was in view, and stays there
      });
      point();
      view.draw();
    } else if (now[1] !== seen[1]) matrix.draw();
    seen = now;
  });
  watch.observe(host);
  watch.observe(matrix.el);

  let waiting = 0;
  return {
    update(next, { title = options.title, actions = options.actions } = {}) {
      Object.assign(options, { title, actions });
      lens.exchange(next);
      describe();
      show(2);
      keep();
    },
    append(next) {
      const added = new Table(next), { table } = lens;
      if (lens.empty && !table.prompts.some((p) => p.positions.length)) return this.update(next);
      const n = table.prompts.length - 1, follow = matrix.atEnd && lens.state.prompt === n;
      table.append(added, n);
      if (waiting || lens.state.prompt !== n) return;
      waiting = requestAnimationFrame(() => {  // many positions may come in one frame
        waiting = 0;
        lens.table.measure();
        [lowEnd.textContent, highEnd.textContent] = lens.mode.ends(lens.prompt);
        withFocus(() => {
          matrix.extend();
          if (follow) matrix.scroll({ left: matrix.el.scrollWidth }, true);
          matrix.draw(true);
        });
      });
    },
    select({ prompt, site, slot, pin } = {}) {
      const { state } = lens, other = Number.isInteger(prompt) && prompt !== state.prompt && lens.table.prompts[prompt];
      if (other) Object.assign(state, { prompt, picture: 0, slot: other.answer, pin: other.answer });
      if (Number.isInteger(site)) state.site = within(site, lens.depth - 1);
      if (Number.isInteger(slot)) state.slot = within(slot, lens.count - 1);
      if (Number.isInteger(pin)) state.pin = within(pin, lens.count - 1);
      show(other ? 2 : 0);
      keep();
    },
    state: () => lens.write(),
    restore(text) {
      lens.read(text);
      show(2);
      keep();
    },
    setTheme(theme) {
      lens.preferred = ["light", "dark"].includes(theme) ? theme : "";
      lens.state.theme = "";
      show(1);
      keep();
    },
    scroll({ left, top, column }) {  // columns of another grid can have another width
      matrix.scroll({ left: column === undefined ? left : column * matrix.width, top }, true);
    },
    destroy() {
      cancelAnimationFrame(waiting);
      watch.disconnect();
      lens.prefersDark.removeEventListener("change", onScheme);
      window.removeEventListener("hashchange", onHash);
      root.replaceChildren();
    },
  };
}

// -- the notebook widget (anywidget) ---------------------------------------------------------------
function render({ model, el }) {
  const host = make("div"), data = model.get("data");
  const pictured = data.prompts.some((p) => p.pictures.length || p.boxes);
  host.style.height = (pictured ? 920 : Math.min(300 + ROW * data.sites.length, 860)) + "px";
  el.append(host);
  const grid = mount(host, data, { theme: model.get("theme"), state: model.get("state") });
  const chosen = () => {
    const { siteNames, prompts } = model.get("data"), given = model.get("selection");
    if (!given) return;
    const site = siteNames.indexOf(given.site), slot = prompts[given.prompt]?.positions.indexOf(given.position) ?? -1;
    if (site >= 0 && slot >= 0) grid.select({ prompt: given.prompt, site, slot });
  };
  const send = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  host.addEventListener("lens-select", ({ detail: { prompt, siteName, position, token } }) => send("selection", { prompt, site: siteName, position, token }));
  host.addEventListener("lens-state", ({ detail }) => send("state", detail.state));
  const follow = {
    "change:data": () => grid.update(model.get("data")),
    "change:selection": chosen,
    "change:theme": () => grid.setTheme(model.get("theme")),
    "change:state": () => { if (model.get("state") !== grid.state()) grid.restore(model.get("state")); },
  };
  for (const [name, change] of Object.entries(follow)) model.on(name, change);
  chosen();
  return () => {
    for (const [name, change] of Object.entries(follow)) model.off(name, change);
    grid.destroy();
  };
}

export default { render };

// -- looks -----------------------------------------------------------------------------------------
// A constructed stylesheet: it needs no permission in a content security policy, and does not reach outside.
let sheet;
function style() {
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(CSS);
  }
  return sheet;
}

const CSS = `
:host { display: block; min-height: 0; min-width: 0; }
.lens {
  --page: #f6f7f8; --card: #ffffff; --ink: #16191f; --soft: #5a6270; --line: #dfe3e8; --strong: #868f9c;
  --accent: #b4430f; --bar: #3490b0; --good: #1c6b45;
  --text: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --code: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light; container-type: inline-size; height: 100%; overflow: auto; display: flex; flex-direction: column;
  background: var(--page); color: var(--ink); font: 14px/1.4 var(--text); padding: 14px 18px 10px; position: relative;
}
.lens[data-theme="dark"] {
  color-scheme: dark;
  --page: #0f1218; --card: #181d28; --ink: #e7eaf0; --soft: #9aa4b4; --line: #2a3140; --strong: #687387;
  --accent: #ff9d5c; --bar: #2f9aa0; --good: #7fd1a5;
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.header { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 18px; margin-bottom: 10px; flex: none; }
.said { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; min-width: 0; overflow-wrap: anywhere; }
.said:empty, .said > :empty { display: none; }
h2 { font-size: 17px; font-weight: 650; margin: 0; }
h3 { font-size: 14px; font-weight: 650; margin: 0; }
h4 { font-size: 12px; font-weight: 600; margin: 10px 0 2px; }
.soft { color: var(--soft); }
.verified:not(.soft) { color: var(--good); }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; margin-left: auto; min-width: 0; }
.controls label { display: flex; align-items: center; gap: 6px; min-width: 0; max-width: 100%; white-space: nowrap; }
select, button {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--strong); border-radius: 6px;
  padding: 3px 8px; max-width: min(320px, 100%); min-width: 0;
}
button { cursor: pointer; }
.legend { display: flex; align-items: center; gap: 6px; font-size: 12px; font-variant-numeric: tabular-nums; }
.ramp { width: 110px; height: 12px; border-radius: 3px; border: 1px solid var(--line); }
.copying { position: relative; }
.menu { position: absolute; right: 0; top: calc(100% + 4px); z-index: 5; display: grid; padding: 4px; min-width: 170px; box-shadow: 0 6px 20px #0004; }
.menu button { border: 0; background: none; text-align: left; white-space: nowrap; padding: 5px 8px; }
.menu button:is(:hover, :focus) { background: var(--line); }
.menu button:focus-visible { outline-offset: -2px; }
.main { display: grid; grid-template: "grid panel" minmax(0, 1fr) / minmax(0, 1fr) 360px; gap: 14px; align-items: start; flex: 1 1 0; min-height: 240px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.grid {
  grid-area: grid; overflow: auto; overscroll-behavior: contain; max-height: min(100%, 100vh); position: relative; outline-offset: -2px;
  font: 12px/1 var(--code);
}
.space { position: relative; min-width: 100%; }
.nothing { padding: 0 10px; }
.row { position: absolute; left: 0; width: 100%; height: 23px; }
.head { position: sticky; top: 0; z-index: 2; height: 42px; background: var(--card); }
.side, .top, .cell { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; height: 100%; }
.top, .cell { position: absolute; top: 0; contain: strict; }
.side {
  position: sticky; left: 0; z-index: 1; background: var(--card); color: var(--soft); text-align: right;
  padding: 6px 8px 0 0; border-right: 1px solid var(--line);
}
.head .side, .top { border-bottom: 1px solid var(--line); }
.top { background: var(--card); padding: 6px 6px 0; cursor: pointer; }
.top small { display: block; font-size: 10px; color: var(--soft); margin-bottom: 5px; }
.top.pinned { box-shadow: inset 0 -3px var(--accent); }
.side.now, .top.now { color: var(--accent); }
.cell { padding: 6px 6px 0; cursor: pointer; border: 0 solid var(--card); border-width: 0 1px 1px 0; unicode-bidi: isolate; }
.cell:hover { outline: 2px solid var(--ink); outline-offset: -2px; }
.cell.now { outline: 2px solid var(--accent); outline-offset: -2px; }
.cell:focus-visible { outline: 3px solid var(--accent); outline-offset: -3px; box-shadow: inset 0 0 0 4px var(--card); }
.panel { grid-area: panel; padding: 12px 14px; max-height: 100%; overflow: auto; outline-offset: -2px; }
.code { font-family: var(--code); unicode-bidi: isolate; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(0, 9em) 1fr 5em; gap: 3px 8px; align-items: center; margin: 8px 0; font-size: 13px; }
.bars .code { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-size: 12px; }
.bars i { display: block; height: 11px; background: var(--bar); border-radius: 2px; min-width: 1px; }
.bars span:nth-child(3n), dd { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: 1fr auto; gap: 2px 12px; margin: 8px 0; font-size: 13px; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0; }
.actions { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; font-size: 13px; }
.actions:empty { display: none; }
.actions .soft { flex-basis: 100%; }
.view { display: flex; flex-wrap: wrap; gap: 12px 20px; padding: 14px; align-items: flex-start; grid-area: view; }
.stage { position: relative; flex: none; background: var(--line); overflow: hidden; border-radius: 4px; }
.photo { display: block; width: 100%; height: 100%; }
.photo.muted { filter: grayscale(1); }
.marks { position: absolute; inset: 0; }
.marks [role="row"] { display: contents; }
.patch, .box { position: absolute; cursor: pointer; }
.patch:hover, .patch.now, .patch:focus-visible { outline: 2px solid #fff; outline-offset: -2px; box-shadow: 0 0 0 1px #000, inset 0 0 0 3px #000; z-index: 1; }
.box { border: 2px solid; }
.box.dashed { border-style: dashed; }
.box.now, .box:hover, .box:focus-visible { outline: 2px solid #fff; box-shadow: 0 0 0 3px #000; z-index: 3; }
.box span {
  position: absolute; left: 0; top: 0; z-index: 2; padding: 1px 4px; font-size: 11px; line-height: 1.2; white-space: nowrap; max-width: 200px;
  overflow: hidden; text-overflow: ellipsis;
}
.box.covered span { visibility: hidden; }
.box.covered:is(:hover, :focus-visible, .now) span { visibility: visible; }
.steer { flex: 1 1 230px; min-width: 200px; max-width: 420px; display: grid; gap: 10px; font-size: 13px; }
.steer label.slide { display: grid; grid-template-columns: 5.5em 1fr; gap: 0 8px; align-items: center; }
.steer output { grid-column: 2; font-family: var(--code); font-size: 12px; overflow-wrap: anywhere; }
.steer input[type="range"] { width: 100%; accent-color: var(--accent); margin: 0; }
.steer p { margin: 0; }
.swatches { list-style: none; margin: 0; padding: 0; display: grid; gap: 3px; }
.swatches li { display: grid; grid-template-columns: 14px minmax(0, 1fr) auto; gap: 8px; align-items: center; }
.swatches i { width: 14px; height: 14px; border-radius: 3px; }
.swatches .code { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-size: 12px; }
.swatches span:last-child { font-variant-numeric: tabular-nums; color: var(--soft); }
.main.pictured { flex: none; grid-template: "view panel" auto "grid panel" 1fr / minmax(0, 1fr) 360px; }
.main.pictured .grid { max-height: clamp(220px, 0.9 * var(--tall, 800px), 100vh); }
.main.pictured .panel { position: sticky; top: 0; max-height: max(240px, var(--tall, 800px) - 24px); }
.over { border-top: 1px solid var(--line); margin-top: 10px; padding-top: 10px; }
.over svg { display: block; width: 100%; height: auto; }
.over svg text { font: 10px var(--text); fill: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; margin-top: 6px; }
.key span { display: inline-flex; align-items: center; gap: 5px; max-width: 100%; overflow: hidden; }
.key svg { width: 22px; height: 8px; flex: none; }
.foot { display: flex; flex-wrap: wrap; gap: 4px 20px; justify-content: space-between; margin-top: 8px; font-size: 12px; color: var(--soft); flex: none; }
.foot dl { grid-template-columns: auto 1fr; max-height: 220px; overflow: auto; }
.foot dd { text-align: left; overflow-wrap: anywhere; }
.live { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@container (max-width: 860px) {
  .controls { margin-left: 0; }
  .main { flex: none; grid-template: "grid" auto "panel" auto / minmax(0, 1fr); }
  .grid { max-height: clamp(220px, 0.65 * var(--tall, 800px), 100vh); }
  .panel { max-height: none; }
  .main.pictured { grid-template: "view" auto "panel" auto "grid" auto / minmax(0, 1fr); }
  .main.pictured .panel { position: static; max-height: none; }
}
@container (max-width: 520px) { .header { margin-bottom: 8px; } .legend .ramp { width: 70px; } }
`;
