// Causal attention with grouped queries inside packed documents, forward and backward, never holding more scores than a block's.
//
// Query i of a row looks at keys first_key[i] .. i + offset (offset = keys - queries: a cache in front).
// A task is one (sequence, kv head): its keys and values are packed once for all query heads that share them.
#pragma once
#include <omp.h>

#include <cmath>

#include "gemm.h"
#include "scratch.h"

struct View {
  i64 batch, token, head;  // strides, in elements; the last dimension is dense
};

template <class T>
struct Attention {
  i64 batch, heads, kv_heads, queries, keys, head_dim;  // head_dim is a multiple of 32
  float scale;
  const T *q, *k, *v;
  View q_at, k_at, v_at;
  const i32* first_key;  // [batch, queries] or null
  i64 offset() const { return keys - queries; }
  i64 first_of(i64 b, i64 i) const { return first_key ? first_key[b * queries + i] : 0; }
  // The first key that any of the queries [i0, i0 + m) looks at, rounded down to whole panels.
  i64 first_panel(i64 b, i64 i0, i64 m) const {
    i64 first = first_of(b, i0);
    for (i64 i = 1; i < m; i++) first = std::min(first, first_of(b, i0 + i));
    return first / NR * NR;
  }
  i64 padded_keys() const { return (keys + NR - 1) / NR * NR; }
};

constexpr i64 KEY_BLOCK = 512;                        // forward: keys a row tile looks at before it rescales
constexpr i64 BACKWARD_QUERIES = 128, BACKWARD_KEYS = 128;

// Keys (or values) of one kv head as columns [keys / NR][head_dim units][NR]; keys past the end are zeros.
template <class T>
static void pack_keys_as_columns(const T* k, i64 stride, i64 keys, i64 d, T* zeros, u32* to) {
  const i64 units = units_of<T>(d), whole = keys / VL * VL;
  for (i64 j = 0; j < whole; j += VL) pack_columns<T>(k + j * stride, stride, d, to + (j / NR) * units * NR + j % NR);
  for (i64 j = whole; j < (keys + NR - 1) / NR * NR; j += VL) {  // a group with fewer than VL keys
    std::fill((char*)zeros, (char*)(zeros + VL * d), 0);
    for (i64 i = 0; j + i < keys && i < VL; i++) std::copy(k + (j + i) * stride, k + (j + i) * stride + d, zeros + i * d);
    pack_columns<T>(zeros, d, d, to + (j / NR) * units * NR + j % NR);
  }
}

// Values (or keys) of one kv head as the reduction [head_dim / NR][padded key units][NR].
template <class T>
static void pack_keys_as_rows(const T* v, i64 stride, i64 keys, i64 d, T* zeros, u32* to) {
  const i64 padded = (keys + NR - 1) / NR * NR, units = units_of<T>(padded);
  std::fill((char*)zeros, (char*)(zeros + d), 0);
  for (i64 c = 0; c < d; c += NR) pack_rows<T, NR>([&](i64 i) { return (i < keys ? v + i * stride : zeros) + c; }, padded, NR, units, to + c * units);
}

