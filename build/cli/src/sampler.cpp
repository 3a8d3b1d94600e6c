#include "sampler.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "elementary.h"

namespace bitnet {

Sampler::Sampler(const SamplingParams& params, std::vector<TokenId> banned)
    : params_(params), banned_(std::move(banned)), random_(params.seed) {}

TokenId Sampler::sample(std::span<float> logits, std::span<const TokenId> history) {
  penalise(logits, history);
  for (const TokenId token : banned_) logits[static_cast<size_t>(token)] = -std::numeric_limits<float>::infinity();
  if (params_.temperature <= 0.0f)
    return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  const size_t k = params_.top_k > 0 ? static_cast<size_t>(params_.top_k) : logits.size();
  keep_best(logits, std::min(k, logits.size()));
  return draw();
}

void Sampler::penalise(std::span<float> logits, std::span<const TokenId> history) const {
  if (params_.repeat_penalty == 1.0f && params_.presence_penalty == 0.0f && params_.frequency_penalty == 0.0f) return;
  if (params_.repeat_last_n >= 0)
    history = history.last(std::min(history.size(), static_cast<size_t>(params_.repeat_last_n)));
  std::unordered_map<TokenId, int> counts;
  for (const TokenId token : history) counts[token]++;
  for (const auto& [token, count] : counts) {
    float& logit = logits[static_cast<size_t>(token)];
    logit = logit <= 0.0f ? logit * params_.repeat_penalty : logit / params_.repeat_penalty;
    logit -= static_cast<float>(count) * params_.frequency_penalty + params_.presence_penalty;
  }
}

void Sampler::keep_best(std::span<const float> logits, size_t k) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  };
  candidates_.clear();
  if (k == logits.size()) {
    for (size_t i = 0; i < k; i++) candidates_.push_back({logits[i], static_cast<TokenId>(i)});
  } else {  // a heap of the k best so far, the worst of them on top
    for (size_t i = 0; i < logits.size(); i++) {
      const Candidate candidate{logits[i], static_cast<TokenId>(i)};
      if (candidates_.size() < k) {
        candidates_.push_back(candidate);
        std::push_heap(candidates_.begin(), candidates_.end(), better);
      } else if (better(candidate, candidates_.front())) {
        std::pop_heap(candidates_.begin(), candidates_.end(), better);
        candidates_.back() = candidate;
        std::push_heap(candidates_.begin(), candidates_.end(), better);
      }
    }
  }
  std::sort(candidates_.begin(), candidates_.end(), better);
}

TokenId Sampler::draw() {
  const double best = candidates_.front().logit;
  double total = 0.0;
  weights_.clear();
  for (const Candidate& c : candidates_) {
    weights_.push_back(exponential(static_cast<double>(c.logit) - best));
    total += weights_.back();
  }
  size_t n = candidates_.size();
  if (params_.top_p < 1.0f) {
    double cumulative = 0.0;
    for (size_t i = 0; i < n; i++) {
      cumulative += weights_[i] / total;
      if (cumulative >= static_cast<double>(params_.top_p)) n = i + 1;
    }
  }
  while (n > 1 && weights_[n - 1] < static_cast<double>(params_.min_p)) n--;  // weights are relative to the best token
  total = 0.0;
  for (size_t i = 0; i < n; i++) {
    weights_[i] =
        exponential((static_cast<double>(candidates_[i].logit) - best) / static_cast<double>(params_.temperature));
    total += weights_[i];
  }
  double point = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  for (size_t i = 0; i < n; i++)
    if ((point -= weights_[i]) < 0.0) return candidates_[i].token;
  return candidates_[n - 1].token;
}

}  // namespace bitnet
