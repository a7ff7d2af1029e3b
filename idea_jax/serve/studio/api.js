// Talking with the server: docs/serving.md says what it answers.

const UNREACHABLE = "Look whether the studio still runs in its terminal, then try again.";
const MISTAKE = "Its messages in the terminal say more. Nothing of what you have is lost.";

/** What the server refuses, in words: title, message (what to do), errors of parts, code, seconds to wait. */
export class Problem extends Error {
  constructor(about, wait = null) {
    const code = String(about.type ?? "").split(":").pop();
    super(code === "internal" ? MISTAKE : sentence(about.detail ?? "The server gave no reason."));
    this.code = code;
    this.title = sentence(about.title ?? "").replace(/\.$/, "");
    this.status = about.status ?? 0;
    this.errors = about.errors ?? [];
    this.wait = wait;
  }
}

function sentence(text) {
  const trimmed = String(text).trim();
  const whole = /[.!?:)]$/.test(trimmed) || !trimmed ? trimmed : `${trimmed}.`;
  return whole.charAt(0).toUpperCase() + whole.slice(1);
}

async function request(method, path, { json, form, signal } = {}) {
  const options = { method, signal, credentials: "same-origin", headers: {} };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  } else if (form) options.body = form;
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ type: "unreachable", title: "The server cannot be reached", detail: UNREACHABLE });
  }
  if (answer.ok) return answer;
  const wait = Number(answer.headers.get("Retry-After")) || null;
  const about = await answer.json().catch(() => ({}));
  if (answer.status === 401) window.dispatchEvent(new Event("token-needed"));
  throw new Problem({ title: `The server answered ${answer.status}`, status: answer.status, ...about }, wait);
}

/** The JSON of an answer, null where it has none. Throws a Problem. */
export async function call(method, path, options) {
  const answer = await request(method, path, options);
  return answer.status === 204 ? null : answer.json();
}

/** [name, data] of each event of a stream. Throws a Problem, also where the stream breaks off. */
export async function* events(path, json, signal) {
  const answer = await request("POST", path, { json, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ type: "unreachable", title: "The connection broke off", detail: UNREACHABLE });
    }
    if (part.done) return;
    rest += part.value.replaceAll("\r\n", "\n");
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n");
      const name = fields.find((line) => line.startsWith("event:"))?.slice(6).trim();
      const data = fields.filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (!name) continue;
      const about = JSON.parse(data || "{}");
      if (name === "error") throw new Problem(about);
      yield [name, about];
    }
  }
}
