// Attention of new tokens over the pages of their sequences.
//
// A page holds 16 positions of one layer and key head: keys as [head_dim][16], so that a lane is a position; values as [16][head_dim].
// Softmax goes over spans of 128 positions that start at multiples of 128, with a running maximum: a token's result is the
// same whatever chunk of its prompt it comes with, and whoever else is computed.
#pragma once
#include <algorithm>
#include <cmath>

#include "matrix.h"

constexpr int PAGE = 16;    // positions
constexpr int SPAN = 128;   // positions between two looks at the maximum
constexpr int QUERIES = 16; // of a tile: some consecutive tokens of a sequence, all query heads of one key head

static inline vec load_cached(const float* p) { return load(p); }
static inline vec load_cached(const bf16* p) { return widen(p); }
static inline void store_cached(float* p, float x) { *p = x; }
static inline void store_cached(bf16* p, float x) { *p = to_bf16(x); }

// The pages of one sequence in one layer, for one key head: page i of the sequence is at base + table[i] * stride.
template <class C>
struct Pages {
  const C *keys, *values;
  const i32* table;
  i64 stride, head_dim;
  const C* key_page(i64 page) const { return keys + table[page] * stride; }
  const C* value_page(i64 page) const { return values + table[page] * stride; }
};

// query . key of M queries with the 16 positions of a page: scores[m * SPAN + position].
template <int M, class C>
static inline void page_scores(const C* keys, const float* query, i64 head_dim, float* scores) {
  vec sums[M][PARTS];
  for (auto& row : sums)
    for (auto& v : row) v = zero();
  for (i64 d = 0; d < head_dim; d++)
    for (int p = 0; p < PARTS; p++) {
      const vec key = load_cached(keys + d * PAGE + p * VL);
      for (int m = 0; m < M; m++) sums[m][p] = fma(key, set1(query[m * head_dim + d]), sums[m][p]);
    }
  for (int m = 0; m < M; m++)
    for (int p = 0; p < PARTS; p++) store(scores + m * SPAN + p * VL, sums[m][p]);
}

// y[m] += sum over the span's positions of probability times value, for M queries and D vectors from column d on.
template <int M, int D, class C>
static inline void add_values(const Pages<C>& pages, i64 first_page, i64 positions, const float* probability, i64 d, float* y) {
  vec sums[M][D];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < D; v++) sums[m][v] = load(y + m * pages.head_dim + d + v * VL);
  for (i64 i = 0; i < positions; i++) {
    const C* value = pages.value_page(first_page + i / PAGE) + i % PAGE * pages.head_dim + d;
    for (int v = 0; v < D; v++) {
      const vec x = load_cached(value + v * VL);
      for (int m = 0; m < M; m++) sums[m][v] = fma(x, set1(probability[m * SPAN + i]), sums[m][v]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < D; v++) store(y + m * pages.head_dim + d + v * VL, sums[m][v]);
}

template <int M, class C>
static inline void add_all_values(const Pages<C>& pages, i64 first_page, i64 positions, const float* probability, float* y) {
  i64 d = 0;
  for (; d + 4 * VL <= pages.head_dim; d += 4 * VL) add_values<M, 4>(pages, first_page, positions, probability, d, y);
  for (; d < pages.head_dim; d += VL) add_values<M, 1>(pages, first_page, positions, probability, d, y);
}

// query [queries][head_dim], scaled already, query q at position position[q] -> y [queries][head_dim]. `scores`: QUERIES * SPAN floats.
template <class C>
static void attend(const Pages<C>& pages, const float* query, const i64* position, i64 queries, float* scores, float* y) {
  float top[QUERIES], total[QUERIES];
  i64 last = 0;
  for (i64 q = 0; q < queries; q++) top[q] = -INFINITY, total[q] = 0.0f, last = std::max(last, position[q]);
  std::fill(y, y + queries * pages.head_dim, 0.0f);
  const auto in_tiles = [&](auto&& run) {
    for (i64 q = 0; q < queries;) {
      if (queries - q >= 4) run(std::integral_constant<int, 4>(), q), q += 4;
      else run(std::integral_constant<int, 1>(), q), q += 1;
    }
  };
  for (i64 start = 0; start <= last; start += SPAN) {
    const i64 positions = std::min<i64>(SPAN, last + 1 - start), padded = (positions + PAGE - 1) / PAGE * PAGE;
    for (i64 i = 0; i < padded; i += PAGE)
      in_tiles([&](auto m, i64 q) { page_scores<decltype(m)::value>(pages.key_page((start + i) / PAGE), query + q * pages.head_dim, pages.head_dim, scores + q * SPAN + i); });
    for (i64 q = 0; q < queries; q++) {
      float* s = scores + q * SPAN;
      const i64 seen = std::min<i64>(padded, position[q] + 1 - start);  // may be none
      if (seen <= 0) {
        std::fill(s, s + padded, 0.0f);
        continue;
      }
      vec most = set1(top[q]);
      for (i64 i = 0; i < padded; i += VL) most = vmax(most, keep_between(load(s + i), set1(-INFINITY), 0, seen - i));
      const float now = maximum(most), shrink = top[q] == -INFINITY ? 0.0f : std::exp(top[q] - now);
      vec sums = zero();
      for (i64 i = 0; i < padded; i += VL) {
        const vec p = keep_between(exponential(load(s + i) - set1(now)), zero(), 0, seen - i);
        store(s + i, p);
        sums = sums + p;
      }
      total[q] = total[q] * shrink + sum(sums);
      if (shrink != 1.0f)
        for (i64 d = 0; d < pages.head_dim; d += VL) store(y + q * pages.head_dim + d, load(y + q * pages.head_dim + d) * set1(shrink));
      top[q] = now;
    }
    in_tiles([&](auto m, i64 q) { add_all_values<decltype(m)::value>(pages, start / PAGE, positions, scores + q * SPAN, y + q * pages.head_dim); });
  }
  for (i64 q = 0; q < queries; q++)
    for (i64 d = 0; d < pages.head_dim; d += VL) store(y + q * pages.head_dim + d, load(y + q * pages.head_dim + d) * set1(1.0f / total[q]));
}
