// Guesses of the tokens to come: the MTP layer, then the MTP layer on its own guess, and so on.
#pragma once
#include "model.h"

// The first of the largest of x [n].
static inline i64 place_of_largest(const float* x, i64 n) {
  vec most = set1(-INFINITY);
  i64 i = 0;
  for (; i + VL <= n; i += VL) most = vmax(most, load(x + i));
  float top = maximum(most);
  for (; i < n; i++) top = std::max(top, x[i]);
  for (i = 0; i < n - 1 && x[i] != top; i++) {
  }
  return i;
}

class Guesser {
 public:
  // guesses [wanted][drafts]: the likeliest words of the head's blocks, rooms[i] of them for wanted row i.
  template <class C>
  void run(Model& model, const Cache<C>& cache, Request ask, const i64* rooms, i64 drafts, i64* guesses) {
    const i64 count = ask.wanted_count, hidden = model.shape.hidden, words = ask.head_block_count * BLOCK;
    logits.resize(std::max<i64>(1, count) * words);
    before.resize(count * hidden), going.resize(count), tokens.resize(count), positions.resize(count), sequences.resize(count), wanted.resize(count);
    for (i64 i = 0; i < count; i++) going[i] = i;
    for (i64 depth = 0;; depth++) {
      states.resize(ask.n * hidden);
      ask.hidden = states.data(), ask.logits = logits.data();
      model.step(cache, ask);
      i64 left = 0;
      for (i64 i = 0; i < ask.wanted_count; i++) {
        const i64 at = going[i], row = ask.wanted[i], word = likeliest(ask, i, model.shape.vocab), position = ask.positions[row] + 1, sequence = ask.sequences[row];
        guesses[at * drafts + depth] = word;
        if (depth + 1 >= rooms[at]) continue;
        std::copy(ask.hidden + row * hidden, ask.hidden + (row + 1) * hidden, &before[left * hidden]);
        going[left] = at, tokens[left] = word, positions[left] = position, sequences[left] = sequence;
        left++;
      }
      if (left == 0) return;
      for (i64 i = 0; i < left; i++) wanted[i] = i;
      ask.previous = before.data();
      ask.n = ask.wanted_count = left;
      ask.tokens = tokens.data(), ask.positions = positions.data(), ask.sequences = sequences.data(), ask.wanted = wanted.data();
    }
  }

 private:
  std::vector<float> logits, states, before;
  std::vector<i64> going, tokens, positions, sequences, wanted;

  // The head is filled up with rows of zeros: words beyond the vocabulary, in its last block.
  static i64 likeliest(const Request& ask, i64 row, i64 vocab) {
    const i64 last = ask.head_blocks[ask.head_block_count - 1], beyond = std::max<i64>(0, (last + 1) * BLOCK - vocab);
    const i64 place = place_of_largest(ask.logits + row * ask.head_block_count * BLOCK, ask.head_block_count * BLOCK - beyond);
    return ask.head_blocks[place / BLOCK] * BLOCK + place % BLOCK;
  }
};
