// Guesses at the next tokens, looked up in what the text already says (prompt look-up decoding): after three tokens
// that stood together before often comes what came then, again and again where a text goes round in a circle. The model
// checks all guesses in one pass over its weights, so a right one costs next to nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "tokenizer.h"

namespace bitnet {

class Drafter {
 public:
  explicit Drafter(size_t max_length) : max_length_(max_length), length_(std::min(max_length, kFirstLength)) {}

  // At most `limit` tokens that may follow `history`; empty when nothing suggests any.
  std::vector<TokenId> propose(std::span<const TokenId> history, size_t limit) const;

  // What became of the last proposal that was not empty.
  void learn(size_t n_drafted, size_t n_accepted);

 private:
  static constexpr size_t kMatch = 3;  // tokens that must have stood together before
  static constexpr size_t kFirstLength = 2;

  size_t max_length_;
  size_t length_;  // of the next proposal: doubled when all was right, cut when not
};

enum class Guesses { kWhereTheyPay, kAlways };

// Whether guessing pays, in units of the time that a token takes without it: a fiftieth of all time may be lost. How
// much a guess costs depends on the processor and the model: next to nothing where memory is the bound, as much as a
// token where computing is.
class GuessBudget {
 public:
  // Whether a pass for so many texts may have guesses: not before one without has been timed.
  bool allows(size_t n_texts) const { return balance_ > 0.0 && n_texts == n_texts_; }
  // What a text's share of a pass for n_texts has taken, which gave it n_right tokens more than the one it would have
  // had without its guesses.
  void weigh(double seconds, size_t n_texts, size_t n_guesses, size_t n_right);

 private:
  static constexpr double kAllowance = 0.02, kFirst = 1.0, kMost = 4.0;
  double balance_ = kFirst;
  double plain_s_ = 0.0;  // a text's share of a pass for n_texts_ without guesses
  size_t n_texts_ = 0;
};

}  // namespace bitnet
