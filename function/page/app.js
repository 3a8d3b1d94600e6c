// The page: what there is, what is shown of it, and what happens when a button is pressed.

const KEPT = "bitnet-1"; // in localStorage; the API key is in sessionStorage
const $ = (selector, root = document) => root.querySelector(selector);
const room = {
  chat: {
    title: "What shall we talk about?",
    text: "Your words go to this server and nowhere else; the conversation stays in this browser.",
    placeholder: "Write a message",
    ideas: ["Tell me of a king and his three sons.", "Why is the sky blue?", "Write a short poem about winter."],
  },
  completion: {
    title: "Begin a text, the model goes on",
    text: "Plain completion: no roles, no template. The model continues exactly what you write.",
    placeholder: "Write the beginning of a text",
    ideas: ["Once upon a time", "The old woman opened the door and", "Dear diary, today I"],
  },
};

/**
 * A turn is what was asked, how, and what came of it:
 * {ask, system, fields, answer, error, figures: {first_ms, tokens, rate, …}}.
 */
const state = { mode: "chat", settings: {}, draft: "", turns: { chat: [], completion: [] }, former: {}, open: false };
const views = new Map(); // turn → its nodes
const form = $("#settings form");
const text = $("#text");
const scroller = $("#scroller");
let running = null; // {turn, controller}
let limits = {}; // of the server: {n_ctx, n_predict}

// ---- what there is

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    if (isUsable({ ...state, ...kept })) Object.assign(state, kept);
  } catch {
    // Not allowed here, or not ours: begin anew.
  }
}

/** Whether a state can be shown: another version of the page may have kept it. */
function isUsable({ mode, settings, draft, turns, former }) {
  const areTexts = (...values) => values.every((value) => typeof value === "string");
  const isTurn = ({ ask, answer, error, fields, figures }) => areTexts(ask, answer, error) && fields && figures;
  const lists = Object.keys(room).flatMap((name) => [turns[name], former[name] ?? []]);
  return Object.hasOwn(room, mode) && areTexts(draft, ...Object.values(settings)) && lists.every((list) => list.every(isTurn));
}

function save() {
  state.draft = text.value;
  try {
    localStorage.setItem(KEPT, JSON.stringify(state));
  } catch {
    say("This browser cannot keep more: the conversation will be lost on reload.");
  }
}

const key = {
  get value() {
    return $("#key").value.trim();
  },
  load() {
    try {
      $("#key").value = sessionStorage.getItem(KEPT) ?? "";
    } catch {}
  },
  save() {
    try {
      sessionStorage.setItem(KEPT, this.value);
    } catch {}
  },
};

const turns = () => state.turns[state.mode];

function request(turn) {
  const all = turns();
  const index = all.indexOf(turn);
  return requestOf(state.mode, turn, index < 0 ? all : all.slice(0, index));
}

function turnOf(ask) {
  const system = state.mode === "chat" ? (state.settings.system ?? "").trim() : "";
  return { ask, system, fields: fieldsOf(state.settings), answer: "", error: "", figures: {} };
}

// ---- asking

async function run(turn) {
  const { path, body } = request(turn);
  const controller = new AbortController();
  running = { turn, controller };
  Object.assign(turn, { answer: "", error: "", figures: {} });
  const began = performance.now();
  const figures = { tokens: 0 };
  let firstRead;
  show(turn);
  toEnd();
  busy(true);
  try {
    for await (const { event, reads } of events(path, body, key.value, controller.signal)) {
      const piece = event.content ?? event.choices?.[0]?.delta?.content;
      if (piece) {
        firstRead ??= reads;
        figures.first_ms ??= performance.now() - began;
        turn.answer += piece;
        figures.tokens += event.tokens?.length || 1;
        figures.rate = rate(figures.tokens - 1, performance.now() - began - figures.first_ms);
        figures.about = true; // a piece may be several tokens
      }
      note(figures, event);
      if (figures.end) figures.whole = firstRead === reads;
      turn.figures = figures;
      draw(turn);
    }
  } catch (error) {
    if (controller.signal.aborted) figures.end = "stopped";
    else turn.error = error.message;
    if (error.status === 401 || error.status === 403) openSettings($("#key"));
  }
  turn.figures = figures;
  running = null;
  busy(false);
  if (views.has(turn)) show(turn);
  save();
  say(turn.error || `The answer is complete${figures.end === "stopped" ? " as far as it came" : ""}.`);
}

/** What the last events of a stream tell, of both routes. */
function note(figures, event) {
  const { timings, usage, choices } = event;
  if (timings) {
    Object.assign(figures, { tokens: timings.predicted_n, rate: timings.predicted_per_second, about: false });
    figures.end = event.stop_type ?? choices[0].finish_reason;
    figures.used = event.tokens_evaluated + event.tokens_predicted || undefined;
  }
  if (usage) figures.used = usage.total_tokens;
}

function rate(tokens, ms) {
  return tokens > 0 && ms > 0 ? (tokens / ms) * 1e3 : undefined;
}

