// The page of `logitlab serve`: a form, the events that come back, and the grids that they fill.
// What comes from a model, a prompt or a file only ever becomes text nodes or values, never markup.
import { mount } from "/static/lens_grid.js";
import * as form from "/static/request.js";
import { RequestError, ask, run } from "/static/stream.js";

const byId = (id) => document.getElementById(id);
const { field, value, put } = form;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, one] of Object.entries(attributes)) node.setAttribute(name, one);
  node.append(...children);
  return node;
}

function percent(p) {
  if (p >= 0.0995) return (100 * p).toFixed(1) + "%";
  return p >= 0.0001 ? (100 * p).toPrecision(2) + "%" : p === 0 ? "0%" : p.toExponential(1);
}

let about = { models: [], lenses: [], vectors: [], limits: {} };
let facts = null; // about the model that is loaded
let work = null; // { id, abort } of what is running
let grids = []; // { host, handle, data, title }
let view = ""; // state of the first grid, kept in the address

// -- theme ----------------------------------------------------------------------------------------
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = localStorage.getItem("logitlab-theme") ?? "";
const theme = () => chosenTheme || (prefersDark.matches ? "dark" : "light");

function showTheme() {
  document.documentElement.dataset.theme = theme();
  byId("theme").textContent = theme() === "dark" ? "Light theme" : "Dark theme";
  for (const { handle } of grids) handle.setTheme(theme());
}
byId("theme").addEventListener("click", () => {
  chosenTheme = theme() === "dark" ? "light" : "dark";
  localStorage.setItem("logitlab-theme", chosenTheme);
  showTheme();
});
prefersDark.addEventListener("change", showTheme);

// -- what is going on -------------------------------------------------------------------------------
function say(...parts) {
  byId("status").replaceChildren(...parts);
}

function complain(error) {
  byId("message").textContent = error instanceof Error ? error.message : String(error);
  byId("message").hidden = false;
  if (!(error instanceof RequestError)) throw error;
}

function showProgress(done, total) {
  const bar = byId("progress");
  bar.hidden = false;
  if (total) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute("value");
}

function onEvent(name, data) {
  if (name === "queued") {
    if (work) work.id = data.id;
    if (data.waiting) say(`waiting: ${data.waiting} before this`);
  } else if (name === "started") say("running");
  else if (name === "progress") {
    say(`${data.what}${data.total ? `: ${data.done.toLocaleString("en")} of ${data.total.toLocaleString("en")}` : ""}`);
    showProgress(data.done, data.total);
  }
}

// One piece of work at a time: a new one takes the place of what is running.
async function does(request, { quiet = false, step = () => {} } = {}) {
  work?.abort.abort();
  const mine = { abort: new AbortController(), id: null };
  work = mine;
  byId("message").hidden = true;
  byId("cancel").disabled = false;
  byId("results").setAttribute("aria-busy", "true");
  if (!quiet) say("asking");
  showProgress(0, 0);
  try {
    return await run(request, (name, data) => {
      if (work !== mine) return;
      if (name === "step") step(data);
      else onEvent(name, data);
    }, mine.abort.signal);
  } catch (error) {
    if (work !== mine) throw new RequestError("another request took its place", "replaced");
    if (error.kind === "cancelled") say("cancelled");
    else say("");
    throw error;
  } finally {
    if (work === mine) {
      work = null;
      byId("cancel").disabled = true;
      byId("progress").hidden = true;
      byId("results").removeAttribute("aria-busy");
    }
  }
}

async function tried(action) {
  try {
    await action();
  } catch (error) {
    if (error.kind !== "replaced" && error.kind !== "cancelled") complain(error);
  }
}

function cancel() {
  if (work?.id !== null && work?.id !== undefined)
    ask(`/api/cancel/${encodeURIComponent(work.id)}`, { method: "POST" }).catch(() => {}); // the abort below ends it too
  work?.abort.abort();
}
byId("cancel").addEventListener("click", cancel);

// -- grids ------------------------------------------------------------------------------------------
function clear() {
  pair.base = pair.source = null;
  for (const { handle } of grids) handle.destroy();
  grids = [];
  byId("grids").replaceChildren();
  byId("written").hidden = byId("outcome").hidden = byId("python").hidden = true;
}

