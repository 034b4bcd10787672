// Cross entropy (and the z-loss of the head) straight from hidden states; both gradients are computed on the way.
//
// A chunk of tokens at a time: its logits, in the type of the hidden states as the public model has them, become probabilities
// and then gradients in place, so nothing of the size tokens x vocabulary ever exists.
#pragma once
#include <omp.h>

#include <cmath>

#include "gemm.h"
#include "scratch.h"

constexpr i64 CHUNK = 512, VOCABULARY_BLOCK = 512;
constexpr i64 ROW_GAP = 64;  // between rows of logits: at a distance of a power of two they would all fall into the same cache sets

// One row of n logits -> its loss; with `grad`, the row becomes the gradient of that loss by the logits. `row` holds n floats.
template <class T>
static inline double softmax_row(T* logits, i64 n, i64 columns, i64 label, float z_weight, float* row, bool grad) {
  vec highest = set1(-INFINITY);
  for (i64 c = 0; c < columns; c += VL) highest = vmax(highest, keep_between(load(logits + c), set1(-INFINITY), 0, n - c));
  const float top = maximum(highest);
  vec total = zero();
  for (i64 c = 0; c < columns; c += VL) {
    const vec e = keep_between(exponential(load(logits + c) - set1(top)), zero(), 0, n - c);
    store(row + c, e);
    total = total + e;
  }
  const float norm = sum(total);
  const double log_norm = (double)top + std::log((double)norm);
  const vec first = load(logits + label / VL * VL);
  alignas(64) float around[VL];
  store(around, first);
  const double loss = log_norm - around[label % VL] + z_weight * log_norm * log_norm;
  if (grad) {
    const float scale = (1.0f + 2.0f * z_weight * (float)log_norm) / norm;
    for (i64 c = 0; c < columns; c += VL) store(logits + c, load(row + c) * set1(scale));
    const i64 block = label / VL * VL;
    store(around, load(row + block) * set1(scale));
    around[label % VL] -= 1.0f;
    store(logits + block, load(around));
  }
  return loss;
}

template <class T, class W>
struct CrossEntropy {
  i64 tokens, hidden, vocabulary;  // hidden is a multiple of 32
  const T* x;                      // [tokens, hidden]
  const W* head;                   // [vocabulary, hidden]
  const i64* labels;               // [tokens], all valid
  float z_weight;
};

// Rows [first, first + m) of the chunk: logits, losses, and (with grad_x) gradients by the hidden states.
template <class T, class W>
static void cross_entropy_rows(const CrossEntropy<T, W>& p, const u32* head_columns, const u32* head_rows, i64 columns, i64 first, i64 m, T* logits, float* row,
                               float* sums, double* losses, T* grad_x) {
  const i64 d = p.hidden;
  std::vector<const T*> rows(m);
  for (i64 i = 0; i < m; i++) rows[i] = p.x + (first + i) * d;
  gemm<T>(rows.data(), m, head_columns, columns, units_of<T>(d), units_of<T>(d), true, [&](i64 i, i64 c, vec left, vec right) {
    store(logits + i * (columns + ROW_GAP) + c, left);
    store(logits + i * (columns + ROW_GAP) + c + VL, right);
  });
  for (i64 i = 0; i < m; i++)
    losses[first + i] = softmax_row(logits + i * (columns + ROW_GAP), p.vocabulary, columns, p.labels[first + i], p.z_weight, row, grad_x != nullptr);
  if (!grad_x) return;
  for (i64 v = 0; v < columns; v += VOCABULARY_BLOCK) {
    const i64 values = std::min(VOCABULARY_BLOCK, columns - v);
    for (i64 i = 0; i < m; i++) rows[i] = logits + i * (columns + ROW_GAP) + v;
    gemm<T>(rows.data(), m, head_rows + units_of<T>(v) * NR, d, units_of<T>(values), units_of<T>(columns), true, [&](i64 i, i64 c, vec left, vec right) {
      float* to = sums + i * d + c;
      store(to, v ? load(to) + left : left);
      store(to + VL, v ? load(to + VL) + right : right);
    });
  }
  for (i64 i = 0; i < m; i++)
    for (i64 c = 0; c < d; c += VL) store(grad_x + (first + i) * d + c, load(sums + i * d + c));
}

