// A heat map of any size: one canvas pixel a cell, stretched by CSS, with axes, a cursor for mouse and keys, a reading line and a table.

import { element, freshId } from "./dom.js";
import { css } from "./palette.js";

/**
 * `map`: {label, rowWord, columnWord, rows, columns, rowName(r), columnName(c), columnTicks: [c], height: px of a row,
 *   value(r, c) -> number, colour(value) -> [r, g, b], read(r, c) -> string, legend() -> Node,
 *   table() -> Node (built when opened), pick(r, c) or null}.
 * Returns {node, draw(map)}; `draw` shows new values or another size.
 */
export function heatMap(map) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const cursor = element("div", { class: "cursor", hidden: true });
  const reading = element("output", { class: "reading", id: freshId("reading"), "aria-live": "polite" });
  const plot = element(
    "div",
    { class: "plot", tabindex: "0", role: "application", "aria-roledescription": "heat map", "aria-describedby": reading.id },
    canvas,
    cursor,
  );
  const rowAxis = element("div", { class: "row-axis", "aria-hidden": "true" });
  const columnAxis = element("div", { class: "column-axis", "aria-hidden": "true" });
  const table = element("details", { class: "as-table" }, element("summary", {}, "As a table"));
  const legend = element("div", { class: "legend" });
  const scroller = element("div", { class: "map-scroller" }, element("div", { class: "map" }, rowAxis, plot, columnAxis));
  const node = element("div", { class: "heat-map" }, legend, scroller, reading, table);
  const state = { map, row: 0, column: 0 };

  const show = (spoken) => {
    const { map: now, row, column } = state;
    cursor.hidden = false;
    place(cursor, now, row, column);
    reading.setAttribute("aria-live", spoken ? "polite" : "off");
    reading.textContent = now.read(row, column);
  };
  const move = (row, column) => {
    state.row = Math.min(state.map.rows - 1, Math.max(0, row));
    state.column = Math.min(state.map.columns - 1, Math.max(0, column));
    show(true);
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    state.column = clamp(Math.floor(((event.clientX - box.left) / box.width) * state.map.columns), state.map.columns);
    state.row = clamp(Math.floor(((event.clientY - box.top) / box.height) * state.map.rows), state.map.rows);
  };
  plot.addEventListener("pointermove", (event) => {
    under(event);
    show(false);
  });
  plot.addEventListener("pointerleave", () => {
    cursor.hidden = document.activeElement !== plot;
  });
  plot.addEventListener("focus", () => show(true));
  plot.addEventListener("blur", () => {
    cursor.hidden = true;
  });
  plot.addEventListener("click", (event) => {
    under(event);
    show(true);
    state.map.pick?.(state.row, state.column);
  });
  plot.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.round(state.map.columns / 8));
    const { row, column } = state;
    const steps = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [row, 0],
      End: [row, state.map.columns - 1],
      PageUp: [row, column - page],
      PageDown: [row, column + page],
    };
    if (event.key in steps) move(...steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") state.map.pick?.(row, column);
    else return;
    event.preventDefault();
  });
  const fillTable = () => {
    table.lastElementChild.tagName === "SUMMARY" || table.lastElementChild.remove();
    if (table.open)
      table.append(
        element(
          "div",
          { class: "table-scroller", tabindex: "0", role: "region", "aria-label": `${state.map.label}, as a table` },
          state.map.table(),
        ),
      );
  };
  table.addEventListener("toggle", fillTable);

  const draw = (next) => {
    state.map = next;
    state.row = clamp(state.row, next.rows);
    state.column = clamp(state.column, next.columns);
    plot.setAttribute(
      "aria-label",
      `${next.label}: ${next.rows} ${next.rowWord} by ${next.columns} ${next.columnWord}; arrow keys read the cells`,
    );
    paint(canvas, next);
    drawAxes(rowAxis, columnAxis, next);
    legend.replaceChildren(
      element("span", { class: "axes", "aria-hidden": "true" }, `${next.rowWord} ↓ ${next.columnWord} →`),
      next.legend(),
    );
    if (!cursor.hidden) show(false);
    else reading.textContent = next.hint ?? "";
    if (table.open) fillTable();
  };
  draw(map);
  return { node, draw };
}

const clamp = (value, length) => Math.min(Math.max(0, length - 1), Math.max(0, value));

function place(cursor, map, row, column) {
  cursor.style.top = `${(100 * row) / map.rows}%`;
  cursor.style.left = `${(100 * column) / map.columns}%`;
  cursor.style.height = `${100 / map.rows}%`;
  cursor.style.width = `${100 / map.columns}%`;
}

function paint(canvas, map) {
  const rows = Math.max(1, map.rows);
  canvas.width = map.columns;
  canvas.height = rows;
  canvas.style.height = `${rows * map.height}px`;
  const image = new ImageData(map.columns, rows);
  for (let row = 0, at = 0; row < map.rows; row += 1) {
    for (let column = 0; column < map.columns; column += 1, at += 4) {
      const [r, g, b] = map.colour(map.value(row, column));
      image.data[at] = r;
      image.data[at + 1] = g;
      image.data[at + 2] = b;
      image.data[at + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawAxes(rowAxis, columnAxis, map) {
  const every = Math.max(1, Math.ceil(14 / map.height)); // rows between two labels that do not touch
  const step = niceStep(every);
  const labels = [];
  for (let row = 0; row < map.rows; row += 1) {
    if (row > 0 && (row + 1) % step) continue;
    const label = element("span", {}, map.rowName(row));
    label.style.top = `${(row + 0.5) * map.height}px`;
    labels.push(label);
  }
  rowAxis.replaceChildren(...labels);
  columnAxis.replaceChildren(
    ...map.columnTicks.map((column) => {
      const tick = element("span", {}, map.columnName(column));
      tick.style.left = `${(100 * column) / map.columns}%`;
      return tick;
    }),
  );
}

const niceStep = (least) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((step) => step >= least) ?? 1000;

/** A ramp from `low` to `high` with marks: [[place 0..1, words]]. */
export function rampLegend(title, colour, marks, low = 0, high = 1) {
  const canvas = element("canvas", { width: 128, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  for (let x = 0; x < 128; x += 1) {
    context.fillStyle = css(colour(low + ((high - low) * x) / 127));
    context.fillRect(x, 0, 1, 1);
  }
  const scale = element(
    "span",
    { class: "scale" },
    ...marks.map(([at, words]) => {
      const mark = element("span", {}, words);
      mark.style.left = `${100 * at}%`;
      mark.className = at < 0.15 ? "first" : at > 0.85 ? "last" : "";
      return mark;
    }),
  );
  return element("div", { class: "ramp" }, element("span", {}, title), element("span", { class: "ramp-bar" }, canvas, scale));
}

/** Columns that begin a group of experts, or a quarter where there is one group only. */
export function expertTicks({ experts, groups }) {
  const parts = groups > 1 && groups <= 16 ? groups : Math.min(4, experts);
  return [...new Set(Array.from({ length: parts }, (_, part) => Math.round((part * experts) / parts)))];
}

/** A table from strings: `head` the column names, `rows` their cells, the first of each row its name. */
export function plainTable(caption, head, rows) {
  const body = rows.map(([name, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))),
  );
  return element(
    "table",
    {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...body),
  );
}