function shownGrids(given, { actions = () => [], keep = true } = {}) {
  const before = keep && grids.length ? grids[0].handle.state() : view;
  for (const { handle } of grids) handle.destroy();
  byId("grids").className = given.length > 1 ? "several" : "";
  byId("grids").replaceChildren();
  const hosts = given.map(({ title }) => {
    const host = make("div", { class: "lens" });
    byId("grids").append(make("section", { "aria-label": title }, host));
    return host;
  });
  // All places are there before the first grid measures its own.
  grids = given.map(({ title, data }, n) => ({ host: hosts[n], data, title,
    handle: mount(hosts[n], data, { theme: theme(), title, compact: true, state: before, actions: actions(n) }) }));
  grids.forEach((grid, n) => link(grid, n));
}

// Grids beside each other show the same cell, and scroll together.
function link({ host }, n) {
  const others = () => grids.filter((_, i) => i !== n);
  host.addEventListener("lens-select", ({ detail }) => {
    for (const { handle } of others()) handle.select({ site: detail.site, slot: detail.slot, ...(pair.source ? {} : { pin: detail.pin }) });
    if (detail.pinned && grids[n].patches) tried(() => patchCell(detail));
  });
  host.addEventListener("lens-scroll", ({ detail }) => {
    for (const { handle } of others()) handle.scroll(detail);
  });
  host.addEventListener("lens-state", ({ detail }) => {
    if (n === 0) view = detail.state;
    writeAddress();
  });
  host.addEventListener("lens-action", ({ detail }) => {
    if (detail.name === "steer") steerHere(detail);
  });
}

const steerAction = { name: "steer", label: "Steer here", title: "Use this site for steering" };

function steerHere({ siteName }) {
  put("site", siteName);
  put("do", "steer");
  showForm();
  field("strength").focus();
}

function showResult(result) {
  byId("python").hidden = !result.python;
  byId("python").querySelector("pre").textContent = result.python ?? "";
  const took = result.seconds ? `read in ${Math.round(1000 * result.seconds.reading)} ms` : "done";
  say([took, ...(result.notes ?? [])].join(" · "));
  writeAddress();
}

// -- outcome: the answer before and after ---------------------------------------------------------------
function bar(p) {
  const inside = make("i");
  inside.style.width = `${100 * p}%`;
  return make("td", {}, make("span", { class: "track" }, inside), percent(p));
}

function showOutcome(title, { tokens, kl }) {
  const rows = tokens.map(({ token, before, after }) =>
    make("tr", after > before ? { class: "up" } : {}, make("td", {}, make("bdi", {}, token)), bar(before), bar(after)));
  const head = make("tr", {}, ...["next token", "before", "after"].map((name) => make("th", { scope: "col" }, name)));
  byId("outcome").replaceChildren(make("h2", {}, title), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
    make("p", { class: "soft" }, `KL(before ‖ after) at the last position: ${kl.toPrecision(3)} nats`));
  byId("outcome").hidden = false;
}

// -- tasks --------------------------------------------------------------------------------------------
async function read() {
  const result = await does(form.request());
  clear();
  shownGrids(result.grids, { actions: () => (facts?.words ? [steerAction] : []), keep: false });
  showResult(result);
}

async function compare() {
  const result = await does(form.request());
  clear();
  shownGrids(result.grids, { keep: false });
  showResult(result);
}

const pair = { base: null, source: null };

// In the address is also what was patched last: "site,position" of the source, or "all".
async function patch(last = "") {
  const result = await does(form.request());
  clear();
  [pair.base, pair.source] = result.grids;
  showPair(pair.base);
  put("patched", last);
  showResult(result);
  say("click a cell of the source: its state goes into the run of the prompt");
  if (last === "all") await patchAll();
  else if (last) await patchCell({ siteName: last.split(",")[0], position: Number(last.split(",")[1]) });
}

// A grid on the left, and the source on the right, whose cells are patched from when they are clicked.
function showPair(left) {
  shownGrids([left, pair.source]);
  grids[1].patches = true;
}

