// The form, the request it stands for, and the address that it is kept in.

const form = document.getElementById("ask");
export const field = (name) => form.elements.namedItem(name);
export const LONGEST_LINK = 20_000;

const DEFAULTS = {};
export const messages = []; // of a chat: { role, content }
export const images = []; // data: URLs

const named = () => [...new Set([...form.elements].map((node) => node.name).filter(Boolean))];

export function value(name) {
  const node = field(name);
  return node.type === "checkbox" ? (node.checked ? "1" : "") : node.value;
}

export function put(name, text) {
  const node = field(name);
  if (!node) return;
  if (node.type === "checkbox") node.checked = text === "1";
  else if (node.tagName !== "SELECT" || [...node.options].some((option) => option.value === text)) node.value = text;
}

// What the form says when nothing was changed; called once the lists of models and lenses are there.
export function keepDefaults() {
  for (const name of named()) DEFAULTS[name] = value(name);
}

// A default that is known only later; it fills an empty field.
export function keepDefault(name, text) {
  DEFAULTS[name] = text;
  if (!value(name)) put(name, text);
}

export function reset() {
  for (const [name, text] of Object.entries(DEFAULTS)) put(name, text);
  messages.length = images.length = 0;
}

// -- address ------------------------------------------------------------------------------------
export function address(view) {
  const parts = new URLSearchParams();
  for (const name of named()) if (value(name) !== DEFAULTS[name]) parts.set(name, value(name));
  if (value("chat")) parts.set("messages", JSON.stringify(messages));
  if (view) parts.set("view", view);
  return parts.toString();
}

// Fill the form from an address; returns the state of the grid that it holds.
export function fromAddress(text) {
  reset();
  const given = new URLSearchParams(text);
  for (const [name, one] of given) if (Object.hasOwn(DEFAULTS, name)) put(name, one);
  let held = [];
  try {
    held = JSON.parse(given.get("messages") ?? "[]");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // an address that was cut short holds no chat
  }
  for (const one of Array.isArray(held) ? held : [])
    if (typeof one?.content === "string") messages.push({ role: String(one.role), content: one.content });
  return given.get("view") ?? "";
}

// -- request ------------------------------------------------------------------------------------
const lines = (text) => text.split("\n").filter((line) => line !== "");

export function prompt() {
  if (value("chat")) return { chat: messages.map(({ role, content }) => ({ role, content })) };
  if (images.length) return { text: value("text") || null, images: [...images] };
  return { text: value("text") };
}

// A second prompt: a text, or where the first is a chat, what a user says.
const second = (text) => (value("chat") ? { chat: [{ role: "user", content: text }] } : { text });

export function vector() {
  if (value("kind") === "token") return { token: value("token") };
  if (value("kind") === "file") return { file: value("vectors") };
  return { prompts: [value("positive"), value("negative")] };
}

const common = () => ({
  model: value("model"),
  prompt: prompt(),
  lens: value("lens"),
  sites: value("sites").split(",").map((one) => one.trim()).filter(Boolean),
  statistics: ["entropy", "kl"].filter((name) => value(name)),
  targets: lines(value("targets")),
  top_k: Number(value("topK")),
  precision: value("precision"),
});

export function request() {
  const what = value("do");
  if (what === "compare") {
    const by = value("by");
    const other = by === "prompt" ? { prompt: second(value("other")) } : { [by]: value(by === "lens" ? "otherLens" : "otherModel") };
    return { do: what, ...common(), other };
  }
  if (what === "patch") return { do: "compare", ...common(), other: { prompt: second(value("source")) } };
  if (what === "steer")
    return { do: what, ...common(), vector: vector(), site: value("site"), strength: Number(value("strength")),
      positions: value("positions"), new_tokens: Number(value("steerTokens")) };
  if (what === "generate")
    return { do: what, ...common(), new_tokens: Number(value("newTokens")), sample: Boolean(value("sample")),
      temperature: Number(value("temperature")), seed: Number(value("seed")) };
  return { do: what, ...common() };
}

// Put the state of the run at a cell of the source into the run of the prompt.
export const patchAt = (site, position, source_position) => ({
  do: "patch", ...common(), source: second(value("source")), site, position, source_position });

export const patchAll = (answers) => ({ do: "patch_all", ...common(), source: second(value("source")), answers });

// -- a request of the history back into the form -------------------------------------------------
export function fromRequest(given) {
  reset();
  const { prompt: asked = {}, vector: used = {}, other = {} } = given;
  const patching = given.do === "patch" || given.do === "patch_all";
  put("do", patching ? "patch" : given.do);
  put("model", given.model ?? "");
  put("text", asked.text ?? "");
  put("chat", asked.chat ? "1" : "");
  messages.push(...(asked.chat ?? []));
  images.push(...(asked.images ?? []));
  put("lens", given.lens ?? "logit");
  if (given.sites) put("sites", given.sites.join(", "));
  put("targets", (given.targets ?? []).join("\n"));
  for (const [name, held] of Object.entries({ topK: given.top_k, precision: given.precision, site: given.site, strength: given.strength,
    positions: given.positions, newTokens: given.new_tokens, steerTokens: given.new_tokens, seed: given.seed, temperature: given.temperature }))
    if (held !== undefined && held !== null) put(name, String(held));
  for (const name of ["entropy", "kl"]) if (given.statistics) put(name, given.statistics.includes(name) ? "1" : "");
  put("sample", given.sample ? "1" : "");
  const said = (one) => one.text ?? one.chat?.at(-1)?.content ?? "";
  if (given.do === "patch") put("patched", `${given.site},${given.source_position}`);
  if (given.do === "patch_all") put("patched", "all");
  if (given.source) put("source", said(given.source));
  if (used.prompts) { put("kind", "prompts"); put("positive", used.prompts[0]); put("negative", used.prompts[1]); }
  if (used.token !== undefined && used.token !== null) { put("kind", "token"); put("token", used.token); }
  if (used.file) { put("kind", "file"); put("vectors", used.file); }
  if (other.prompt) { put("by", "prompt"); put("other", said(other.prompt)); }
  if (other.lens) { put("by", "lens"); put("otherLens", other.lens); }
  if (other.model) { put("by", "model"); put("otherModel", other.model); }
}
