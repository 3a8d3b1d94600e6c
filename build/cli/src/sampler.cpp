#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "elementary.h"

namespace bitnet {

size_t Sampler::candidates_wanted() const {
  if (penalises()) return 0;
  if (params_.temperature <= 0.0f) return 1;
  if (params_.top_k < 1 || params_.top_k > kMaxScreenedTopK) return 0;
  return static_cast<size_t>(params_.top_k);
}

TokenId Sampler::sample(std::span<const Candidate> best) {
  candidates_.assign(best.begin(), best.end());
  return draw();
}

TokenId Sampler::sample(std::span<float> logits, std::span<const TokenId> history) {
  penalise(logits, history);
  size_t k = params_.temperature <= 0.0f ? 1 : static_cast<size_t>(params_.top_k);
  if (k == 0 || k > logits.size()) k = logits.size();
  candidates_ = best_of(logits, k);
  std::sort(candidates_.begin(), candidates_.end(), better);
  return draw();
}

bool Sampler::penalises() const {
  return params_.repeat_penalty != 1.0f || params_.presence_penalty != 0.0f || params_.frequency_penalty != 0.0f;
}

void Sampler::penalise(std::span<float> logits, std::span<const TokenId> history) const {
  if (!penalises()) return;
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

TokenId Sampler::draw() {
  if (params_.temperature <= 0.0f) return candidates_.front().token;
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
