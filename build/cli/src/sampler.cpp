#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "elementary.h"

namespace bitnet {
namespace {

constexpr size_t kMaxScreened = 256;            // candidates that are still cheaper to seek than all logits to compute
constexpr size_t kMirostatTokens = 100;         // from which Mirostat 1 estimates how fast probabilities fall
constexpr double kMaxDryExponent = 88.7228391;  // of e: the largest float

double value_of(const Candidate& candidate) { return static_cast<double>(candidate.logit); }

// Base and exponent of which nothing else is known: NaN where the power is not defined.
double power(double base, double exponent) {
  return base > 0.0 ? exponential(exponent * logarithm(base)) : std::pow(base, exponent);
}

bool penalised_after_temperature(std::span<const SamplerStage> stages) {
  const auto temperature = std::find(stages.begin(), stages.end(), SamplerStage::kTemperature);
  return std::find(temperature, stages.end(), SamplerStage::kPenalties) != stages.end();
}

}  // namespace

std::string_view name_of(SamplerStage stage) {
  constexpr std::string_view kNames[kSamplerStages] = {"penalties", "dry",   "top_n_sigma", "top_k",      "typ_p",
                                                       "top_p",     "min_p", "xtc",         "temperature"};
  return kNames[static_cast<size_t>(stage)];
}

Sampler::Sampler(const SamplingParams& params, size_t n_vocab)
    : params_(params),
      n_vocab_(n_vocab),
      random_(params.seed),
      mirostat_mu_(2.0 * static_cast<double>(params.mirostat_tau)) {
  for (const LogitBias& b : params.logit_bias) biases_[b.token] += b.bias;
}

bool Sampler::penalises() const {
  return params_.repeat_penalty != 1.0f || params_.presence_penalty != 0.0f || params_.frequency_penalty != 0.0f;
}

// Whether the best candidate is drawn whatever the others are.
bool Sampler::is_greedy() const {
  const auto uses = [&](SamplerStage stage) {
    return std::find(params_.samplers.begin(), params_.samplers.end(), stage) != params_.samplers.end();
  };
  return uses(SamplerStage::kTemperature) && params_.temperature <= 0.0f && params_.dynatemp_range <= 0.0f &&
         !(uses(SamplerStage::kTypicalP) && params_.typical_p < 1.0f) &&
         !(uses(SamplerStage::kXtc) && params_.xtc_probability > 0.0f);
}

size_t Sampler::prepare(std::span<const TokenId> history) {
  const auto window = [&](int32_t n) {
    return n < 0 ? history : history.last(std::min(history.size(), static_cast<size_t>(n)));
  };
  counts_.clear();
  repeats_.clear();
  if (params_.mirostat > 0) return 0;
  if (penalises())
    for (const TokenId token : window(params_.repeat_last_n)) counts_[token]++;
  if (params_.dry_multiplier > 0.0f)
    repeats_ = dry_repeats(window(params_.dry_penalty_last_n), static_cast<size_t>(params_.dry_allowed_length),
                           params_.dry_breakers ? *params_.dry_breakers : DryBreakers());

  // A token that gains may come from anywhere. One that loses makes room for one more of the best.
  if (std::any_of(biases_.begin(), biases_.end(), [](const auto& entry) { return entry.second > 0.0f; })) return 0;
  if (params_.repeat_penalty < 1.0f || params_.presence_penalty < 0.0f || params_.frequency_penalty < 0.0f) return 0;
  const size_t n_lower = biases_.size() + counts_.size() + repeats_.size();
  const auto best = [&](size_t k) { return k + n_lower <= kMaxScreened ? k + n_lower : 0; };
  const bool greedy = is_greedy();
  for (const SamplerStage stage : params_.samplers) {
    bool needs_all = false;
    switch (stage) {
      case SamplerStage::kPenalties:
      case SamplerStage::kDry:
        break;
      case SamplerStage::kTopNSigma:
        needs_all = params_.top_n_sigma > 0.0f && !greedy;
        break;
      case SamplerStage::kTopK:
        if (params_.top_k > 0) return best(greedy ? 1 : std::min(static_cast<size_t>(params_.top_k), kMaxScreened + 1));
        break;
      case SamplerStage::kTypicalP:
        needs_all = params_.typical_p < 1.0f;
        break;
      case SamplerStage::kTopP:
        needs_all = params_.top_p < 1.0f && !greedy;
        break;
      case SamplerStage::kMinP:
        needs_all = params_.min_p > 0.0f && !greedy;
        break;
      case SamplerStage::kXtc:
        needs_all = params_.xtc_probability > 0.0f;
        break;
      case SamplerStage::kTemperature:
        if (greedy) return best(1);
        needs_all = params_.dynatemp_range > 0.0f || params_.temperature <= 0.0f;
        break;
    }
    if (needs_all) break;
  }
  return 0;
}

TokenId Sampler::sample(std::vector<Candidate> candidates) {
  candidates_ = std::move(candidates);
  sorted_ = std::is_sorted(candidates_.begin(), candidates_.end(), better);
  add_biases();
  if (params_.mirostat > 0) {
    divide_by(static_cast<double>(params_.temperature));
    truncate_for_mirostat();
  } else {
    for (const SamplerStage stage : params_.samplers) apply(stage);
  }
  softmax();
  size_t i = 0;
  for (double point = uniform(); i + 1 < candidates_.size(); i++)
    if ((point -= probabilities_[i]) < 0.0) break;
  if (params_.mirostat > 0) {
    const double surprise = -logarithm(probabilities_[i]) / logarithm(2.0);
    mirostat_mu_ -= static_cast<double>(params_.mirostat_eta) * (surprise - static_cast<double>(params_.mirostat_tau));
  }
  return candidates_[i].token;
}

void Sampler::apply(SamplerStage stage) {
  switch (stage) {
    case SamplerStage::kPenalties:
      return penalise();
    case SamplerStage::kDry:
      return penalise_repeats();
    case SamplerStage::kTopNSigma:
      return top_n_sigma();
    case SamplerStage::kTopK:
      return top_k(params_.top_k > 0 ? static_cast<size_t>(params_.top_k) : candidates_.size());
    case SamplerStage::kTypicalP:
      return typical_p();
    case SamplerStage::kTopP:
      return top_p();
    case SamplerStage::kMinP:
      return min_p();
    case SamplerStage::kXtc:
      return xtc();
    case SamplerStage::kTemperature:
      return temperature();
  }
}

void Sampler::add_biases() {
  if (biases_.empty()) return;
  for (Candidate& c : candidates_)
    if (const auto it = biases_.find(c.token); it != biases_.end()) c.logit += it->second;
  sorted_ = false;
}

void Sampler::penalise() {
  if (counts_.empty()) return;
  for (Candidate& c : candidates_)
    if (const auto it = counts_.find(c.token); it != counts_.end()) {
      c.logit = c.logit <= 0.0f ? c.logit * params_.repeat_penalty : c.logit / params_.repeat_penalty;
      c.logit -= static_cast<float>(it->second) * params_.frequency_penalty + params_.presence_penalty;
    }
  sorted_ = false;
}

void Sampler::penalise_repeats() {
  if (repeats_.empty()) return;
  const double log_base = logarithm(static_cast<double>(params_.dry_base));
  for (Candidate& c : candidates_)
    if (const auto it = repeats_.find(c.token); it != repeats_.end()) {
      const double exponent = static_cast<double>(it->second) - static_cast<double>(params_.dry_allowed_length);
      c.logit -= static_cast<float>(static_cast<double>(params_.dry_multiplier) *
                                    exponential(std::min(exponent * log_base, kMaxDryExponent)));
    }
  sorted_ = false;
}

// Keeps what is within n standard deviations of the best.
void Sampler::top_n_sigma() {
  if (params_.top_n_sigma <= 0.0f) return;
  double best = -std::numeric_limits<double>::infinity(), sum = 0.0, squares = 0.0;
  size_t n = 0;
  for (const Candidate& c : candidates_) {
    if (std::isinf(c.logit)) continue;
    best = std::max(best, value_of(c));
    sum += value_of(c);
    n++;
  }
  if (n == 0) return;
  const double mean = sum / static_cast<double>(n);
  for (const Candidate& c : candidates_)
    if (!std::isinf(c.logit)) squares += (value_of(c) - mean) * (value_of(c) - mean);
  const double least = best - static_cast<double>(params_.top_n_sigma) * std::sqrt(squares / static_cast<double>(n));
  std::erase_if(candidates_, [&](const Candidate& c) { return value_of(c) < least; });
}

void Sampler::top_k(size_t k) {
  if (k >= candidates_.size()) return;
  if (!sorted_)
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k), candidates_.end(),
                      better);
  candidates_.resize(k);
  sorted_ = true;
}