// Rows [i0, i0 + m) of one head, m <= MR: out rows and the log of each row's normaliser.
template <class T>
static inline void attention_tile(const Attention<T>& p, i64 b, i64 h, i64 i0, i64 m, const u32* k_columns, const u32* v_rows, float* scores, T* probabilities,
                                  float* sums, T* out, float* log_norm) {
  const i64 d = p.head_dim, ud = units_of<T>(d), padded_units = units_of<T>(p.padded_keys());
  const T *q_row[MR], *p_row[MR];
  float top[MR], norm[MR];
  for (i64 i = 0; i < m; i++) {
    q_row[i] = p.q + b * p.q_at.batch + (i0 + i) * p.q_at.token + h * p.q_at.head;
    p_row[i] = probabilities + i * KEY_BLOCK;
    top[i] = -INFINITY, norm[i] = 0;
  }
  std::fill(sums, sums + m * d, 0.0f);
  const i64 end = i0 + m + p.offset();  // one past the last key that the tile looks at
  for (i64 j0 = p.first_panel(b, i0, m); j0 < end; j0 += KEY_BLOCK) {
    const i64 n = (std::min(KEY_BLOCK, end - j0) + NR - 1) / NR * NR;
    const vec scale = set1(p.scale);
    gemm<T>(q_row, m, k_columns + j0 * ud, n, ud, [&](i64 i, i64 c, vec left, vec right) {
      store(scores + i * KEY_BLOCK + c, left * scale);
      store(scores + i * KEY_BLOCK + c + VL, right * scale);
    });
    for (i64 i = 0; i < m; i++) {
      float* s = scores + i * KEY_BLOCK;
      const i64 from = p.first_of(b, i0 + i) - j0, to = i0 + i + p.offset() + 1 - j0;
      vec highest = set1(-INFINITY);
      for (i64 c = 0; c < n; c += VL) highest = vmax(highest, keep_between(load(s + c), set1(-INFINITY), from - c, to - c));
      const float new_top = std::max(top[i], maximum(highest));
      vec total = zero();
      for (i64 c = 0; c < n; c += VL) {
        const vec e = keep_between(exponential(load(s + c) - set1(new_top)), zero(), from - c, to - c);
        total = total + e;
        store(probabilities + i * KEY_BLOCK + c, e);
      }
      const float fade = top[i] == new_top ? 1.0f : std::exp(top[i] - new_top);
      norm[i] = norm[i] * fade + sum(total);
      if (fade != 1.0f)
        for (i64 c = 0; c < d; c += VL) store(sums + i * d + c, load(sums + i * d + c) * set1(fade));
      top[i] = new_top;
    }
    gemm<T>(p_row, m, v_rows + units_of<T>(j0) * NR, d, units_of<T>(n), padded_units, false, [&](i64 i, i64 c, vec left, vec right) {
      float* to = sums + i * d + c;
      store(to, load(to) + left);
      store(to + VL, load(to + VL) + right);
    });
  }
  for (i64 i = 0; i < m; i++) {
    T* to = out + ((b * p.queries + i0 + i) * p.heads + h) * d;
    for (i64 c = 0; c < d; c += VL) store(to + c, load(sums + i * d + c) * set1(1.0f / norm[i]));
    log_norm[(b * p.heads + h) * p.queries + i0 + i] = top[i] + std::log(norm[i]);
  }
}

// out [batch, queries, heads, head_dim]; log_norm [batch, heads, queries]
template <class T>
static void attention_forward(const Attention<T>& p, T* out, float* log_norm, int threads) {
  const i64 d = p.head_dim, ud = units_of<T>(d), group = p.heads / p.kv_heads, padded = p.padded_keys();
  const i64 tasks = p.batch * p.kv_heads, pieces = std::max<i64>(1, std::min<i64>((p.queries + 255) / 256, 2 * threads / std::max<i64>(1, tasks) + 1));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(thread_buffer(), padded * ud * 4 + d * units_of<T>(padded) * 4 + MR * KEY_BLOCK * (4 + sizeof(T)) + MR * d * 4 + VL * d * 4 + 1024);
    u32 *k_columns = scratch.take<u32>(padded * ud), *v_rows = scratch.take<u32>(d * units_of<T>(padded));
    float *scores = scratch.take<float>(MR * KEY_BLOCK), *sums = scratch.take<float>(MR * d);
    T *probabilities = scratch.take<T>(MR * KEY_BLOCK), *zeros = scratch.take<T>(VL * d);
#pragma omp for schedule(dynamic, 1)
    for (i64 n = 0; n < tasks * pieces; n++) {
      const i64 b = n / pieces / p.kv_heads, kv = n / pieces % p.kv_heads, piece = pieces - 1 - n % pieces;
      const i64 from = p.queries * piece / pieces, to = p.queries * (piece + 1) / pieces;
      pack_keys_as_columns(p.k + b * p.k_at.batch + kv * p.k_at.head, p.k_at.token, p.keys, d, zeros, k_columns);
      pack_keys_as_rows(p.v + b * p.v_at.batch + kv * p.v_at.head, p.v_at.token, p.keys, d, zeros, v_rows);
      for (i64 h = kv * group; h < (kv + 1) * group; h++)
        for (i64 i = from; i < to; i += MR)
          attention_tile(p, b, h, i, std::min<i64>(MR, to - i), k_columns, v_rows, scores, probabilities, sums, out, log_norm);
    }
  }
}

template <class T>
struct AttentionBackward {
  const T *out, *grad_out;        // [batch, queries, heads, head_dim]
  const float* log_norm;          // [batch, heads, queries]
  T *grad_q, *grad_k, *grad_v;    // [batch, tokens, heads or kv_heads, head_dim]
};

// What one thread works with in the backward.
template <class T>
struct AttentionScratch {
  u32 *k_columns, *v_columns, *k_rows;           // keys and values of the kv head
  u32 *q_panels, *grad_out_panels;               // the query block as a reduction
  u32 *probability_panels, *grad_score_panels;   // the block of scores, transposed
  T *probabilities, *grad_scores, *zeros;        // [queries of the block][keys of the block]
  float *scores, *grad_probabilities, *grad_q, *grad_k, *grad_v, *delta;
  AttentionScratch(Buffer& buffer, i64 d, i64 padded) : AttentionScratch(Scratch(buffer, bytes(d, padded)), d, padded) {}

