// The engine's C functions. Kinds of weights: 0 = fp32, 1 = bf16, 2 = int8, 3 = int4; of the cache: 0 = fp32, 1 = bf16.
#pragma once
#include "guess.h"

struct Engine {
  Model model;
  Guesser guesser;
  bool cache_is_bf16;
  void *keys = nullptr, *values = nullptr;
  i64 pages = 0;
  Engine(const Shape& shape, int threads, bool cache_is_bf16) : model(shape, threads), cache_is_bf16(cache_is_bf16) {}
};

EXPORT void sparseling_engine_create(const i64* sizes, float eps, float routed_scale, i64 threads, i64 cache_kind, Engine** made) {
  const i64* s = sizes;
  *made = new Engine({s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], eps, routed_scale}, (int)threads, cache_kind == 1);
}

EXPORT void sparseling_engine_destroy(Engine* engine) { delete engine; }

// `slot` counts the matrices of a layer as Layer has them; layer -1 has the head and the MTP layer's projection.
EXPORT void sparseling_engine_set_matrix(Engine* engine, i64 layer, i64 slot, i64 kind, i64 rows, i64 columns, const void* data, const void* scales) {
  const Matrix matrix{(Kind)kind, rows, columns, (const uint8_t*)data, (const uint16_t*)scales};
  if (layer < 0) {
    (slot == 0 ? engine->model.head : engine->model.door.projection) = matrix;
    return;
  }
  Layer& l = engine->model.layers[layer];
  Matrix* const slots[] = {&l.query_key_value, &l.dense, &l.router, &l.gate_up, &l.down, &l.shared_gate_up, &l.shared_down};
  *slots[slot] = matrix;
}

// Likewise the vectors, fp32. Layer -1: the final norm, cosines, sines, and three norms of the MTP layer.
EXPORT void sparseling_engine_set_vector(Engine* engine, i64 layer, i64 slot, const float* data) {
  if (layer < 0) {
    Model& m = engine->model;
    const float** const slots[] = {&m.final_norm, &m.cosine, &m.sine, &m.door.embedding_norm, &m.door.hidden_norm, &m.ahead_norm};
    *slots[slot] = data;
    return;
  }
  Layer& l = engine->model.layers[layer];
  const float** const slots[] = {&l.input_norm, &l.post_norm, &l.query_norm, &l.key_norm, &l.expert_bias, &l.query_key_value_bias, &l.dense_bias};
  *slots[slot] = data;
}

EXPORT void sparseling_engine_set_embedding(Engine* engine, i64 kind, const void* data) {
  engine->model.embedding = data, engine->model.embedding_is_bf16 = kind == 1;
}

// Steps from now on are computed by so many of the engine's threads.
EXPORT void sparseling_engine_use_threads(Engine* engine, i64 threads) { engine->model.use_threads((int)threads); }

EXPORT void sparseling_engine_set_cache(Engine* engine, i64 pages, void* keys, void* values) {
  engine->pages = pages, engine->keys = keys, engine->values = values;
}

// Whether a request stays within the model's tables and the cache: its arrays are read without looking afterwards.
static inline bool fits(const Engine& engine, const Request& ask, i64 sequences, i64 most_positions) {
  for (i64 r = 0; r < ask.n; r++) {
    const i64 s = ask.sequences[r], p = ask.positions[r];
    if (ask.tokens[r] < 0 || ask.tokens[r] >= engine.model.shape.vocab || s < 0 || s >= sequences || p < 0 || p >= most_positions || p / PAGE >= ask.most_pages) return false;
    for (i64 page = 0; page <= p / PAGE; page++)
      if (ask.tables[s * ask.most_pages + page] < 0 || ask.tables[s * ask.most_pages + page] >= engine.pages) return false;
  }
  for (i64 i = 0; i < ask.wanted_count; i++)
    if (ask.wanted[i] < 0 || ask.wanted[i] >= ask.n) return false;
  return ask.wanted_count <= ask.n && (!ask.previous || engine.model.shape.ahead);
}

template <class Body>
static inline void with_cache(const Engine& engine, const Body& body) {
  if (engine.cache_is_bf16) body(Cache<bf16>{(bf16*)engine.keys, (bf16*)engine.values, engine.pages});
  else body(Cache<float>{(float*)engine.keys, (float*)engine.values, engine.pages});
}

