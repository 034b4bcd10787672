// The heat maps of the page: what each shows, in numbers and in words.

import { counted, percent } from "./dom.js";
import { expertTicks, plainTable, rampLegend } from "./heatmap.js";
import { oneWay, twoWays } from "./palette.js";
import { named } from "./words.js";

const ROWS_OF_A_TABLE = 500; // more would keep a screen reader busy for minutes

const rowHeight = (rows, least, most) => Math.min(most, Math.max(least, Math.round(260 / Math.max(1, rows))));

/** The largest share of an answer's map, its darkest colour. */
export const largestShare = (routing, measure) => routing.shares(measure).reduce((most, value) => Math.max(most, value), 1e-9);

/**
 * Layers by experts: the share of the answer's tokens that used each expert, or its share of the gate weight. Square-root colours up to
 * `top`, which two maps to be compared have in common.
 */
export function layersMap(routing, measure, pick, top = largestShare(routing, measure)) {
  const { shape } = routing;
  const shares = routing.shares(measure);
  const even = routing.evenShare(measure);
  const total = routing.tokens.length;
  const at = (row, expert) => row * shape.experts + expert;
  const colour = (value) => oneWay(Math.sqrt(value / top));
  return {
    ...frame(shape, "Experts of the answer"),
    value: (row, expert) => shares[at(row, expert)],
    colour,
    read: (row, expert) =>
      `Layer ${shape.layers[row]}, expert ${expert}: ${routing.counts[at(row, expert)]} of ${counted(total, "token")}, ` +
      shareWords(shares[at(row, expert)], measure, even),
    legend: () =>
      rampLegend(measure === "weight" ? "share of the layer’s gate weight" : "share of tokens that used the expert", oneWay, [
        [0, "0"],
        ...evenMark(even, top),
        [1, percent(top)],
      ]),
    hint: "Point at a cell, or use the arrow keys; press one to mark its tokens in the answer.",
    table: () =>
      plainTable(
        measure === "weight" ? "Share of the layer’s gate weight in percent" : `Tokens that used each expert, of ${total}`,
        ["Layer", ...Array.from({ length: shape.experts }, (_, expert) => `Expert ${expert}`)],
        shape.layers.map((layer, row) => [
          `Layer ${layer}`,
          ...Array.from({ length: shape.experts }, (_, expert) =>
            measure === "weight" ? (100 * shares[at(row, expert)]).toFixed(2) : String(routing.counts[at(row, expert)]),
          ),
        ]),
      ),
    pick,
  };
}

/** Tokens by experts in the layer of `row`: gate weights. */
export function tokensMap(routing, row, pick) {
  const { shape, tokens } = routing;
  const layer = shape.layers[row];
  const weights = new Float64Array(tokens.length * shape.experts);
  let top = 1e-9;
  tokens.forEach((_, number) => {
    for (const { expert, weight } of routing.chosen(number, row)) {
      weights[number * shape.experts + expert] = weight;
      top = Math.max(top, weight);
    }
  });
  const tableRows = () =>
    tokens.slice(0, ROWS_OF_A_TABLE).map((token, number) => [
      `${number + 1} ${named(token.text)}`,
      routing
        .chosen(number, row)
        .map(({ expert, weight }) => `${expert} (${weight.toFixed(3)})`)
        .join(", "),
    ]);
  const cut = tokens.length > ROWS_OF_A_TABLE ? `; the first ${ROWS_OF_A_TABLE} of ${tokens.length} tokens` : "";
  return {
    ...frame(shape, `Tokens and experts of layer ${layer}`),
    rowWord: "tokens",
    rows: tokens.length,
    rowName: (number) => String(number + 1),
    height: rowHeight(tokens.length, 3, 16),
    value: (number, expert) => weights[number * shape.experts + expert],
    colour: (value) => oneWay(Math.sqrt(value / top)),
    read: (number, expert) => {
      const weight = weights[number * shape.experts + expert];
      const words = weight ? `gate weight ${weight.toFixed(3)}` : "not used";
      return `Token ${number + 1} ${named(tokens[number].text)}, expert ${expert}: ${words}`;
    },
    legend: () =>
      rampLegend("gate weight", oneWay, [
        [0, "not used"],
        [1, top.toFixed(2)],
      ]),
    hint: "Point at a cell, or use the arrow keys; press one to show its token.",
    table: () => plainTable(`Experts of each token in layer ${layer}, with gate weights${cut}`, ["Token", "Experts"], tableRows()),
    pick,
  };
}

/** Layers by experts: share of tokens in `a` less that in `b`, in points of percent. Blue is more in b, orange more in a. */
export function differenceMap(a, b, names) {
  const { shape } = a;
  const [mine, other] = [a.shares("tokens"), b.shares("tokens")];
  const difference = mine.map((value, at) => value - other[at]);
  const top = Math.max(
    difference.reduce((most, value) => Math.max(most, Math.abs(value)), 0),
    1e-9,
  );
  const at = (row, expert) => row * shape.experts + expert;
  return {
    ...frame(shape, `Difference: ${names[0]} less ${names[1]}`),
    value: (row, expert) => difference[at(row, expert)],
    colour: (value) => twoWays(value / top),
    read: (row, expert) =>
      `Layer ${shape.layers[row]}, expert ${expert}: ${percent(mine[at(row, expert)])} of tokens ${names[0]}, ` +
      `${percent(other[at(row, expert)])} ${names[1]}`,
    legend: () =>
      rampLegend(
        "share of tokens, difference",
        twoWays,
        [
          [0, `${names[1]} +${percent(top, 0)}`],
          [0.5, "alike"],
          [1, `${names[0]} +${percent(top, 0)}`],
        ],
        -1,
        1,
      ),
    hint: `Blue was used more when ${names[1]}, orange more when ${names[0]}.`,
    table: () =>
      plainTable(
        `Share of tokens in points of percent, ${names[0]} less ${names[1]}`,
        ["Layer", ...Array.from({ length: shape.experts }, (_, expert) => `Expert ${expert}`)],
        shape.layers.map((layer, row) => [
          `Layer ${layer}`,
          ...Array.from({ length: shape.experts }, (_, expert) => (100 * difference[at(row, expert)]).toFixed(1)),
        ]),
      ),
  };
}

/** The experts whose use differs most: [{layer, expert, mine, other}], shares of tokens. */
export function largestDifferences(a, b, number) {
  const [mine, other] = [a.shares("tokens"), b.shares("tokens")];
  const { experts, layers } = a.shape;
  return Array.from(mine.keys())
    .sort((x, y) => Math.abs(mine[y] - other[y]) - Math.abs(mine[x] - other[x]))
    .slice(0, number)
    .map((at) => ({
      row: Math.floor(at / experts),
      layer: layers[Math.floor(at / experts)],
      expert: at % experts,
      mine: mine[at],
      other: other[at],
    }));
}

function frame(shape, label) {
  return {
    label,
    rowWord: "layers",
    columnWord: "experts",
    rows: shape.layers.length,
    columns: shape.experts,
    rowName: (row) => String(shape.layers[row]),
    columnName: String,
    columnTicks: expertTicks(shape),
    height: rowHeight(shape.layers.length, 10, 30),
  };
}

/** Where the even share lies on a square-root legend, unless it would touch the ends. */
function evenMark(even, top) {
  const at = Math.sqrt(even / top);
  return at > 0.3 && at < 0.72 ? [[at, `even ${percent(even)}`]] : [];
}

function shareWords(share, measure, even) {
  const what = measure === "weight" ? "of the gate weight" : "of tokens";
  return `${percent(share)} ${what}, ${(share / even).toFixed(1)} times even`;
}
