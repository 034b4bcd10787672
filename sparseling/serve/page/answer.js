// One answer: reasoning and content, token by token, while they come and after.

import { button, counted, element, freshId } from "./dom.js";
import { Cutter } from "./cut.js";
import { Routing } from "./routing.js";
import { shown, spoken } from "./words.js";

const PARTS = ["reasoning", "content"];

/** `actions`: {select(answer, number), overview(answer), regenerate(answer), follow(answer)}; `title` names one answer of two. */
export class Answer {
  state = "waiting"; // then streaming, and at the end: done, cut, stopped, failed
  tokens = []; // elements in the order they are read; `numbers` says which token of the routing each shows
  numbers = new Map();
  usage = null;
  times = { start: performance.now(), first: null, end: null };

  constructor(shape, thinking, title, actions) {
    Object.assign(this, { shape, thinking, title, actions });
    this.routing = shape ? new Routing(shape) : null;
    this.parts = Object.fromEntries(PARTS.map((name) => [name, this.#part(name)]));
    this.node = this.#frame();
  }

  #part(name) {
    const label = name === "reasoning" ? "Tokens of the reasoning" : "Tokens of the answer";
    const rest = element("span", { role: "option", "aria-selected": "false", class: "rest" });
    const list = element("div", { class: `tokens ${name}-tokens`, role: "listbox", "aria-label": label, dir: "auto" }, rest);
    const plain = element("p", { class: "visually-hidden plain-text", dir: "auto" });
    return { cutter: new Cutter(), rest, list, plain, ready: [] };
  }

  #frame() {
    const { reasoning, content } = this.parts;
    this.fold = element(
      "details",
      { class: "reasoning", open: true, hidden: true },
      element("summary", {}, "Reasoning"),
      reasoning.plain,
      reasoning.list,
    );
    this.body = element("div", { class: "content", hidden: true }, content.plain, content.list);
    this.status = element("p", { class: "status" }, "Waiting for the first token…");
    this.error = element("p", { class: "error", role: "alert", hidden: true });
    this.buttons = element("div", { class: "actions", hidden: true });
    const node = element(
      "article",
      { class: "answer", "aria-label": this.title ?? "Answer", id: freshId("answer") },
      this.title ? element("h3", {}, this.title) : null,
      this.fold,
      this.body,
      this.error,
      element("footer", {}, this.status, this.buttons),
    );
    node.addEventListener("click", (event) => this.#clicked(event));
    node.addEventListener("keydown", (event) => this.#key(event));
    return node;
  }

  /** Takes one choice of the stream. */
  take(choice) {
    const delta = choice.delta ?? {};
    this.times.first ??= performance.now();
    if (this.state === "waiting") this.state = "streaming";
    if (delta.reasoning_content) this.#text("reasoning", delta.reasoning_content);
    if (delta.content) this.#text("content", delta.content);
    for (const entry of choice.routing ?? []) if (this.routing && entry.part !== "prompt") this.#entry(entry);
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    this.#soon();
  }

  #text(name, text) {
    this.parts[name].ready.push(...this.parts[name].cutter.pushText(text));
  }

  #entry(entry) {
    const name = entry.part === "reasoning" ? "reasoning" : "content";
    if (name === "content" && !this.parts.reasoning.cutter.closed) {
      this.parts.reasoning.ready.push(...this.parts.reasoning.cutter.close());
    }
    this.parts[name].ready.push(...this.parts[name].cutter.pushEntry({ number: this.routing.add(entry), text: entry.text ?? "" }));
  }

  /** Ends the answer. `state`: done, stopped or failed; `message`: what went wrong. */
  end(state, message = "") {
    this.state = state === "done" && this.finishReason === "length" ? "cut" : state;
    this.times.end = performance.now();
    for (const name of PARTS) {
      this.parts[name].ready.push(...this.parts[name].cutter.finish());
      this.paint();
      const { cutter, rest, list, plain } = this.parts[name];
      rest.remove();
      if (cutter.rest) this.#append(list, cutter.rest, null);
      plain.textContent = shown(cutter.text);
    }
    this.tokens[0]?.setAttribute("tabindex", "0");
    this.error.textContent = message;
    this.error.hidden = !message;
    this.status.textContent = this.#summary();
    this.#showButtons();
  }

  #soon() {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      // not an animation frame: a tab in the background gets its answer too
      this.timer = null;
      if (this.times.end === null) this.paint();
    }, 33);
  }

  /** Brings the elements up to date with what has come. */
  paint() {
    for (const name of PARTS) {
      const part = this.parts[name];
      for (const { entry, text } of part.ready.splice(0)) this.#append(part.list, text, entry.number, part.rest);
      part.rest.textContent = shown(part.cutter.rest);
      part.rest.hidden = part.cutter.rest === "";
    }
    this.fold.hidden = this.parts.reasoning.cutter.text === "" && this.parts.reasoning.list.childElementCount < 2;
    this.body.hidden = this.parts.content.cutter.text === "" && this.parts.content.list.childElementCount < 2;
    const count = this.routing?.tokens.length ?? 0;
    if (this.state === "streaming") this.status.textContent = count ? `${counted(count, "token")} so far…` : "Answering…";
    this.changed?.();
  }

  #append(list, text, number, before = null) {
    const own = number === null ? "" : this.routing.tokens[number].text;
    const silent = text === "";
    const token = element(
      "span",
      {
        class: silent ? "token silent" : "token",
        role: "option",
        "aria-selected": "false",
        tabindex: this.tokens.length ? "-1" : "0",
        "aria-label": silent ? own.trim() || spoken(own) : spoken(text),
      },
      silent ? own.trim() || (own.includes("\n") ? "↵" : "◦") : shown(text),
    );
    token.classList.toggle("blank", silent && own.trim() === "");
    if (before?.parentNode === list) before.before(token);
    else list.append(token);
    this.numbers.set(token, number);
    token.dataset.place = this.tokens.push(token) - 1;
  }

  #summary() {
    const { start, first, end } = this.times;
    const tokens = this.usage?.completion_tokens ?? this.routing?.tokens.length ?? 0;
    const words = [counted(tokens, "token")];
    if (tokens > 9 && first !== null && end - first > 20)
      words.push(`${Math.round((tokens - 1) / ((end - first) / 1000)).toLocaleString("en")} tokens/s`);
    if (first !== null) words.push(`the first after ${((first - start) / 1000).toFixed(2)} s`);
    const endings = { stopped: "stopped", cut: "cut off at the longest answer allowed", failed: "not finished" };
    return [...words, ...(endings[this.state] ? [endings[this.state]] : [])].join(" · ");
  }

  #showButtons() {
    const copy = button("Copy", async () => {
      try {
        await navigator.clipboard.writeText(this.content); // there is none where the page comes over plain http from another machine
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Not allowed here";
      }
      setTimeout(() => {
        copy.textContent = "Copy";
      }, 1500);
    });
    const experts = this.routing?.tokens.length ? button("Experts", () => this.actions.overview(this), { class: "primary" }) : null;
    this.again = button("Regenerate", () => this.actions.regenerate(this));
    this.follow = this.title ? button("Go on from this one", () => this.actions.follow(this), { "aria-pressed": "false" }) : null;
    this.buttons.replaceChildren(...[experts, copy, this.again, this.follow].filter(Boolean));
    this.buttons.hidden = false;
  }

  get content() {
    return this.parts.content.cutter.text;
  }

  get reasoning() {
    return this.parts.reasoning.cutter.text;
  }

  #clicked(event) {
    const token = event.target.closest(".token");
    if (token && getSelection().isCollapsed) this.#choose(token);
  }

  #choose(token) {
    this.focus(token);
    this.actions.select(this, this.numbers.get(token), token);
  }

  /** The token at `place` in `tokens`, focused and shown. */
  go(place, quietly = false) {
    const token = this.tokens[Math.min(this.tokens.length - 1, Math.max(0, place))];
    if (!token) return;
    if (this.fold.contains(token)) this.fold.open = true;
    if (quietly) this.#stop(token);
    else this.focus(token);
    this.actions.select(this, this.numbers.get(token), token, { follow: true });
  }

  focus(token) {
    this.#stop(token);
    token.focus({ preventScroll: false });
  }

  #stop(token) {
    // the one token that Tab reaches
    if (this.reached) this.reached.setAttribute("tabindex", "-1");
    else this.tokens[0]?.setAttribute("tabindex", "-1");
    token.setAttribute("tabindex", "0");
    this.reached = token;
  }

  #key(event) {
    const token = event.target.closest?.(".token");
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = Number(token.dataset.place);
    const forward = getComputedStyle(token.parentNode).direction === "rtl" ? -1 : 1;
    if (event.key === "ArrowRight") this.#step(place + forward);
    else if (event.key === "ArrowLeft") this.#step(place - forward);
    else if (event.key === "ArrowDown") this.#step(this.#nextLine(place, 1));
    else if (event.key === "ArrowUp") this.#step(this.#nextLine(place, -1));
    else if (event.key === "Home") this.#step(0);
    else if (event.key === "End") this.#step(this.tokens.length - 1);
    else if (event.key === "Enter" || event.key === " ") this.actions.select(this, this.numbers.get(token), token, { enter: true });
    else return;
    event.preventDefault();
  }

  #step(place) {
    const token = this.tokens[Math.min(this.tokens.length - 1, Math.max(0, place))];
    if (this.fold.contains(token)) this.fold.open = true;
    this.focus(token);
    this.actions.moved(this, this.numbers.get(token), token);
  }

  /** The place of the token above or below that is nearest. */
  #nextLine(place, direction) {
    const box = (at) => this.tokens[at].getBoundingClientRect();
    const here = box(place);
    let best = place,
      line = null,
      least = Infinity;
    for (let at = place + direction; at >= 0 && at < this.tokens.length; at += direction) {
      const there = box(at);
      if (Math.abs(there.top - here.top) < here.height / 2) continue;
      line ??= there.top;
      if (Math.abs(there.top - line) > here.height / 2) break;
      if (Math.abs(there.left - here.left) < least) [best, least] = [at, Math.abs(there.left - here.left)];
    }
    return best;
  }

  /** Tints every token by its weight for one expert; null takes the tint away. */
  tint(weights) {
    const most = Math.max(1e-9, ...(weights ?? []));
    for (const token of this.tokens) {
      const number = this.numbers.get(token);
      const weight = weights && number !== null ? weights[number] : 0;
      token.classList.toggle("tinted", weight > 0);
      if (weight > 0) token.style.setProperty("--tint", (0.2 + (0.8 * weight) / most).toFixed(3));
      else token.style.removeProperty("--tint");
    }
  }
}