 private:
  static constexpr i64 BQ = BACKWARD_QUERIES, BK = BACKWARD_KEYS;
  static size_t bytes(i64 d, i64 padded) { return 4 * (5 * padded * d + 3 * BQ * d + 4 * BQ * BK + 2 * MR * BK + BQ + VL * d) + 64 * 20; }
  AttentionScratch(Scratch s, i64 d, i64 padded) {
    k_columns = s.take<u32>(padded * units_of<T>(d)), v_columns = s.take<u32>(padded * units_of<T>(d)), k_rows = s.take<u32>(units_of<T>(padded) * d);
    q_panels = s.take<u32>(units_of<T>(BQ) * d), grad_out_panels = s.take<u32>(units_of<T>(BQ) * d);
    probability_panels = s.take<u32>(units_of<T>(BQ) * BK), grad_score_panels = s.take<u32>(units_of<T>(BQ) * BK);
    probabilities = s.take<T>(BQ * BK), grad_scores = s.take<T>(BQ * BK), zeros = s.take<T>(VL * d);
    scores = s.take<float>(MR * BK), grad_probabilities = s.take<float>(MR * BK);
    grad_q = s.take<float>(BQ * d), grad_k = s.take<float>(padded * d), grad_v = s.take<float>(padded * d), delta = s.take<float>(BQ);
  }
};

// Probabilities and their gradients by the scores for queries [i0, i0 + m) and keys [j0, j0 + n), as rows.
template <class T>
static inline void scores_backward(const Attention<T>& p, const AttentionBackward<T>& g, const AttentionScratch<T>& s, i64 b, i64 h, i64 i0, i64 m, i64 j0, i64 n) {
  const i64 d = p.head_dim, ud = units_of<T>(d);
  for (i64 t = 0; t < m; t += MR) {
    const i64 rows = std::min<i64>(MR, m - t), end = std::min(n, (i0 + t + rows + p.offset() - j0 + NR - 1) / NR * NR);
    if (end > 0) {
      const T *q_row[MR], *grad_row[MR];
      for (i64 i = 0; i < rows; i++) {
        q_row[i] = p.q + b * p.q_at.batch + (i0 + t + i) * p.q_at.token + h * p.q_at.head;
        grad_row[i] = g.grad_out + ((b * p.queries + i0 + t + i) * p.heads + h) * d;
      }
      gemm<T>(q_row, rows, s.k_columns + j0 * ud, end, ud, [&](i64 i, i64 c, vec left, vec right) {
        store(s.scores + i * BACKWARD_KEYS + c, left);
        store(s.scores + i * BACKWARD_KEYS + c + VL, right);
      });
      gemm<T>(grad_row, rows, s.v_columns + j0 * ud, end, ud, [&](i64 i, i64 c, vec left, vec right) {
        store(s.grad_probabilities + i * BACKWARD_KEYS + c, left);
        store(s.grad_probabilities + i * BACKWARD_KEYS + c + VL, right);
      });
    }
    for (i64 i = 0; i < rows; i++) {
      const i64 query = i0 + t + i, from = p.first_of(b, query) - j0, to = query + p.offset() + 1 - j0;
      const vec log_norm = set1(g.log_norm[(b * p.heads + h) * p.queries + query]), delta = set1(s.delta[t + i]), scale = set1(p.scale);
      T *probability = s.probabilities + (t + i) * BACKWARD_KEYS, *grad = s.grad_scores + (t + i) * BACKWARD_KEYS;
      for (i64 c = 0; c < n; c += VL) {
        if (c >= end) {
          store(probability + c, zero());
          store(grad + c, zero());
          continue;
        }
        const vec e = keep_between(exponential(fma(load(s.scores + i * BACKWARD_KEYS + c), scale, zero() - log_norm)), zero(), from - c, to - c);
        store(probability + c, e);
        store(grad + c, e * (load(s.grad_probabilities + i * BACKWARD_KEYS + c) - delta) * scale);
      }
    }
  }
}

