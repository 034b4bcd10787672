// Tokens in words that can be seen and heard.

const NAMES = { "\n": "↵", "\t": "⇥", " ": "␣", "\r": "␍" };

/** A token's text in quotation marks with white space made visible; "no text" for one that shows none. */
export const named = (text) =>
  text
    ? `“${shown(text)
        .replace(/[\n\t\r]/g, (mark) => NAMES[mark])
        .replace(/^ +| +$/g, (run) => "␣".repeat(run.length))}”`
    : "(no text)";

/** Text as it is shown: marks that turn the direction of all that follows are named instead of obeyed. */
export const shown = (text) =>
  text.replace(/[\u202a-\u202e\u2066-\u2069]/g, (mark) => `[U+${mark.codePointAt(0).toString(16).toUpperCase()}]`);

const SPOKEN = { " ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return" };

/** What a screen reader is to say for a token that its text alone would leave silent; null where the text says it. */
export function spoken(text) {
  if (text === "") return "token without text";
  if (text.trim() !== "") return null;
  const kinds = [...new Set(text)].map((mark) => SPOKEN[mark] ?? "white space");
  return kinds.join(" and ");
}
