// From router logits to experts and their weights, with the backward; and sorting (token, slot) pairs by expert.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

// The k largest of scores[from, to), best first, appended at `filled` of ids; equal scores: the smaller index first; NaN counts as lowest.
static inline void insert_best(const float* scores, i64 from, i64 to, i64 k, i64* filled, i64* ids, float* best) {
  for (i64 e = from; e < to; e++) {
    const float s = std::isnan(scores[e]) ? -INFINITY : scores[e];
    if (*filled == k && !(s > best[k - 1])) continue;
    i64 at = *filled < k ? (*filled)++ : k - 1;
    while (at > 0 && !(best[at - 1] >= s)) best[at] = best[at - 1], ids[at] = ids[at - 1], at--;
    best[at] = s, ids[at] = e;
  }
}

// What choosing needs for one token, kept by each thread.
struct Choice {
  i64 experts, groups, kept, k;
  std::vector<float> best, group_score, group_best;
  std::vector<i64> group;
  Choice(i64 experts, i64 groups, i64 kept, i64 k)
      : experts(experts), groups(groups), kept(kept), k(k), best(k), group_score(groups), group_best(kept), group(kept) {}

  // scores [experts] -> ids [k]: the best experts of the `kept` best groups; a group's score is the sum of its two best.
  void choose(const float* scores, i64* ids) {
    const i64 size = experts / groups;
    i64 filled = 0, found = 0;
    if (groups == 1) return insert_best(scores, 0, experts, k, &filled, ids, best.data());
    for (i64 g = 0; g < groups; g++) {
      float pair[2];
      i64 two[2], count = 0;
      insert_best(scores, g * size, (g + 1) * size, 2, &count, two, pair);
      group_score[g] = pair[0] + (count > 1 ? pair[1] : 0.0f);
    }
    insert_best(group_score.data(), 0, groups, kept, &found, group.data(), group_best.data());
    std::sort(group.begin(), group.end());
    for (i64 g : group) insert_best(scores, g * size, (g + 1) * size, k, &filled, ids, best.data());
  }
};

// exp(x[i] - shift) into out[i], which may be x; returns the sum of them all.
static inline float exponentials(const float* x, i64 n, float shift, float* out) {
  vec total = zero();
  i64 e = 0;
  for (; e + VL <= n; e += VL) {
    const vec p = exponential(load(x + e) - set1(shift));
    store(out + e, p);
    total = total + p;
  }
  float rest = 0.0f;
  for (; e < n; e++) rest += out[e] = std::exp(x[e] - shift);
  return sum(total) + rest;
}

static inline float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

struct Router {
  i64 tokens, experts, groups, kept, k;
  float scale;
};

// logits [tokens, experts], bias [experts] -> ids, weights [tokens, k], log_norm [tokens]: log of the sum of exp(logits).
static void route_forward(const Router& p, const float* logits, const float* bias, i64* ids, float* weights, float* log_norm, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Choice choice(p.experts, p.groups, p.kept, p.k);
    std::vector<float> row(p.experts);
#pragma omp for schedule(static)
    for (i64 t = 0; t < p.tokens; t++) {
      const float* x = logits + t * p.experts;
      float top = x[0];
      for (i64 e = 1; e < p.experts; e++) top = std::max(top, x[e]);
      log_norm[t] = top + std::log(exponentials(x, p.experts, top, row.data()));
      i64 e = 0;
      for (; e + VL <= p.experts; e += VL) store(row.data() + e, sigmoid(load(x + e)) + load(bias + e));
      for (; e < p.experts; e++) row[e] = sigmoid_of(x[e]) + bias[e];
      choice.choose(row.data(), ids + t * p.k);
      float total = 0.0f;
      for (i64 j = 0; j < p.k; j++) total += weights[t * p.k + j] = sigmoid_of(x[ids[t * p.k + j]]);
      const float factor = p.k > 1 ? p.scale / (total + 1e-20f) : p.scale;
      for (i64 j = 0; j < p.k; j++) weights[t * p.k + j] *= factor;
    }
  }
}

// grad_weights [tokens, k] and grad_log_norm [tokens], either may be null -> grad_logits [tokens, experts].
static void route_backward(const Router& p, const float* logits, const i64* ids, const float* log_norm, const float* grad_weights,
                           const float* grad_log_norm, float* grad_logits, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 t = 0; t < p.tokens; t++) {
    const float* x = logits + t * p.experts;
    float* grad = grad_logits + t * p.experts;
    if (grad_log_norm) {
      exponentials(x, p.experts, log_norm[t], grad);
      for (i64 e = 0; e < p.experts; e++) grad[e] *= grad_log_norm[t];
    } else {
      std::fill(grad, grad + p.experts, 0.0f);
    }
    if (!grad_weights) continue;
    const i64* chosen = ids + t * p.k;
    const float* g = grad_weights + t * p.k;
    float total = 1e-20f, mean = 0.0f;  // weights are scale * score / total
    for (i64 j = 0; j < p.k; j++) {
      const float score = sigmoid_of(x[chosen[j]]);
      total += score;
      mean += g[j] * score;
    }
    mean /= total;
    for (i64 j = 0; j < p.k; j++) {
      const float score = sigmoid_of(x[chosen[j]]), grad_score = p.k > 1 ? p.scale * (g[j] - mean) / total : p.scale * g[j];
      grad[chosen[j]] += grad_score * score * (1.0f - score);
    }
  }
}

// Counting sort, stable: order [pairs] of flat pair indices, ends [experts]. Returns the first id that is out of range, else -1.
static i64 sort_by_expert(const i64* ids, i64 pairs, i64 experts, i32* order, i64* ends) {
  std::vector<i64> next(experts, 0);
  for (i64 i = 0; i < pairs; i++) {
    if (ids[i] < 0 || ids[i] >= experts) return i;
    next[ids[i]]++;
  }
  i64 total = 0;
  for (i64 e = 0; e < experts; e++) {
    const i64 count = next[e];
    next[e] = total;
    ends[e] = total += count;
  }
  for (i64 i = 0; i < pairs; i++) order[next[ids[i]]++] = (i32)i;
  return -1;
}
