// Routed SwiGLU experts, forward and backward. (token, slot) pairs come sorted by expert; no padding, no capacity.
//
// A part is a run of pairs of one expert: its weights are packed once, one thread computes it. Experts with many tokens are cut
// into several parts, so that a router that sends everything to one expert still keeps all cores busy. Parts of one expert keep
// their weight gradients apart and are added in order: same input, same bits, at a fixed number of threads.
#pragma once
#include <omp.h>

#include <cstring>

#include "gemm.h"
#include "scratch.h"

template <class T, class W>
struct Experts {
  i64 tokens, k, experts, hidden, width;
  const T* x;               // [tokens, hidden]
  const i32* order;         // [tokens * k] pair (token * k + slot) at each sorted place
  const i64* ends;          // [experts] sorted place after each expert's last pair
  const float* weights;     // [tokens, k]
  const W* gate;            // [hidden] rows: expert e, row f at gate + e * gate_stride + f * hidden
  const W* up;
  const W* down;            // [experts, hidden, width]
  i64 gate_stride;
};

struct Part {
  i64 expert, first, last;
  int turn;                 // 0 for the first part of its expert
};

static inline std::vector<Part> cut_into_parts(const i64* ends, i64 experts, i64 most) {
  std::vector<Part> parts;
  i64 first = 0;
  for (i64 e = 0; e < experts; e++) {
    const i64 count = ends[e] - first, pieces = std::max<i64>(1, (count + most - 1) / most);
    for (i64 p = 0; p < pieces; p++) parts.push_back({e, first + count * p / pieces, first + count * (p + 1) / pieces, (int)p});
    first = ends[e];
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.last - a.first > b.last - b.first; });
  return parts;
}

// out[t] = sum of the k rows of token t, in order, in fp32
template <class T>
static void add_slots(const T* rows, i64 tokens, i64 k, i64 hidden, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 t = 0; t < tokens; t++)
    for (i64 c = 0; c < hidden; c += VL) {
      vec s = load(rows + t * k * hidden + c);
      for (i64 j = 1; j < k; j++) s = s + load(rows + (t * k + j) * hidden + c);
      store(out + t * hidden + c, s);
    }
}

constexpr i64 FORWARD_BLOCK = 256, BACKWARD_BLOCK = 512;

// gate_up: [pairs in sorted order][width / VL][gate VL | up VL] before SiLU, kept for the backward, or null.
template <class T, class W>
static void experts_forward(const Experts<T, W>& p, T* gate_up, T* out, int threads) {
  const i64 d = p.hidden, f = p.width, pairs = p.tokens * p.k;
  const auto parts = cut_into_parts(p.ends, p.experts, std::max<i64>(2 * FORWARD_BLOCK, pairs / (4 * threads) + 1));
  T* slots = p.k == 1 ? out : (T*)shared_buffer().grow(pairs * d * sizeof(T));
#pragma omp parallel num_threads(threads)
  {
    const i64 ud = units_of<T>(d), uf = units_of<T>(f);
    Scratch scratch(thread_buffer(), (2 * f * ud + d * uf) * 4 + FORWARD_BLOCK * (f * sizeof(T) + 4 * sizeof(void*)) + 1024);
    u32 *packed_gate_up = scratch.take<u32>(2 * f * ud), *packed_down = scratch.take<u32>(d * uf);
    T* activation = scratch.take<T>(FORWARD_BLOCK * f);
    const T **x_row = scratch.take<const T*>(FORWARD_BLOCK), **a_row = scratch.take<const T*>(FORWARD_BLOCK);
    T** y_row = scratch.take<T*>(FORWARD_BLOCK);
    for (i64 i = 0; i < FORWARD_BLOCK; i++) a_row[i] = activation + i * f;
#pragma omp for schedule(dynamic, 1)
    for (size_t n = 0; n < parts.size(); n++) {
      const i64 e = parts[n].expert, part_first = parts[n].first, part_last = parts[n].last;
      if (part_first == part_last) continue;
      for (i64 c = 0; c < f; c += VL) {
        pack_columns<T>(p.gate + e * p.gate_stride + c * d, d, d, packed_gate_up + c / VL * ud * NR);
        pack_columns<T>(p.up + e * p.gate_stride + c * d, d, d, packed_gate_up + c / VL * ud * NR + VL);
      }
      pack_transposed<T>(p.down + e * d * f, f, d, f, packed_down);
      for (i64 first = part_first; first < part_last; first += FORWARD_BLOCK) {
        const i64 m = std::min(FORWARD_BLOCK, part_last - first);
        for (i64 i = 0; i < m; i++) {
          const i64 pair = p.order[first + i];
          x_row[i] = p.x + pair / p.k * d;
          y_row[i] = slots + pair * d;
        }
        gemm<T>(x_row, m, packed_gate_up, 2 * f, ud, [&](i64 i, i64 c, vec gate, vec up) {
          if (gate_up) {
            T* kept = gate_up + (first + i) * 2 * f + c;
            store(kept, gate);
            store(kept + VL, up);
          }
          store(activation + i * f + c / 2, gate * sigmoid(gate) * up * set1(p.weights[p.order[first + i]]));
        });
        gemm<T>(a_row, m, packed_down, d, uf, [&](i64 i, i64 c, vec left, vec right) {
          store(y_row[i] + c, left);
          store(y_row[i] + c + VL, right);
        });
      }
    }
  }
  if (p.k > 1) add_slots(slots, p.tokens, p.k, d, out, threads);
}