// Keeps those whose surprise is nearest to the entropy (Meister et al., 2022).
void Sampler::typical_p() {
  if (params_.typical_p >= 1.0f) return;
  softmax();
  const double expected = entropy();
  std::vector<double> distances;
  for (const double p : probabilities_)
    distances.push_back(p > 0.0 ? std::fabs(-logarithm(p) - expected) : std::numeric_limits<double>::infinity());
  std::vector<size_t> order(candidates_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return distances[a] < distances[b]; });
  std::vector<Candidate> kept;
  double total = 0.0;
  for (const size_t i : order) {
    kept.push_back(candidates_[i]);
    total += probabilities_[i];
    if (total > static_cast<double>(params_.typical_p) && keeps_enough(kept.size())) break;
  }
  candidates_ = std::move(kept);
  sorted_ = false;
}

void Sampler::top_p() {
  if (params_.top_p >= 1.0f) return;
  softmax();
  double total = 0.0;
  for (size_t i = 0; i < candidates_.size(); i++) {
    total += probabilities_[i];
    if (total >= static_cast<double>(params_.top_p) && keeps_enough(i + 1)) candidates_.resize(i + 1);
  }
}

void Sampler::min_p() {
  if (params_.min_p <= 0.0f) return;
  sort();
  const double best = value_of(candidates_.front());
  size_t n = candidates_.size();
  while (n > 1 && keeps_enough(n - 1) &&
         !(exponential(value_of(candidates_[n - 1]) - best) >= static_cast<double>(params_.min_p)))
    n--;
  candidates_.resize(n);
}

