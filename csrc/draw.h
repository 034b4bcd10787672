// The next token of a row of logits: temperature, top-k, top-p, min-p and one uniform draw, as sparseling/run/sampler.py defines them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

using u64 = uint64_t;

struct DrawRule {
  float temperature;
  i64 top_k;
  double top_p;
  float min_p;
};

// One thread's memory for a row: scores are logits less the best, over the temperature; weights their exponentials.
struct DrawScratch {
  std::vector<float> scores, weights;
  std::vector<i32> ids;
  std::vector<double> buckets;
  std::vector<u64> last;
};

// In one order whatever the row's place in memory.
static inline double sum_of(const float* x, i64 n) {
  double part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (i64 j = 0; j < 8; j++) part[j] += x[i + j];
  for (; i < n; i++) part[0] += x[i];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// Fills scores and weights of the scratch. Weights too small for a float are 0.
static inline void weigh(const float* logits, i64 n, float temperature, DrawScratch& s) {
  const i64 padded = (n + VL - 1) / VL * VL;
  s.scores.assign(padded, -INFINITY), s.weights.resize(padded);
  vec top = set1(-INFINITY);
  i64 i = 0;
  for (; i + VL <= n; i += VL) top = vmax(top, load(logits + i));
  float best = maximum(top);
  for (; i < n; i++) best = std::max(best, logits[i]);
  for (i = 0; i + VL <= n; i += VL) store(s.scores.data() + i, (load(logits + i) - set1(best)) / set1(temperature));
  for (; i < n; i++) s.scores[i] = (logits[i] - best) / temperature;
  for (i = 0; i < padded; i += VL) store(s.weights.data() + i, exponential(load(s.scores.data() + i)));
  for (i = 0; i < n; i++)
    if (s.scores[i] < -87.0f) s.weights[i] = 0.0f;
}

// Where the draw falls among all n weights: by blocks, so that few additions wait for each other. Never one of weight 0.
static inline i64 pick_of_all(const float* weights, i64 n, double draw) {
  constexpr i64 BLOCK = 256;
  double total = 0, before = 0;
  for (i64 b = 0; b < n; b += BLOCK) total += sum_of(weights + b, std::min(BLOCK, n - b));
  const double wanted = std::min(draw * total, std::nextafter(total, 0.0));
  i64 last = -1;
  for (i64 b = 0; b < n; b += BLOCK) {
    const i64 end = std::min(b + BLOCK, n);
    const double mass = sum_of(weights + b, end - b);
    if (mass > 0)
      for (last = end - 1; weights[last] == 0; last--) {}
    if (before + mass > wanted) {
      double sum = before;
      for (i64 i = b; i < end; i++) {
        sum += weights[i];
        if (sum > wanted && weights[i] > 0) return i;
      }
      return last;
    }
    before += mass;
  }
  return last;
}

// Drops the ids for which keep(id) is false. Without a branch: which ids stay cannot be foreseen.
template <class Keep>
static inline void keep_where(DrawScratch& s, const Keep& keep) {
  i64 kept = 0;
  for (i32 id : s.ids) {
    s.ids[kept] = id;
    kept += keep(id);
  }
  s.ids.resize(kept);
}

// Orders scores, which are at most 0: the better, the smaller.
static inline u32 key_of(float score) {
  u32 bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x7fffffffu;
}

// Cuts ids, which are in order, to the fewest best whose weights together reach `mass`. Scores fall into buckets by their leading bits; only
// the bucket in which the last of them stands is sorted.
template <class Weight>
static inline void keep_best(double mass, DrawScratch& s, const Weight& weight) {
  constexpr int SHIFT = 20;
  s.buckets.assign((0x7f800000u >> SHIFT) + 1, 0.0);
  for (i32 id : s.ids) s.buckets[key_of(s.scores[id]) >> SHIFT] += weight(id);
  double before = 0;
  u32 bucket = 0;
  const u32 worst = (u32)s.buckets.size() - 1;
  while (bucket < worst && before + s.buckets[bucket] < mass) before += s.buckets[bucket++];
  s.last.clear();
  for (i32 id : s.ids)
    if (key_of(s.scores[id]) >> SHIFT == bucket) s.last.push_back((u64)key_of(s.scores[id]) << 32 | (u32)id);
  std::sort(s.last.begin(), s.last.end());
  u64 cut = (u64)bucket << (SHIFT + 32);                                         // the first that is not kept
  for (u64 entry : s.last) {
    if (before >= mass) break;
    before += weight((i32)(u32)entry);
    cut = entry + 1;
  }
  keep_where(s, [&](i32 id) { return ((u64)key_of(s.scores[id]) << 32 | (u32)id) < cut; });
}

// logits [n], the best of them finite; draw in [0, 1).
static inline i64 draw_row(const float* logits, i64 n, const DrawRule& rule, double draw, DrawScratch& s) {
  weigh(logits, n, rule.temperature, s);
  const bool few = rule.top_k > 0 && rule.top_k < n;
  if (!few && rule.top_p >= 1 && rule.min_p <= 0) return pick_of_all(s.weights.data(), n, draw);
  s.ids.resize(n);
  for (i64 i = 0; i < n; i++) s.ids[i] = (i32)i;
  double total = 0;
  if (few) {
    keep_best((double)rule.top_k, s, [](i32) { return 1.0; });
    for (i32 id : s.ids) total += s.weights[id];
  } else {
    total = sum_of(s.weights.data(), n);
    // All tokens below this floor together weigh less than half of what top-p leaves out: none of them is kept.
    const float floor = (float)std::log((1 - rule.top_p) * total / (2.0 * n));
    keep_where(s, [&](i32 id) { return s.scores[id] >= floor && s.weights[id] > 0; });
  }
  if (rule.top_p < 1) keep_best(rule.top_p * total, s, [&](i32 id) { return (double)s.weights[id]; });
  keep_where(s, [&](i32 id) { return s.weights[id] > 0 && s.weights[id] >= rule.min_p; });
  total = 0;
  for (i32 id : s.ids) total += s.weights[id];
  const double wanted = std::min(draw * total, std::nextafter(total, 0.0));
  double sum = 0;
  for (i32 id : s.ids) {
    sum += s.weights[id];
    if (sum > wanted) return id;
  }
  return s.ids.back();
}