template <class W>
struct ExpertGrads {
  W *gate, *up, *down;      // laid out like the weights
  float* weights;           // [tokens, k]
};

static inline void add_to(float* to, vec v, bool first) { store(to, first ? v : load(to) + v); }

// What a backward part works with; one of them a thread.
template <class T>
struct BackwardScratch {
  u32 *down, *gate_up, *x, *grad_y, *grad_gate_up, *activation_panels;
  T *activation, *grad_hidden;
  const T **x_row, **grad_y_row, **grad_row, **activation_row;
  T** grad_x_row;
  float* weight_grad;       // [block][VL] partial sums of the routing weights' gradients
  float* sums;              // [3 * hidden * width] weight gradients when they cannot be added up in place
  BackwardScratch(Buffer& buffer, i64 d, i64 f, i64 block, bool own_sums) : BackwardScratch(Scratch(buffer, bytes(d, f, block, own_sums)), d, f, block, own_sums) {}

 private:
  static size_t bytes(i64 d, i64 f, i64 block, bool own_sums) {
    return 4 * (3 * d * f + (block + 2) * (2 * d + 3 * f)) + 4 * block * (3 * f) + 5 * 8 * block + 4 * VL * block + (own_sums ? 12 * d * f : 0) + 64 * 16;
  }
  BackwardScratch(Scratch s, i64 d, i64 f, i64 block, bool own_sums) {
    down = s.take<u32>(units_of<T>(d) * f), gate_up = s.take<u32>(units_of<T>(2 * f) * d);
    const i64 u = units_of<T>(block) + 1;
    x = s.take<u32>(u * d), grad_y = s.take<u32>(u * d), grad_gate_up = s.take<u32>(u * 2 * f), activation_panels = s.take<u32>(u * f);
    activation = s.take<T>(block * f), grad_hidden = s.take<T>(block * 2 * f);
    x_row = s.take<const T*>(block), grad_y_row = s.take<const T*>(block), grad_row = s.take<const T*>(block), activation_row = s.take<const T*>(block);
    grad_x_row = s.take<T*>(block);
    weight_grad = s.take<float>(block * VL);
    sums = own_sums ? s.take<float>(3 * d * f) : nullptr;
    for (i64 i = 0; i < block; i++) grad_row[i] = grad_hidden + i * 2 * f, activation_row[i] = activation + i * f;
  }
};

