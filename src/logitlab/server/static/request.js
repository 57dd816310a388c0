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

// Fill a field; false where it does not take that: a list without such an entry, a slider that does not go so far.
export function put(name, text) {
  const node = field(name);
  if (node.type === "checkbox") node.checked = text === "1";
  else if (node.tagName !== "SELECT" || [...node.options].some((option) => option.value === text)) node.value = text;
  return node.type === "checkbox" || node.value === text.replaceAll("\r\n", "\n");
}

// A number of the form; what was left empty is as at the start.
const number = (name) => Number(value(name) === "" ? DEFAULTS[name] : value(name));

// What the form says when nothing was changed; called once the lists of models and lenses are there.
export function keepDefaults() {
  for (const name of named()) DEFAULTS[name] = value(name);
}

// A default that is known only later; it fills a field that is empty, or still holds the default before it.
export function keepDefault(name, text) {
  if (!value(name) || value(name) === DEFAULTS[name]) put(name, text);
  DEFAULTS[name] = text;
}

export function reset() {
  for (const [name, text] of Object.entries(DEFAULTS)) put(name, text);
  messages.length = images.length = 0;
}

// -- address ------------------------------------------------------------------------------------
export function address() {
  const parts = new URLSearchParams();
  for (const name of named()) if (value(name) !== DEFAULTS[name]) parts.set(name, value(name));
  if (value("chat")) parts.set("messages", JSON.stringify(messages));
  if (images.length) parts.set("pictures", images.length); // they themselves are not in it
  return parts.toString();
}

// Fill the form from an address; returns the state of the grid that it holds, and what it asks for that is not here.
export function fromAddress(text) {
  reset();
  const given = new URLSearchParams(text), missing = [];
  for (const [name, one] of given) if (Object.hasOwn(DEFAULTS, name) && !put(name, one)) missing.push(`${name} “${one}”`);
  if (given.has("pictures")) missing.push(`the ${given.get("pictures")} pictures: add them again`);
  let held = [];
  try {
    held = JSON.parse(given.get("messages") ?? "[]");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // an address that was cut short holds no chat
  }
  for (const one of Array.isArray(held) ? held : [])
    if (typeof one?.content === "string") messages.push({ role: String(one.role), content: one.content });
  return { view: given.get("view") ?? "", missing };
}

// -- request ------------------------------------------------------------------------------------
const lines = (text) => text.split("\n").filter((line) => line !== "");

export const reads = { text: true }; // what the model that is loaded takes

export function prompt() {
  if (value("chat")) return { chat: messages.map(({ role, content }) => ({ role, content })) };
  if (images.length) return { text: (reads.text && value("text")) || null, images: [...images] };
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
  sites: (value("sites").trim() || DEFAULTS.sites).split(",").map((one) => one.trim()).filter(Boolean),
  statistics: ["entropy", "kl"].filter((name) => value(name)),
  targets: lines(value("targets")),
  top_k: number("topK"),
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
  const steer = () => ({ vector: vector(), site: value("site"), strength: number("strength"), positions: value("positions") });
  if (what === "steer") return { do: what, ...common(), ...steer(), new_tokens: number("steerTokens") };
  if (what === "generate")
    return { do: what, ...common(), new_tokens: number("newTokens"), sample: Boolean(value("sample")), temperature: number("temperature"),
      seed: number("seed"), ...(value("steered") ? { steer: steer() } : {}) };
  return { do: what, ...common() };
}

// What follows from two prompts that were read beside each other: the first, and the source of states.
const between = ({ other, ...asked }, what) => ({ ...asked, do: what, source: other.prompt });
export const patchAt = (asked, site, position, source_position) => ({ ...between(asked, "patch"), site, position, source_position });
export const patchAll = (asked, answers) => ({ ...between(asked, "patch_all"), answers });

// -- a request of the history back into the form -------------------------------------------------
export function fromRequest(given) {
  reset();
  const { prompt: asked = {}, other = {} } = given, steer = given.do === "steer" ? given : given.steer;
  const missing = [], fill = (name, held) => {
    if (held !== undefined && held !== null && !put(name, String(held))) missing.push(`${name} “${held}”`);
  };
  const said = (one) => one?.text ?? one?.chat?.at(-1)?.content ?? "";
  fill("do", given.do.startsWith("patch") ? "patch" : given.do);
  fill("model", given.model);
  fill("text", asked.text ?? "");
  put("chat", asked.chat ? "1" : "");
  messages.push(...(asked.chat ?? []));
  images.push(...(asked.images ?? []));
  fill("lens", given.lens);
  fill("sites", given.sites?.join(", "));
  fill("targets", (given.targets ?? []).join("\n"));
  fill("topK", given.top_k);
  fill("precision", given.precision);
  for (const name of ["entropy", "kl"]) if (given.statistics) put(name, given.statistics.includes(name) ? "1" : "");
  if (given.do === "generate") {
    for (const [name, held] of Object.entries({ newTokens: given.new_tokens, seed: given.seed, temperature: given.temperature })) fill(name, held);
    put("sample", given.sample ? "1" : "");
    put("steered", given.steer ? "1" : "");
  }
  if (given.do === "steer") fill("steerTokens", given.new_tokens);
  if (given.do === "patch") fill("patched", [given.site, given.source_position, given.position].join());
  if (given.do === "patch_all") fill("patched", "all");
  if (given.source) fill("source", said(given.source));
  if (steer) {
    for (const name of ["site", "strength", "positions"]) fill(name, steer[name]);
    const { prompts, token, file } = steer.vector;
    fill("kind", prompts ? "prompts" : file ? "file" : "token");
    if (prompts) for (const [n, name] of ["positive", "negative"].entries()) fill(name, prompts[n]);
    fill("token", token);
    fill("vectors", file);
  }
  if (other.prompt) { fill("by", "prompt"); fill("other", said(other.prompt)); }
  if (other.lens) { fill("by", "lens"); fill("otherLens", other.lens); }
  if (other.model) { fill("by", "model"); fill("otherModel", other.model); }
  return missing;
}