function send() {
  const ask = state.mode === "chat" ? text.value.trim() : text.value;
  if (running || !ask || !settled()) return;
  const turn = turnOf(ask);
  turns().push(turn);
  text.value = "";
  grow();
  run(turn);
}

/** Whether all settings can be used; shows the first one that cannot. */
function settled() {
  if (form.checkValidity()) return true;
  openSettings();
  form.reportValidity();
  return false;
}

const actions = {
  retry(turn) {
    if (settled()) run(Object.assign(turn, turnOf(turn.ask)));
  },
  continue(turn) {
    if (settled()) run(Object.assign(turn, turnOf(turn.ask + turn.answer)));
  },
  edit(turn) {
    remove(turn);
    text.value = turn.ask;
    grow();
    text.focus();
    save();
  },
  copy(turn, button) {
    copy(state.mode === "chat" ? turn.answer : turn.ask + turn.answer, button, views.get(turn).answer);
  },
  code(turn) {
    showCode(turn);
  },
};

// ---- what is shown of it

function showAll() {
  for (const input of document.getElementsByName("mode")) input.checked = input.value === state.mode;
  const { title, text: words, placeholder, ideas } = room[state.mode];
  $("#empty h2").textContent = title;
  $("#empty p").textContent = words;
  $("#ideas").replaceChildren(...ideas.map(idea));
  text.placeholder = placeholder;
  for (const node of form.querySelectorAll("[data-mode]")) node.hidden = node.dataset.mode !== state.mode;
  form.elements.n_predict.placeholder = state.mode === "chat" ? "no limit" : (limits.n_predict ?? "");
  $("#turns").replaceChildren();
  views.clear();
  turns().forEach(show);
  showEmpty();
  toEnd();
}

function idea(words) {
  const button = element("button", words);
  button.type = "button";
  button.onclick = () => {
    text.value = words;
    grow();
    text.focus();
  };
  return button;
}

function showEmpty() {
  $("#empty").hidden = turns().length > 0;
  $("#new").disabled = turns().length === 0;
  $("#restore").hidden = !state.former[state.mode]?.length;
}

/** Shows a turn; makes its nodes if there are none. Only the last one can be asked again. */
function show(turn) {
  const view = views.get(turn) ?? make(turn);
  const isLast = turn === turns().at(-1);
  const isRunning = running?.turn === turn;
  view.ask.textContent = turn.ask;
  view.error.textContent = turn.error;
  view.error.hidden = !turn.error;
  view.node.classList.toggle("running", isRunning);
  view.node.setAttribute("aria-busy", isRunning);
  for (const button of view.buttons) {
    const needsAnswer = ["copy", "continue"].includes(button.name);
    const forLast = ["retry", "edit", "continue"].includes(button.name);
    const wrongMode = button.name === "continue" && state.mode !== "completion";
    button.hidden = isRunning || wrongMode || (forLast && !isLast) || (needsAnswer && !turn.answer);
  }
  paint(turn);
  showEmpty();
}

function make(turn) {
  for (const [earlier, view] of views) {
    for (const button of view.buttons) button.hidden ||= earlier !== turn && /retry|edit|continue/.test(button.name);
  }
  const node = $("#turn").content.firstElementChild.cloneNode(true);
  const view = { node, buttons: [...node.querySelectorAll("button")] };
  for (const name of ["ask", "answer", "error", "figures"]) view[name] = $(`.${name}`, node);
  for (const button of view.buttons) button.onclick = () => actions[button.name](turn, button);
  node.classList.add(state.mode);
  views.set(turn, view);
  $("#turns").append(node);
  return view;
}

function remove(turn) {
  turns().splice(turns().indexOf(turn), 1);
  views.get(turn).node.remove();
  views.delete(turn);
  turns().slice(-1).forEach(show);
  showEmpty();
}

let frame = 0;
/** Shows the answer so far, at most once a frame. */
function draw(turn) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (views.has(turn)) paint(turn);
  });
}

function paint(turn) {
  const { answer, figures } = views.get(turn);
  const stay = atEnd();
  if (state.mode === "chat") answer.replaceChildren(markup(turn.answer));
  else answer.textContent = turn.answer;
  figures.textContent = words(turn);
  if (stay) toEnd();
}

