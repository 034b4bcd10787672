// Which part of the text each token wrote. Text and routing come on their own: a token's routing follows a step after its text, and text
// may be held back (half a tag, the line break before </think>) until after the routing. Whatever comes, the pieces together are the text.

const CUT = "\ufffd"; // in what a token says it is: it holds part of a character only
const LONGEST_GAP = 16; // characters that a run of such tokens may make

export class Cutter {
  text = "";
  closed = false; // no more text comes
  #at = 0; // text before this place has its token
  #waiting = [];

  /** More text; returns the pieces that became certain, `{entry, text}` each. */
  pushText(text) {
    this.text += text;
    return this.#settle();
  }

  /** A token with its routing; returns pieces as `pushText` does. */
  pushEntry(entry) {
    this.#waiting.push(entry);
    return this.#settle();
  }

  /** No more text comes; tokens still may. */
  close() {
    this.closed = true;
    return this.#settle();
  }

  /** The last pieces: nothing comes any more. */
  finish() {
    const pieces = this.close();
    const last = this.#waiting.length - 1; // cut characters to the very end
    return [...pieces, ...this.#waiting.splice(0).map((entry, place) => this.#take(entry, place === last ? this.rest.length : 0))];
  }

  /** Text that no token has claimed yet. */
  get rest() {
    return this.text.slice(this.#at);
  }

  #take(entry, length) {
    this.#at += length;
    return { entry, text: this.text.slice(this.#at - length, this.#at) };
  }

  #settle() {
    const pieces = [];
    while (this.#waiting.length) {
      const lengths = this.#waiting[0].text.includes(CUT) ? this.#lengthsOfCut() : this.#lengthOf(this.#waiting[0].text);
      if (lengths === null) break;
      for (const length of lengths) pieces.push(this.#take(this.#waiting.shift(), length));
    }
    return pieces;
  }

  /** How much of the rest belongs to a token that says it is `said`, [length]; null while more text may tell. */
  #lengthOf(said) {
    if (!said) return [0];
    const shown = shownAs(said);
    const whole = shown.find((text) => this.rest.startsWith(text));
    if (whole !== undefined) return [whole.length];
    return !this.closed && shown.some((text) => text.startsWith(this.rest)) ? null : [0];
  }

  /** The lengths of a run of tokens that only together make characters: all of it is the last one's, up to the token after the run. */
  #lengthsOfCut() {
    if (this.rest.startsWith(this.#waiting[0].text)) return [this.#waiting[0].text.length]; // a character that never became whole
    const after = this.#waiting.findIndex((entry) => entry.text !== "" && !entry.text.includes(CUT));
    if (after < 0) return null;
    const places = shownAs(this.#waiting[after].text).map((text) => this.rest.indexOf(text, 1));
    const place = places.find((found) => found > 0 && found <= LONGEST_GAP);
    if (place === undefined && !this.closed && this.rest.length <= LONGEST_GAP) return null;
    return Array.from({ length: after }, (_, number) => (number === after - 1 ? (place ?? 0) : 0));
  }
}

/** What of a token may be shown: all of it, or without the line breaks around reasoning. */
const shownAs = (said) => [said, said.replace(/^\n+/, ""), said.replace(/\n+$/, ""), said.trim()].filter((text) => text !== "");
