// The page of `logitlab serve`: a form, the events that come back, and the grids that they fill.
import { byId, make, percent, size } from "/static/dom.js";
import * as form from "/static/request.js";
import * as grids from "/static/grids.js";
import { RequestError, ask, run, takeToken } from "/static/stream.js";

const { field, value, put } = form;

let about = { models: [], lenses: [], vectors: [], limits: {} };
let facts = null; // about the model that is loaded
let work = null; // { id, abort } of what is running
let view = ""; // state of the first grid, kept in the address
let shown = { address: "", of: "", task: "" }; // what the grids are of: the form as it was then, model and prompt, the task

// -- theme ----------------------------------------------------------------------------------------
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = localStorage.getItem("logitlab-theme") ?? "";
const theme = () => chosenTheme || (prefersDark.matches ? "dark" : "light");

function showTheme() {
  document.documentElement.dataset.theme = theme();
  byId("theme").textContent = theme() === "dark" ? "Light theme" : "Dark theme";
  grids.setTheme(theme());
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
  byId("message").scrollIntoView({ block: "nearest" });
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
    work.id = data.id;
    if (data.waiting) say(`waiting: ${data.waiting} before this`);
  } else if (name === "started") say("running");
  else if (name === "progress") {
    say(`${data.what}${data.total ? `: ${data.done.toLocaleString("en")} of ${data.total.toLocaleString("en")}` : ""}`);
    showProgress(data.done, data.total);
  }
}

