// Choosing experts, and sorting (token, slot) pairs by expert.
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

// scores [tokens, experts] -> ids [tokens, k]: the best experts of the `kept` best groups; a group's score is the sum of its two best.
static void choose_experts(const float* scores, i64 tokens, i64 experts, i64 groups, i64 kept, i64 k, i64* ids, int threads) {
  const i64 size = experts / groups;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> best(k), group_score(groups), group_best(kept), pair(2);
    std::vector<i64> group(kept), two(2);
#pragma omp for schedule(static)
    for (i64 t = 0; t < tokens; t++) {
      const float* s = scores + t * experts;
      i64 filled = 0;
      if (groups == 1) {
        insert_best(s, 0, experts, k, &filled, ids + t * k, best.data());
        continue;
      }
      for (i64 g = 0; g < groups; g++) {
        i64 found = 0;
        insert_best(s, g * size, (g + 1) * size, 2, &found, two.data(), pair.data());
        group_score[g] = pair[0] + (found > 1 ? pair[1] : 0.0f);
      }
      i64 found = 0;
      insert_best(group_score.data(), 0, groups, kept, &found, group.data(), group_best.data());
      std::sort(group.begin(), group.end());
      for (i64 g : group) insert_best(s, g * size, (g + 1) * size, k, &filled, ids + t * k, best.data());
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
