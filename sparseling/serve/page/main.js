// The page: starts it, sends questions, and keeps the turns of the chat.

import { models, ServerError, setKey, streamChat } from "./api.js";
import { Answer } from "./answer.js";
import { Comparison } from "./compare.js";
import { byId, button, counted, element } from "./dom.js";
import { Panel } from "./panel.js";
import { shapeOf } from "./routing.js";
import { alone, remember, remembered, sampling, startSettings, systemPrompt } from "./settings.js";

const EXAMPLES = ["What is 47 + 38?", "What is the biggest of 41, 87, 52?", "Sort the letters q c m.", "Reverse the letters w o l f."];
const SPOKEN_EVERY = 15_000; // milliseconds between two remarks to a screen reader while an answer comes
const SPOKEN_MOST = 1500; // characters of an answer that are read out unasked

const state = { models: [], turns: [], running: new Set() };
let panel;

const say = (text) => {
  byId("live").textContent = text;
};

const isOn = (id) => byId(id).getAttribute("aria-checked") === "true";

function setOn(id, on) {
  byId(id).setAttribute("aria-checked", String(on));
  if (id === "side-by-side") byId("thinking").disabled = on;
}

/** The model that is chosen, or null while none is known. */
const model = () => state.models[byId("model").selectedIndex] ?? state.models[0] ?? null;

async function findModels() {
  byId("trouble").hidden = true;
  try {
    state.models = await models();
  } catch (error) {
    byId("model-facts").textContent = "No model";
    byId("trouble").textContent = error.message;
    byId("trouble").hidden = false;
    if (error.status === 401) askForKey(error.message, findModels);
    return;
  }
  byId("model").replaceChildren(...state.models.map((one) => element("option", {}, one.id)));
  byId("model").hidden = state.models.length < 2;
  byId("model-name").hidden = state.models.length >= 2;
  showModel();
}

function showModel() {
  const chosen = model();
  if (!chosen) return;
  const shape = shapeOf(chosen);
  byId("model-name").textContent = chosen.id;
  if (remembered("thinking") === undefined) setOn("thinking", chosen.thinking === true);
  const facts = shape
    ? [`${shape.experts} experts`, `${shape.perToken} a token`, counted(shape.layers.length, "sparse layer")]
    : ["dense, no experts to show"];
  if (chosen.context_length) facts.push(`${chosen.context_length.toLocaleString("en")} tokens of context`);
  byId("model-facts").textContent = facts.join(" · ");
}

/** Asks for a key, then calls `next`. */
function askForKey(message, next) {
  const dialog = byId("key-dialog");
  byId("key-note").textContent = `${message} The key stays in this tab.`;
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    setKey(byId("key").value.trim());
    byId("key").value = "";
    dialog.close();
    next();
  };
  if (!dialog.open) dialog.showModal();
}

/** The messages of a request: the system prompt, the turns before `until` that were answered, and the question. */
function messagesFor(question, until) {
  const messages = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  for (const turn of alone() ? [] : state.turns.slice(0, until)) {
    const { content } = turn.answers[turn.followed];
    if (content.trim()) messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
  }
  return [...messages, { role: "user", content: question }];
}

function refuse(message) {
  byId("ask-error").textContent = message ?? "";
  byId("ask-error").hidden = !message;
}

function submit() {
  const question = byId("question").value.trim();
  if (!question || state.running.size) return;
  const { request, error } = sampling();
  if (error) return refuse(error);
  if (!model()) return refuse("No model is known yet; is the server running?");
  refuse(null);
  byId("question").value = "";
  byId("welcome").hidden = true;
  const turn = startTurn(question, isOn("side-by-side") ? [true, false] : [isOn("thinking")]);
  return Promise.all(turn.answers.map((answer) => run(turn, answer, request)));
}

function startTurn(question, modes) {
  for (const { answers } of state.turns) for (const { again } of answers) if (again) again.hidden = true;
  const turn = { question, followed: 0, answers: [] };
  const compared = modes.length > 1;
  turn.answers = modes.map((thinking) => newAnswer(turn, thinking, compared));
  turn.place = element("div", { class: compared ? "answers two" : "answers" }, ...turn.answers.map((answer) => answer.node));
  turn.node = element(
    "section",
    { class: compared ? "turn compared" : "turn", "aria-label": `Question ${state.turns.length + 1}` },
    element("h2", { class: "question", dir: "auto" }, question),
    turn.place,
  );
  if (compared) watch(turn);
  state.turns.push(turn);
  byId("turns").append(turn.node);
  atEnd = true;
  turn.node.scrollIntoView({ block: "nearest" });
  return turn;
}

/** Puts the comparison below the two answers of a turn, fresh. */
function watch(turn) {
  turn.comparison?.node.remove();
  turn.comparison = new Comparison(turn.answers, (answer, row, expert) => panel.markIn(answer, row, expert));
  turn.node.append(turn.comparison.node);
}

function newAnswer(turn, thinking, compared) {
  const title = compared ? (thinking ? "With thinking" : "Without thinking") : null;
  const answer = new Answer(shapeOf(model()), thinking, title, {
    select: (...which) => panel.select(...which),
    moved: (...which) => panel.moved(...which),
    overview: (which) => panel.overview(which),
    regenerate: (which) => regenerate(turn, which),
    follow: (which) => follow(turn, which),
  });
  answer.changed = () => {
    keepEndInView();
    panel.changed(answer);
    turn.comparison?.changed();
  };
  return answer;
}

