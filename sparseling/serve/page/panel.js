// The panel beside the chat (on a phone a sheet over it): a token, the heat map of an answer, its load.

import { expertsLoad } from "./api.js";
import { byId, element, throttled } from "./dom.js";
import { heatMap } from "./heatmap.js";
import { showLoad } from "./loadview.js";
import { layersMap, tokensMap } from "./maps.js";
import { onSchemeChange } from "./palette.js";
import { TokenView } from "./tokenview.js";

const TABS = ["token", "map", "load"];

export class Panel {
  answer = null;
  number = null; // of the token shown
  #token = null; // its element
  #tab = "token";
  #map = null;
  #load = null; // the last reply of /v1/experts/load
  #loadRow = 0;
  #marked = null;

  constructor() {
    this.node = byId("panel");
    this.tokenView = new TokenView(byId("token-view"), (row, expert) => this.mark(row, expert));
    byId("panel-close").addEventListener("click", () => this.close());
    byId("previous-token").addEventListener("click", () => this.#step(-1));
    byId("next-token").addEventListener("click", () => this.#step(1));
    byId("unmark").addEventListener("click", () => this.unmark());
    for (const id of ["map-kind", "map-measure"]) byId(id).addEventListener("change", () => this.#showMap());
    this.node.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      this.close();
    });
    for (const tab of TABS) {
      byId(`tab-${tab}`).addEventListener("click", () => this.#choose(tab));
      byId(`tab-${tab}`).addEventListener("keydown", (event) => this.#tabKey(event, tab));
    }
    this.redraw = throttled(() => this.#refresh(), 300);
    onSchemeChange(() => this.#refresh());
  }

  get shown() {
    return !this.node.hidden;
  }

  /** Shows a token. `enter`: by the keyboard; pressed again on the same token the focus goes into the panel. */
  select(answer, number, token, { enter = false } = {}) {
    const again = enter && this.shown && this.#token === token && this.#tab === "token";
    this.#take(answer);
    this.#setToken(number, token);
    this.#choose("token");
    this.#reveal();
    token.scrollIntoView({ block: "nearest" });
    if (again) byId("panel-title").focus();
  }

  /** The reader went to another token: the panel follows if it is shown. */
  moved(answer, number, token) {
    if (!this.shown || this.#tab !== "token") return;
    this.#take(answer);
    this.#setToken(number, token);
    this.#refresh();
  }

  /** Shows the heat map of an answer. */
  overview(answer) {
    this.#take(answer);
    this.#choose("map");
    this.#reveal();
    byId("panel-title").focus();
  }

  /** More of `answer` has come. */
  changed(answer) {
    if (answer === this.answer && this.shown) this.redraw();
  }

  close() {
    const back = this.#token?.isConnected ? this.#token : byId("question");
    const inside = this.node.contains(document.activeElement);
    this.unmark();
    this.#token?.setAttribute("aria-selected", "false");
    this.node.hidden = true;
    document.body.classList.remove("with-panel");
    if (inside || document.activeElement === document.body) back.focus();
  }

  /** Forgets all answers. */
  clear() {
    if (this.answer) this.forget(this.answer);
  }

  /** Forgets an answer that is gone. */
  forget(answer) {
    if (this.answer !== answer) return;
    if (this.shown) this.close();
    this.unmark();
    this.answer = this.number = this.#token = null;
  }

  /** Tints the tokens of any answer that used an expert. */
  markIn(answer, row, expert) {
    this.#take(answer);
    this.mark(row, expert);
    if (this.shown) this.#refresh();
  }

  /** Tints the tokens that used an expert. */
  mark(row, expert) {
    const weights = this.answer.routing.weightsOf(row, expert);
    const used = weights.filter((weight) => weight > 0).length;
    this.#marked = { row, expert };
    this.answer.tint(weights);
    byId("marked").hidden = false;
    byId("marked-text").textContent =
      `Marked: ${used} of ${weights.length} tokens used expert ${expert} of layer ${this.answer.shape.layers[row]}`;
  }

  unmark() {
    if (this.#marked) this.answer?.tint(null);
    this.#marked = null;
    byId("marked").hidden = true;
  }

  #take(answer) {
    if (this.answer === answer) return;
    this.unmark();
    this.answer = answer;
    this.number = null;
    this.#token?.setAttribute("aria-selected", "false");
    this.#token = null;
    this.#fillKinds();
  }

  #setToken(number, token) {
    this.#token?.setAttribute("aria-selected", "false");
    this.#token = token;
    this.number = number;
    token.setAttribute("aria-selected", "true");
  }

  #fillKinds() {
    const layers = this.answer.shape?.layers ?? [];
    byId("map-kind").replaceChildren(
      element("option", { value: "layers" }, "All layers, whole answer"),
      ...layers.map((layer, row) => element("option", { value: row }, `Layer ${layer}, token by token`)),
    );
    this.#loadRow = 0;
  }

  #reveal() {
    this.node.hidden = false;
    document.body.classList.add("with-panel");
    this.#refresh();
  }

  #choose(tab) {
    this.#tab = tab;
    for (const other of TABS) {
      byId(`tab-${other}`).setAttribute("aria-selected", String(other === tab));
      byId(`tab-${other}`).setAttribute("tabindex", other === tab ? "0" : "-1");
      byId(`${other}-tab`).hidden = other !== tab;
    }
    if (tab === "load") this.#fetchLoad();
    if (this.shown) this.#refresh();
  }

  #tabKey(event, tab) {
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (!(event.key in steps)) return;
    const next = TABS[(TABS.indexOf(tab) + steps[event.key] + TABS.length) % TABS.length];
    this.#choose(next);
    byId(`tab-${next}`).focus();
    event.preventDefault();
  }

  #step(by) {
    const place = this.#token ? Number(this.#token.dataset.place) : -1;
    this.answer.go(place + by, true);
    this.#token?.scrollIntoView({ block: "nearest" });
  }

