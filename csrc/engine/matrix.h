// Weights as the engine keeps them, and their products with the activations of a few tokens.
//
// Rows are interleaved in blocks of 16: [rows / 16][columns / values][16][values], the values of one 32-bit unit. A lane of a vector
// is a row, so that a block is one sequential stream and nothing is summed across lanes. The same bytes serve one token (as fast as
// they can be read) and many (each vector read is used for all tokens of a tile). A token's sums run over the columns in order,
// whatever else is in the tile: what is computed together changes no bit.
//
// kinds: F32; BF16 (pairs); I8 and I4: groups of 32 columns with one fp16 scale a row, weights as unsigned numbers with an offset,
// activations quantised to int8 by the same groups. I4: a byte holds the columns c (low half) and c + 16 of its group.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../simd.h"

constexpr int BLOCK = 16;           // rows of a block
constexpr int PARTS = BLOCK / VL;   // vectors of a block
constexpr int GROUP = 32;           // columns that share a scale
enum Kind : i64 { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

struct Matrix {
  Kind kind = F32;
  i64 rows = 0, columns = 0;        // multiples of BLOCK and GROUP
  const uint8_t* data = nullptr;
  const uint16_t* scales = nullptr; // [rows / 16][columns / GROUP][16] fp16, or null

  static i64 bytes_of_block(Kind kind, i64 columns) { return BLOCK * columns * (kind == F32 ? 8 : kind == BF16 ? 4 : kind == I8 ? 2 : 1) / 2; }
  const uint8_t* block(i64 b) const { return data + b * bytes_of_block(kind, columns); }
  const uint16_t* block_scales(i64 b) const { return scales + b * (columns / GROUP) * BLOCK; }
};

// One token's activations in the form that products of some kind read.
struct Activation {
  const float* exact = nullptr;     // [columns]
  const bf16* rounded = nullptr;    // [columns]
  const int8_t* quantised = nullptr;// [columns]
  const float* scale = nullptr;     // [columns / GROUP]
  const float* sum = nullptr;       // [columns / GROUP] sum of the group's quantised values times scale
};

static inline float to_float(bf16 x) {
  const u32 bits = (u32)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline bf16 to_bf16(float f) {
  u32 bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {(uint16_t)(bits >> 16 | 0x40)};  // NaN stays NaN
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#if defined(__AVX512F__)
static inline lanes low_values(lanes pairs) { return _mm512_slli_epi32(pairs, 16); }
static inline lanes high_values(lanes pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)); }
static inline vec load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline vec from_int(lanes v) { return _mm512_cvtepi32_ps(v); }
static inline lanes no_lanes() { return _mm512_setzero_si512(); }
static inline lanes low_nibbles(lanes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline lanes high_nibbles(lanes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
static inline lanes dot_bytes(lanes sums, lanes w, lanes x) { return _mm512_dpbusd_epi32(sums, w, x); }  // w unsigned, x signed
static inline lanes add_lanes(lanes a, lanes b) { return _mm512_add_epi32(a, b); }
static inline lanes to_int(vec v) { return _mm512_cvtps_epi32(v); }  // to the nearest
static inline void store_bytes(int8_t* p, lanes v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }  // of values in [-128, 127]
static inline int sum_lanes(lanes v) { return _mm512_reduce_add_epi32(v); }
static inline vec widen(const bf16* p) { return as_vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline lanes dot_nibbles(lanes sums, lanes w, lanes x) { return dot_bytes(sums, w, x); }
constexpr bool OFFSET_8 = true;     // 8-bit products are of w + 128, put right by the sum of x
#else
static inline lanes low_values(lanes pairs) { return _mm256_slli_epi32(pairs, 16); }
static inline lanes high_values(lanes pairs) { return _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)); }
static inline vec load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline vec from_int(lanes v) { return _mm256_cvtepi32_ps(v); }
static inline lanes no_lanes() { return _mm256_setzero_si256(); }
static inline lanes low_nibbles(lanes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline lanes high_nibbles(lanes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
static inline lanes add_lanes(lanes a, lanes b) { return _mm256_add_epi32(a, b); }
static inline lanes to_int(vec v) { return _mm256_cvtps_epi32(v); }
static inline void store_bytes(int8_t* p, lanes v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
static inline int sum_lanes(lanes v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline vec widen(const bf16* p) { return as_vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
constexpr bool OFFSET_8 = false;
// Pairs of 8-bit products must fit 16 bits: for nibbles they do; bytes are taken as signed, and their sign moves to x.
static inline lanes dot_nibbles(lanes sums, lanes w, lanes x) { return add_lanes(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))); }
static inline lanes dot_bytes(lanes sums, lanes w, lanes x) {
  const lanes s = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
  return add_lanes(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s)), _mm256_set1_epi16(1)));
}
#endif

static inline u32 unit_at(const void* p, i64 unit) {
  u32 u;
  std::memcpy(&u, (const char*)p + 4 * unit, 4);
  return u;
}

// Sums of M tokens with B blocks of rows from block `first` on: out [M][B * 16].
template <Kind K, int M, int B>
static void tile(const Matrix& w, i64 first, const Activation* const* x, float* out) {
  constexpr int V = B * PARTS;
  vec sums[M][V];
  for (auto& row : sums)
    for (auto& v : row) v = zero();
  const i64 step = Matrix::bytes_of_block(K, w.columns);
  const uint8_t* base = w.block(first);
  const auto at = [&](int v, i64 unit) { return base + (v / PARTS) * step + (unit * BLOCK + v % PARTS * VL) * 4; };
  if constexpr (K == F32) {
    for (i64 u = 0; u < w.columns; u++)
      for (int v = 0; v < V; v++) {
        const vec row = as_vec(load_lanes(at(v, u)));
        for (int m = 0; m < M; m++) sums[m][v] = fma(row, set1(x[m]->exact[u]), sums[m][v]);
      }
  } else if constexpr (K == BF16) {
    for (i64 u = 0; u < w.columns / 2; u++)
      for (int v = 0; v < V; v++) {
        const lanes row = load_lanes(at(v, u));
#ifdef HAS_BF16
        for (int m = 0; m < M; m++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], (__m512bh)row, (__m512bh)broadcast(unit_at(x[m]->rounded, u)));
#else
        const vec low = as_vec(low_values(row)), high = as_vec(high_values(row));
        for (int m = 0; m < M; m++) {
          sums[m][v] = fma(low, set1(x[m]->exact[2 * u]), sums[m][v]);
          sums[m][v] = fma(high, set1(x[m]->exact[2 * u + 1]), sums[m][v]);
        }
#endif
      }
  } else {
    const i64 groups = w.columns / GROUP;
    for (i64 g = 0; g < groups; g++) {
      lanes whole[M][V];
      for (auto& row : whole)
        for (auto& v : row) v = no_lanes();
      for (int u = 0; u < (K == I8 ? 8 : 4); u++)
        for (int v = 0; v < V; v++) {
          const lanes row = load_lanes(at(v, g * (K == I8 ? 8 : 4) + u));
          for (int m = 0; m < M; m++) {
            const int8_t* q = x[m]->quantised + g * GROUP;
            if constexpr (K == I8) {
              whole[m][v] = dot_bytes(whole[m][v], row, broadcast(unit_at(q, u)));
            } else {
              whole[m][v] = dot_nibbles(whole[m][v], low_nibbles(row), broadcast(unit_at(q, u)));
              whole[m][v] = dot_nibbles(whole[m][v], high_nibbles(row), broadcast(unit_at(q, u + 4)));
            }
          }
        }
      for (int v = 0; v < V; v++) {
        const vec scale = load_half(w.block_scales(first + v / PARTS) + g * BLOCK + v % PARTS * VL);
        for (int m = 0; m < M; m++) {
          const float offset = K == I4 ? 8.0f : OFFSET_8 ? 128.0f : 0.0f;
          const vec s = fma(from_int(whole[m][v]), set1(x[m]->scale[g]), set1(-offset * x[m]->sum[g]));
          sums[m][v] = fma(scale, s, sums[m][v]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(out + m * B * BLOCK + v * VL, sums[m][v]);
}

// The shapes of tiles, by what registers hold, of sums and of addresses. The fewer tokens, the more blocks: a sum has to wait for itself, and
// there have to be others in between; but each block is a stream of its own for the memory.
struct Tiling {
  int blocks, most_tokens;
};
static inline Tiling tiling(Kind kind, i64 tokens, i64 blocks) {
  constexpr bool wide = VL == 16;
  if (tokens == 1 && wide && blocks >= 8 && (kind == F32 || kind == BF16)) return {8, 1};
  if (tokens < 8 && blocks >= 4) return {4, wide ? 4 : 1};
  if (blocks >= 2) return {2, wide ? 8 : 2};
  return {1, wide ? 8 : 4};
}
constexpr int MOST_SUMS = 16 * BLOCK;  // of a tile

template <Kind K, int B, int M = 1>
static inline void run_tile(i64 tokens, const Matrix& w, i64 first, const Activation* const* x, float* out) {
  if (tokens == M) return tile<K, M, B>(w, first, x, out);
  if constexpr (M < (B == 8 ? 1 : B == 4 ? (VL == 16 ? 4 : 1) : VL == 16 ? 8 : B == 2 ? 2 : 4)) run_tile<K, B, M + 1>(tokens, w, first, x, out);
}

template <Kind K>
static void run_tiles(const Tiling& shape, i64 tokens, const Matrix& w, i64 first, const Activation* const* x, float* out) {
  switch (shape.blocks) {
    case 8: return run_tile<K, 8>(tokens, w, first, x, out);
    case 4: return run_tile<K, 4>(tokens, w, first, x, out);
    case 2: return run_tile<K, 2>(tokens, w, first, x, out);
    default: return run_tile<K, 1>(tokens, w, first, x, out);
  }
}

// Products of m tokens with the blocks [from, to): out(token, row, VL sums). A gate's block and its up's come one after the other.
template <class Out>
static inline void multiply(const Matrix& w, i64 from, i64 to, const Activation* const* x, i64 m, const Out& out) {
  alignas(64) float sums[MOST_SUMS];
  const auto run = w.kind == F32 ? run_tiles<F32> : w.kind == BF16 ? run_tiles<BF16> : w.kind == I8 ? run_tiles<I8> : run_tiles<I4>;
  for (i64 b = from; m > 0 && b < to;) {
    const Tiling shape = tiling(w.kind, m, to - b);
    const i64 parts = (m + shape.most_tokens - 1) / shape.most_tokens;  // of one size, as far as may be
    for (i64 part = 0; part < parts; part++) {
      const i64 first = m * part / parts, last = m * (part + 1) / parts;
      run(shape, last - first, w, b, x + first, sums);
      for (i64 t = first; t < last; t++)
        for (int v = 0; v < shape.blocks * PARTS; v++) out(t, b * BLOCK + v * VL, load(sums + ((t - first) * shape.blocks * PARTS + v) * VL));
    }
    b += shape.blocks;
  }
}
