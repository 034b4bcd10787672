// y = x w^T and its two gradients. Weights may stay fp32 while the product is bf16: they are rounded while being packed.
#pragma once
#include <omp.h>

#include "gemm.h"
#include "scratch.h"

constexpr i64 ROW_BLOCK = 128, TOKEN_CHUNK = 2048;

// to [m, n] = rows of x [m, k units] times panels that `pack(first column)` fills, NR columns at a time; threads share the panels.
template <class T, class Pack>
static void rows_times_panels(const T* x, i64 m, i64 k, i64 n, T* to, int threads, const Pack& pack) {
  const i64 units = units_of<T>(k);
  u32* panels = (u32*)shared_buffer().grow(n * units * 4);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (i64 c = 0; c < n; c += NR) pack(c, panels + c * units);
    std::vector<const T*> row(ROW_BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (i64 first = 0; first < m; first += ROW_BLOCK) {
      const i64 rows = std::min(ROW_BLOCK, m - first);
      for (i64 i = 0; i < rows; i++) row[i] = x + (first + i) * k;
      gemm<T>(row.data(), rows, panels, n, units, [&](i64 i, i64 c, vec left, vec right) {
        store(to + (first + i) * n + c, left);
        store(to + (first + i) * n + c + VL, right);
      });
    }
  }
}

// x [m, k], w [n, k] -> y [m, n]; k and n are multiples of 32.
template <class T, class W>
static void linear_forward(const T* x, const W* w, i64 m, i64 k, i64 n, T* y, int threads) {
  rows_times_panels(x, m, k, n, y, threads, [&](i64 c, u32* to) { pack_transposed<T>(w + c * k, k, NR, k, to); });
}

// grad_y [m, n], w [n, k] -> grad_x [m, k]
template <class T, class W>
static void linear_grad_input(const T* grad_y, const W* w, i64 m, i64 k, i64 n, T* grad_x, int threads) {
  rows_times_panels(grad_y, m, n, k, grad_x, threads, [&](i64 c, u32* to) { pack_rows<T, NR>([&](i64 i) { return w + i * k + c; }, n, NR, units_of<T>(n), to); });
}

// grad_y [m, n], x [m, k] -> grad_w [n, k]: NR rows of it are one thread's. Sums run over tokens in order, whatever the threads.
template <class T, class W>
static void linear_grad_weight(const T* grad_y, const T* x, i64 m, i64 k, i64 n, W* grad_w, int threads) {
  const i64 most = std::min(TOKEN_CHUNK, m);
  char* shared = (char*)shared_buffer().grow((units_of<T>(most) + 1) * k * 4 + n * k * 4 + 64);
  float* sums;
  if constexpr (std::is_same_v<W, float>) sums = grad_w;
  else sums = (float*)shared;
  u32* panels = (u32*)(shared + (std::is_same_v<W, float> ? 0 : (n * k * 4 + 63) / 64 * 64));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(thread_buffer(), (units_of<T>(most) + 1) * NR * 4 + 64);
    u32* left = scratch.take<u32>((units_of<T>(most) + 1) * NR);
    for (i64 first = 0; first < m; first += TOKEN_CHUNK) {
      const i64 rows = std::min(TOKEN_CHUNK, m - first), units = units_of<T>(rows);
#pragma omp for schedule(static)
      for (i64 c = 0; c < k; c += NR) pack_rows<T, NR>([&](i64 i) { return x + (first + i) * k + c; }, rows, NR, units, panels + c * units);
#pragma omp for schedule(dynamic, 1)
      for (i64 r = 0; r < n; r += NR) {
        pack_rows<T, VL>([&](i64 i) { return grad_y + (first + i) * n + r; }, rows, NR, units, left);
        gemm_transposed<T>(left, NR, panels, k, units, [&](i64 i, i64 c, vec a, vec b) {
          float* to = sums + (r + i) * k + c;
          store(to, first ? load(to) + a : a);
          store(to + VL, first ? load(to + VL) + b : b);
        });
      }
    }
    if constexpr (!std::is_same_v<W, float>) {
#pragma omp for schedule(static)
      for (i64 i = 0; i < n * k; i += VL) store(grad_w + i, load(sums + i));
    }
  }
}