function target(position) {
  const positions = (one) => one.data.prompts[0].positions, base = positions(pair.base), source = positions(pair.source);
  if (value("into") === "end") return base.at(-1) - (source.at(-1) - position);
  if (value("into") === "pinned") {
    const pinned = Number(new URLSearchParams(grids[0].handle.state()).get("pin"));
    return base[pinned] ?? base.at(-1);
  }
  return position;
}

async function patchCell({ siteName, position }) {
  const into = target(position);
  if (into < 0 || into > pair.base.data.prompts[0].positions.at(-1))
    throw new RequestError(`the prompt has no position ${into}: choose another cell, or where it goes`, "input");
  const result = await does(form.patchAt(siteName, into, position));
  showPair(result.grids[1]);
  put("patched", `${siteName},${position}`);
  showOutcome(`${siteName}, position ${position} of the source into position ${into}`, result.outcome);
  showResult(result);
}

// The likeliest next tokens of the source's run and of the prompt's: what patching is measured by.
function answers() {
  const likeliest = ({ data }) => {
    const [prompt] = data.prompts, { top } = prompt, width = data.k;
    const at = decoded(top).length - prompt.positions.length * width + (prompt.positions.length - 1) * width;
    return `id:${data.ids[decoded(top)[at]]}`;
  };
  const [right, wrong] = [likeliest(pair.source), likeliest(pair.base)];
  return right === wrong ? [right] : [right, wrong];
}

const KINDS = { u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
const decoded = ({ dtype, data }) => new KINDS[dtype](Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer);

async function patchAll() {
  if (!pair.base) await patch();
  const result = await does(form.patchAll(answers()));
  showPair(result.grids[0]);
  put("patched", "all");
  byId("outcome").hidden = true;
  showResult(result);
}
byId("patch-all").addEventListener("click", () => tried(patchAll));

async function steer() {
  const result = await does(form.request());
  clear();
  shownGrids(result.grids, { keep: false });
  if (result.texts) {
    const told = ["plain", "steered"].map((name, n) => make("div", {}, make("h2", {}, name), make("p", {}, make("bdi", {}, result.texts[n]))));
    byId("written").replaceChildren(make("div", { class: "texts" }, ...told));
    byId("written").hidden = false;
  }
  const { vector, states } = result.norm ?? {};
  const size = vector === undefined ? "" : `; the vector is ${vector.toPrecision(3)} long, states there ${states.toPrecision(3)}`;
  showOutcome(`${value("site")}, strength ${value("strength")}${size}`, result.outcome);
  showResult(result);
}

const breaks = (text) => /^\n+$/.test(text);

async function write() {
  clear();
  const told = make("p", {}, make("bdi", { class: "asked" }, value("chat") ? "" : value("text")));
  byId("written").replaceChildren(make("h2", {}, "written"), told);
  byId("written").hidden = false;
  const step = ({ index, token, text, logprob, data }) => {
    if (grids.length) grids[0].handle.append(data);
    else shownGrids([{ title: "as it was written", data }], { keep: false });
    const p = Math.exp(logprob);
    const word = make("button", { type: "button", class: "word", title: `${token} ${percent(p)}` }, make("bdi", {}, breaks(text) ? token : text));
    word.style.borderBottom = `3px solid color-mix(in srgb, var(--bar) ${Math.round(100 * p)}%, var(--line))`;
    word.addEventListener("click", () => grids[0]?.handle.select({ slot: index, pin: index }));
    told.append(word, breaks(text) ? text : ""); // breaks of lines stay breaks
    say(`${index + 1} tokens`);
  };
  const result = await does(form.request(), { step });
  showResult(result);
}

const TASKS = { read, compare, steer, generate: write };

// -- form -----------------------------------------------------------------------------------------------
function options(name, entries) {
  field(name).replaceChildren(...entries.map((one) => make("option", { value: one }, one)));
}

function showForm() {
  const task = value("do"), chat = Boolean(value("chat"));
  for (const node of document.querySelectorAll("[data-for]")) node.hidden = node.dataset.for !== task;
  for (const node of document.querySelectorAll("[data-by]")) node.hidden = node.dataset.by !== value("by");
  for (const node of document.querySelectorAll("[data-kind]")) node.hidden = node.dataset.kind !== value("kind");
  for (const node of document.querySelectorAll("[data-sample]")) node.hidden = !value("sample");
  byId("strength-shown").value = Number(value("strength")).toFixed(1);
  byId("text-field").hidden = chat;
  byId("messages").hidden = byId("add-message").hidden = !chat;
  byId("open-image").hidden = !facts?.images;
  byId("images").hidden = !form.images.length;
  if (chat && !form.messages.length) form.messages.push({ role: "user", content: value("text") });
  showMessages();
  showImages();
}

function showMessages() {
  if (byId("messages").hidden || byId("messages").contains(document.activeElement)) return;
  byId("messages").replaceChildren(...form.messages.map((one, n) => {
    const role = make("select", { "aria-label": `role of message ${n + 1}` }, ...["system", "user", "assistant"].map((r) => make("option", { value: r }, r)));
    role.value = one.role;
    role.addEventListener("change", () => { one.role = role.value; });
    const text = make("textarea", { rows: 3, "aria-label": `message ${n + 1}`, spellcheck: "false" });
    text.value = one.content;
    text.addEventListener("input", () => { one.content = text.value; });
    const away = make("button", { type: "button", class: "quiet", "aria-label": `remove message ${n + 1}` }, "Remove");
    away.addEventListener("click", () => { form.messages.splice(n, 1); away.blur(); showForm(); });
    return make("div", { class: "message" }, role, make("span"), away, text);
  }));
}
byId("add-message").addEventListener("click", () => {
  const last = form.messages.at(-1)?.role;
  form.messages.push({ role: last === "user" ? "assistant" : "user", content: "" });
  showForm();
  [...byId("messages").querySelectorAll("textarea")].at(-1).focus();
});

function showImages() {
  byId("images").replaceChildren(...form.images.map((url, n) => {
    const away = make("button", { type: "button", "aria-label": `remove picture ${n + 1}` }, "×");
    away.addEventListener("click", () => { form.images.splice(n, 1); showForm(); });
    return make("li", {}, make("img", { src: url, alt: `picture ${n + 1}` }), away);
  }));
}

const asDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new RequestError(`${file.name} cannot be read`, "input"));
  reader.readAsDataURL(file);
});

