// One step of the model over a batch of new tokens: a token each of many sequences, or chunks of their prompts, or both.
//
// All threads go through all layers together and share every product by its rows, so that an uneven router leaves none idle. Every
// token's numbers are computed in one order, whatever else is in the batch: alone or with others it gets the same bits.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "pool.h"
#include "step.h"

class Model {
 public:
  Model(const Shape& shape, int threads) : shape(shape), layers(shape.layers + shape.ahead), pool(threads) {
    for (int t = 0; t < threads; t++) own.emplace_back(shape, QUERIES * SPAN + 2 * QUERIES * shape.head_dim);
    buffers.next_tile = std::vector<std::atomic<i64>>(layers.size());
  }

  const Shape shape;
  std::vector<Layer> layers;        // those of the decoder, then an MTP layer if there is one
  Door door;
  Matrix head;
  const void* embedding = nullptr;  // [vocab][hidden]
  bool embedding_is_bf16 = false;
  const float *final_norm = nullptr, *ahead_norm = nullptr;
  const float *cosine = nullptr, *sine = nullptr;  // [positions][rotary_dim / 2]

  void use_threads(int count) { pool.use(count); }

  template <class C>
  void step(const Cache<C>& cache, const Request& ask) {
    grow(ask);
    const bool heads_divide = shape.kv_heads % pool.used() == 0;
    const auto tiles = attention_tiles(ask);
    pool.run([&](int t) {
      enter(ask, t);
      const i64 from = ask.previous ? shape.layers : 0, to = ask.previous ? from + 1 : shape.layers;
      for (i64 l = from, moe = 0; l < to; l++) {
        const Layer& layer = layers[l];
        norm(layer.input_norm, layer.query_key_value.kind, ask.n, t);
        if (few && heads_divide) attend_own_heads(layer, cache, ask, l, tiles, t);
        else attend_in_phases(layer, cache, ask, l, tiles, t);
        pool.barrier();
        add_product(layer.dense, layer.dense_bias, buffers.attended, ask.n, t);
        pool.barrier();
        norm(layer.post_norm, layer.gate_up.kind, ask.n, t);
        if (layer.has_experts()) experts(layer, ask, moe++, t);
        else dense_mlp(layer, ask.n, t);
        pool.barrier();
      }
      finish(ask, t);
    });
  }

 private:
  static constexpr i64 FEW = 8;  // tokens

  struct Tile {
    i64 row, rows, kv_head;
  };

  Pool pool;
  Buffers buffers;
  std::vector<Own> own;
  bool few = false;

  Activations& normed(int t) { return few ? own[t].normed : buffers.normed; }
  Chosen& chosen(int t) { return few ? own[t].chosen : buffers.chosen; }

