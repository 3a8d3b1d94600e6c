#include "sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <map>

using namespace bitnet;

namespace {

std::map<TokenId, double> shares(const SamplingParams& params, const std::vector<float>& logits,
                                 std::vector<TokenId> history = {}) {
  std::map<TokenId, double> counts;
  constexpr int kDraws = 20000;
  Sampler sampler(params);
  for (int i = 0; i < kDraws; i++) {
    std::vector<float> copy = logits;
    counts[sampler.sample(copy, history)] += 1.0 / kDraws;
  }
  return counts;
}

SamplingParams open() {
  SamplingParams p;
  p.temperature = 1.0f;
  p.top_k = 0;
  p.top_p = 1.0f;
  p.min_p = 0.0f;
  p.seed = 7;
  return p;
}

const std::vector<float> kLogits = {std::log(0.1f), std::log(0.4f), std::log(0.3f), std::log(0.2f)};

}  // namespace

TEST_CASE("greedy takes the best logit, the lower id of equals") {
  SamplingParams p;
  p.temperature = 0.0f;
  Sampler sampler(p);
  std::vector<float> logits = {0.0f, 3.0f, 3.0f, -1.0f};
  CHECK(sampler.sample(logits, {}) == 1);
}

TEST_CASE("draws follow the softmax, sharpened by the temperature") {
  SamplingParams p = open();
  auto s = shares(p, kLogits);
  CHECK(s[0] == doctest::Approx(0.1).epsilon(0.15));
  CHECK(s[1] == doctest::Approx(0.4).epsilon(0.05));
  CHECK(s[2] == doctest::Approx(0.3).epsilon(0.05));
  p.temperature = 0.5f;  // probabilities squared: 0.01 0.16 0.09 0.04, of 0.30
  s = shares(p, kLogits);
  CHECK(s[1] == doctest::Approx(0.533).epsilon(0.05));
}

TEST_CASE("top-k, top-p and min-p cut what they should") {
  SamplingParams p = open();
  p.top_k = 2;
  auto s = shares(p, kLogits);
  CHECK(s.size() == 2);
  CHECK(s[1] == doctest::Approx(4.0 / 7.0).epsilon(0.05));
  p = open();
  p.top_p = 0.6f;  // 0.4, then 0.7 ≥ 0.6
  CHECK(shares(p, kLogits).size() == 2);
  p.top_p = 0.39f;
  CHECK(shares(p, kLogits).size() == 1);
  p = open();
  p.min_p = 0.45f;  // 0.45 · 0.4 = 0.18: all but the first
  CHECK(shares(p, kLogits).size() == 3);
  p.min_p = 1.0f;
  CHECK(shares(p, kLogits).size() == 1);
}

TEST_CASE("penalties look back as far as repeat_last_n") {
  SamplingParams p = open();
  p.temperature = 0.0f;
  std::vector<float> logits = {1.0f, 2.0f, -1.0f};
  const auto best = [&](std::vector<TokenId> history) {
    std::vector<float> copy = logits;
    return Sampler(p).sample(copy, history);
  };
  p.repeat_penalty = 4.0f;
  CHECK(best({1}) == 0);  // 2 / 4 < 1
  CHECK(best({}) == 1);
  p.repeat_last_n = 1;
  CHECK(best({1, 0}) == 1);  // only 0 is seen
  p.repeat_last_n = 0;
  CHECK(best({1}) == 1);
  p.repeat_last_n = -1;
  p.repeat_penalty = 1.0f;
  p.frequency_penalty = 0.6f;
  CHECK(best({1}) == 1);
  CHECK(best({1, 1}) == 0);  // 2 − 1.2 < 1
  p.frequency_penalty = 0.0f;
  p.presence_penalty = 1.5f;
  CHECK(best({1}) == 0);
}

TEST_CASE("a seed repeats its draws") {
  SamplingParams p = open();
  p.top_k = 40;
  Sampler a(p), b(p);
  for (int i = 0; i < 100; i++) {
    std::vector<float> x = kLogits, y = kLogits;
    CHECK(a.sample(x, {}) == b.sample(y, {}));
  }
}
