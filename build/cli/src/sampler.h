// From logits to a token, as llama.cpp's samplers do it and in its order: penalties, top-k, top-p, min-p, temperature,
// draw.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "tokenizer.h"
#include "transformer.h"

namespace bitnet {

struct SamplingParams {
  float temperature = 0.8f;  // 0: greedy
  int32_t top_k = 40;        // 0: the whole vocabulary
  float top_p = 0.95f;       // 1: off
  float min_p = 0.05f;       // 0: off
  float repeat_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t repeat_last_n = 64;  // window of the three penalties; −1: everything, 0: off
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingParams& params) : params_(params), random_(params.seed) {}

  // How many of the largest logits are enough to draw from; 0: it takes all of them, because a penalty can lift a token
  // from outside.
  size_t candidates_wanted() const;

  // From the best candidates (best first, as many as wanted).
  TokenId sample(std::span<const Candidate> best);

  // From all logits, (n_vocab), which are used up; −∞: never. `history` is the prompt and what was generated after it.
  // Equal logits: the lower id wins.
  TokenId sample(std::span<float> logits, std::span<const TokenId> history);

 private:
  static constexpr int32_t kMaxScreenedTopK = 100;

  bool penalises() const;
  void penalise(std::span<float> logits, std::span<const TokenId> history) const;
  TokenId draw();

  SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<Candidate> candidates_;  // best first
  std::vector<double> weights_;
};

}  // namespace bitnet
