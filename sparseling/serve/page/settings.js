// The reader's settings, kept in this browser. An empty field is not sent: the server's own default holds.

import { byId } from "./dom.js";

const PLACE = "sparseling.settings";

// Field of the form, key of the request, what is allowed.
const NUMBERS = [
  ["temperature", "temperature", 0, 2],
  ["top-p", "top_p", 0, 1],
  ["top-k", "top_k", 0, 1e6],
  ["max-tokens", "max_tokens", 1, 1e6],
  ["seed", "seed", 0, 2 ** 31 - 1],
];
const TEXTS = ["system"];
const SWITCHES = ["alone"];
const FIELDS = [...NUMBERS.map(([field]) => field), ...TEXTS];

/** Fills the form from what was kept, and keeps every change. */
export function startSettings() {
  const kept = read();
  for (const field of FIELDS) if (typeof kept[field] === "string") byId(field).value = kept[field];
  for (const field of SWITCHES) byId(field).checked = kept[field] === true;
  byId("settings").addEventListener("input", keep);
  byId("settings-reset").addEventListener("click", () => {
    for (const field of FIELDS) byId(field).value = "";
    for (const field of SWITCHES) byId(field).checked = false;
    keep();
  });
}

/** The keys of a request that the form sets, or `{error}`: a sentence on the first field that cannot be used. */
export function sampling() {
  const request = {};
  for (const [field, key, least, most] of NUMBERS) {
    const input = byId(field);
    if (input.value.trim() === "" && !input.validity.badInput) continue;
    const value = Number(input.value);
    const whole = input.step === "1";
    if (input.validity.badInput || !Number.isFinite(value) || value < least || value > most || (whole && !Number.isInteger(value))) {
      return {
        error:
          `${byId(`${field}-label`).textContent}: give a ${whole ? "whole " : ""}number from ${least} to ` +
          `${most.toLocaleString("en")}, or nothing.`,
      };
    }
    request[key] = value;
  }
  return { request };
}

export const systemPrompt = () => byId("system").value.trim();

/** Whether each question is sent without the turns before it. */
export const alone = () => byId("alone").checked;

/** A remembered choice outside the form, such as the thinking switch. */
export function remember(name, value) {
  write({ ...read(), [name]: value });
}

export const remembered = (name) => read()[name];

function keep() {
  const kept = read();
  for (const field of FIELDS) kept[field] = byId(field).value;
  for (const field of SWITCHES) kept[field] = byId(field).checked;
  write(kept);
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return kept !== null && typeof kept === "object" ? kept : {};
  } catch {
    return {};
  }
}

function write(kept) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(kept));
  } catch {
    // A browser that keeps nothing still chats.
  }
}
