// The smallest help for building a page. Strings become text nodes: what a model wrote is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Keys of `attributes`: `class`, `data-*`, `aria-*`... as written; `on` holds listeners; null and false are left out. */
export function element(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, name), attributes, children);
}

function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function button(label, onClick, attributes = {}) {
  return element("button", { type: "button", ...attributes, on: { click: onClick } }, label);
}

let lastId = 0;

/** An id that no other element of the page has. */
export function freshId(stem) {
  lastId += 1;
  return `${stem}-${lastId}`;
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Calls `action` at most once in `milliseconds`, the last call never lost. */
export function throttled(action, milliseconds) {
  let timer = null;
  let last = -Infinity;
  const fire = () => {
    timer = null;
    last = performance.now();
    action();
  };
  return () => {
    if (timer === null) timer = setTimeout(fire, Math.max(0, last + milliseconds - performance.now()));
  };
}
