// What is answered: the events of a stream, and errors in words.

/** No answer, or not its end; the message says why to whoever asked. */
class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * The events of an answer with the number of the read that brought them: one by one as they are computed, or all with
 * the first read where the server answers in one piece. Aborting `signal` ends the connection, and so the computation.
 */
async function* events(path, body, key, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (let reads = 1; ; reads++) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) break;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: {")) continue;
      const event = JSON.parse(block.slice("data: ".length));
      if (event.error) throw new Failure(sentence(event.error.message));
      ended ||= event.stop === true || event.choices?.[0]?.finish_reason != null;
      yield { event, reads };
    }
  }
  signal.throwIfAborted();
  if (!ended) throw new Failure("The connection broke before the end of the answer.");
}

/** The response to a request, if it is a good one. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch {
    options.signal?.throwIfAborted();
    throw new Failure("The server does not answer. Is it running, and is this device online?");
  }
  if (!response.ok) throw new Failure(await why(response), response.status);
  return response;
}

async function why(response) {
  const text = await response.text().catch(() => "");
  let body = {};
  try {
    body = JSON.parse(text) ?? {};
  } catch {
    // Lambda and proxies answer in their own ways.
  }
  const message = body.error?.message ?? body.Message ?? body.message;
  const hint = {
    401: "Enter an API key in the settings.",
    403: "The server does not let this page in; where it wants an API key, enter it in the settings.",
    429: "Too many requests at once: try again in a moment.",
    502: "The function failed: its log says why.",
    503: "Try again in a moment.",
    504: "It took too long.",
  }[response.status];
  const full = body.error?.code === "context_length_exceeded" && "Begin a new chat, or ask for less.";
  return [message ? sentence(message) : `The server answers with HTTP ${response.status}.`, full || hint].filter(Boolean).join(" ");
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