// Queries [i0, i0 + m) of head h: their gradients, and their share of the gradients of keys and values.
template <class T>
static inline void attention_backward_block(const Attention<T>& p, const AttentionBackward<T>& g, const AttentionScratch<T>& s, i64 b, i64 h, i64 i0, i64 m) {
  const i64 d = p.head_dim, units = units_of<T>(m), padded_units = units_of<T>(p.padded_keys());
  auto q_row = [&](i64 i) { return p.q + b * p.q_at.batch + (i0 + i) * p.q_at.token + h * p.q_at.head; };
  auto grad_row = [&](i64 i) { return g.grad_out + ((b * p.queries + i0 + i) * p.heads + h) * d; };
  for (i64 i = 0; i < m; i++) {
    const T *out = g.out + ((b * p.queries + i0 + i) * p.heads + h) * d, *grad = grad_row(i);
    vec total = zero();
    for (i64 c = 0; c < d; c += VL) total = fma(load(out + c), load(grad + c), total);
    s.delta[i] = sum(total);
  }
  pack_rows<T, NR>(q_row, m, d, units, s.q_panels);
  pack_rows<T, NR>(grad_row, m, d, units, s.grad_out_panels);
  std::fill(s.grad_q, s.grad_q + m * d, 0.0f);
  const T* score_row[BACKWARD_QUERIES];
  for (i64 i = 0; i < m; i++) score_row[i] = s.grad_scores + i * BACKWARD_KEYS;
  const i64 end = i0 + m + p.offset();
  for (i64 j0 = p.first_panel(b, i0, m); j0 < end; j0 += BACKWARD_KEYS) {
    const i64 n = (std::min(BACKWARD_KEYS, end - j0) + NR - 1) / NR * NR;
    scores_backward(p, g, s, b, h, i0, m, j0, n);
    gemm<T>(score_row, m, s.k_rows + units_of<T>(j0) * NR, d, units_of<T>(n), padded_units, false, [&](i64 i, i64 c, vec left, vec right) {
      float* to = s.grad_q + i * d + c;
      store(to, load(to) + left);
      store(to + VL, load(to + VL) + right);
    });
    pack_rows<T, VL>([&](i64 i) { return s.probabilities + i * BACKWARD_KEYS; }, m, n, units, s.probability_panels);
    pack_rows<T, VL>([&](i64 i) { return s.grad_scores + i * BACKWARD_KEYS; }, m, n, units, s.grad_score_panels);
    auto add = [&](float* to, vec left, vec right) {
      store(to, load(to) + left);
      store(to + VL, load(to + VL) + right);
    };
    gemm_transposed<T>(s.probability_panels, n, s.grad_out_panels, d, units, [&](i64 j, i64 c, vec left, vec right) { add(s.grad_v + (j0 + j) * d + c, left, right); });
    gemm_transposed<T>(s.grad_score_panels, n, s.q_panels, d, units, [&](i64 j, i64 c, vec left, vec right) { add(s.grad_k + (j0 + j) * d + c, left, right); });
  }
  for (i64 i = 0; i < m; i++)
    for (i64 c = 0; c < d; c += VL) store(g.grad_q + ((b * p.queries + i0 + i) * p.heads + h) * d + c, load(s.grad_q + i * d + c));
}

template <class T>
static void attention_backward(const Attention<T>& p, const AttentionBackward<T>& g, int threads) {
  const i64 d = p.head_dim, group = p.heads / p.kv_heads, padded = p.padded_keys();
#pragma omp parallel num_threads(threads)
  {
    const AttentionScratch<T> s(thread_buffer(), d, padded);
#pragma omp for schedule(dynamic, 1)
    for (i64 n = 0; n < p.batch * p.kv_heads; n++) {
      const i64 b = n / p.kv_heads, kv = n % p.kv_heads;
      const T *k = p.k + b * p.k_at.batch + kv * p.k_at.head, *v = p.v + b * p.v_at.batch + kv * p.v_at.head;
      pack_keys_as_columns(k, p.k_at.token, p.keys, d, s.zeros, s.k_columns);
      pack_keys_as_columns(v, p.v_at.token, p.keys, d, s.zeros, s.v_columns);
      pack_keys_as_rows(k, p.k_at.token, p.keys, d, s.zeros, s.k_rows);
      std::fill(s.grad_k, s.grad_k + padded * d, 0.0f);
      std::fill(s.grad_v, s.grad_v + padded * d, 0.0f);
      for (i64 h = kv * group; h < (kv + 1) * group; h++)
        for (i64 i = 0; i < p.queries; i += BACKWARD_QUERIES) attention_backward_block(p, g, s, b, h, i, std::min(BACKWARD_QUERIES, p.queries - i));
      for (i64 j = 0; j < p.keys; j++)
        for (i64 c = 0; c < d; c += VL) {
          const i64 at = ((b * p.keys + j) * p.kv_heads + kv) * d + c;
          store(g.grad_k + at, load(s.grad_k + j * d + c));
          store(g.grad_v + at, load(s.grad_v + j * d + c));
        }
    }
  }
}
