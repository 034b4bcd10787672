// What a model consists of, what a step is asked, and the arrays that it works on.
#pragma once
#include <atomic>
#include <cmath>
#include <vector>

#include "../route.h"
#include "attention.h"
#include "pack.h"

// An MTP layer enters by its own door: projection [embedding of the next token, normed | hidden state, normed].
struct Door {
  Matrix projection;
  const float *embedding_norm = nullptr, *hidden_norm = nullptr;
};

struct Layer {
  Matrix query_key_value, dense, router, gate_up, down, shared_gate_up, shared_down;
  const float *input_norm = nullptr, *post_norm = nullptr, *query_norm = nullptr, *key_norm = nullptr, *expert_bias = nullptr;
  const float *query_key_value_bias = nullptr, *dense_bias = nullptr;
  bool has_experts() const { return router.data != nullptr; }
};

struct Shape {
  i64 layers, ahead, hidden, heads, kv_heads, head_dim, rotary_dim, experts, k, groups, groups_kept, width, dense_width, shared_width, vocab;
  float eps, routed_scale;
};

// What a step is asked: tokens [n] with their positions and sequences; a sequence's tokens stand together, in order. `tables`
// [sequences][most_pages] are page numbers. Logits come for the tokens of `wanted`, for all words or for those of some blocks of the
// head. With `previous` the MTP layer is asked instead of the decoder: hidden states of the positions, `tokens` being those that follow.
struct Request {
  i64 n, most_pages, wanted_count;
  const i64 *tokens, *positions, *sequences, *wanted;
  const i32* tables;
  const float* previous;     // [n][hidden] after the final norm, or null
  float *logits;             // [wanted][blocks of the head * 16]
  float *hidden;             // [n][hidden] after the final norm, or null
  i32* expert_ids;           // [layers with experts][n][k], or null
  float *expert_weights;     // likewise
  float *expert_scores;      // [layers with experts][n][experts] before the bias, or null
  const i64* head_blocks;    // ascending, or null for all
  i64 head_block_count;
};

template <class C>
struct Cache {
  C *keys = nullptr, *values = nullptr;  // [layers + ahead][pages][kv_heads][head_dim * PAGE]
  i64 pages = 0;
};

// The experts of every token and their weights.
struct Chosen {
  std::vector<i64> ids;       // [tokens][k]
  std::vector<float> weights; // likewise
};

// (token, slot) pairs of every expert that has some.
struct Gathered {
  std::vector<i64> first, pair, place;
  std::vector<const Activation*> input, inner;
};

// Arrays of a step, kept for the next.
struct Buffers {
  std::vector<float> residual, query_key_value, scores;
  std::vector<std::atomic<i64>> next_tile;
  Chosen chosen;
  Activations normed, joined, attended, inner, pairs, shared;
};

// What a thread has for itself. Of few tokens each thread norms all and chooses all experts: sooner done than waited for.
struct Own {
  Activations normed;
  Chosen chosen;
  Gathered gathered;
  Choice choice;
  std::vector<float> gate, biased;  // scores of the experts
  std::vector<float> scores;        // of a tile of attention
  Own(const Shape& s, i64 floats)
      : choice(s.experts, s.groups, s.groups_kept, s.k), gate(s.experts + BLOCK), biased(s.experts), scores(floats) {}
};

static inline void rms_norm(const float* x, const float* weight, i64 n, float eps, float* out) {
  vec squares = zero();
  for (i64 i = 0; i < n; i += VL) squares = fma(load(x + i), load(x + i), squares);
  const vec scale = set1(1.0f / std::sqrt(sum(squares) / (float)n + eps));
  for (i64 i = 0; i < n; i += VL) store(out + i, load(x + i) * scale * load(weight + i));
}