// `done`: 1, or 0 for a request that does not fit, of which nothing is computed.
EXPORT void sparseling_engine_step(Engine* engine, i64 n, const i64* tokens, const i64* positions, const i64* sequences, i64 sequence_count, i64 most_positions,
                                   i64 most_pages, const i32* tables, i64 wanted_count, const i64* wanted, const float* previous, float* logits, float* hidden,
                                   i32* expert_ids, float* expert_weights, float* expert_scores, i64* done) {
  const Request ask{n,      most_pages, wanted_count, tokens,         positions,     sequences, wanted, tables, previous,
                    logits, hidden,     expert_ids,   expert_weights, expert_scores, nullptr,   engine->model.head.rows / BLOCK};
  *done = fits(*engine, ask, sequence_count, most_positions);
  if (*done) with_cache(*engine, [&](const auto& cache) { engine->model.step(cache, ask); });
}

// As a step with `previous`, and then, for each wanted row i, up to rooms[i] of `drafts` guesses, one from the other: guesses [wanted][drafts].
// Their positions have to lie within the tables. `blocks`: ascending blocks of the head that guesses are chosen from.
EXPORT void sparseling_engine_guess(Engine* engine, i64 n, const i64* tokens, const i64* positions, const i64* sequences, i64 sequence_count, i64 most_positions,
                                    i64 most_pages, const i32* tables, i64 wanted_count, const i64* wanted, const float* previous, const i64* rooms, i64 drafts,
                                    i64 block_count, const i64* blocks, i64* guesses, i64* done) {
  const Request ask{n,       most_pages, wanted_count, tokens,  positions, sequences, wanted, tables, previous,
                    nullptr, nullptr,    nullptr,      nullptr, nullptr,   blocks,    block_count};
  *done = fits(*engine, ask, sequence_count, most_positions);
  for (i64 i = 0; *done && i < wanted_count; i++) {
    const i64 last = positions[wanted[i]] + rooms[i] - 1, *row = &sequences[wanted[i]];
    *done = rooms[i] >= 1 && rooms[i] <= drafts && last < most_positions && last / PAGE < most_pages;
    for (i64 page = 0; *done && page <= last / PAGE; page++) *done = tables[*row * most_pages + page] >= 0 && tables[*row * most_pages + page] < engine->pages;
  }
  *done = *done && block_count > 0;
  for (i64 b = 0; *done && b < block_count; b++)
    *done = blocks[b] >= 0 && blocks[b] < engine->model.head.rows / BLOCK && (b == 0 || blocks[b] > blocks[b - 1]);
  if (*done) with_cache(*engine, [&](const auto& cache) { engine->guesser.run(engine->model, cache, ask, rooms, drafts, guesses); });
}

// rows [rows][true columns] of fp32 (0) or bf16 (1) into every `step`th block from `data` and `scales` on, threads sharing them; `scales` only for int8
// and int4. A step of 2 leaves room for the blocks of another matrix in between.
EXPORT void sparseling_engine_pack(i64 threads, i64 kind, i64 rows, i64 true_columns, i64 columns, i64 step, i64 source_kind, const void* source, void* data,
                                   void* scales) {
  const i64 bytes = Matrix::bytes_of_block((Kind)kind, columns), scales_of_block = columns / GROUP * BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 block = 0; block < (rows + BLOCK - 1) / BLOCK; block++) {
    uint8_t* const to = (uint8_t*)data + block * step * bytes;
    uint16_t* const to_scales = (uint16_t*)scales + block * step * scales_of_block;
    if (source_kind == 1) pack_block((Kind)kind, (const bf16*)source, block * BLOCK, rows, true_columns, columns, to, to_scales);
    else pack_block((Kind)kind, (const float*)source, block * BLOCK, rows, true_columns, columns, to, to_scales);
  }
}

// The other way: fp32 [rows][columns] as products see them.
EXPORT void sparseling_engine_unpack(i64 threads, i64 kind, i64 rows, i64 columns, const void* data, const void* scales, float* out) {
  const Matrix matrix{(Kind)kind, rows, columns, (const uint8_t*)data, (const uint16_t*)scales};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 r = 0; r < rows; r++)
    for (i64 c = 0; c < columns; c++) out[r * columns + c] = unpacked(matrix, r, c);
}