function follow(turn, answer) {
  turn.followed = turn.answers.indexOf(answer);
  for (const other of turn.answers) other.follow?.setAttribute("aria-pressed", String(other === answer));
}

async function regenerate(turn, old) {
  if (state.running.size) return;
  const { request, error } = sampling();
  if (error) return refuse(error);
  refuse(null);
  panel.forget(old);
  const fresh = newAnswer(turn, old.thinking, turn.answers.length > 1);
  old.node.replaceWith(fresh.node);
  turn.answers[turn.answers.indexOf(old)] = fresh;
  if (turn.comparison) watch(turn);
  await run(turn, fresh, request);
}

/** Streams one answer to its end, whatever end that is. */
async function run(turn, answer, request) {
  const controller = new AbortController();
  begin(controller);
  let spokenAt = performance.now();
  let [ending, message] = ["done", ""];
  try {
    const messages = messagesFor(turn.question, state.turns.indexOf(turn));
    const body = { ...request, model: model().id, messages, chat_template_kwargs: { enable_thinking: answer.thinking } };
    for await (const choice of streamChat(body, controller.signal)) {
      if (choice.usage) answer.usage = choice.usage;
      else answer.take(choice);
      if (performance.now() - spokenAt > SPOKEN_EVERY) {
        spokenAt = performance.now();
        say(`Still answering, ${counted(answer.tokens.length, "token")} so far.`);
      }
    }
  } catch (error) {
    ending = error.name === "AbortError" ? "stopped" : "failed";
    message =
      error.name === "AbortError"
        ? ""
        : error instanceof ServerError
          ? error.message
          : "The page failed to show the answer; the browser’s console says more.";
    if (ending === "failed" && !(error instanceof ServerError)) console.error(error);
    if (error.status === 401) askForKey(message, () => findModels().then(() => regenerate(turn, answer)));
  }
  answer.end(ending, message);
  if (turn.answers.length > 1) follow(turn, turn.answers[turn.followed]);
  panel.changed(answer);
  turn.comparison?.changed();
  finish(controller, answer, ending);
}

function begin(controller) {
  state.running.add(controller);
  byId("send").hidden = true;
  byId("stop").hidden = false;
  say("Answering.");
}

function finish(controller, answer, ending) {
  state.running.delete(controller);
  if (state.turns.some((turn) => turn.answers.includes(answer))) tell(answer, ending); // not after a new chat
  if (state.running.size) return;
  const inStop = document.activeElement === byId("stop");
  byId("stop").hidden = true;
  byId("send").hidden = false;
  if (inStop) byId("question").focus();
  keepEndInView();
}

function tell(answer, ending) {
  const name = answer.title ? `${answer.title}: ` : "";
  if (ending === "done") say(name + (answer.content.slice(0, SPOKEN_MOST) || "The answer is empty."));
  else if (ending === "stopped") say(`${name}stopped.`);
}

const stop = () => state.running.forEach((controller) => controller.abort());

/** Follows an answer as it grows, unless the reader has scrolled away from its end or is at work on a token. */
let atEnd = true;
function keepEndInView() {
  if (atEnd && !document.activeElement?.classList.contains("token")) byId("conversation").scrollTop += Math.max(0, belowView());
}

/** How far the end of the last answers (the comparison below them not counted) lies below what is in view, in pixels. */
function belowView() {
  const last = state.turns.at(-1);
  return last ? last.place.getBoundingClientRect().bottom + 24 - byId("conversation").getBoundingClientRect().bottom : 0;
}

function newChat() {
  stop();
  panel.clear();
  state.turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  refuse(null);
  say("New chat.");
  byId("question").focus();
}

function startSwitches() {
  setOn("thinking", remembered("thinking") === true);
  setOn("side-by-side", remembered("side-by-side") === true);
  for (const id of ["thinking", "side-by-side"]) {
    byId(id).addEventListener("click", () => {
      setOn(id, !isOn(id));
      remember(id, isOn(id));
    });
  }
}

function startDialogs() {
  byId("open-settings").addEventListener("click", () => byId("settings-dialog").showModal());
  byId("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("settings-dialog").close();
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
}

/** Makes the question's field as high as its text, where the browser does not do so itself. */
function growQuestion() {
  byId("question").style.height = "auto";
  byId("question").style.height = `${byId("question").scrollHeight + 2}px`;
}

function startAsking() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  if (!CSS.supports("field-sizing", "content")) byId("question").addEventListener("input", growQuestion);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (state.running.size) stop();
    else if (panel.shown) panel.close();
  });
  byId("conversation").addEventListener("scroll", () => {
    atEnd = belowView() < 60;
  });
  byId("examples").append(
    ...EXAMPLES.map((example) =>
      element(
        "li",
        {},
        button(example, () => {
          byId("question").value = example;
          submit();
        }),
      ),
    ),
  );
}

function start() {
  panel = new Panel();
  startSettings();
  startSwitches();
  startDialogs();
  startAsking();
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", newChat);
  byId("model").addEventListener("change", showModel);
  byId("question").focus({ preventScroll: true });
  findModels();
}

start();
