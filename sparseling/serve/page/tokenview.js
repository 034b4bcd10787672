// One token, layer by layer: which experts it used and how strongly.

import { element, svg } from "./dom.js";
import { named } from "./words.js";

const WIDTH = 512,
  HEIGHT = 26; // of a strip, in units of its own

/** Shows tokens in `node`. Layers that the reader opened stay open from token to token. */
export class TokenView {
  #open = new Set();
  #first = true;

  /** `pickExpert(row, expert)` is called for a press on an expert. */
  constructor(node, pickExpert) {
    this.node = node;
    this.pickExpert = pickExpert;
  }

  /** Token `number` of `answer`; null for one that has no routing. */
  show(answer, number, token) {
    if (number === null) {
      const why = answer.routing
        ? "The model never read this token: the answer ended with it, so no expert saw it."
        : "This model has no experts to show.";
      this.node.replaceChildren(title(token.textContent), element("p", { class: "note" }, why));
      return;
    }
    const { routing } = answer;
    const { shape } = routing;
    const entry = routing.tokens[number];
    if (this.#first && shape.layers.length) this.#open.add(shape.layers[0]);
    this.#first = false;
    const all = element(
      "button",
      { type: "button", class: "link", on: { click: () => this.#toggleAll(shape) } },
      "Open or close all layers",
    );
    this.node.replaceChildren(
      title(entry.text),
      element(
        "p",
        { class: "note" },
        `Token ${number + 1} of ${routing.tokens.length}, id ${entry.token}, ${entry.part === "reasoning" ? "reasoning" : "answer"}. ` +
          `Each layer sends it to ${shape.perToken} of ${shape.experts} experts.`,
      ),
      key(shape),
      ...shape.layers.map((layer, row) => this.#layer(routing, number, layer, row)),
      all,
    );
  }

  #toggleAll(shape) {
    const open = this.#open.size < shape.layers.length;
    for (const fold of this.node.querySelectorAll("details.layer")) fold.open = open;
  }

  #layer(routing, number, layer, row) {
    const chosen = routing.chosen(number, row);
    const kept = routing.tokens[number].kept[row] ?? [];
    const words = chosen.map(({ expert }) => expert).join(", ");
    const fold = element(
      "details",
      { class: "layer", open: this.#open.has(layer) },
      element(
        "summary",
        {},
        element("span", { class: "layer-name" }, `Layer ${layer}`),
        strip(routing.shape, chosen, kept),
        element("span", { class: "visually-hidden" }, chosen.length ? `experts ${words}` : "no routing"),
      ),
    );
    const fill = () => {
      this.#open[fold.open ? "add" : "delete"](layer);
      if (fold.open && fold.childElementCount === 1) fold.append(this.#details(routing.shape, chosen, kept, row));
    };
    fold.addEventListener("toggle", fill);
    fill();
    return fold;
  }

  #details(shape, chosen, kept, row) {
    const most = Math.max(1e-9, ...chosen.map(({ weight }) => weight));
    const rows = chosen.map(({ expert, weight, score, biased }) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--share", `${(100 * weight) / most}%`);
      const press = element(
        "button",
        {
          type: "button",
          class: "expert",
          title: "Mark the tokens that used this expert",
          on: { click: () => this.pickExpert(row, expert) },
        },
        element("span", { class: "visually-hidden" }, "Expert "),
        String(expert),
      );
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, press),
        element("td", { class: "weight" }, bar, weight.toFixed(4)),
        element("td", {}, score.toFixed(4)),
        element("td", {}, biased.toFixed(4)),
        element("td", {}, signed(biased - score)),
      );
    });
    const heads = ["Expert", "Gate weight", "Score", "With bias", "Bias"].map((name) => element("th", { scope: "col" }, name));
    const groups =
      shape.groups > 1
        ? element("p", { class: "note" }, `Groups kept: ${[...kept].sort((a, b) => a - b).join(", ")} of 0 to ${shape.groups - 1}`)
        : null;
    return element(
      "div",
      { class: "layer-details" },
      groups,
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)),
    );
  }
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(4)}`;

const title = (text) => element("p", { class: "token-title", dir: "auto" }, named(text));

function key(shape) {
  const kept = shape.groups > 1 ? element("span", {}, element("i", { class: "swatch kept" }), "group kept") : null;
  return element(
    "p",
    { class: "key", "aria-hidden": "true" },
    element("span", {}, element("i", { class: "swatch chosen" }), "expert, height is its gate weight"),
    kept,
  );
}

/** All experts of a layer as one line: kept groups shaded, the chosen ones as bars as high as their weight. */
function strip(shape, chosen, kept) {
  const most = Math.max(1e-9, ...chosen.map(({ weight }) => weight));
  const one = WIDTH / shape.experts;
  const group = WIDTH / shape.groups;
  const shades =
    shape.groups > 1 ? kept.map((number) => svg("rect", { class: "kept", x: number * group, y: 0, width: group, height: HEIGHT })) : [];
  const rules =
    shape.groups > 1
      ? Array.from({ length: shape.groups - 1 }, (_, number) =>
          svg("line", { x1: (number + 1) * group, x2: (number + 1) * group, y1: 0, y2: HEIGHT }),
        )
      : [];
  const bars = chosen.map(({ expert, weight }) => {
    const height = Math.max(3, (HEIGHT * weight) / most);
    const width = Math.max(3, one);
    return svg("rect", {
      class: "chosen",
      x: Math.min(WIDTH - width, expert * one - (width - one) / 2),
      y: HEIGHT - height,
      width,
      height,
    });
  });
  return svg(
    "svg",
    { class: "strip", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
    ...shades,
    ...rules,
    ...bars,
  );
}