// Fills losses [tokens] and, unless null, grad_x [tokens, hidden] and grad_head (fp32 sums [vocabulary, hidden]).
template <class T, class W>
static void cross_entropy(const CrossEntropy<T, W>& p, double* losses, T* grad_x, float* grad_head, int threads) {
  const i64 d = p.hidden, columns = (p.vocabulary + NR - 1) / NR * NR, ud = units_of<T>(d), uv = units_of<T>(columns);
  const i64 chunk = std::min(CHUNK, p.tokens), uc = units_of<T>(chunk) + 1;
  Scratch shared(shared_buffer(), columns * ud * 4 + d * uv * 4 + chunk * (columns + ROW_GAP) * sizeof(T) + uc * d * 4 + 2 * NR * d * sizeof(W) + 1024);
  u32 *head_columns = shared.take<u32>(columns * ud), *head_rows = shared.take<u32>(d * uv), *x_panels = shared.take<u32>(uc * d);
  T* logits = shared.take<T>(chunk * (columns + ROW_GAP));
  // the last panel's rows past the vocabulary are zeros
  W* last = shared.take<W>(NR * d);
  std::fill((char*)last, (char*)(last + NR * d), 0);
  const i64 whole = p.vocabulary / NR * NR;
  std::copy(p.head + whole * d, p.head + p.vocabulary * d, last);
  auto head_row = [&](i64 v) { return v < whole ? p.head + v * d : last + (v - whole) * d; };
#pragma omp parallel num_threads(threads)
  {
    const i64 most = (chunk + threads - 1) / threads;
    Scratch scratch(thread_buffer(), columns * 4 + most * d * 4 + uc * NR * 4 + 256);
    float *row = scratch.take<float>(columns), *sums = scratch.take<float>(most * d);
    u32* left = scratch.take<u32>(uc * NR);
#pragma omp for schedule(static)
    for (i64 v = 0; v < columns; v += NR) {
      pack_transposed<T>(head_row(v), d, NR, d, head_columns + v * ud);
      if (grad_x)
        for (i64 c = 0; c < d; c += NR)
          pack_rows<T, NR>([&](i64 i) { return head_row(v + i) + c; }, NR, NR, uv, head_rows + c * uv + units_of<T>(v) * NR);
    }
    for (i64 first = 0; first < p.tokens; first += CHUNK) {
      const i64 m = std::min(CHUNK, p.tokens - first), units = units_of<T>(m), share = (m + threads - 1) / threads;
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; part++) {
        const i64 from = std::min(m, part * share), to = std::min(m, from + share);
        if (from < to) cross_entropy_rows(p, head_columns, head_rows, columns, first + from, to - from, logits + from * (columns + ROW_GAP), row, sums, losses, grad_x);
      }
      if (!grad_x) continue;
#pragma omp for schedule(static)
      for (i64 c = 0; c < d; c += NR) pack_rows<T, NR>([&](i64 i) { return p.x + (first + i) * d + c; }, m, NR, units, x_panels + c * units);
#pragma omp for schedule(dynamic, 4)
      for (i64 v = 0; v < columns; v += NR) {
        pack_rows<T, VL>([&](i64 i) { return logits + i * (columns + ROW_GAP) + v; }, m, NR, units, left);
        gemm_transposed<T>(left, NR, x_panels, d, units, [&](i64 i, i64 c, vec a, vec b) {
          if (v + i >= p.vocabulary) return;
          float* to = grad_head + (v + i) * d + c;
          store(to, first ? load(to) + a : a);
          store(to + VL, first ? load(to + VL) + b : b);
        });
      }
    }
  }
}
