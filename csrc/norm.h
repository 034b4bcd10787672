// RMSNorm, and QK-norm with partial rotation of the fused query-key-value rows; forward and backward.
#pragma once
#include <omp.h>

#include <cmath>
#include <vector>

#include "simd.h"

// 1 / sqrt(mean(x^2) + eps) of a row of `size` values (a multiple of VL); `count` of them are real, the others zeros.
template <class T>
static inline float inverse_norm(const T* x, i64 size, i64 count, float eps) {
  vec total = zero();
  for (i64 c = 0; c < size; c += VL) {
    const vec v = load(x + c);
    total = fma(v, v, total);
  }
  return 1.0f / std::sqrt(sum(total) / (float)count + eps);
}

template <class T>
static void rms_norm_forward(const T* x, const float* weight, i64 rows, i64 size, i64 count, float eps, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 r = 0; r < rows; r++) {
    const vec scale = set1(inverse_norm(x + r * size, size, count, eps));
    for (i64 c = 0; c < size; c += VL) store(y + r * size + c, load(x + r * size + c) * scale * load(weight + c));
  }
}

// One row: grad_x from grad_y; grad_weight += grad_y * normalised x
template <class T, class G>
static inline void norm_row_backward(const T* x, const G* grad_y, const float* weight, i64 size, i64 count, float eps, T* grad_x, float* grad_weight) {
  const float scale = inverse_norm(x, size, count, eps);
  vec product = zero();
  for (i64 c = 0; c < size; c += VL) product = fma(load(grad_y + c) * load(weight + c), load(x + c), product);
  const vec s = set1(scale), along = set1(sum(product) * scale * scale / (float)count);
  for (i64 c = 0; c < size; c += VL) {
    const vec v = load(x + c), g = load(grad_y + c);
    store(grad_weight + c, fma(g, v * s, load(grad_weight + c)));
    store(grad_x + c, s * fnma(along, v, g * load(weight + c)));
  }
}

// Adds the threads' sums [threads][size] up, in order.
static inline void add_up(const std::vector<float>& sums, int threads, i64 size, float* to) {
  for (i64 c = 0; c < size; c++) {
    float s = 0;
    for (int t = 0; t < threads; t++) s += sums[t * size + c];
    to[c] = s;
  }
}

template <class T>
static void rms_norm_backward(const T* x, const T* grad_y, const float* weight, i64 rows, i64 size, i64 count, float eps, T* grad_x, float* grad_weight, int threads) {
  std::vector<float> sums(threads * size, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; t++)
    for (i64 r = rows * t / threads; r < rows * (t + 1) / threads; r++)
      norm_row_backward(x + r * size, grad_y + r * size, weight, size, count, eps, grad_x + r * size, sums.data() + t * size);
  add_up(sums, threads, size, grad_weight);
}

template <class T>
struct QueryKeyValue {
  i64 tokens, heads, kv_heads, head_dim, count, half;  // `count` real dimensions of head_dim; the first 2 * half are rotated
  float eps;
  const T* rows;                                       // [tokens, heads + 2 * kv_heads, head_dim]
  const float *query_weight, *key_weight;              // [head_dim], null without QK-norm
  const float *cosine, *sine;                          // [tokens, half]
};

// -> q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]
template <class T>
static void query_key_value_forward(const QueryKeyValue<T>& p, T* q, T* k, T* v, int threads) {
  const i64 d = p.head_dim, rows = p.heads + 2 * p.kv_heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 t = 0; t < p.tokens; t++) {
    std::vector<float> normed(d);
    for (i64 h = 0; h < p.heads + p.kv_heads; h++) {
      const T* x = p.rows + (t * rows + h) * d;
      const float* weight = h < p.heads ? p.query_weight : p.key_weight;
      const vec scale = set1(weight ? inverse_norm(x, d, p.count, p.eps) : 1.0f);
      for (i64 c = 0; c < d; c += VL) store(normed.data() + c, weight ? load(x + c) * scale * load(weight + c) : load(x + c));
      for (i64 c = 0; c < p.half; c++) {
        const float first = normed[c], second = normed[c + p.half], cosine = p.cosine[t * p.half + c], sine = p.sine[t * p.half + c];
        normed[c] = first * cosine - second * sine;
        normed[c + p.half] = second * cosine + first * sine;
      }
      T* to = h < p.heads ? q + (t * p.heads + h) * d : k + (t * p.kv_heads + h - p.heads) * d;
      for (i64 c = 0; c < d; c += VL) store(to + c, load(normed.data() + c));
    }
    const T* values = p.rows + (t * rows + p.heads + p.kv_heads) * d;
    std::copy(values, values + p.kv_heads * d, v + t * p.kv_heads * d);
  }
}

template <class T>
static void query_key_value_backward(const QueryKeyValue<T>& p, const T* grad_q, const T* grad_k, const T* grad_v, T* grad_rows, float* grad_query_weight,
                                     float* grad_key_weight, int threads) {
  const i64 d = p.head_dim, rows = p.heads + 2 * p.kv_heads;
  std::vector<float> query_sums(threads * d, 0.0f), key_sums(threads * d, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    std::vector<float> grad(d);
    for (i64 t = p.tokens * part / threads; t < p.tokens * (part + 1) / threads; t++) {
      for (i64 h = 0; h < p.heads + p.kv_heads; h++) {
        const T* from = h < p.heads ? grad_q + (t * p.heads + h) * d : grad_k + (t * p.kv_heads + h - p.heads) * d;
        for (i64 c = 0; c < d; c += VL) store(grad.data() + c, load(from + c));
        for (i64 c = 0; c < p.half; c++) {
          const float first = grad[c], second = grad[c + p.half], cosine = p.cosine[t * p.half + c], sine = p.sine[t * p.half + c];
          grad[c] = first * cosine + second * sine;
          grad[c + p.half] = second * cosine - first * sine;
        }
        const T* x = p.rows + (t * rows + h) * d;
        T* to = grad_rows + (t * rows + h) * d;
        const float* weight = h < p.heads ? p.query_weight : p.key_weight;
        if (weight) norm_row_backward(x, grad.data(), weight, d, p.count, p.eps, to, (h < p.heads ? query_sums : key_sums).data() + part * d);
        else
          for (i64 c = 0; c < d; c += VL) store(to + c, load(grad.data() + c));
      }
      std::copy(grad_v + t * p.kv_heads * d, grad_v + (t + 1) * p.kv_heads * d, grad_rows + (t * rows + p.heads + p.kv_heads) * d);
    }
  }
  if (p.query_weight) add_up(query_sums, threads, d, grad_query_weight);
  if (p.key_weight) add_up(key_sums, threads, d, grad_key_weight);
}
