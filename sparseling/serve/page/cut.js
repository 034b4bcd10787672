// Which part of the text each token wrote. Text and routing come on their own: a token's routing follows a step after its text, and text
// may be held back (half a tag, the line break before </think>) until after the routing. Whatever comes, the pieces together are the text.

const CUT_CHARACTER = "\ufffd"; // a token that holds part of a character only
const LONGEST_GAP = 16;

export class Cutter {
  text = "";
  #at = 0; // text before this place has its token
  #waiting = [];

  /** More text; returns the pieces that became certain, `{entry, text}` each. */
  pushText(text) {
    this.text += text;
    return this.#settle(false);
  }

  /** A token with its routing; returns pieces as `pushText` does. */
  pushEntry(entry) {
    this.#waiting.push(entry);
    return this.#settle(false);
  }

  /** No more text comes. */
  close() {
    return this.#settle(true);
  }

  /** Text that no token has claimed yet. */
  get rest() {
    return this.text.slice(this.#at);
  }

  #settle(closed) {
    const pieces = [];
    while (this.#waiting.length) {
      const length = this.#lengthOf(this.#waiting[0].text, closed);
      if (length === null) break;
      pieces.push({ entry: this.#waiting.shift(), text: this.text.slice(this.#at, this.#at + length) });
      this.#at += length;
    }
    return pieces;
  }

  /** How much of the rest belongs to a token that says it is `said`; null while more text may tell. */
  #lengthOf(said, closed) {
    const rest = this.rest;
    if (!said) return 0;
    // Line breaks around reasoning are not shown, so a token may be shown without its own.
    const shown = [said, said.replace(/^\n+/, ""), said.replace(/\n+$/, ""), said.trim()].filter((text) => text !== "");
    const whole = shown.find((text) => rest.startsWith(text));
    if (whole !== undefined) return whole.length;
    if (!closed && (rest === "" || shown.some((text) => text.startsWith(rest)))) return null;
    // A character that several tokens make belongs to the one after them that can be found again.
    const place = said.includes(CUT_CHARACTER) ? -1 : rest.indexOf(said);
    const certain = said.trim().length > 2 || /^[^\x00-\x7f]+$/.test(rest.slice(0, place).trim());
    if (place > 0 && place <= LONGEST_GAP && certain) return place + said.length;
    return 0;
  }
}