  std::pair<i64, i64> share(i64 n, int t) const { return {n * t / pool.used(), n * (t + 1) / pool.used()}; }
  float* residual(i64 row) { return &buffers.residual[row * shape.hidden]; }
  i64 projected() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_dim; }
  i64 padded_experts() const { return (shape.experts + BLOCK - 1) / BLOCK * BLOCK; }

  void grow(const Request& ask) {
    const i64 n = ask.n;
    const auto at_least = [](auto& v, i64 size) {
      if ((i64)v.size() < size) v.resize(size);
    };
    const auto grow_chosen = [&](Chosen& c) { at_least(c.ids, n * shape.k), at_least(c.weights, n * shape.k); };
    few = n <= FEW;
    for (auto& counter : buffers.next_tile) counter.store(0, std::memory_order_relaxed);
    at_least(buffers.residual, n * shape.hidden);
    at_least(buffers.query_key_value, n * projected());
    at_least(buffers.scores, n * padded_experts());
    for (int t = 0; t < (few ? pool.used() : 1); t++) normed(t).resize(n, shape.hidden), grow_chosen(chosen(t));
    if (ask.previous) buffers.joined.resize(n, 2 * shape.hidden);
    buffers.attended.resize(n, shape.heads * shape.head_dim);
    if (shape.dense_width) buffers.inner.resize(n, shape.dense_width);
    if (shape.width) buffers.pairs.resize(n * shape.k, shape.width);
    if (shape.shared_width) buffers.shared.resize(n, shape.shared_width);
  }

  // The first residual: the embedding, or what the MTP layer makes of it and the hidden state before.
  void enter(const Request& ask, int t) {
    const auto [first, last] = share(ask.n, t);
    for (i64 r = first; r < last; r++) {
      embed(ask.tokens[r], residual(r));
      if (!ask.previous) continue;
      rms_norm(residual(r), door.embedding_norm, shape.hidden, shape.eps, buffers.joined.values(r));
      rms_norm(ask.previous + r * shape.hidden, door.hidden_norm, shape.hidden, shape.eps, buffers.joined.values(r) + shape.hidden);
      buffers.joined.prepare(r, door.projection.kind);
    }
    if (ask.previous) {
      pool.barrier();
      const auto [from, to] = share(shape.hidden / BLOCK, t);
      multiply(door.projection, from, to, buffers.joined.pointers.data(), ask.n, [&](i64 r, i64 row, vec s) { store(residual(r) + row, s); });
    }
    pool.barrier();
  }

  void embed(i64 token, float* x) const {
    for (i64 i = 0; i < shape.hidden; i += VL)
      store(x + i, embedding_is_bf16 ? widen((const bf16*)embedding + token * shape.hidden + i) : load((const float*)embedding + token * shape.hidden + i));
  }

  // The residual of all n tokens, normed, for products of a kind; afterwards any thread may read all of normed(t).
  void norm(const float* weight, Kind kind, i64 n, int t) {
    const auto [first, last] = few ? std::pair<i64, i64>(0, n) : share(n, t);
    Activations& out = normed(t);
    for (i64 r = first; r < last; r++) {
      rms_norm(residual(r), weight, shape.hidden, shape.eps, out.values(r));
      out.prepare(r, kind);
    }
    if (!few) pool.barrier();
  }

  // Blocks [from, to) of queries, keys and values of all n tokens
  void project(const Layer& layer, i64 n, int t, i64 from, i64 to) {
    multiply(layer.query_key_value, from, to, normed(t).pointers.data(), n, [&](i64 r, i64 row, vec s) {
      if (layer.query_key_value_bias) s = s + load(layer.query_key_value_bias + row);
      store(&buffers.query_key_value[r * projected() + row], s);
    });
  }

  // Each thread takes some key heads, from their projection to what is attended: nobody waits in between.
  template <class C>
  void attend_own_heads(const Layer& layer, const Cache<C>& cache, const Request& ask, i64 l, const std::vector<Tile>& tiles, int t) {
    const auto [first, last] = share(shape.kv_heads, t);
    const i64 blocks = shape.head_dim / BLOCK, group = shape.heads / shape.kv_heads;
    project(layer, ask.n, t, first * group * blocks, last * group * blocks);
    for (i64 before : {shape.heads, shape.heads + shape.kv_heads}) project(layer, ask.n, t, (before + first) * blocks, (before + last) * blocks);
    for (i64 r = 0; r < ask.n; r++)
      for (i64 h = first; h < last; h++) turn_and_keep(layer, cache, ask, l, r, h);
    for (const Tile& tile : tiles)
      if (tile.kv_head >= first && tile.kv_head < last) attend_tile(layer, cache, ask, l, tile, t);
  }

  template <class C>
  void attend_in_phases(const Layer& layer, const Cache<C>& cache, const Request& ask, i64 l, const std::vector<Tile>& tiles, int t) {
    const auto [from, to] = share(projected() / BLOCK, t);
    project(layer, ask.n, t, from, to);
    pool.barrier();
    const auto [first, last] = share(ask.n * shape.kv_heads, t);
    for (i64 i = first; i < last; i++) turn_and_keep(layer, cache, ask, l, i / shape.kv_heads, i % shape.kv_heads);
    pool.barrier();
    for (i64 i; (i = buffers.next_tile[l].fetch_add(1)) < (i64)tiles.size();) attend_tile(layer, cache, ask, l, tiles[i], t);
  }

  void rotate(float* x, i64 position) const {
    const i64 half = shape.rotary_dim / 2;
    const float *c = cosine + position * half, *s = sine + position * half;
    for (i64 i = 0; i < half; i++) {
      const float low = x[i], high = x[i + half];
      x[i] = low * c[i] - high * s[i];
      x[i + half] = high * c[i] + low * s[i];
    }
  }

  i64 page_stride() const { return shape.kv_heads * shape.head_dim * PAGE; }

  // QK-norm and rotation of one token's heads that share a key head; its key and value go to their page.
  template <class C>
  void turn_and_keep(const Layer& layer, const Cache<C>& cache, const Request& ask, i64 l, i64 r, i64 kv_head) {
    const i64 d = shape.head_dim, group = shape.heads / shape.kv_heads, position = ask.positions[r];
    float* row = &buffers.query_key_value[r * projected()];
    const vec scale = set1(1.0f / std::sqrt((float)d));
    for (i64 h = kv_head * group; h < (kv_head + 1) * group; h++) {
      float* q = row + h * d;
      if (layer.query_norm) rms_norm(q, layer.query_norm, d, shape.eps, q);
      rotate(q, position);
      for (i64 i = 0; i < d; i += VL) store(q + i, load(q + i) * scale);
    }
    float *k = row + (shape.heads + kv_head) * d, *v = row + (shape.heads + shape.kv_heads + kv_head) * d;
    if (layer.key_norm) rms_norm(k, layer.key_norm, d, shape.eps, k);
    rotate(k, position);
    const i64 page = ask.tables[ask.sequences[r] * ask.most_pages + position / PAGE], slot = position % PAGE;
    const i64 at = (l * cache.pages + page) * page_stride() + kv_head * d * PAGE;
    for (i64 i = 0; i < d; i++) store_cached(cache.keys + at + i * PAGE + slot, k[i]), store_cached(cache.values + at + slot * d + i, v[i]);
  }

  // Runs of tokens of one sequence, by key head; the longest contexts first.
  std::vector<Tile> attention_tiles(const Request& ask) const {
    std::vector<Tile> tiles;
    const i64 most = std::max<i64>(1, QUERIES / (shape.heads / shape.kv_heads));
    for (i64 r = 0; r < ask.n;) {
      i64 rows = 1;
      while (r + rows < ask.n && rows < most && ask.sequences[r + rows] == ask.sequences[r]) rows++;
      for (i64 h = 0; h < shape.kv_heads; h++) tiles.push_back({r, rows, h});
      r += rows;
    }
    std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return ask.positions[a.row] > ask.positions[b.row]; });
    return tiles;
  }

  template <class C>
  void attend_tile(const Layer& layer, const Cache<C>& cache, const Request& ask, i64 l, const Tile& tile, int t) {
    const i64 d = shape.head_dim, group = shape.heads / shape.kv_heads, offset = l * cache.pages * page_stride() + tile.kv_head * d * PAGE;
    const Pages<C> pages{cache.keys + offset, cache.values + offset, ask.tables + ask.sequences[tile.row] * ask.most_pages, page_stride(), d};
    const i64 most = std::max<i64>(1, QUERIES / group);
    // a group larger than a tile is taken in pieces
    const i64 heads_at_once = std::min<i64>(group, QUERIES);
    for (i64 h0 = 0; h0 < group; h0 += heads_at_once) {
      const i64 heads = std::min(heads_at_once, group - h0), rows = most == 1 ? 1 : tile.rows;
      float *scores = own[t].scores.data(), *query = scores + QUERIES * SPAN, *y = query + QUERIES * d;
      i64 position[QUERIES], count = 0;
      for (i64 r = 0; r < rows; r++)
        for (i64 h = 0; h < heads; h++) {
          const float* q = &buffers.query_key_value[(tile.row + r) * projected() + (tile.kv_head * group + h0 + h) * d];
          std::copy(q, q + d, query + count * d);
          position[count++] = ask.positions[tile.row + r];
        }
      attend(pages, query, position, count, scores, y);
      count = 0;
      for (i64 r = 0; r < rows; r++)
        for (i64 h = 0; h < heads; h++, count++) {
          const i64 column = (tile.kv_head * group + h0 + h) * d;
          std::copy(y + count * d, y + (count + 1) * d, buffers.attended.values(tile.row + r) + column);
          buffers.attended.prepare(tile.row + r, layer.dense.kind, column, column + d);
        }
    }
  }

  // residual += x w^T (+ bias), a thread its own columns
  void add_product(const Matrix& w, const float* bias, const Activations& x, i64 n, int t) {
    const auto [from, to] = share(shape.hidden / BLOCK, t);
    multiply(w, from, to, x.pointers.data(), n, [&](i64 r, i64 row, vec s) {
      if (bias) s = s + load(bias + row);
      store(residual(r) + row, load(residual(r) + row) + s);
    });
  }

  // silu(gate) * up of rows interleaved as [16 gates | 16 ups], for the inner columns [from, to): write(token, column, VL values)
  template <class Write>
  static void gated(const Matrix& w, i64 first_block, i64 from, i64 to, const Activation* const* x, i64 n, const Write& write) {
    vec gate[PARTS];
    multiply(w, first_block + from / BLOCK * 2, first_block + to / BLOCK * 2, x, n, [&](i64 r, i64 row, vec s) {
      const i64 block = row / BLOCK - first_block, part = row % BLOCK / VL;
      if (block % 2 == 0) gate[part] = s;
      else write(r, block / 2 * BLOCK + part * VL, gate[part] * sigmoid(gate[part]) * s);
    });
  }

  // One SwiGLU for all tokens, as far as its inner activations; columns in groups, for they are quantised by groups
  void inner_of(const Matrix& gate_up, Kind down_kind, Activations& inner, i64 n, int t) {
    const auto [from, to] = share(inner.columns / GROUP, t);
    gated(gate_up, 0, from * GROUP, to * GROUP, normed(t).pointers.data(), n, [&](i64 r, i64 column, vec y) { store(inner.values(r) + column, y); });
    for (i64 r = 0; r < n; r++) inner.prepare(r, down_kind, from * GROUP, to * GROUP);
  }

  void dense_mlp(const Layer& layer, i64 n, int t) {
    inner_of(layer.gate_up, layer.down.kind, buffers.inner, n, t);
    pool.barrier();
    add_product(layer.down, nullptr, buffers.inner, n, t);
  }

  void experts(const Layer& layer, const Request& ask, i64 moe, int t) {
    const i64 n = ask.n;
    const auto [from, to] = share(padded_experts() / BLOCK, t);
    multiply(layer.router, from, to, normed(t).pointers.data(), n, [&](i64 r, i64 row, vec s) { store(&buffers.scores[r * padded_experts() + row], s); });
    pool.barrier();
    const auto [first, last] = few ? std::pair<i64, i64>(0, n) : share(n, t);
    choose(layer, ask, moe, first, last, !few || t == 0, t);
    if (!few) pool.barrier();
    Gathered& g = gather(n, t);
    const auto [low, high] = share(shape.width / GROUP, t);
    for (i64 e = 0; e < shape.experts; e++) {
      const i64 start = g.first[e], count = g.first[e + 1] - start;
      gated(layer.gate_up, e * 2 * shape.width / BLOCK, low * GROUP, high * GROUP, g.input.data() + start, count,
            [&](i64 i, i64 column, vec y) { store(buffers.pairs.values(g.pair[start + i]) + column, y); });
      for (i64 i = start; i < start + count; i++) buffers.pairs.prepare(g.pair[i], layer.down.kind, low * GROUP, high * GROUP);
    }
    if (shape.shared_width) inner_of(layer.shared_gate_up, layer.shared_down.kind, buffers.shared, n, t);
    pool.barrier();
    const float* weights = chosen(t).weights.data();
    const auto [b0, b1] = share(shape.hidden / BLOCK, t);
    for (i64 e = 0; e < shape.experts; e++) {
      const i64 start = g.first[e], count = g.first[e + 1] - start, base = e * shape.hidden / BLOCK;
      multiply(layer.down, base + b0, base + b1, g.inner.data() + start, count, [&](i64 i, i64 row, vec s) {
        const i64 pair = g.pair[start + i];
        float* x = residual(pair / shape.k) + row - e * shape.hidden;
        store(x, fma(s, set1(weights[pair]), load(x)));
      });
    }
    if (shape.shared_width) add_product(layer.shared_down, nullptr, buffers.shared, n, t);
  }

  // Experts and their weights of the rows [first, last), from the router's logits; `tells`: also to who asked.
  void choose(const Layer& layer, const Request& ask, i64 moe, i64 first, i64 last, bool tells, int t) {
    float *gate = own[t].gate.data(), *biased = own[t].biased.data();
    for (i64 r = first; r < last; r++) {
      const float* logits = &buffers.scores[r * padded_experts()];
      float* weights = &chosen(t).weights[r * shape.k];
      i64* ids = &chosen(t).ids[r * shape.k];
      for (i64 e = 0; e < padded_experts(); e += VL) store(gate + e, sigmoid(load(logits + e)));
      for (i64 e = 0; e < shape.experts; e++) biased[e] = gate[e] + layer.expert_bias[e];
      own[t].choice.choose(biased, ids);
      float total = 0.0f;
      for (i64 j = 0; j < shape.k; j++) total += gate[ids[j]];
      for (i64 j = 0; j < shape.k; j++) weights[j] = gate[ids[j]] * shape.routed_scale / (shape.k > 1 ? total + 1e-20f : 1.0f);
      const i64 at = moe * ask.n + r;
      if (tells && ask.expert_ids) std::copy(ids, ids + shape.k, ask.expert_ids + at * shape.k);
      if (tells && ask.expert_weights) std::copy(weights, weights + shape.k, ask.expert_weights + at * shape.k);
      if (tells && ask.expert_scores) std::copy(gate, gate + shape.experts, ask.expert_scores + at * shape.experts);
    }
  }

  // Every thread sorts for itself: cheaper than to wait for one that does
  Gathered& gather(i64 n, int t) {
    Gathered& g = own[t].gathered;
    const i64* ids = chosen(t).ids.data();
    g.first.assign(shape.experts + 1, 0);
    g.pair.resize(n * shape.k), g.input.resize(n * shape.k), g.inner.resize(n * shape.k);
    for (i64 p = 0; p < n * shape.k; p++) g.first[ids[p] + 1]++;
    for (i64 e = 0; e < shape.experts; e++) g.first[e + 1] += g.first[e];
    g.place.assign(g.first.begin(), g.first.end() - 1);
    for (i64 p = 0; p < n * shape.k; p++) {
      const i64 i = g.place[ids[p]]++;
      g.pair[i] = p, g.input[i] = normed(t).pointers[p / shape.k], g.inner[i] = buffers.pairs.pointers[p];
    }
    return g;
  }

  // Final norm and logits. The rows that want logits come first in what is normed: nobody reads that any more.
  void finish(const Request& ask, int t) {
    const float* weight = ask.previous ? ahead_norm : final_norm;
    const auto [a, b] = share(ask.n, t);
    if (ask.hidden)
      for (i64 r = a; r < b; r++) rms_norm(residual(r), weight, shape.hidden, shape.eps, ask.hidden + r * shape.hidden);
    const auto [first, last] = few ? std::pair<i64, i64>(0, ask.wanted_count) : share(ask.wanted_count, t);
    Activations& out = normed(t);
    for (i64 i = first; i < last; i++) {
      rms_norm(residual(ask.wanted[i]), weight, shape.hidden, shape.eps, out.values(i));
      out.prepare(i, head.kind);
    }
    if (!few) pool.barrier();
    const auto [from, to] = share(ask.head_block_count, t);
    for (i64 at = from; at < to;) {  // runs of blocks that stand together
      const i64 block = ask.head_blocks ? ask.head_blocks[at] : at;
      i64 run = 1;
      while (at + run < to && (!ask.head_blocks || ask.head_blocks[at + run] == block + run)) run++;
      multiply(head, block, block + run, out.pointers.data(), ask.wanted_count,
               [&](i64 i, i64 row, vec s) { store(ask.logits + (i * ask.head_block_count + at - block) * BLOCK + row, s); });
      at += run;
    }
  }
};