  #refresh() {
    if (!this.answer || !this.shown) return;
    byId("panel-title").textContent = this.answer.title ? `Experts at work: ${this.answer.title.toLowerCase()}` : "Experts at work";
    if (this.#tab === "token") this.#showToken();
    else if (this.#tab === "map") this.#showMap();
    else this.#showLoad();
  }

  #showToken() {
    if (this.#token) this.tokenView.show(this.answer, this.number, this.#token);
    else
      byId("token-view").replaceChildren(
        element("p", { class: "note" }, "Press a token of the answer, or go through them with the arrow keys."),
      );
  }

  #showMap() {
    const { routing } = this.answer;
    const place = byId("map-view");
    const empty = !routing?.tokens.length;
    place.hidden = empty;
    byId("map-empty").hidden = !empty;
    if (empty) return;
    const kind = byId("map-kind").value;
    byId("map-measure").disabled = kind !== "layers";
    const map =
      kind === "layers"
        ? layersMap(routing, byId("map-measure").value, (row, expert) => this.mark(row, expert))
        : tokensMap(routing, Number(kind), (number) => this.#jump(number));
    if (this.#map) this.#map.draw(map);
    else {
      this.#map = heatMap(map);
      place.append(this.#map.node);
    }
  }

  #jump(number) {
    const token = this.answer.tokens.find((one) => this.answer.numbers.get(one) === number);
    if (!token) return;
    this.select(this.answer, number, token);
    token.scrollIntoView({ block: "nearest" });
  }

  async #fetchLoad() {
    try {
      this.#load = await expertsLoad();
    } catch (error) {
      this.#load = null;
      byId("load-view").replaceChildren(element("p", { class: "error" }, error.message));
      return;
    }
    if (this.#tab === "load") this.#refresh();
  }

  #showLoad() {
    const { routing } = this.answer;
    if (!routing) byId("load-view").replaceChildren(element("p", { class: "note" }, "This model has no experts to show."));
    else if (this.#load) {
      showLoad(byId("load-view"), routing, this.#load, this.#loadRow, (row) => {
        this.#loadRow = row;
        this.#refresh();
        byId("load-view").querySelectorAll("tbody button")[row]?.focus();
      });
    }
  }
}
