// Server-sent events out of a stream of bytes, wherever the network cuts it.

/** Yields the data of each event of `body` (a ReadableStream of bytes). Comments and other fields are passed over. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A carriage return at the very end may be half of a CRLF: it waits for the next bytes.
      const parts = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = parts.pop();
      for (const line of parts) {
        if (line !== "") lines.push(line);
        else if (lines.length) {
          const data = dataOf(lines);
          lines = [];
          if (data !== null) yield data;
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(lines) {
  const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).replace(/^ /, ""));
  return data.length ? data.join("\n") : null;
}
