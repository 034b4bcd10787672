// AdamW over many fp32 tensors in one pass each: gradients are scaled on the way (clipping); and the squares of all gradients.
#pragma once
#include <omp.h>

#include <cmath>
#include <vector>

#include "simd.h"

constexpr i64 ELEMENTS_AT_ONCE = 16384;  // elements that one thread takes at a time

struct Block {
  i64 tensor, from, to;
};

static std::vector<Block> blocks_of(const i64* sizes, i64 tensors) {
  std::vector<Block> blocks;
  for (i64 t = 0; t < tensors; t++)
    for (i64 from = 0; from < sizes[t]; from += ELEMENTS_AT_ONCE) blocks.push_back({t, from, std::min(sizes[t], from + ELEMENTS_AT_ONCE)});
  return blocks;
}

// Short runs in fp32, added up in double.
static inline double sum_of_squares(const float* x, i64 n) {
  double total = 0;
  for (i64 first = 0; first < n; first += 64 * VL) {
    const i64 end = std::min(n, first + 64 * VL);
    vec squares = zero();
    i64 i = first;
    for (; i + VL <= end; i += VL) squares = fma(load(x + i), load(x + i), squares);
    total += sum(squares);
    for (; i < end; i++) total += (double)x[i] * x[i];
  }
  return total;
}

// The sum over all tensors, the same bits whatever the threads.
static double squares_of_all(const float* const* x, const i64* sizes, i64 tensors, int threads) {
  const std::vector<Block> blocks = blocks_of(sizes, tensors);
  std::vector<double> sums(blocks.size());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 b = 0; b < (i64)blocks.size(); b++) sums[b] = sum_of_squares(x[blocks[b].tensor] + blocks[b].from, blocks[b].to - blocks[b].from);
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

// What is the same for all tensors.
struct AdamW {
  float rest1, beta2, rest2, epsilon, grad_scale;  // rest = 1 - beta, which loses digits when it is computed in fp32
};

// keep = 1 - rate * decay, step = rate / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
static inline void adamw_block(const AdamW& a, float keep, float step, float root, float* p, const float* grad, float* first, float* second, i64 n) {
  i64 i = 0;
  for (; i + VL <= n; i += VL) {
    const vec g = load(grad + i) * set1(a.grad_scale);
    const vec m = fma(set1(a.rest1), g - load(first + i), load(first + i)), v = fma(set1(a.rest2), g * g, load(second + i) * set1(a.beta2));
    store(first + i, m);
    store(second + i, v);
    store(p + i, load(p + i) * set1(keep) - set1(step) * m / fma(square_root(v), set1(root), set1(a.epsilon)));
  }
  for (; i < n; i++) {
    const float g = grad[i] * a.grad_scale;
    first[i] += a.rest1 * (g - first[i]);
    second[i] = second[i] * a.beta2 + a.rest2 * g * g;
    p[i] = p[i] * keep - step * first[i] / (std::sqrt(second[i]) * root + a.epsilon);
  }
}

static void adamw(const AdamW& a, const float* factors, float* const* p, const float* const* grad, float* const* first, float* const* second, const i64* sizes,
                  i64 tensors, int threads) {
  const std::vector<Block> blocks = blocks_of(sizes, tensors);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 b = 0; b < (i64)blocks.size(); b++) {
    const Block at = blocks[b];
    const i64 t = at.tensor;
    const float* f = factors + 3 * t;
    adamw_block(a, f[0], f[1], f[2], p[t] + at.from, grad[t] + at.from, first[t] + at.from, second[t] + at.from, at.to - at.from);
  }
}