async function addImages(files) {
  for (const file of files) {
    if (!["image/png", "image/jpeg", "image/webp"].includes(file.type))
      throw new RequestError(`${file.name} is no PNG, JPEG or WebP picture`, "input");
    if (about.limits.upload_bytes && 1.4 * file.size > about.limits.upload_bytes)
      throw new RequestError(`${file.name} is too large: at most ${Math.floor(about.limits.upload_bytes / 1.4e6)} MB`, "input");
    form.images.push(await asDataUrl(file));
  }
  showForm();
}

byId("open-image").addEventListener("click", () => byId("image").click());
byId("image").addEventListener("change", (event) => tried(() => addImages(event.target.files)).then(() => { event.target.value = ""; }));
byId("ask").addEventListener("dragover", (event) => event.preventDefault());
byId("ask").addEventListener("drop", (event) => {
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  if (files.some((file) => file.type.startsWith("image/")) && facts?.images) tried(() => addImages(files));
  else if (files.length) tried(() => openText(files[0]));
});

async function openText(file) {
  const most = about.limits.prompt_characters ?? Infinity;
  if (file.size > 4 * most) throw new RequestError(`${file.name} is too long: a prompt has at most ${most.toLocaleString("en")} characters`, "input");
  const text = new TextDecoder("utf-8", { fatal: true });
  try {
    put("text", text.decode(await file.arrayBuffer()));
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new RequestError(`${file.name} is not UTF-8 text: save it as UTF-8`, "input");
  }
  put("chat", "");
  showForm();
}
byId("open-file").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => tried(() => openText(event.target.files[0])).then(() => { event.target.value = ""; }));

async function load() {
  const name = value("model");
  if (facts?.model === name) return;
  byId("facts").textContent = "";
  facts = await does({ do: "load", model: name });
  byId("facts").textContent = [`${facts.layers} layers`, facts.verified && `✓ ${facts.verified}`].filter(Boolean).join(" · ");
  byId("site-list").replaceChildren(...facts.sites.map((one) => make("option", { value: one })));
  form.keepDefault("site", facts.sites[Math.floor(facts.sites.length / 2)] ?? "");
  field("chat").disabled = !facts.chat;
  if (!facts.chat) put("chat", "");
  showForm();
}