// Gradients of one block of pairs [first, first + m) of expert e; weight gradients go to fp32 arrays, added unless `fresh`.
// Columns of grad_hidden are in the order of gate_up: VL gates, then their VL ups.
template <class T, class W>
static inline void experts_backward_block(const Experts<T, W>& p, const BackwardScratch<T>& s, const T* gate_up, const T* grad_out, T* grad_slots, i64 first, i64 m,
                                          float* grad_gate, float* grad_up, float* grad_down, float* grad_weights, bool fresh) {
  const i64 d = p.hidden, f = p.width;
  for (i64 i = 0; i < m; i++) {
    const i64 pair = p.order[first + i];
    s.x_row[i] = p.x + pair / p.k * d;
    s.grad_y_row[i] = grad_out + pair / p.k * d;
    s.grad_x_row[i] = grad_slots + pair * d;
  }
  gemm<T>(s.grad_y_row, m, s.down, f, units_of<T>(d), [&](i64 i, i64 c, vec left, vec right) {
    const vec weight = set1(p.weights[p.order[first + i]]);
    vec of_weight = c == 0 ? zero() : load(s.weight_grad + i * VL);
    for (int half = 0; half < 2; half++) {
      const T* kept = gate_up + (first + i) * 2 * f + 2 * (c + half * VL);
      T* grad = s.grad_hidden + i * 2 * f + 2 * (c + half * VL);
      const vec gate = load(kept), up = load(kept + VL), s1 = sigmoid(gate), silu = gate * s1, product = silu * up, g = half ? right : left;
      of_weight = fma(g, product, of_weight);
      store(s.activation + i * f + c + half * VL, product * weight);
      const vec weighted = g * weight;
      store(grad, weighted * up * fma(silu, set1(1.0f) - s1, s1));
      store(grad + VL, weighted * silu);
    }
    store(s.weight_grad + i * VL, of_weight);
  });
  for (i64 i = 0; i < m; i++) grad_weights[p.order[first + i]] = sum(load(s.weight_grad + i * VL));
  gemm<T>(s.grad_row, m, s.gate_up, d, units_of<T>(2 * f), [&](i64 i, i64 c, vec left, vec right) {
    store(s.grad_x_row[i] + c, left);
    store(s.grad_x_row[i] + c + VL, right);
  });
  const i64 u = units_of<T>(m);
  pack_rows<T, NR>([&](i64 i) { return s.x_row[i]; }, m, d, u, s.x);
  pack_rows<T, VL>([&](i64 i) { return s.grad_row[i]; }, m, 2 * f, u, s.grad_gate_up);
  gemm_transposed<T>(s.grad_gate_up, 2 * f, s.x, d, u, [&](i64 i, i64 c, vec left, vec right) {
    float* to = (i / VL % 2 ? grad_up : grad_gate) + (i / NR * VL + i % VL) * d + c;
    add_to(to, left, fresh);
    add_to(to + VL, right, fresh);
  });
  pack_rows<T, VL>([&](i64 i) { return s.grad_y_row[i]; }, m, d, u, s.grad_y);
  pack_rows<T, NR>([&](i64 i) { return s.activation_row[i]; }, m, f, u, s.activation_panels);
  gemm_transposed<T>(s.grad_y, d, s.activation_panels, f, u, [&](i64 i, i64 c, vec left, vec right) {
    add_to(grad_down + i * f + c, left, fresh);
    add_to(grad_down + i * f + c + VL, right, fresh);
  });
}

template <class W>
static inline void write_out(const float* from, i64 count, W* to) {
  for (i64 i = 0; i < count; i += VL) store(to + i, load(from + i));
}

