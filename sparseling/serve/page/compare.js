// Two answers to one question beside each other: their heat maps, and the experts whose use differs most.

import { counted, element, percent, throttled } from "./dom.js";
import { heatMap } from "./heatmap.js";
import { differenceMap, largestDifferences, largestShare, layersMap } from "./maps.js";
import { onSchemeChange } from "./palette.js";

const SHOWN = 12;

/** The part of a turn below its two answers. `mark(answer, row, expert)` is called for a press on an expert. */
export class Comparison {
  #maps = [];

  constructor(answers, mark) {
    this.answers = answers;
    this.mark = mark;
    this.maps = element("div", { class: "pair" });
    this.difference = element("div", {});
    this.list = element("div", { class: "table-scroller", tabindex: "0", role: "region", "aria-label": "Experts whose use differs most" });
    this.node = element(
      "section",
      { class: "comparison", "aria-label": "The experts of both answers", hidden: true },
      element("h3", {}, "Their experts, side by side"),
      this.maps,
      element("h3", {}, "What differs"),
      this.difference,
      this.list,
    );
    this.changed = throttled(() => this.draw(), 500);
    onSchemeChange(() => this.draw());
  }

  draw() {
    const [a, b] = this.answers.map((answer) => answer.routing);
    if (!a?.tokens.length || !b?.tokens.length) return;
    const names = ["thinking", "not thinking"];
    const top = Math.max(largestShare(a, "tokens"), largestShare(b, "tokens"));
    const maps = [
      { ...layersMap(a, "tokens", (row, expert) => this.mark(this.answers[0], row, expert), top), label: "Experts with thinking" },
      { ...layersMap(b, "tokens", (row, expert) => this.mark(this.answers[1], row, expert), top), label: "Experts without thinking" },
      differenceMap(a, b, names),
    ];
    if (this.#maps.length) this.#maps.forEach((map, at) => map.draw(maps[at]));
    else {
      this.#maps = maps.map(heatMap);
      this.maps.append(...this.#maps.slice(0, 2).map((map, at) => element("div", {}, element("h4", {}, this.answers[at].title), map.node)));
      this.difference.append(this.#maps[2].node);
      this.node.hidden = false;
    }
    this.list.replaceChildren(this.#table(largestDifferences(a, b, SHOWN), [a.tokens.length, b.tokens.length]));
  }

  #table(largest, tokens) {
    const most = Math.max(1e-9, ...largest.map(({ mine, other }) => Math.max(mine, other)));
    const cell = (share, name) => {
      const bar = element("span", { class: `bar ${name}`, "aria-hidden": "true" });
      bar.style.setProperty("--share", `${(100 * share) / most}%`);
      return element("td", { class: "weight" }, bar, percent(share));
    };
    const press = ({ row, layer, expert, mine, other }) =>
      element(
        "button",
        {
          type: "button",
          class: "expert",
          title: "Mark its tokens",
          on: { click: () => this.mark(this.answers[mine >= other ? 0 : 1], row, expert) },
        },
        `layer ${layer}, expert ${expert}`,
      );
    const rows = largest.map((one) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, press(one)),
        cell(one.mine, "more"),
        cell(one.other, "less"),
        element("td", {}, `${one.mine >= one.other ? "+" : "−"}${percent(Math.abs(one.mine - one.other))}`),
      ),
    );
    const heads = ["Expert", `Thinking, ${counted(tokens[0], "token")}`, `Not thinking, ${counted(tokens[1], "token")}`, "Difference"].map(
      (name) => element("th", { scope: "col" }, name),
    );
    return element(
      "table",
      {},
      element("caption", {}, "Experts whose share of tokens differs most"),
      element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...rows),
    );
  }
}
