// The C functions of the library. Every variant (an instruction set each) compiles this file; Python chooses one at run time.
// dtypes: 0 = float, 1 = bf16. Arrays are contiguous; sizes that the kernels vectorise over are multiples of 32 (see each).
#pragma once
#include "adamw.h"
#include "attention.h"
#include "cross_entropy.h"
#include "draw.h"
#include "experts.h"
#include "linear.h"
#include "norm.h"
#include "read.h"
#include "route.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Calls body(T{}) for the type of activations.
template <class Body>
static inline void with_type(i64 activation, const Body& body) {
#ifdef HAS_BF16
  if (activation == 1) return body(bf16{});
#endif
  body(float{});
}

// Calls body(T{}, W{}) for the types of activations and weights; fp32 activations go with fp32 weights only.
template <class Body>
static inline void with_types(i64 activation, i64 weight, const Body& body) {
#ifdef HAS_BF16
  if (activation == 1 && weight == 1) return body(bf16{}, bf16{});
  if (activation == 1) return body(bf16{}, float{});
#endif
  body(float{}, float{});
}

// The number of this interface; sparseling/kernels/library.py has the same: raise both when arguments change.
EXPORT i64 sparseling_interface() { return 7; }

EXPORT i64 sparseling_has_bf16() {
#ifdef HAS_BF16
  return 1;
#else
  return 0;
#endif
}

EXPORT void sparseling_experts_forward(i64 dtype, i64 weight_dtype, i64 threads, i64 tokens, i64 k, i64 experts, i64 hidden, i64 width, const void* x, const i32* order,
                                       const i64* ends, const float* weights, const void* gate, const void* up, const void* down, i64 gate_stride, void* gate_up,
                                       void* out) {
  with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const Experts<T, W> p{tokens, k, experts, hidden, width, (const T*)x, order, ends, weights, (const W*)gate, (const W*)up, (const W*)down, gate_stride};
    experts_forward(p, (T*)gate_up, (T*)out, threads);
  });
}

EXPORT void sparseling_experts_backward(i64 dtype, i64 weight_dtype, i64 threads, i64 tokens, i64 k, i64 experts, i64 hidden, i64 width, const void* x, const i32* order,
                                        const i64* ends, const float* weights, const void* gate, const void* up, const void* down, i64 gate_stride,
                                        const void* gate_up, const void* grad_out, void* grad_x, void* grad_gate, void* grad_up, void* grad_down, float* grad_weights) {
  with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const Experts<T, W> p{tokens, k, experts, hidden, width, (const T*)x, order, ends, weights, (const W*)gate, (const W*)up, (const W*)down, gate_stride};
    experts_backward(p, (const T*)gate_up, (const T*)grad_out, (T*)grad_x, ExpertGrads<W>{(W*)grad_gate, (W*)grad_up, (W*)grad_down, grad_weights}, threads);
  });
}

// logits [tokens, experts], bias [experts] -> ids, weights [tokens, k], log_norm [tokens]
EXPORT void sparseling_route_forward(i64 threads, i64 tokens, i64 experts, i64 groups, i64 kept, i64 k, float scale, const float* logits, const float* bias, i64* ids,
                                     float* weights, float* log_norm) {
  route_forward({tokens, experts, groups, kept, k, scale}, logits, bias, ids, weights, log_norm, (int)threads);
}

// grad_weights and grad_log_norm may be null
EXPORT void sparseling_route_backward(i64 threads, i64 tokens, i64 experts, i64 k, float scale, const float* logits, const i64* ids, const float* log_norm,
                                      const float* grad_weights, const float* grad_log_norm, float* grad_logits) {
  route_backward({tokens, experts, 1, 1, k, scale}, logits, ids, log_norm, grad_weights, grad_log_norm, grad_logits, (int)threads);
}

// *out_of_range: place of the first id outside 0 .. experts - 1, or -1
EXPORT void sparseling_sort_by_expert(i64 pairs, i64 experts, const i64* ids, i32* order, i64* ends, i64* out_of_range) {
  *out_of_range = sort_by_expert(ids, pairs, experts, order, ends);
}

// x [m, k], w [n, k], y [m, n]
EXPORT void sparseling_linear_forward(i64 dtype, i64 weight_dtype, i64 threads, i64 m, i64 k, i64 n, const void* x, const void* w, void* y) {
  with_types(dtype, weight_dtype, [&](auto t, auto u) { linear_forward((const decltype(t)*)x, (const decltype(u)*)w, m, k, n, (decltype(t)*)y, threads); });
}

EXPORT void sparseling_linear_grad_input(i64 dtype, i64 weight_dtype, i64 threads, i64 m, i64 k, i64 n, const void* grad_y, const void* w, void* grad_x) {
  with_types(dtype, weight_dtype,
             [&](auto t, auto u) { linear_grad_input((const decltype(t)*)grad_y, (const decltype(u)*)w, m, k, n, (decltype(t)*)grad_x, threads); });
}

EXPORT void sparseling_linear_grad_weight(i64 dtype, i64 weight_dtype, i64 threads, i64 m, i64 k, i64 n, const void* grad_y, const void* x, void* grad_w) {
  with_types(dtype, weight_dtype,
             [&](auto t, auto u) { linear_grad_weight((const decltype(t)*)grad_y, (const decltype(t)*)x, m, k, n, (decltype(u)*)grad_w, threads); });
}