// One piece of work at a time: a new one takes the place of what is running.
async function does(request, step = () => {}) {
  work?.abort.abort();
  const mine = { abort: new AbortController(), id: null };
  work = mine;
  byId("cancel").disabled = false;
  byId("results").setAttribute("aria-busy", "true");
  say("asking");
  showProgress(0, 0);
  try {
    const result = await run(request, (name, data) => {
      if (work !== mine) return;
      if (name === "step") step(data);
      else onEvent(name, data);
    }, mine.abort.signal);
    if (work !== mine) throw new RequestError("another request took its place", "replaced");
    return result;
  } catch (error) {
    if (work !== mine) throw new RequestError("another request took its place", "replaced");
    say(error.kind === "cancelled" ? "cancelled" : "");
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
  byId("message").hidden = true;
  try {
    await action();
  } catch (error) {
    if (error.kind !== "replaced" && error.kind !== "cancelled") complain(error);
  }
}

// The server ends the work, and says so in its stream; where it has not begun, or does not answer, the stream is given up.
async function cancel() {
  clearTimeout(later);
  const mine = work;
  if (!mine) return;
  const given = setTimeout(() => mine.abort.abort(), mine.id === null ? 0 : 1500);
  if (mine.id === null) return;
  try {
    await ask(`/api/cancel/${encodeURIComponent(mine.id)}`, { method: "POST" });
  } catch (error) {
    if (!(error instanceof RequestError)) throw error; // it has ended by itself
  }
  if (work !== mine) clearTimeout(given);
}
byId("cancel").addEventListener("click", cancel);

// -- results ------------------------------------------------------------------------------------------
function clearTold() {
  pair = null;
  byId("written").hidden = byId("outcome").hidden = byId("python").hidden = true;
}

// A request of the form as it is now, and what it makes of the page once it is answered.
function asking() {
  const request = form.request(), { model, prompt, do: task } = request;
  const of = JSON.stringify([model, prompt, task === "generate"]), another = shown.of && shown.of !== of;
  // Where the prompt is another one than before, the cell that was chosen there means nothing.
  const kept = view.split("&").filter((part) => !another || !/^(cell|pin|prompt|picture)=/.test(part)).join("&");
  return { request, of, task: value("do"), address: form.address(), view: kept, anew: shown.of !== of };
}

// It is answered: from here on the address is this one's.
function settle(mine) {
  const { address, of, task, anew } = mine;
  shown = { address, of, task };
  view = mine.view;
  put("patched", "");
  return anew;
}

function showGrids(given, mine) {
  const anew = settle(mine);
  grids.show(given, view);
  if (anew) grids.restore(view);
}

function showResult({ python = "", seconds, notes = [] }) {
  byId("python").hidden = !python;
  byId("python").querySelector("pre").textContent = python;
  const { reading, total } = seconds;
  const long = total > 1.5 * reading + 0.3 ? `, ${total.toFixed(1)} s in all` : "";
  say([`read in ${Math.round(1000 * reading)} ms${long}`, ...notes].join(" · "));
  writeAddress();
}

function bar(p) {
  const inside = make("i");
  inside.style.width = `${100 * (p ?? 0)}%`;
  return make("td", {}, make("span", { class: "track" }, inside), percent(p));
}

// The answer before and after.
function showOutcome(title, { tokens, kl }) {
  const rows = tokens.map(({ token, before, after }) =>
    make("tr", after > before ? { class: "up" } : {}, make("td", {}, make("bdi", {}, token)), bar(before), bar(after)));
  const head = make("tr", {}, ...["next token", "before", "after"].map((name) => make("th", { scope: "col" }, name)));
  tell(title, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
    make("p", { class: "soft" }, `KL(before ‖ after) at the last position: ${kl === null ? "–" : size(kl)} nats`));
}

function tell(title, ...parts) {
  byId("outcome").replaceChildren(make("h2", {}, title), ...parts);
  byId("outcome").hidden = false;
  byId("outcome").scrollIntoView({ block: "nearest" });
}

const steerAction = { name: "steer", label: "Steer here", title: "Use this site for steering" };

grids.listen({
  state: () => {
    view = grids.shown[0]?.handle.state() ?? "";
    writeAddress();
  },
  click: (n, cell) => { if (n === 1 && pair && value("do") === "patch") tried(() => patchCell(cell.siteName, cell.position, target(cell))); },
  action: (n, { siteName }) => {
    put("site", siteName);
    put("do", "steer");
    showForm();
    field("strength").focus();
  },
  link: () => {
    writeAddress();
    return window.location.href;
  },
  apart: () => pair !== null, // a cell of the source is chosen without moving the pin of the prompt
});

// -- tasks ----------------------------------------------------------------------------------------------
async function read() {
  const mine = asking(), result = await does(mine.request);
  clearTold();
  showGrids(result.grids.map((grid) => ({ ...grid, actions: facts.words ? [steerAction] : [] })), mine);
  showResult(result);
}

async function compare() {
  const mine = asking(), result = await does(mine.request);
  clearTold();
  showGrids(result.grids, mine);
  showResult(result);
}

// Two prompts that were read beside each other, and what they were asked by: { asked, base, source }.
let pair = null;

// In the address is also what was patched last: "site,position of the source,position of the prompt", or "all".
async function patch(last = "") {
  const mine = asking(), result = await does(mine.request);
  clearTold();
  const [base, source] = result.grids;
  pair = { asked: mine.request, base, source };
  showGrids([base, source], mine);
  put("patched", last);
  showResult(result);
  say("click a cell of the source: its state goes into the run of the prompt");
  const [site, from, into] = last.split(",");
  if (last === "all") await patchAll();
  else if (last) await patchCell(site, Number(from), Number(into));
}

const positions = ({ data }) => data.prompts[0].positions;

function target({ position }) {
  const base = positions(pair.base), source = positions(pair.source);
  if (value("into") === "end") return base.at(-1) - (source.at(-1) - position);
  if (value("into") === "pinned") return base[Number(new URLSearchParams(grids.shown[0].handle.state()).get("pin"))] ?? base.at(-1);
  return position;
}

async function patchCell(site, from, into) {
  if (into < 0 || into > positions(pair.base).at(-1))
    throw new RequestError(`the prompt has no position ${into}: choose another cell, or another place for it to go`, "input");
  const mine = pair, result = await does(form.patchAt(pair.asked, site, into, from));
  if (mine !== pair) return;
  grids.show([result.grids[1], pair.source], view);
  put("patched", [site, from, into].join());
  showOutcome(`${site}, position ${from} of the source into position ${into}`, result.outcome);
  showResult(result);
}

const KINDS = { u2: Uint16Array, u4: Uint32Array };

// The likeliest next token of a run: { id, label }.
function likeliest({ data }) {
  const { dtype, data: packed } = data.prompts[0].top, bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const numbers = new KINDS[dtype](bytes.buffer), number = numbers[numbers.length - data.k]; // last site, last position
  return { id: data.ids[number], label: data.labels[number] };
}

async function patchAll() {
  clearTimeout(later);
  await load();
  if (!pair || JSON.stringify(pair.asked) !== JSON.stringify(form.request())) await patch();
  const right = likeliest(pair.source), wrong = likeliest(pair.base), one = right.id === wrong.id, mine = pair;
  const result = await does(form.patchAll(pair.asked, (one ? [right] : [right, wrong]).map(({ id }) => `id:${id}`)));
  if (mine !== pair) return;
  grids.show([result.grids[0], pair.source], view);
  put("patched", "all");
  const what = one ? ["log-probability of ", make("bdi", {}, right.label)] : ["logit of ", make("bdi", {}, right.label), " less that of ", make("bdi", {}, wrong.label)];
  tell("every place, patched by itself", make("p", {}, "recovery of the ", ...what,
    `: 1 is the run of the source (${size(result.clean)} nats), 0 that of the prompt (${size(result.corrupted)} nats)`));
  showResult(result);
}
byId("patch-all").addEventListener("click", () => tried(patchAll));

async function steer() {
  const mine = asking(), { request } = mine, result = await does(request);
  clearTold();
  showGrids(result.grids, mine);
  if (result.texts) {
    const told = ["plain", "steered"].map((name, n) => make("div", {}, make("h2", {}, name), make("p", {}, make("bdi", {}, result.texts[n]))));
    byId("written").replaceChildren(make("div", { class: "texts" }, ...told));
    byId("written").hidden = false;
  }
  const { site, strength } = request, { vector, states } = result.norm;
  showOutcome(`${site}, strength ${strength}: adds ${size(Math.abs(strength) * vector)} to states of ${size(states)} (lengths; median over tokens)`, result.outcome);
  showResult(result);
}

const breaks = (text) => /^\n+$/.test(text);

async function write() {
  const mine = asking(), told = make("p", {}, make("bdi", { class: "asked" }, value("chat") ? "" : value("text")));
  clearTold();
  grids.clear();
  byId("written").replaceChildren(make("h2", {}, "written"), told);
  byId("written").hidden = false;
  const result = await does(mine.request, ({ index, token, text, logprob, data }) => {
    if (index) grids.shown[0].handle.append(data);
    else showGrids([{ title: "as it was written", data }], mine);
    const p = Math.exp(logprob);
    const word = make("button", { type: "button", class: "word", title: `${token} ${percent(p)}` }, make("bdi", {}, breaks(text) ? token : text));
    word.style.borderBottom = `3px solid color-mix(in srgb, var(--bar) ${Math.round(100 * p)}%, var(--line))`;
    word.addEventListener("click", () => grids.choose({ slot: index, pin: index }));
    told.append(word, breaks(text) ? text : ""); // breaks of lines stay breaks
    say(`${index + 1} tokens`);
  });
  if (mine.view && view === mine.view) grids.restore(view); // now its columns are there, and nobody has chosen another cell
  showResult(result);
}

const TASKS = { read, compare, steer, generate: write };

// -- form -----------------------------------------------------------------------------------------------
function options(name, entries) {
  field(name).replaceChildren(...entries.map((one) => make("option", { value: one }, one)));
}

// What the loaded model cannot do is not offered.
const CAN = { read: () => true, compare: () => true, patch: (f) => f.text && f.words, steer: (f) => f.text && f.words, generate: (f) => f.generates };

function showForm() {
  const task = value("do"), chat = Boolean(value("chat")), text = facts?.text ?? true;
  for (const node of document.querySelectorAll("[data-for]")) node.hidden = node.dataset.for !== task;
  for (const node of document.querySelectorAll("[data-by]")) node.hidden = node.dataset.by !== value("by");
  for (const node of document.querySelectorAll("[data-kind]")) node.hidden = node.dataset.kind !== value("kind");
  for (const node of document.querySelectorAll("[data-sample]")) node.hidden = !value("sample");
  for (const node of document.querySelectorAll("[name=do]")) node.disabled = facts !== null && !CAN[node.value](facts);
  byId("vector").hidden = task !== "steer" && !(task === "generate" && value("steered"));
  byId("strength-shown").value = Number(value("strength")).toFixed(1);
  byId("text-field").hidden = chat || !text;
  byId("open-file").hidden = field("chat").parentElement.hidden = !text;
  byId("messages").hidden = byId("add-message").hidden = !chat;
  byId("open-image").hidden = !facts?.images;
  byId("images").hidden = !form.images.length;
  if (chat && !form.messages.length) form.messages.push({ role: "user", content: value("text") });
  showMessages();
  showImages();
}

function showMessages() {
  if (byId("messages").childElementCount === form.messages.length) return; // nothing is drawn anew while it is used
  byId("messages").replaceChildren(...form.messages.map((one, n) => {
    const role = make("select", { "aria-label": `role of message ${n + 1}` }, ...["system", "user", "assistant"].map((r) => make("option", { value: r }, r)));
    role.value = one.role;
    role.addEventListener("change", () => { one.role = role.value; });
    const text = make("textarea", { rows: 3, "aria-label": `message ${n + 1}`, spellcheck: "false" });
    text.value = one.content;
    text.addEventListener("input", () => { one.content = text.value; });
    const away = make("button", { type: "button", class: "quiet", "aria-label": `remove message ${n + 1}` }, "Remove");
    away.addEventListener("click", () => {
      form.messages.splice(n, 1);
      showForm();
      byId("add-message").focus();
    });
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
  if (byId("images").childElementCount === form.images.length) return;
  byId("images").replaceChildren(...form.images.map((url, n) => {
    const away = make("button", { type: "button", "aria-label": `remove picture ${n + 1}` }, "×");
    away.addEventListener("click", () => {
      form.images.splice(n, 1);
      showForm();
      byId("open-image").focus();
    });
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
const holdsFiles = (event) => event.dataTransfer.types.includes("Files"); // not text that is dragged
byId("ask").addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
byId("ask").addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  if (files.some((file) => file.type.startsWith("image/")) && facts?.images) tried(() => addImages(files));
  else if (files.length) tried(() => openText(files[0]));
});

async function openText(file) {
  const most = about.limits.prompt_characters ?? Infinity, decoder = new TextDecoder("utf-8", { fatal: true });
  if (file.size > 4 * most) throw new RequestError(`${file.name} is too long: a prompt has at most ${most.toLocaleString("en")} characters`, "input");
  try {
    put("text", decoder.decode(await file.arrayBuffer()));
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
  facts = null;
  byId("facts").textContent = "";
  facts = await does({ do: "load", model: name });
  byId("facts").textContent = [`${facts.layers} layers`, facts.verified && `✓ ${facts.verified}`].filter(Boolean).join(" · ");
  byId("site-list").replaceChildren(...facts.sites.map((one) => make("option", { value: one })));
  form.keepDefault("site", facts.sites[Math.floor(facts.sites.length / 2)] ?? "");
  form.reads.text = facts.text;
  field("chat").disabled = !facts.chat;
  if (!facts.chat) put("chat", "");
  if (!CAN[value("do")](facts)) put("do", "read");
  showForm();
  say("");
}

// Do what the form says; `again` where it was filled from an address or the history, with all that was done then.
async function go(again = false) {
  clearTimeout(later);
  await load();
  if (!facts.text && !form.images.length) return say("add a picture");
  if (value("do") === "patch") await patch(again ? value("patched") : "");
  else await TASKS[value("do")]();
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); tried(() => go()); });
let later = 0;
byId("ask").addEventListener("input", ({ target: { name } }) => {
  if (name === "do") clearTimeout(later);
  if (["do", "by", "kind", "strength"].includes(name)) showForm();
  if (name !== "strength" || value("do") !== "steer" || shown.task !== "steer") return;
  clearTimeout(later); // the answer follows the slider
  later = setTimeout(() => tried(() => go()), 350);
});
byId("ask").addEventListener("change", (event) => { if (event.target.name) showForm(); });
field("model").addEventListener("change", () => tried(load)); // it stands outside of the form
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); tried(() => go()); }
  else if (event.key === "Escape" && work && !byId("history").open) cancel();
});

// -- address ----------------------------------------------------------------------------------------------
// The address is that of what is shown, whatever has been written into the form since.
function writeAddress() {
  const parts = new URLSearchParams(shown.address);
  for (const [name, one] of [["patched", value("patched")], ["view", view]]) {
    parts.delete(name);
    if (one) parts.set(name, one);
  }
  const text = parts.toString(), long = text.length > form.LONGEST_LINK;
  window.history.replaceState(null, "", long ? "#" : `#${text}`);
  return !long;
}

// Fill the form from an address, and do what it says, unless a part of it is not here.
async function open(address) {
  const { view: state, missing } = form.fromAddress(address);
  view = state;
  filled();
  await opened(missing);
}

// The form has been filled: nothing of what was there before counts.
function filled() {
  shown.of = "";
  byId("messages").replaceChildren();
  byId("images").replaceChildren();
  showForm();
}

async function opened(missing) {
  if (missing.length) {
    await load();
    throw new RequestError(`this server does not have ${missing.join(", ")}: choose anew, then Run`, "input");
  }
  await go(true);
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
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment is the view's
  byId("results").focus();
});
window.addEventListener("hashchange", () => {
  if (takeToken()) return window.location.reload(); // of a server that was started anew
  return tried(() => open(window.location.hash.slice(1)));
});

