// The routing of one answer, packed: 2,000 tokens x 20 layers x 8 experts take 10 MB instead of 100.

const FIELDS = 4; // expert, gate weight, score, score with bias

/** `shape`: {experts, perToken, groups, layers: [numbers]} of the model. */
export class Routing {
  tokens = []; // {index, part, token, text, data: Float32Array [layers, perToken, 4], kept: groups a layer}

  constructor(shape) {
    this.shape = shape;
    this.counts = new Float64Array(shape.layers.length * shape.experts); // tokens that used an expert, [layers, experts]
    this.weights = new Float64Array(shape.layers.length * shape.experts); // sums of gate weights
    this.row = new Map(shape.layers.map((layer, row) => [layer, row]));
  }

  /** Takes an entry of the server; returns its number in `tokens`. What does not fit the model's shape is left out. */
  add(entry) {
    const { experts, perToken, layers } = this.shape;
    const data = new Float32Array(layers.length * perToken * FIELDS).fill(-1);
    const kept = [];
    for (const routed of entry.layers ?? []) {
      const row = this.row.get(routed.layer);
      if (row === undefined) continue;
      kept[row] = routed.groups ?? [];
      routed.experts.slice(0, perToken).forEach((expert, place) => {
        if (!(Number.isInteger(expert) && expert >= 0 && expert < experts)) return;
        data.set([expert, routed.weights[place], routed.scores[place], routed.biased[place]], (row * perToken + place) * FIELDS);
        this.counts[row * experts + expert] += 1;
        this.weights[row * experts + expert] += routed.weights[place];
      });
    }
    this.tokens.push({ index: entry.index, part: entry.part, token: entry.token, text: entry.text, data, kept });
    return this.tokens.length - 1;
  }

  /** The experts of a token in a layer's row, by falling gate weight: [{expert, weight, score, biased}]. */
  chosen(number, row) {
    const { perToken } = this.shape;
    const { data } = this.tokens[number];
    const list = [];
    for (let place = 0; place < perToken; place += 1) {
      const at = (row * perToken + place) * FIELDS;
      if (data[at] >= 0) list.push({ expert: data[at], weight: data[at + 1], score: data[at + 2], biased: data[at + 3] });
    }
    return list.sort((a, b) => b.weight - a.weight);
  }

  /** Gate weight of each token for one expert, 0 where it was not chosen. */
  weightsOf(row, expert) {
    return this.tokens.map((_, number) => this.chosen(number, row).find((one) => one.expert === expert)?.weight ?? 0);
  }

  /** [layers, experts]: the share of tokens that used each expert (`tokens`) or its share of the gate weight (`weight`). */
  shares(measure) {
    const { experts, layers, perToken } = this.shape;
    const source = measure === "weight" ? this.weights : this.counts;
    const shares = new Float64Array(source.length);
    for (let row = 0; row < layers.length; row += 1) {
      const slice = source.subarray(row * experts, (row + 1) * experts);
      const total = measure === "weight" ? slice.reduce((sum, value) => sum + value, 0) : this.tokens.length;
      if (total > 0) for (let expert = 0; expert < experts; expert += 1) shares[row * experts + expert] = slice[expert] / total;
    }
    return shares;
  }

  /** What every cell of `shares` would be if all experts were used alike. */
  evenShare(measure) {
    return (measure === "weight" ? 1 : this.shape.perToken) / this.shape.experts;
  }
}

/** The shape that /v1/models tells of, or null for a model without experts. */
export function shapeOf(model) {
  const layers = Array.isArray(model.moe_layers) ? model.moe_layers : [];
  if (!layers.length || !(model.num_experts > 0) || !(model.num_experts_per_tok > 0)) return null;
  return { experts: model.num_experts, perToken: model.num_experts_per_tok, groups: Math.max(1, model.n_group ?? 1), layers };
}

/** What an answer's counts [experts] say beside another's: experts used, the busiest, the distance of the two. */
export function compareLoads(mine, other) {
  const total = mine.reduce((sum, value) => sum + value, 0);
  const otherTotal = other.reduce((sum, value) => sum + value, 0);
  let used = 0,
    busiest = 0,
    distance = 0;
  mine.forEach((value, expert) => {
    if (value > 0) used += 1;
    if (value > mine[busiest]) busiest = expert;
    distance += Math.abs((total ? value / total : 0) - (otherTotal ? other[expert] / otherTotal : 0)) / 2;
  });
  return { used, busiest, timesEven: total ? (mine[busiest] * mine.length) / total : 0, distance: total && otherTotal ? distance : null };
}
