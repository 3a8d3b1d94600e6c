// Guesses at the next tokens, looked up in what the text already says (prompt look-up decoding): after three tokens
// that stood together before often comes what came then, again and again where a text goes round in a circle. The model
// checks all guesses in one pass over its weights, so a right one costs next to nothing.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "tokenizer.h"

namespace bitnet {

class Drafter {
 public:
  explicit Drafter(size_t max_length) : max_length_(max_length), length_(max_length) {}

  // At most `limit` tokens that may follow `history`; empty when nothing suggests any, or guessing has not paid lately.
  std::vector<TokenId> propose(std::span<const TokenId> history, size_t limit);

  // What became of the last proposal that was not empty.
  void learn(size_t n_drafted, size_t n_accepted);

 private:
  static constexpr size_t kMatch = 3;      // tokens that must have stood together before
  static constexpr size_t kMaxPause = 64;  // tokens without a guess after repeated misses

  size_t max_length_;
  size_t length_;      // of the next proposal: doubled when all was right, cut when not
  size_t misses_ = 0;  // proposals in a row of which nothing was right
  size_t pause_ = 0;
};

}  // namespace bitnet