// -- history ------------------------------------------------------------------------------------------------
async function showHistory() {
  const { entries, notes } = await (await ask("/api/history")).json();
  const rows = entries.map((entry) => {
    const opening = make("button", { type: "button", class: "open" }, make("span", { class: "soft" }, entry.do), make("bdi", {}, entry.title),
      make("time", { class: "soft", datetime: entry.when }, new Date(entry.when).toLocaleString()));
    opening.addEventListener("click", () => {
      byId("history").close();
      tried(() => {
        view = "";
        const missing = form.fromRequest(entry.request);
        filled();
        return opened(missing);
      });
    });
    const away = make("button", { type: "button", class: "quiet", "aria-label": `forget ${entry.title}` }, "Forget");
    away.addEventListener("click", () => tried(async () => {
      await ask(`/api/history/${encodeURIComponent(entry.id)}`, { method: "DELETE" });
      await showHistory();
      byId("history-close").focus();
    }));
    return make("li", {}, opening, away);
  });
  const said = [...notes, ...(rows.length ? [] : ["nothing yet"])].map((note) => make("li", { class: "soft" }, note));
  byId("entries").replaceChildren(...rows, ...said);
  if (!byId("history").open) byId("history").showModal();
}
byId("history-open").addEventListener("click", () => tried(showHistory));
byId("history-close").addEventListener("click", () => byId("history").close());
byId("history-clear").addEventListener("click", () => tried(async () => {
  await ask("/api/history", { method: "DELETE" });
  await showHistory();
}));

// -- start ----------------------------------------------------------------------------------------------------
takeToken();
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
  await open(window.location.hash.slice(1));
});
