// How fast memory can be read here: the ceiling of decoding, where every weight is read once a token.
#pragma once
#include "simd.h"

#if defined(__AVX512F__)
static inline lanes mixed(lanes a, lanes b) { return _mm512_xor_si512(a, b); }
#else
static inline lanes mixed(lanes a, lanes b) { return _mm256_xor_si256(a, b); }
#endif

// All of data [bytes], a multiple of threads * STREAMS * 64, each thread its own part, in STREAMS rows at once as products read weights.
// `digest` keeps the compiler from leaving it out.
static void read_all(const char* data, i64 bytes, int threads, float* digest) {
  constexpr int STREAMS = 8;
  constexpr i64 STEP = sizeof(lanes);
  const i64 part = bytes / threads, stream = part / STREAMS;
  float total = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; t++) {
    vec sums[STREAMS];
    for (auto& v : sums) v = zero();
    for (i64 at = 0; at < stream; at += STEP)
      for (int s = 0; s < STREAMS; s++) sums[s] = as_vec(mixed(as_lanes(sums[s]), load_lanes(data + t * part + s * stream + at)));
    for (const vec v : sums) total += sum(v);
  }
  *digest = total;
}