template <class T, class W>
static void experts_backward(const Experts<T, W>& p, const T* gate_up, const T* grad_out, T* grad_x, const ExpertGrads<W>& grads, int threads) {
  const i64 d = p.hidden, f = p.width, pairs = p.tokens * p.k, weights = 3 * d * f;
  // Each part beyond the first of its expert needs weight gradients of its own: a dense layer gets one part a thread.
  const i64 per_thread = p.experts == 1 ? 1 : 4;
  auto parts = cut_into_parts(p.ends, p.experts, std::max<i64>(2 * BACKWARD_BLOCK, pairs / (per_thread * threads) + 1));
  // Sums of later parts of an expert, [extra part][3 * hidden * width], are added to the first part's afterwards.
  std::vector<i64> extra(parts.size(), -1);
  i64 extras = 0;
  std::vector<i64> pieces(p.experts, 1);
  for (size_t n = 0; n < parts.size(); n++) pieces[parts[n].expert] = std::max<i64>(pieces[parts[n].expert], parts[n].turn + 1);
  constexpr bool in_place = std::is_same_v<W, float>;
  for (size_t n = 0; n < parts.size(); n++)
    if (parts[n].turn > 0 || (!in_place && pieces[parts[n].expert] > 1)) extra[n] = extras++;
  const size_t slot_bytes = p.k == 1 ? 0 : ((size_t)pairs * d * sizeof(T) + 63) / 64 * 64;
  char* shared = (char*)shared_buffer().grow(slot_bytes + extras * weights * 4 + 64);
  T* grad_slots = p.k == 1 ? grad_x : (T*)shared;
  float* extra_sums = (float*)(shared + slot_bytes);
#pragma omp parallel num_threads(threads)
  {
    const BackwardScratch<T> s(thread_buffer(), d, f, BACKWARD_BLOCK, !in_place);
#pragma omp for schedule(dynamic, 1)
    for (size_t n = 0; n < parts.size(); n++) {
      const i64 e = parts[n].expert, part_first = parts[n].first, part_last = parts[n].last;
      W *gate = grads.gate + e * p.gate_stride, *up = grads.up + e * p.gate_stride, *down = grads.down + e * d * f;
      if (part_first == part_last) {
        std::memset((void*)gate, 0, f * d * sizeof(W));
        std::memset((void*)up, 0, f * d * sizeof(W));
        std::memset((void*)down, 0, f * d * sizeof(W));
        continue;
      }
      pack_rows<T, NR>([&](i64 i) { return p.down + e * d * f + i * f; }, d, f, units_of<T>(d), s.down);
      pack_rows<T, NR>([&](i64 i) { return (i / VL % 2 ? p.up : p.gate) + e * p.gate_stride + (i / NR * VL + i % VL) * d; }, 2 * f, d, units_of<T>(2 * f), s.gate_up);
      float *to_gate, *to_up, *to_down;
      bool own = true;
      if constexpr (in_place) own = extra[n] >= 0;
      if (own) {
        float* base = extra[n] >= 0 ? extra_sums + extra[n] * weights : s.sums;
        to_gate = base, to_up = base + f * d, to_down = base + 2 * f * d;
      } else {
        to_gate = (float*)gate, to_up = (float*)up, to_down = (float*)down;
      }
      for (i64 first = part_first; first < part_last; first += BACKWARD_BLOCK)
        experts_backward_block(p, s, gate_up, grad_out, grad_slots, first, std::min(BACKWARD_BLOCK, part_last - first), to_gate, to_up, to_down, grads.weights,
                               first == part_first);
      if (!in_place && extra[n] < 0) write_out(to_gate, f * d, gate), write_out(to_up, f * d, up), write_out(to_down, f * d, down);
    }
    // parts of one expert, in order; threads split the rows
    for (i64 e = 0; e < p.experts; e++) {
      if (pieces[e] == 1) continue;
      std::vector<const float*> sums;
      for (int turn = 0; turn < pieces[e]; turn++)
        for (size_t n = 0; n < parts.size(); n++)
          if (parts[n].expert == e && parts[n].turn == turn && extra[n] >= 0) sums.push_back(extra_sums + extra[n] * weights);
#pragma omp for schedule(static)
      for (i64 i = 0; i < weights; i += VL) {
        W* to = i < f * d ? grads.gate + e * p.gate_stride + i : i < 2 * f * d ? grads.up + e * p.gate_stride + i - f * d : grads.down + e * d * f + i - 2 * f * d;
        vec v;
        if constexpr (in_place) v = load((const float*)to);
        else v = zero();
        for (const float* part : sums) v = v + load(part + i);
        store(to, v);
      }
    }
  }
  if (p.k > 1) add_slots(grad_slots, p.tokens, p.k, d, grad_x, threads);
}
