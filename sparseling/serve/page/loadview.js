// How an answer loads the experts of each layer, beside all the tokens the server has run since its start.

import { element, percent, svg } from "./dom.js";
import { compareLoads } from "./routing.js";

const WIDTH = 512,
  HEIGHT = 130;

/** `load` is the reply of /v1/experts/load. Shows one line a layer, and one layer's experts in `node`; `row` says which. */
export function showLoad(node, routing, load, row, pickRow) {
  const { shape } = routing;
  const server = new Map(load.layers.map((layer) => [layer.layer, layer]));
  const countsOf = (at) => Array.from(routing.counts.subarray(at * shape.experts, (at + 1) * shape.experts));
  const lines = shape.layers.map((layer, at) => {
    const other = server.get(layer)?.counts ?? new Array(shape.experts).fill(0);
    const [mine, all] = [compareLoads(countsOf(at), other), compareLoads(other, other)];
    const press = element(
      "button",
      { type: "button", class: "expert", "aria-pressed": String(at === row), on: { click: () => pickRow(at) } },
      element("span", { class: "visually-hidden" }, "Layer "),
      String(layer),
    );
    return element(
      "tr",
      { class: at === row ? "chosen" : "" },
      element("th", { scope: "row" }, press),
      ...[
        `${mine.used} of ${shape.experts}`,
        `${mine.busiest} (${mine.timesEven.toFixed(1)}×)`,
        all.timesEven ? `${all.busiest} (${all.timesEven.toFixed(1)}×)` : "none yet",
        mine.distance === null ? "none yet" : percent(mine.distance, 0),
      ].map((cell) => element("td", {}, cell)),
    );
  });
  const heads = ["Layer", "Experts used", "Busiest here", "Busiest in all", "Distance"].map((name) =>
    element("th", { scope: "col" }, name),
  );
  const tokens = server.get(shape.layers[row])?.tokens ?? 0;
  node.replaceChildren(
    element(
      "p",
      { class: "note" },
      "The server has routed ",
      element("strong", {}, tokens.toLocaleString("en")),
      " tokens since its start, prompts included; this answer ",
      element("strong", {}, routing.tokens.length.toLocaleString("en")),
      ".",
    ),
    mirrored(shape, row, countsOf(row), server.get(shape.layers[row])?.counts ?? []),
    element(
      "div",
      { class: "table-scroller", tabindex: "0", role: "region", "aria-label": "Load of each layer" },
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines)),
    ),
    element(
      "p",
      { class: "note" },
      "× is times the even share. Distance is the part of the load that sits on other experts than the server’s: " +
        "0% alike, 100% nothing in common.",
    ),
  );
}

/** Experts of one layer: the answer's share upwards, the server's downwards, on one scale. */
function mirrored(shape, row, mine, other) {
  const share = (counts) => {
    const total = counts.reduce((sum, value) => sum + value, 0);
    return counts.map((value) => (total ? value / total : 0));
  };
  const [up, down] = [share(mine), share(other)];
  const [tallest, deepest] = [Math.max(1e-9, ...up), Math.max(0, ...down)];
  const scale = HEIGHT / (tallest + deepest);
  const base = scale * tallest;
  const one = WIDTH / shape.experts;
  const bar = (value, expert, name) =>
    svg("rect", {
      class: name,
      x: expert * one,
      width: Math.max(0.5, one * 0.86),
      y: name === "mine" ? base - scale * value : base,
      height: scale * value,
    });
  const even = scale / shape.experts;
  const most = Math.max(tallest, deepest);
  const picture = svg(
    "svg",
    {
      class: "mirrored",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label":
        `Layer ${shape.layers[row]}: shares of the experts in this answer, upwards, and in all the server’s tokens, downwards; ` +
        `the largest is ${percent(most)}`,
    },
    ...up.map((value, expert) => bar(value, expert, "mine")),
    ...down.map((value, expert) => bar(value, expert, "all")),
    ...(deepest ? [base - even, base + even] : [base - even]).map((y) => svg("line", { class: "even", x1: 0, x2: WIDTH, y1: y, y2: y })),
    svg("line", { class: "base", x1: 0, x2: WIDTH, y1: base, y2: base }),
  );
  return element(
    "figure",
    {},
    element(
      "figcaption",
      {},
      element("strong", {}, `Layer ${shape.layers[row]}`),
      `, experts 0 to ${shape.experts - 1}; the tallest bar is ${percent(most)} of the layer’s load, the dotted lines are the even share`,
    ),
    picture,
    element(
      "p",
      { class: "key", "aria-hidden": "true" },
      element("span", {}, element("i", { class: "swatch mine" }), "this answer"),
      element("span", {}, element("i", { class: "swatch all" }), "all tokens of the server"),
    ),
  );
}
