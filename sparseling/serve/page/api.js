// What the page asks of the server, and its failures as sentences.

import { events } from "./sse.js";

const KEY = "sparseling.key"; // this tab only

/** A failure to be shown as it is. `status` is the HTTP status, or 0 where there was none. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

export const models = async () => (await (await ask("v1/models")).json()).data;

export const expertsLoad = async () => (await ask("v1/experts/load")).json();

/** Streams an answer: yields the choice of each chunk, and `{usage}` where told. Throws `ServerError`, or AbortError when stopped. */
export async function* streamChat(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true }, routing: true });
  const response = await ask("v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  if (!(response.headers.get("Content-Type") ?? "").includes("text/event-stream")) {
    throw new ServerError("The server did not answer with a stream; is it sparseling serve?");
  }
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const chunk = parsed(data);
      if (chunk.error) throw new ServerError(sentence(chunk.error.message ?? "The server failed in the middle of the answer"));
      if (chunk.choices?.length) yield chunk.choices[0];
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("The connection broke before the answer ended; the server may have stopped.");
  }
  if (!ended) throw new ServerError("The connection broke before the answer ended; the server may have stopped.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not JSON in the middle of the answer.");
  }
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached; is sparseling serve still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const said = await response.json().then(
    (body) => body?.error?.message ?? body?.detail,
    () => null,
  );
  const message = typeof said === "string" && said ? said : null;
  const wait = Number(response.headers.get("Retry-After"));
  const again = wait > 0 ? `; try again in ${wait} second${wait === 1 ? "" : "s"}` : "";
  if (response.status === 401) return new ServerError(sentence(message ?? "The server wants an API key"), 401);
  if (response.status === 429) return new ServerError(sentence((message ?? "The server is busy").replace(/\.$/, "") + again), 429);
  if (response.status === 503)
    return new ServerError(sentence((message ?? "The server takes no requests now").replace(/\.$/, "") + again), 503);
  return new ServerError(sentence(message ?? `The server answered with the status ${response.status}`), response.status);
}

const sentence = (text) => (/[.!?]$/.test(text.trim()) ? text.trim() : `${text.trim()}.`);
