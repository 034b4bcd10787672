// Matrix products from small register tiles: row operands are read through row pointers, the other operand from packed panels.
//
// T is the type of the product's operands. The reduction runs over 32-bit units: one float, or a pair of bf16. Sums are fp32.
// A panel holds NR columns of the right operand for the whole reduction, [units][NR]; a left operand that must be transposed
// (weight gradients) is packed alike into panels of VL columns, [units][VL].
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "simd.h"

constexpr int NR = 2 * VL;                // columns of a tile
constexpr int MR = VL == 16 ? 8 : 6;      // rows of a tile of row pointers
constexpr int MT = VL == 16 ? 8 : 4;      // rows of a tile of a transposed panel; divides VL

template <class T>
constexpr int unit_values = std::is_same_v<T, float> ? 1 : 2;  // values of the reduction in one 32-bit unit

template <class T>
static inline i64 units_of(i64 k) { return (k + unit_values<T> - 1) / unit_values<T>; }

template <class T>
static inline vec dot(vec sum, u32 a, lanes b) {
#ifdef HAS_BF16
  if constexpr (std::is_same_v<T, bf16>) return _mm512_dpbf16_ps(sum, (__m512bh)broadcast(a), (__m512bh)b);
#endif
  return fma(as_vec(broadcast(a)), as_vec(b), sum);
}

// M x NR sums: a[i][u * STEP] is unit u of row i. Not inlined: in the middle of other code the compiler spills the sums.
template <class T, int STEP, size_t... I>
static __attribute__((noinline)) void tile_sums(const u32* const* a, const u32* b, i64 units, float* to, std::index_sequence<I...>) {
  vec left[] = {((void)I, zero())...}, right[] = {((void)I, zero())...};
  const u32* const row[] = {a[I]...};
  for (i64 u = 0; u < units; u++, b += NR) {
    const lanes b0 = load_lanes(b), b1 = load_lanes(b + VL);
    const auto add = [&](vec& x, vec& y, u32 unit) {
      x = dot<T>(x, unit, b0);
      y = dot<T>(y, unit, b1);
    };
    (add(left[I], right[I], row[I][u * STEP]), ...);
  }
  ((store(to + I * NR, left[I]), store(to + I * NR + VL, right[I])), ...);
}

// The first `rows` of M rows, as above; finish(i, left, right) gets the sums of row i.
template <class T, int M, int STEP, class Finish>
static inline void tile(const u32* const* a, const u32* b, i64 units, int rows, const Finish& finish) {
  alignas(64) float sums[M * NR];
  const u32* row[M];
  for (int i = 0; i < M; i++) row[i] = a[std::min(i, rows - 1)];
  tile_sums<T, STEP>(row, b, units, sums, std::make_index_sequence<M>());
  for (int i = 0; i < rows; i++) finish(i, load(sums + i * NR), load(sums + i * NR + VL));
}

// rows [m][k] times panels of n columns (a multiple of NR): finish(row, first column, left VL sums, right VL sums).
// `columns_first` keeps a panel in the nearest cache over all rows; otherwise a tile's rows stay there over all panels.
template <class T, class Finish>
static inline void gemm(const T* const* rows, i64 m, const u32* panels, i64 n, i64 units, i64 panel_units, bool columns_first, const Finish& finish) {
  auto one = [&](i64 m0, i64 n0) {
    const int left = (int)std::min<i64>(MR, m - m0);
    auto done = [&](int i, vec x, vec y) { finish(m0 + i, n0, x, y); };
    const u32* const* a = (const u32* const*)(rows + m0);
    const u32* b = panels + n0 * panel_units;
    if (left > MR / 2) tile<T, MR, 1>(a, b, units, left, done);
    else tile<T, MR / 2, 1>(a, b, units, left, done);
  };
  if (columns_first)
    for (i64 n0 = 0; n0 < n; n0 += NR)
      for (i64 m0 = 0; m0 < m; m0 += MR) one(m0, n0);
  else
    for (i64 m0 = 0; m0 < m; m0 += MR)
      for (i64 n0 = 0; n0 < n; n0 += NR) one(m0, n0);
}

template <class T, class Finish>
static inline void gemm(const T* const* rows, i64 m, const u32* panels, i64 n, i64 units, const Finish& finish) {
  gemm<T>(rows, m, panels, n, units, units, false, finish);
}

// transposed [m columns of panels of VL][units] times panels of n columns: finish(row, first column, left, right).
template <class T, class Finish>
static inline void gemm_transposed(const u32* left, i64 m, const u32* panels, i64 n, i64 units, const Finish& finish) {
  for (i64 n0 = 0; n0 < n; n0 += NR)
    for (i64 m0 = 0; m0 < m; m0 += MT) {
      const u32* a[MT];
      for (int i = 0; i < MT; i++) a[i] = left + (m0 / VL) * units * VL + m0 % VL + i;
      tile<T, MT, VL>(a, panels + n0 * units, units, MT, [&](int i, vec x, vec y) { finish(m0 + i, n0, x, y); });
    }
}

// VL rows w[j][0..k) become VL neighbouring columns of a panel: to[u * NR + j] is unit u of row j. k is a multiple of VL units.
template <class T, class W>
static inline void pack_columns(const W* w, i64 row_stride, i64 k, u32* to) {
  for (i64 u = 0; u < k / unit_values<T>; u += VL) {
    lanes r[VL];
    for (int j = 0; j < VL; j++) {
      const W* p = w + j * row_stride + u * unit_values<T>;
#ifdef HAS_BF16
      if constexpr (std::is_same_v<T, bf16>) r[j] = load_pairs(p);
      else
#endif
        r[j] = as_lanes(load(p));
    }
    transpose(r);
    for (int j = 0; j < VL; j++) store_lanes(to + (u + j) * NR, r[j]);
  }
}

// All n rows of w [n][k] as columns of panels [n / NR][units][NR]: the right operand of x @ w^T.
template <class T, class W>
static inline void pack_transposed(const W* w, i64 row_stride, i64 n, i64 k, u32* to) {
  const i64 units = k / unit_values<T>;
  for (i64 j = 0; j < n; j += VL) pack_columns<T>(w + j * row_stride, row_stride, k, to + (j / NR) * units * NR + j % NR);
}

// k rows of n values as the reduction of panels [n / WIDTH][units][WIDTH]; row(i) gives row i. An odd last bf16 row is paired with zeros.
template <class T, int WIDTH, class Row>
static inline void pack_rows(const Row& row, i64 k, i64 n, i64 panel_units, u32* to) {
  if constexpr (unit_values<T> == 1) {
    for (i64 u = 0; u < k; u++) {
      const auto* p = row(u);
      for (i64 j = 0; j < n; j += VL) store_lanes(to + (j / WIDTH) * panel_units * WIDTH + u * WIDTH + j % WIDTH, as_lanes(load(p + j)));
    }
  } else {
#ifdef HAS_BF16
    for (i64 u = 0; 2 * u < k; u++) {
      const auto* low = row(2 * u);
      const bool pair = 2 * u + 1 < k;
      const auto* high = pair ? row(2 * u + 1) : low;
      for (i64 j = 0; j < n; j += VL) {
        const lanes v = pair ? interleave(low + j, high + j) : low_only(low + j);
        store_lanes(to + (j / WIDTH) * panel_units * WIDTH + u * WIDTH + j % WIDTH, v);
      }
    }
#endif
  }
}