// Now and then leaves out all but the last of those that are probable enough.
void Sampler::xtc() {
  if (params_.xtc_probability <= 0.0f || params_.xtc_threshold > 0.5f || candidates_.size() < 2) return;
  if (uniform() > static_cast<double>(params_.xtc_probability)) return;
  softmax();
  size_t n_probable = 0;
  while (n_probable < candidates_.size() && probabilities_[n_probable] >= static_cast<double>(params_.xtc_threshold))
    n_probable++;
  if (n_probable < 2 || !keeps_enough(candidates_.size() - n_probable + 1)) return;
  candidates_.erase(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(n_probable - 1));
}

void Sampler::temperature() {
  const auto t = static_cast<double>(params_.temperature), range = static_cast<double>(params_.dynatemp_range);
  if (range <= 0.0) return divide_by(t);
  if (candidates_.size() < 2) return;
  softmax();
  const double least = std::max(0.0, t - range), most = t + range;
  const double share = entropy() / logarithm(static_cast<double>(candidates_.size()));
  divide_by(least + (most - least) * power(share, static_cast<double>(params_.dynatemp_exponent)));
}

void Sampler::divide_by(double temperature) {
  if (!(temperature > 0.0)) {
    candidates_ = {*std::min_element(candidates_.begin(), candidates_.end(), better)};
    sorted_ = true;
    return;
  }
  const double best = value_of(*std::min_element(candidates_.begin(), candidates_.end(), better));
  if (std::isinf(best)) return;
  // Differences to the best keep their digits. But a penalty that comes later looks at the sign of a logit.
  const bool signs_count =
      penalised_after_temperature(params_.samplers) && std::isfinite(static_cast<float>(best / temperature));
  const double zero = signs_count ? 0.0 : best;
  for (Candidate& c : candidates_) c.logit = static_cast<float>((value_of(c) - zero) / temperature);
}

