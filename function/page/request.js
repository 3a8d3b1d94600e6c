// What is asked: the path and the body of a request, and the same as text to paste.

const NUMBERS = [
  "temperature", "top_k", "top_p", "min_p", "n_predict", "seed",
  "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty",
];

/** The fields that the settings ask for, with the names of /completion; empty settings are left to the server. */
function fieldsOf(settings) {
  const fields = {};
  for (const name of NUMBERS) if (settings[name]) fields[name] = Number(settings[name]);
  const stop = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop.map((text) => text.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t" })[c] ?? c));
  return fields;
}

/** The request of a turn: `ask` and its settings, after the `earlier` turns of a chat. */
function requestOf(mode, turn, earlier) {
  if (mode === "completion") return { path: "completion", body: { prompt: turn.ask, ...turn.fields, stream: true } };
  const { n_predict, ...fields } = turn.fields;
  const messages = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const { ask, answer, error } of earlier) {
    if (answer && !error) messages.push({ role: "user", content: ask }, { role: "assistant", content: answer });
  }
  messages.push({ role: "user", content: turn.ask });
  if (n_predict !== undefined) fields.max_completion_tokens = n_predict;
  return {
    path: "v1/chat/completions",
    body: { messages, ...fields, stream: true, stream_options: { include_usage: true } },
  };
}

function curl(url, body, hasKey) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = hasKey ? ' \\\n  -H "Authorization: Bearer $BITNET_API_KEY"' : "";
  return `curl -N ${quote(url)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quote(JSON.stringify(body, null, 2))}\n`;
}

function python(url, body, hasKey) {
  const key = hasKey ? ', "Authorization": "Bearer " + os.environ["BITNET_API_KEY"]' : "";
  const show = "messages" in body
    ? `for choice in json.loads(line[6:]).get("choices", []):
                print(choice["delta"].get("content") or "", end="", flush=True)`
    : 'print(json.loads(line[6:]).get("content", ""), end="", flush=True)';
  return `import json${hasKey ? "\nimport os" : ""}
import urllib.request

body = ${literal(body)}
headers = {"Content-Type": "application/json"${key}}
request = urllib.request.Request(${JSON.stringify(url)}, json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as response:
    for line in response:
        if line.startswith(b"data: {"):
            ${show}
`;
}

/** A JSON value as Python writes it. */
function literal(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    return value.length ? `[\n${value.map((item) => `${inner}${literal(item, inner)},\n`).join("")}${indent}]` : "[]";
  }
  if (typeof value === "object") {
    const items = Object.entries(value).map(([name, item]) => `${inner}${JSON.stringify(name)}: ${literal(item, inner)},\n`);
    return `{\n${items.join("")}${indent}}`;
  }
  return JSON.stringify(value);
}