async function go(again = false) {
  await load();
  if (value("do") === "patch") await patch(again ? value("patched") : "");
  else await TASKS[value("do")]();
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); tried(() => go()); });
let later = 0;
byId("ask").addEventListener("input", (event) => {
  if (["do", "by", "kind", "strength"].includes(event.target.name)) showForm();
  if (event.target.name !== "strength" || !grids.length) return;
  clearTimeout(later); // the answer follows the slider
  later = setTimeout(() => tried(() => go()), 350);
});
byId("ask").addEventListener("change", (event) => {
  if (event.target.name === "model") tried(load);
  else if (event.target.name) showForm();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); tried(() => go()); }
  else if (event.key === "Escape" && work && !byId("history").open) cancel();
});

// -- address ----------------------------------------------------------------------------------------------
function writeAddress() {
  const text = form.address(view);
  const long = text.length > form.LONGEST_LINK;
  window.history.replaceState(null, "", long ? "#" : `#${text}`);
  return !long;
}

byId("link").addEventListener("click", () => tried(async () => {
  if (form.images.length) throw new RequestError("a link holds no pictures: the history does", "input");
  if (!writeAddress()) throw new RequestError("this prompt is too long for a link: the history holds it", "input");
  await copy(window.location.href, "link");
}));

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    throw new RequestError(`the browser does not let this page copy: select the ${what} and copy it by hand`, "input");
  }
  say(`copied the ${what}`);
}
byId("copy-python").addEventListener("click", () => tried(() => copy(byId("python").querySelector("pre").textContent, "Python")));
window.addEventListener("hashchange", () => { view = form.fromAddress(window.location.hash.slice(1)); showForm(); tried(() => go(true)); });

// -- history ------------------------------------------------------------------------------------------------
async function showHistory() {
  const { entries } = await (await ask("/api/history")).json();
  const rows = entries.map((entry) => {
    const open = make("button", { type: "button", class: "open" }, make("span", { class: "soft" }, entry.do), make("bdi", {}, entry.title),
      make("time", { class: "soft", datetime: entry.when }, new Date(entry.when).toLocaleString()));
    open.addEventListener("click", () => {
      byId("history").close();
      view = "";
      form.fromRequest(entry.request);
      showForm();
      tried(() => go(true));
    });
    const away = make("button", { type: "button", class: "quiet", "aria-label": `forget ${entry.title}` }, "Forget");
    away.addEventListener("click", () => tried(async () => {
      await ask(`/api/history/${encodeURIComponent(entry.id)}`, { method: "DELETE" });
      await showHistory();
    }));
    return make("li", {}, open, away);
  });
  byId("entries").replaceChildren(...(rows.length ? rows : [make("li", { class: "soft" }, "nothing yet")]));
  if (!byId("history").open) byId("history").showModal();
}
byId("history-open").addEventListener("click", () => tried(showHistory));
byId("history-close").addEventListener("click", () => byId("history").close());
byId("history-clear").addEventListener("click", () => tried(async () => {
  await ask("/api/history", { method: "DELETE" });
  await showHistory();
}));

// -- start ----------------------------------------------------------------------------------------------------
showTheme();
tried(async () => {
  about = await (await ask("/api/about")).json();
  const models = about.models.map(({ name }) => name), lenses = ["logit", ...about.lenses];
  options("model", models);
  options("otherModel", models);
  options("lens", lenses);
  options("otherLens", lenses);
  options("vectors", about.vectors);
  byId("history-open").hidden = !about.history;
  for (const one of field("by").options) one.hidden = one.disabled = (one.value === "lens" && lenses.length < 2) || (one.value === "model" && models.length < 2);
  for (const one of field("kind").options) one.hidden = one.disabled = one.value === "file" && !about.vectors.length;
  form.keepDefaults();
  view = form.fromAddress(window.location.hash.slice(1));
  showForm();
  await go(true);
});