// Basu et al., 2021; version 2 cuts where the surprise passes μ, version 1 after the number of tokens that a Zipf
// distribution with the exponent of the best ones has below it.
void Sampler::truncate_for_mirostat() {
  softmax();
  if (params_.mirostat == 2) {
    size_t n = 1;
    while (n < candidates_.size() && -logarithm(probabilities_[n]) / logarithm(2.0) <= mirostat_mu_) n++;
    return candidates_.resize(n);
  }
  double products = 0.0, squares = 0.0;
  for (size_t i = 0; i + 1 < std::min(kMirostatTokens, candidates_.size()); i++) {
    const double t = logarithm(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    const double b = value_of(candidates_[i]) - value_of(candidates_[i + 1]);
    products += t * b;
    squares += t * t;
  }
  const double s = products / squares, epsilon = s - 1.0;
  const double k =
      power(epsilon * power(2.0, mirostat_mu_) / (1.0 - power(static_cast<double>(n_vocab_), -epsilon)), 1.0 / s);
  if (k < static_cast<double>(candidates_.size())) candidates_.resize(std::max(static_cast<size_t>(k), size_t{1}));
}

void Sampler::sort() {
  if (!sorted_) std::sort(candidates_.begin(), candidates_.end(), better);
  sorted_ = true;
}

void Sampler::softmax() {
  sort();
  const double best = value_of(candidates_.front());
  double total = 0.0;
  probabilities_.clear();
  for (const Candidate& c : candidates_) {
    const double weight = c.logit == candidates_.front().logit ? 1.0 : exponential(value_of(c) - best);  // −∞ too
    probabilities_.push_back(weight);
    total += weight;
  }
  for (double& p : probabilities_) p /= total;
}

double Sampler::entropy() const {
  double sum = 0.0;
  for (const double p : probabilities_)
    if (p > 0.0) sum -= p * logarithm(p);
  return sum;
}

std::vector<Candidate> candidates_of(std::span<const float> logits, std::span<const uint64_t> allowed) {
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t t = 0; t < logits.size(); t++) {
    if (!allowed.empty() && (allowed[t / 64] >> t % 64 & 1) == 0) continue;
    // A model with wrong weights may give NaN, which nothing could be ordered by.
    candidates.push_back(
        {std::isnan(logits[t]) ? -std::numeric_limits<float>::infinity() : logits[t], static_cast<TokenId>(t)});
  }
  return candidates;
}

TokenProbability log_probability(std::span<const float> logits, TokenId token, size_t n_best) {
  std::vector<Candidate> best = best_of(logits, std::max<size_t>(n_best, 1));
  std::sort(best.begin(), best.end(), better);
  const double most = value_of(best.front());
  double total = 0.0;
  for (const float logit : logits)
    if (!std::isnan(logit)) total += exponential(static_cast<double>(logit) - most);
  const double log_total = most + logarithm(total);
  const auto entry = [&](TokenId t) {
    return TokenProbability::Entry{t, static_cast<double>(logits[static_cast<size_t>(t)]) - log_total};
  };
  TokenProbability probability{entry(token), {}};
  best.resize(std::min(best.size(), n_best));
  for (const Candidate& c : best) probability.best.push_back(entry(c.token));
  return probability;
}

}  // namespace bitnet
