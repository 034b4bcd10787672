// From rows of numbers to the blocks of matrix.h; and from a token's numbers to its activation.
#pragma once
#include <algorithm>
#include <cmath>

#include "matrix.h"

static inline float from_half(uint16_t h) { return _cvtsh_ss(h); }
static inline float to_float(float x) { return x; }

// 32-bit lanes as numbers, for shifts and sums of bits.
using words = u32 __attribute__((vector_size(4 * VL)));
static inline words bits_of(vec v) { return (words)as_lanes(v); }
static inline words whole_of(vec v) { return (words)to_int(v); }
static inline void store_words(void* p, words w) { store_lanes(p, (lanes)w); }
#if defined(__AVX512F__)
static inline void store_half(uint16_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
static inline void store_half(uint16_t* p, vec v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#endif

static inline vec as_half(vec v) {
  uint16_t half[VL];
  store_half(half, v);
  return load_half(half);
}

// The nearest whole number in [low, high]; NaN gives low.
static inline vec on_grid(vec x, float low, float high) { return vmin(set1(high), vmax(round_to_int(x), set1(low))); }

// x / scale on the grid; 0 for a scale of 0.
static inline vec quantised(vec x, vec scale, float low, float high) { return scale == zero() ? zero() : on_grid(x / scale, low, high); }

static inline words rounded_to_bf16(vec v) {
  const words bits = bits_of(v), one = words{} + 1;
  return (bits & 0x7fffffff) > words{} + 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & one)) >> 16;
}

// A lane is a row of a block, as in matrix.h: x[c] are the values of VL rows in column c of a group.
using Group = vec[GROUP];

// The scales of one group of VL rows: for int8 the largest value becomes 127. For int4 19 grids are tried, from one that leaves room above the largest
// value to one that clips it, each with the scale that then fits best; the one with the least squared error is taken. Four at once: their sums do not
// wait for each other.
static inline vec scales_of_group(const Group& x, Kind kind) {
  vec top = zero(), signed_top = zero();
  for (const vec v : x) {
    const vec size = vmax(v, zero() - v);
    signed_top = size > top ? v : signed_top, top = size > top ? size : top;
  }
  if (kind == I8) return as_half(top / set1(127.0f));
  constexpr int AT_ONCE = 4;
  vec best = zero(), best_error = set1(INFINITY);
  for (float first = 6.5f; first <= 11.0f; first += 0.25f * AT_ONCE) {
    vec inverse[AT_ONCE], scale[AT_ONCE], product[AT_ONCE], square[AT_ONCE], error[AT_ONCE];
    for (int i = 0; i < AT_ONCE; i++) {
      inverse[i] = set1(-std::min(first + 0.25f * i, 11.0f)) / signed_top;
      product[i] = square[i] = error[i] = zero();
    }
    for (const vec v : x)
      for (int i = 0; i < AT_ONCE; i++) {
        const vec q = on_grid(v * inverse[i], -8.0f, 7.0f);
        product[i] = fma(v, q, product[i]), square[i] = fma(q, q, square[i]);
      }
    for (int i = 0; i < AT_ONCE; i++) scale[i] = as_half(product[i] / square[i]);
    for (const vec v : x)
      for (int i = 0; i < AT_ONCE; i++) {
        const vec left = fnma(on_grid(v / scale[i], -8.0f, 7.0f), scale[i], v);
        error[i] = fma(left, left, error[i]);
      }
    for (int i = 0; i < AT_ONCE; i++) {
      error[i] = scale[i] == zero() ? set1(INFINITY) : error[i];
      best = error[i] < best_error ? scale[i] : best, best_error = error[i] < best_error ? error[i] : best_error;
    }
  }
  return best;
}

// One group of VL rows from `lane` of a block on, as the units of this kind; `units`: the group's first of the block.
static inline void store_group(const Group& x, Kind kind, int lane, uint8_t* units, uint16_t* scales) {
  const auto unit = [&](int u, words w) { store_words(units + (u * BLOCK + lane) * 4, w); };
  if (kind == F32) {
    for (int c = 0; c < GROUP; c++) unit(c, bits_of(x[c]));
  } else if (kind == BF16) {
    for (int u = 0; u < GROUP / 2; u++) unit(u, rounded_to_bf16(x[2 * u]) | rounded_to_bf16(x[2 * u + 1]) << 16);
  } else {
    const vec scale = scales_of_group(x, kind);
    store_half(scales + lane, scale);
    words q[GROUP];
    for (int c = 0; c < GROUP; c++) q[c] = kind == I8 ? whole_of(quantised(x[c], scale, -127.0f, 127.0f)) + 128 : whole_of(quantised(x[c], scale, -8.0f, 7.0f)) + 8;
    if (kind == I4)
      for (int c = 0; c < GROUP / 2; c++) q[c] |= q[c + GROUP / 2] << 4;
    for (int u = 0; u < (kind == I8 ? 8 : 4); u++) unit(u, q[4 * u] | q[4 * u + 1] << 8 | q[4 * u + 2] << 16 | q[4 * u + 3] << 24);
  }
}

