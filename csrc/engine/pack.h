// From rows of numbers to the blocks of matrix.h; and from a token's numbers to its activation.
#pragma once
#include <algorithm>
#include <cmath>

#include "matrix.h"

static inline uint16_t to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
static inline float from_half(uint16_t h) { return _cvtsh_ss(h); }

// The nearest whole number of a 4-bit grid.
static inline float on_grid(float x) { return std::min(7.0f, std::max(-8.0f, std::nearbyint(x))); }

// The scale of one group of a row: for int8 the largest value becomes 127. For int4 some grids are tried, from one that leaves room above the largest
// value to one that clips it, each with the scale that then fits best; the one with the least squared error is taken.
static inline float scale_of_group(const float* x, Kind kind, uint16_t* half) {
  float top = 0.0f, signed_top = 0.0f;
  for (int c = 0; c < GROUP; c++)
    if (std::fabs(x[c]) > top) top = std::fabs(x[c]), signed_top = x[c];
  if (kind == I8 || top == 0.0f) {
    *half = to_half(top / 127.0f);
    return from_half(*half);
  }
  float best = 0.0f, best_error = INFINITY;
  for (float steps = 6.5f; steps <= 11.0f; steps += 0.25f) {
    const float inverse = -steps / signed_top;
    float product = 0.0f, square = 0.0f, error = 0.0f;
    for (int c = 0; c < GROUP; c++) {
      const float q = on_grid(x[c] * inverse);
      product += x[c] * q, square += q * q;
    }
    const float scale = from_half(to_half(product / square));
    if (scale == 0.0f) continue;
    for (int c = 0; c < GROUP; c++) {
      const float left = x[c] - on_grid(x[c] / scale) * scale;
      error += left * left;
    }
    if (error < best_error) best = scale, best_error = error;
  }
  *half = to_half(best);
  return best;
}

// Rows [16 * block, 16 * block + 16) of a matrix of `rows` true rows and `true_columns`, row r given by read(r, c); the rest is zero.
template <class Read>
static void pack_block(Kind kind, i64 block, i64 rows, i64 true_columns, i64 columns, const Read& read, uint8_t* data, uint16_t* scales) {
  data += block * Matrix::bytes_of_block(kind, columns);
  for (int r = 0; r < BLOCK; r++) {
    const i64 row = block * BLOCK + r;
    const auto value = [&](i64 c) { return row < rows && c < true_columns ? read(row, c) : 0.0f; };
    for (i64 g = 0; g < columns / GROUP; g++) {
      float x[GROUP];
      for (int c = 0; c < GROUP; c++) x[c] = value(g * GROUP + c);
      if (kind == F32 || kind == BF16) {
        for (int c = 0; c < GROUP; c++) {
          const i64 column = g * GROUP + c;
          if (kind == F32) ((float*)data)[column * BLOCK + r] = x[c];
          else ((bf16*)data)[column / 2 * 2 * BLOCK + r * 2 + column % 2] = to_bf16(x[c]);
        }
        continue;
      }
      const float scale = scale_of_group(x, kind, scales + (block * (columns / GROUP) + g) * BLOCK + r);
      for (int c = 0; c < GROUP; c++) {
        const float q = scale == 0.0f ? 0.0f : std::nearbyint(x[c] / scale);
        if (kind == I8) {
          data[((g * 8 + c / 4) * BLOCK + r) * 4 + c % 4] = (uint8_t)(128 + (int)std::min(127.0f, std::max(-127.0f, q)));
        } else {
          uint8_t& byte = data[((g * 4 + c % 16 / 4) * BLOCK + r) * 4 + c % 4];
          const uint8_t nibble = (uint8_t)(8 + (int)std::min(7.0f, std::max(-8.0f, q)));
          byte = c < 16 ? (uint8_t)((byte & 0xf0) | nibble) : (uint8_t)((byte & 0x0f) | nibble << 4);
        }
      }
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
