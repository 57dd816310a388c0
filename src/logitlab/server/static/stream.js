// Requests to the server: plain JSON, and work whose events stream back.

export class RequestError extends Error {
  constructor(message, kind = "internal") {
    super(message);
    this.kind = kind;
  }
}

const said = async (response) => {
  try {
    return (await response.json()).message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
};

// The token comes in the fragment of the printed address, which no server sees; it is kept for this origin alone.
const KEPT = "logitlab-token";

export function takeToken() {
  const given = new URLSearchParams(window.location.hash.slice(1));
  if (!given.has("token")) return false;
  localStorage.setItem(KEPT, given.get("token"));
  given.delete("token");
  window.history.replaceState(null, "", `#${given}`);
  return true;
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers, authorization: `Bearer ${localStorage.getItem(KEPT) ?? ""}` };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch {
    throw new RequestError("the server does not answer: is it still running?", "offline");
  }
  if (response.status === 401)
    throw new RequestError("this page does not have the server's token: open the address that logitlab serve has printed", "token");
  if (!response.ok) throw new RequestError(await said(response), response.status === 503 ? "busy" : "input");
  return response;
}

// One event of a text/event-stream: its name and its data, or null for a comment.
function parsed(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null;
}

// Run a request; `on` is called with every event's name and data. Resolves with the result, rejects with a RequestError.
export async function run(request, on, signal) {
  const response = await ask("/api/run", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(request), signal,
  }).catch((error) => { throw signal?.aborted ? new RequestError("cancelled", "cancelled") : error; });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", result;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw signal?.aborted ? new RequestError("cancelled", "cancelled") : new RequestError("the connection to the server broke off", "offline");
      });
      if (done) break;
      rest += value;
      if (!value.includes("\n")) continue; // a large result comes in many pieces
      const blocks = rest.replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const [name, data] of blocks.map(parsed).filter(Boolean)) {
        if (name === "error") throw new RequestError(data.message, data.kind);
        if (name === "result") result = data;
        on(name, data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended already
  }
  if (result === undefined) throw new RequestError("the server ended without a result", "offline");
  return result;
}
