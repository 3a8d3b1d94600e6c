// From logits to a token, by llama.cpp's samplers and, unless told otherwise, in its order.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "candidate.h"
#include "dry.h"
#include "tokenizer.h"

namespace bitnet {

enum class SamplerStage { kPenalties, kDry, kTopNSigma, kTopK, kTypicalP, kTopP, kMinP, kXtc, kTemperature };
inline constexpr size_t kSamplerStages = 9;
std::string_view name_of(SamplerStage stage);

struct LogitBias {
  TokenId token;
  float bias;
};

constexpr double kLeastRepeatPenalty = 1e-9;  // less could make numbers of logits that are none

struct SamplingParams {
  std::vector<SamplerStage> samplers = {SamplerStage::kPenalties, SamplerStage::kDry,      SamplerStage::kTopNSigma,
                                        SamplerStage::kTopK,      SamplerStage::kTypicalP, SamplerStage::kTopP,
                                        SamplerStage::kMinP,      SamplerStage::kXtc,      SamplerStage::kTemperature};
  std::vector<LogitBias> logit_bias;  // added before everything else; of one token several add up
  float repeat_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t repeat_last_n = 64;   // window of the three penalties; −1: everything, 0: off
  float dry_multiplier = 0.0f;  // 0: off
  float dry_base = 1.75f;
  int32_t dry_allowed_length = 2;
  int32_t dry_penalty_last_n = -1;                  // −1: everything, 0: off
  std::shared_ptr<const DryBreakers> dry_breakers;  // nullptr: none
  float top_n_sigma = -1.0f;                        // not above 0: off
  int32_t top_k = 40;                               // 0: the whole vocabulary
  float typical_p = 1.0f;                           // 1: off
  float top_p = 0.95f;                              // 1: off
  float min_p = 0.05f;                              // 0: off
  int32_t min_keep = 0;                             // candidates that typical-p, top-p, min-p and XTC leave at least
  float xtc_probability = 0.0f;                     // 0: off
  float xtc_threshold = 0.1f;                       // above 0.5: off
  float temperature = 0.8f;                         // 0: greedy
  float dynatemp_range = 0.0f;                      // 0: the temperature does not change
  float dynatemp_exponent = 1.0f;
  int32_t mirostat = 0;  // 1, 2: Mirostat of this version, in place of all samplers but the temperature
  float mirostat_tau = 5.0f;
  float mirostat_eta = 0.1f;
  uint64_t seed = 0;
};

class Sampler {
 public:
  Sampler(const SamplingParams& params, size_t n_vocab);

  // Makes ready for the token after `history`, the prompt and what was generated after it. Gives how many of the
  // largest logits are enough to draw from; 0: all are needed.
  size_t prepare(std::span<const TokenId> history);

  // Draws from the best candidates, as many as prepare() said, or from all that there are; at least one. Equal logits:
  // the lower id is better.
  TokenId sample(std::vector<Candidate> candidates);

  // What the last token was drawn from, best first, and with which probabilities.
  std::span<const Candidate> candidates() const { return candidates_; }
  std::span<const double> probabilities() const { return probabilities_; }

 private:
  bool penalises() const;
  bool is_greedy() const;
  void apply(SamplerStage stage);
  void add_biases();
  void penalise();
  void penalise_repeats();
  void top_n_sigma();
  void top_k(size_t k);
  void typical_p();
  void top_p();
  void min_p();
  void xtc();
  void temperature();
  void divide_by(double temperature);
  void truncate_for_mirostat();
  void sort();
  void softmax();  // of the candidates, sorted → probabilities_
  double entropy() const;
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }  // from 0 to below 1
  bool keeps_enough(size_t n) const { return n >= static_cast<size_t>(params_.min_keep); }

  SamplingParams params_;
  size_t n_vocab_;
  std::mt19937_64 random_;
  double mirostat_mu_;                           // most surprise that is allowed, in bits
  std::unordered_map<TokenId, float> biases_;    // summed
  std::unordered_map<TokenId, int> counts_;      // in the penalties' window
  std::unordered_map<TokenId, size_t> repeats_;  // of DRY
  std::vector<Candidate> candidates_;
  bool sorted_ = false;  // best first
  std::vector<double> probabilities_;
};

// Those of all logits (n_vocab) that may be drawn, in the order of their ids: those whose bit is set, or all where
// there are no bits.
std::vector<Candidate> candidates_of(std::span<const float> logits, std::span<const uint64_t> allowed);

// How probable a token was among others.
struct TokenProbability {
  struct Entry {
    TokenId token;
    double value;
  };
  Entry chosen;
  std::vector<Entry> best;  // best first
};

// Natural logarithms of the probabilities of a token and of the n_best best, from all logits (n_vocab).
TokenProbability log_probability(std::span<const float> logits, TokenId token, size_t n_best);

}  // namespace bitnet