// grad_x and grad_head (always fp32) may be null together: losses only
EXPORT void sparseling_cross_entropy(i64 dtype, i64 weight_dtype, i64 threads, i64 tokens, i64 hidden, i64 vocabulary, const void* x, const void* head,
                                     const i64* labels, float z_weight, double* losses, void* grad_x, float* grad_head) {
  with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    cross_entropy(CrossEntropy<T, W>{tokens, hidden, vocabulary, (const T*)x, (const W*)head, labels, z_weight}, losses, (T*)grad_x, grad_head, threads);
  });
}

// sizes: batch, heads, kv_heads, queries, keys, head_dim; strides: batch, token, head of q, then of k, then of v
template <class T>
static inline Attention<T> attention_of(const i64* sizes, const i64* strides, float scale, const void* q, const void* k, const void* v, const i32* first_key) {
  const View at[3] = {{strides[0], strides[1], strides[2]}, {strides[3], strides[4], strides[5]}, {strides[6], strides[7], strides[8]}};
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale, (const T*)q, (const T*)k, (const T*)v, at[0], at[1], at[2], first_key};
}

EXPORT void sparseling_attention_forward(i64 dtype, i64 threads, const i64* sizes, const i64* strides, float scale, const void* q, const void* k, const void* v,
                                         const i32* first_key, void* out, float* log_norm) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    attention_forward(attention_of<T>(sizes, strides, scale, q, k, v, first_key), (T*)out, log_norm, threads);
  });
}

EXPORT void sparseling_attention_backward(i64 dtype, i64 threads, const i64* sizes, const i64* strides, float scale, const void* q, const void* k, const void* v,
                                          const i32* first_key, const void* out, const float* log_norm, const void* grad_out, void* grad_q, void* grad_k,
                                          void* grad_v) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    attention_backward(attention_of<T>(sizes, strides, scale, q, k, v, first_key),
                       AttentionBackward<T>{(const T*)out, (const T*)grad_out, log_norm, (T*)grad_q, (T*)grad_k, (T*)grad_v}, threads);
  });
}

EXPORT void sparseling_rms_norm_forward(i64 dtype, i64 threads, i64 rows, i64 size, i64 count, float eps, const void* x, const float* weight, void* y) {
  with_type(dtype, [&](auto t) { rms_norm_forward((const decltype(t)*)x, weight, rows, size, count, eps, (decltype(t)*)y, threads); });
}

EXPORT void sparseling_rms_norm_backward(i64 dtype, i64 threads, i64 rows, i64 size, i64 count, float eps, const void* x, const float* weight, const void* grad_y,
                                         void* grad_x, float* grad_weight) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    rms_norm_backward((const T*)x, (const T*)grad_y, weight, rows, size, count, eps, (T*)grad_x, grad_weight, threads);
  });
}

// sizes: tokens, heads, kv_heads, head_dim, count, half
template <class T>
static inline QueryKeyValue<T> query_key_value_of(const i64* s, float eps, const void* rows, const float* query_weight, const float* key_weight, const float* cosine,
                                                  const float* sine) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], eps, (const T*)rows, query_weight, key_weight, cosine, sine};
}

EXPORT void sparseling_query_key_value_forward(i64 dtype, i64 threads, const i64* sizes, float eps, const void* rows, const float* query_weight,
                                               const float* key_weight, const float* cosine, const float* sine, void* q, void* k, void* v) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    query_key_value_forward(query_key_value_of<T>(sizes, eps, rows, query_weight, key_weight, cosine, sine), (T*)q, (T*)k, (T*)v, threads);
  });
}

EXPORT void sparseling_query_key_value_backward(i64 dtype, i64 threads, const i64* sizes, float eps, const void* rows, const float* query_weight,
                                                const float* key_weight, const float* cosine, const float* sine, const void* grad_q, const void* grad_k,
                                                const void* grad_v, void* grad_rows, float* grad_query_weight, float* grad_key_weight) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    query_key_value_backward(query_key_value_of<T>(sizes, eps, rows, query_weight, key_weight, cosine, sine), (const T*)grad_q, (const T*)grad_k, (const T*)grad_v,
                             (T*)grad_rows, grad_query_weight, grad_key_weight, threads);
  });
}

// x: pointers to `tensors` arrays of `sizes` floats; *total: the sum of their squares
EXPORT void sparseling_sum_of_squares(i64 threads, i64 tensors, const i64* sizes, const float* const* x, double* total) {
  *total = squares_of_all(x, sizes, tensors, (int)threads);
}

// rest = 1 - beta. factors [tensors, 3]: what a weight is multiplied by, step size, and root of the second moment's correction
EXPORT void sparseling_adamw(i64 threads, i64 tensors, float rest1, float beta2, float rest2, float epsilon, float grad_scale, const float* factors, const i64* sizes, float* const* p,
                             const float* const* grad, float* const* first, float* const* second) {
  adamw({rest1, beta2, rest2, epsilon, grad_scale}, factors, p, grad, first, second, sizes, tensors, (int)threads);
}

EXPORT void sparseling_read(i64 threads, const void* data, i64 bytes, float* digest) { read_all((const char*)data, bytes, (int)threads, digest); }

// rows: which rows of logits [., stride]; one rule and draw each; tokens: what they say next
EXPORT void sparseling_draw(i64 count, i64 vocab, i64 stride, const float* logits, const i64* rows, const float* temperature, const i64* top_k,
                            const double* top_p, const float* min_p, const double* draws, i64* tokens) {
  DrawScratch scratch;
  for (i64 i = 0; i < count; i++) tokens[i] = draw_row(logits + rows[i] * stride, vocab, {temperature[i], top_k[i], top_p[i], min_p[i]}, draws[i], scratch);
}

#include "engine/exports.h"
