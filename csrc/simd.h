// A vector of floats for the instruction set that this file is compiled for: AVX-512 (16 lanes) or AVX2 with FMA (8 lanes).
// bf16 exists only where the CPU multiplies it (AVX-512-BF16); elsewhere callers convert to float first.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

using i64 = int64_t;
using i32 = int32_t;
using u32 = uint32_t;

struct bf16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

constexpr int VL = 16;  // lanes
using vec = __m512;
using lanes = __m512i;  // 32-bit lanes: one float or two bf16

static inline vec zero() { return _mm512_setzero_ps(); }
static inline vec set1(float x) { return _mm512_set1_ps(x); }
static inline vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
static inline lanes load_lanes(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_lanes(void* p, lanes v) { _mm512_storeu_si512(p, v); }
static inline lanes broadcast(u32 x) { return _mm512_set1_epi32((int)x); }
static inline vec as_vec(lanes v) { return _mm512_castsi512_ps(v); }
static inline lanes as_lanes(vec v) { return _mm512_castps_si512(v); }
static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec vmin(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec square_root(vec v) { return _mm512_sqrt_ps(v); }
static inline float sum(vec v) { return _mm512_reduce_add_ps(v); }
static inline float maximum(vec v) { return _mm512_reduce_max_ps(v); }
static inline vec round_to_int(vec v) { return _mm512_roundscale_ps(v, 0); }
static inline vec times_power_of_two(vec p, vec n) { return _mm512_scalef_ps(p, n); }
// Lanes [from, to) of v, `other` elsewhere; bounds may lie outside 0..VL.
static inline vec keep_between(vec v, vec other, i64 from, i64 to) {
  const u32 low = from <= 0 ? 0 : from >= VL ? 0xffff : (1u << from) - 1;
  const u32 high = to <= 0 ? 0 : to >= VL ? 0xffff : (1u << to) - 1;
  return _mm512_mask_blend_ps((__mmask16)(high & ~low), other, v);
}

// 16 x 16 transpose of 32-bit lanes.
static inline void transpose(lanes* r) {
  lanes t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#if defined(__AVX512BF16__)
#define HAS_BF16 1
static inline vec load(const bf16* p) {
  return as_vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline void store(bf16* p, vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
// 32 consecutive values rounded to bf16: lane j holds values 2j and 2j + 1.
static inline lanes load_pairs(const float* p) { return (lanes)_mm512_cvtne2ps_pbh(load(p + 16), load(p)); }
static inline lanes load_pairs(const bf16* p) { return load_lanes(p); }
// Two vectors rounded to bf16: lane j holds low[j] and high[j].
static inline lanes interleave(vec low, vec high) {
  const lanes l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low)), h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}
static inline lanes interleave(const bf16* low, const bf16* high) {
  const lanes l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  return _mm512_or_si512(l, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high)), 16));
}
static inline lanes interleave(const float* low, const float* high) { return interleave(load(low), load(high)); }
static inline lanes low_only(const bf16* low) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low)); }
static inline lanes low_only(const float* low) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(low))); }
#endif

#else  // AVX2

constexpr int VL = 8;
using vec = __m256;
using lanes = __m256i;

static inline vec zero() { return _mm256_setzero_ps(); }
static inline vec set1(float x) { return _mm256_set1_ps(x); }
static inline vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
static inline lanes load_lanes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store_lanes(void* p, lanes v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline lanes broadcast(u32 x) { return _mm256_set1_epi32((int)x); }
static inline vec as_vec(lanes v) { return _mm256_castsi256_ps(v); }
static inline lanes as_lanes(vec v) { return _mm256_castps_si256(v); }
static inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec vmin(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec square_root(vec v) { return _mm256_sqrt_ps(v); }
static inline float sum(vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float maximum(vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline vec round_to_int(vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec times_power_of_two(vec p, vec n) {
  return as_vec(_mm256_add_epi32(as_lanes(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
static inline vec keep_between(vec v, vec other, i64 from, i64 to) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const i32 low = (i32)(from < 0 ? 0 : from > VL ? VL : from), high = (i32)(to < 0 ? 0 : to > VL ? VL : to);
  const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(low - 1)), _mm256_cmpgt_epi32(_mm256_set1_epi32(high), index));
  return _mm256_blendv_ps(other, v, as_vec(inside));
}

// 8 x 8 transpose of 32-bit lanes.
static inline void transpose(lanes* r) {
  lanes t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif

// e^x to about one unit in the last place; results below the smallest normal float are that float. NaN stays NaN: of two operands
// the minimum and maximum instructions give the second one then.
static inline vec exponential(vec x) {
  x = vmin(set1(88.3f), vmax(set1(-87.3f), x));
  const vec n = round_to_int(x * set1(1.44269504f));
  vec r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return times_power_of_two(p, n);
}
static inline vec sigmoid(vec x) { return set1(1.0f) / (set1(1.0f) + exponential(zero() - x)); }