function words(turn) {
  const { tokens, rate: speed, first_ms, about, whole, end, used } = turn.figures;
  if (first_ms === undefined) return running?.turn === turn ? "thinking…" : end === "stopped" ? "stopped" : "";
  const s = (ms) => (ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`);
  const n = (number) => number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 1 : 0 });
  const circa = about ? "≈ " : "";
  return [
    `${circa}${n(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
    speed && `${circa}${n(speed)} tokens/s`,
    whole ? `in one piece after ${s(first_ms)}` : `first token ${s(first_ms)}`,
    used && limits.n_ctx && `context ${n(used)}/${n(limits.n_ctx)}`,
    { length: "cut at the limit", limit: "cut at the limit", deadline: "cut at the deadline", cancelled: "cancelled", stopped: "stopped" }[end],
  ].filter(Boolean).join(" · ");
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  $("#send").setAttribute("aria-label", is ? "Stop" : "Send");
  $("#turns").setAttribute("aria-busy", is);
  for (const input of document.getElementsByName("mode")) input.disabled = is;
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

/** Says something to those who listen to the page. */
function say(message) {
  $("#news").textContent = message;
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

async function copy(words, button, shown) {
  try {
    await navigator.clipboard.writeText(words);
    button.textContent = "Copied";
  } catch { // no clipboard without HTTPS: mark the text, so that Ctrl C takes it
    getSelection().selectAllChildren(shown);
    button.textContent = "Press Ctrl C";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

// ---- dialogs

const isNarrow = matchMedia("(max-width: 64rem)");
const settings = $("#settings");

function openSettings(focus) {
  if (!settings.open) {
    if (isNarrow.matches) settings.showModal();
    else settings.show();
    state.open = true;
    $("#toggle").setAttribute("aria-expanded", "true");
  }
  focus?.focus();
}

settings.onclose = () => {
  state.open = false;
  $("#toggle").setAttribute("aria-expanded", "false");
  save();
};
for (const button of document.querySelectorAll(".close")) button.onclick = () => button.closest("dialog").close();
$("#toggle").onclick = () => (settings.open ? settings.close() : openSettings());
isNarrow.onchange = () => settings.close();

function showSettings() {
  for (const input of form.elements) if (input.name) input.value = state.settings[input.name] ?? "";
}

form.oninput = ({ target }) => {
  if (target.name) state.settings[target.name] = target.value;
  else key.save();
  save();
};
form.onsubmit = (event) => event.preventDefault(); // Enter in a field
$("#key").onchange = () => greet();
$("#defaults").onclick = () => {
  state.settings = {};
  showSettings();
  save();
};

let coded; // the turn whose code is shown

function showCode(turn) {
  coded = turn;
  const { path, body } = request(turn);
  const language = $("[name=language]:checked").value;
  const write = { curl, python }[language];
  $("#snippet pre").textContent = write(new URL(path, location.href).href, body, Boolean(key.value));
  $("#snippet p").hidden = !key.value;
  if (!$("#snippet").open) $("#snippet").showModal();
}

for (const input of document.getElementsByName("language")) input.onchange = () => showCode(coded);
$("#copy").onclick = ({ currentTarget }) => copy($("#snippet pre").textContent, currentTarget, $("#snippet pre"));
$("#code").onclick = () => settled() && showCode(turnOf(text.value || room[state.mode].ideas[0]));

// ---- what happens

for (const input of document.getElementsByName("mode")) {
  input.onchange = () => {
    state.mode = input.value;
    showAll();
    save();
  };
}
$("#new").onclick = () => {
  running?.controller.abort();
  state.former[state.mode] = turns();
  state.turns[state.mode] = [];
  showAll();
  save();
  text.focus();
};
$("#restore").onclick = () => {
  state.turns[state.mode] = state.former[state.mode];
  state.former[state.mode] = [];
  showAll();
  save();
  text.focus();
};
$("#composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.controller.abort();
  else send();
};
text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
text.oninput = grow;
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog:modal")) return;
  if (running) running.controller.abort();
  else if (settings.open && settings.contains(document.activeElement)) {
    settings.close();
    $("#toggle").focus();
  }
};
scroller.onscroll = () => ($("#latest").hidden = atEnd());
$("#latest").onclick = toEnd;
addEventListener("pagehide", () => {
  if (running) running.turn.figures.end = "stopped";
  save();
});
addEventListener("storage", (event) => { // another tab has gone on with the conversation
  if (event.key !== KEPT || running) return;
  load();
  showSettings();
  showAll();
});

/** Asks the server for its model and its defaults. */
async function greet() {
  const model = $("#model");
  try {
    const response = await ask("props", { headers: headers(key.value) });
    const { model: about, default_generation_settings: defaults } = await response.json();
    model.replaceChildren(about.name, element("span", ` · context ${defaults.n_ctx.toLocaleString("en")} tokens`));
    limits = { n_ctx: defaults.n_ctx, n_predict: defaults.params.n_predict };
    for (const name of NUMBERS) {
      if (name !== "seed") form.elements[name].placeholder = defaults.params[name];
    }
    showAll();
  } catch (error) {
    model.textContent = error.status === 401 ? "an API key is needed" : error.status === 503 ? "the model is being loaded" : "no answer from the server";
    if (error.status === 401) openSettings($("#key"));
    if (error.status === 503) setTimeout(greet, 2000);
  }
}

load();
text.value = state.draft;
key.load();
showSettings();
showAll();
grow();
if (state.open && !isNarrow.matches) openSettings();
if (matchMedia("(hover: hover)").matches) text.focus();
greet();