// Rows [row, row + 16) of a matrix [rows][true_columns], filled up with zeros, as a block.
template <class T>
static void pack_block(Kind kind, const T* source, i64 row, i64 rows, i64 true_columns, i64 columns, uint8_t* block, uint16_t* scales) {
  const i64 bytes = Matrix::bytes_of_block(kind, GROUP);
  for (i64 g = 0; g < columns / GROUP; g++) {
    float by_row[BLOCK][GROUP] = {};
    const i64 count = std::min<i64>(GROUP, true_columns - g * GROUP);
    for (i64 r = 0; r < std::min<i64>(BLOCK, rows - row); r++) {
      const T* from = source + (row + r) * true_columns + g * GROUP;
      if (count == GROUP)
        for (int c = 0; c < GROUP; c++) by_row[r][c] = to_float(from[c]);
      else
        for (i64 c = 0; c < count; c++) by_row[r][c] = to_float(from[c]);
    }
    for (int lane = 0; lane < BLOCK; lane += VL) {
      Group x;
      for (int c = 0; c < GROUP; c += VL) {
        lanes square[VL];
        for (int r = 0; r < VL; r++) square[r] = load_lanes(&by_row[lane + r][c]);
        transpose(square);
        for (int i = 0; i < VL; i++) x[c + i] = as_vec(square[i]);
      }
      store_group(x, kind, lane, block + g * bytes, scales + g * BLOCK);
    }
  }
}

// Value (row, column) as products see it.
static float unpacked(const Matrix& w, i64 row, i64 column) {
  const i64 block = row / BLOCK, r = row % BLOCK, g = column / GROUP, c = column % GROUP;
  const uint8_t* data = w.block(block);
  if (w.kind == F32) return ((const float*)data)[column * BLOCK + r];
  if (w.kind == BF16) return to_float(((const bf16*)data)[column / 2 * 2 * BLOCK + r * 2 + column % 2]);
  const float scale = from_half(w.block_scales(block)[g * BLOCK + r]);
  if (w.kind == I8) return scale * (float)((int)data[((g * 8 + c / 4) * BLOCK + r) * 4 + c % 4] - 128);
  const uint8_t byte = data[((g * 4 + c % 16 / 4) * BLOCK + r) * 4 + c % 4];
  return scale * (float)((c < 16 ? byte & 15 : byte >> 4) - 8);
}

// Memory of many activations of one width; each token's is filled by one thread.
struct Activations {
  i64 columns = 0;
  std::vector<float> exact, scale, sum;
  std::vector<bf16> rounded;
  std::vector<int8_t> quantised;
  std::vector<Activation> each;
  std::vector<const Activation*> pointers;

  void resize(i64 tokens, i64 wide) {
    columns = wide;
    if ((i64)each.size() < tokens || (i64)exact.size() < tokens * wide) {
      exact.resize(tokens * wide), rounded.resize(tokens * wide), quantised.resize(tokens * wide);
      scale.resize(tokens * wide / GROUP), sum.resize(tokens * wide / GROUP);
      each.resize(tokens), pointers.resize(tokens);
    }
    for (i64 t = 0; t < tokens; t++) {
      each[t] = {&exact[t * wide], &rounded[t * wide], &quantised[t * wide], &scale[t * wide / GROUP], &sum[t * wide / GROUP]};
      pointers[t] = &each[t];
    }
  }
  float* values(i64 token) { return &exact[token * columns]; }

  // Columns [from, to), multiples of GROUP: from exact values to what products of this kind read.
  void prepare(i64 token, Kind kind, i64 from, i64 to) {
    const i64 start = token * columns;
    if (kind == BF16) {
#ifdef HAS_BF16
      for (i64 c = start + from; c < start + to; c += VL) store(&rounded[c], load(&exact[c]));
#endif
    } else if (kind == I8 || kind == I4) {
      for (i64 c = start + from; c < start + to; c += GROUP) quantise(&exact[c], &quantised[c], scale[c / GROUP], sum[c / GROUP]);
    }
  }
  void prepare(i64 token, Kind kind) { prepare(token, kind, 0, columns); }

  static void quantise(const float* x, int8_t* q, float& scale, float& sum) {
    vec top = zero();
    for (int c = 0; c < GROUP; c += VL) top = vmax(top, vmax(load(x + c), zero() - load(x + c)));
    const float largest = maximum(top);
    scale = largest / 127.0f;
    const vec inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    int total = 0;
    for (int c = 0; c < GROUP; c += VL) {
      const lanes whole = to_int(load(x + c) * inverse);
      store_bytes(q + c, whole);
      total += sum_lanes(whole);
    }
    sum = scale * (float)total;
  }
};
