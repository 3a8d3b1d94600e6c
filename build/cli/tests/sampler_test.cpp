#include "sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>

#include "gguf.h"

using namespace bitnet;

namespace {

using Stage = SamplerStage;

// The token that a sampler draws from all logits.
TokenId draw(Sampler& sampler, const std::vector<float>& logits, const std::vector<TokenId>& history = {}) {
  sampler.prepare(history);
  return sampler.sample(candidates_of(logits, {}));
}

std::map<TokenId, double> shares(const SamplingParams& params, const std::vector<float>& logits,
                                 std::vector<TokenId> history = {}) {
  std::map<TokenId, double> counts;
  constexpr int kDraws = 20000;
  Sampler sampler(params, logits.size());
  for (int i = 0; i < kDraws; i++) counts[draw(sampler, logits, history)] += 1.0 / kDraws;
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

// What is drawn from, with which probabilities.
std::map<TokenId, double> chances(const SamplingParams& params, const std::vector<float>& logits,
                                  const std::vector<TokenId>& history = {}) {
  Sampler sampler(params, logits.size());
  draw(sampler, logits, history);
  std::map<TokenId, double> out;
  for (size_t i = 0; i < sampler.candidates().size(); i++)
    out[sampler.candidates()[i].token] = sampler.probabilities()[i];
  return out;
}

void check(const std::map<TokenId, double>& got, const std::map<TokenId, double>& expected) {
  CHECK(got.size() == expected.size());
  for (const auto& [token, p] : expected) {
    CAPTURE(token);
    REQUIRE(got.contains(token));
    CHECK(got.at(token) == doctest::Approx(p).epsilon(1e-5));
  }
}

const std::vector<float> kLogits = {std::log(0.1f), std::log(0.4f), std::log(0.3f), std::log(0.2f)};

}  // namespace

TEST_CASE("greedy takes the best logit, the lower id of equals") {
  SamplingParams p;
  p.temperature = 0.0f;
  Sampler sampler(p, 4);
  CHECK(draw(sampler, {0.0f, 3.0f, 3.0f, -1.0f}) == 1);
  CHECK(draw(sampler, {0.0f, std::nanf(""), -3.0f, -1.0f}) == 0);
  CHECK(draw(sampler, std::vector<float>(4, std::nanf(""))) == 0);
  CHECK(draw(sampler, std::vector<float>(4, -std::numeric_limits<float>::infinity())) == 0);
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
  check(chances(p, kLogits), {{0, 0.01 / 0.3}, {1, 0.16 / 0.3}, {2, 0.09 / 0.3}, {3, 0.04 / 0.3}});
  p.temperature = 1e-38f;
  check(chances(p, kLogits), {{0, 0.0}, {1, 1.0}, {2, 0.0}, {3, 0.0}});
}

TEST_CASE("dynamic temperature follows the entropy") {
  SamplingParams p = open();
  p.dynatemp_range = 0.5f;
  // Two alike: the entropy is the greatest there is, so the temperature is 1.5, and two alike they stay.
  check(chances(p, {0.0f, 0.0f}), {{0, 0.5}, {1, 0.5}});
  // H = −(0.8 ln 0.8 + 0.2 ln 0.2) = 0.500402, of ln 2: 0.721928, so T = 0.5 + 0.721928 = 1.221928
  const double odds = std::pow(4.0, 1.0 / 1.221928);
  check(chances(p, {std::log(0.8f), std::log(0.2f)}), {{0, odds / (1.0 + odds)}, {1, 1.0 / (1.0 + odds)}});
  p.dynatemp_exponent = 2.0f;  // T = 0.5 + 0.721928² = 1.021180
  const double less = std::pow(4.0, 1.0 / 1.021180);
  check(chances(p, {std::log(0.8f), std::log(0.2f)}), {{0, less / (1.0 + less)}, {1, 1.0 / (1.0 + less)}});
}

TEST_CASE("top-k, top-p and min-p cut what they should") {
  SamplingParams p = open();
  p.top_k = 2;
  check(chances(p, kLogits), {{1, 4.0 / 7.0}, {2, 3.0 / 7.0}});
  p = open();
  p.top_p = 0.6f;  // 0.4, then 0.7 ≥ 0.6
  CHECK(chances(p, kLogits).size() == 2);
  p.min_keep = 3;
  CHECK(chances(p, kLogits).size() == 3);
  p.min_keep = 0;
  p.top_p = 0.39f;
  CHECK(chances(p, kLogits).size() == 1);
  p = open();
  p.min_p = 0.45f;  // 0.45 · 0.4 = 0.18: all but the first
  CHECK(chances(p, kLogits).size() == 3);
  p.min_p = 1.0f;
  CHECK(chances(p, kLogits).size() == 1);
  p.min_keep = 2;
  CHECK(chances(p, kLogits).size() == 2);
}

TEST_CASE("typical-p keeps what is about as surprising as expected") {
  SamplingParams p = open();
  // H = 1.279854. |−ln p − H|: 1.022731 for 0.1, 0.363563 for 0.4, 0.075881 for 0.3, 0.329584 for 0.2
  p.typical_p = 0.29f;
  check(chances(p, kLogits), {{2, 1.0}});
  p.typical_p = 0.4f;
  check(chances(p, kLogits), {{2, 0.6}, {3, 0.4}});
  p.typical_p = 0.6f;
  CHECK(chances(p, kLogits).size() == 3);
  p.typical_p = 0.29f;
  p.min_keep = 2;
  CHECK(chances(p, kLogits).size() == 2);
}

TEST_CASE("top-n-sigma keeps what is near the best, in standard deviations") {
  SamplingParams p = open();
  p.top_n_sigma = 1.0f;
  // Mean 2, deviation √2 = 1.414: 4 and 3 are within one of 4.
  CHECK(chances(p, {0.0f, 1.0f, 2.0f, 3.0f, 4.0f}).size() == 2);
  p.top_n_sigma = 2.0f;
  CHECK(chances(p, {0.0f, 1.0f, 2.0f, 3.0f, 4.0f}).size() == 3);
  p.top_n_sigma = 3.0f;
  CHECK(chances(p, {0.0f, 1.0f, 2.0f, 3.0f, 4.0f}).size() == 5);
  p.top_n_sigma = 0.0f;
  CHECK(chances(p, {0.0f, 1.0f, 2.0f, 3.0f, 4.0f}).size() == 5);
}

TEST_CASE("XTC leaves out the top choices but the last of them") {
  SamplingParams p = open();
  p.xtc_probability = 1.0f;
  p.xtc_threshold = 0.15f;  // 0.4, 0.3 and 0.2 reach it
  check(chances(p, kLogits), {{3, 2.0 / 3.0}, {0, 1.0 / 3.0}});
  p.xtc_threshold = 0.35f;  // one alone stays
  CHECK(chances(p, kLogits).size() == 4);
  p.xtc_threshold = 0.51f;
  CHECK(chances(p, kLogits).size() == 4);
  p.xtc_threshold = 0.15f;
  p.min_keep = 3;
  CHECK(chances(p, kLogits).size() == 4);
  p.min_keep = 0;
  p.xtc_probability = 0.5f;  // token 1 comes in half of the draws with 0.4
  CHECK(shares(p, kLogits)[1] == doctest::Approx(0.2).epsilon(0.07));
}

TEST_CASE("penalties look back as far as repeat_last_n") {
  SamplingParams p = open();
  p.temperature = 0.0f;
  const auto best = [&](const std::vector<TokenId>& history) {
    Sampler sampler(p, 3);
    return draw(sampler, {1.0f, 2.0f, -1.0f}, history);
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

TEST_CASE("DRY: what repeats longer costs more") {
  const std::vector<float> flat(10, 0.0f);
  const std::vector<TokenId> history = {1, 2, 3, 9, 2, 3, 7, 1, 2, 3};
  // After 1 2 3 came 9, after 2 3 came 7; 9 would repeat three tokens, 7 two.
  CHECK(dry_repeats(history, 2, {}) == std::unordered_map<TokenId, size_t>{{9, 3}, {7, 2}});
  CHECK(dry_repeats(history, 3, {}) == std::unordered_map<TokenId, size_t>{{9, 3}});
  CHECK(dry_repeats(history, 4, {}).empty());
  CHECK(dry_repeats(std::span(history).last(6), 2, {}) == std::unordered_map<TokenId, size_t>{{7, 2}});
  CHECK(dry_repeats({}, 2, {}).empty());
  const std::vector<TokenId> same(50, 5);
  CHECK(dry_repeats(same, 2, {}) == std::unordered_map<TokenId, size_t>{{5, 49}});
  // A breaker cuts the run that it stands in, and is never penalised itself.
  CHECK(dry_repeats(history, 2, {{1, {}}}) == std::unordered_map<TokenId, size_t>{{9, 2}, {7, 2}});
  CHECK(dry_repeats(history, 2, {{1, {2}}}).empty());
  CHECK(dry_repeats(history, 1, {{1, {2}}}) == std::unordered_map<TokenId, size_t>{{9, 1}, {7, 1}});
  CHECK(dry_repeats(history, 2, {{1, {3}}}) == dry_repeats(history, 2, {}));
  CHECK(dry_repeats(history, 2, {{9, {}}}) == std::unordered_map<TokenId, size_t>{{7, 2}});
  SamplingParams p = open();
  p.dry_multiplier = 0.5f;
  p.dry_base = 2.0f;
  // 7 loses 0.5 · 2⁰, 9 loses 0.5 · 2¹
  const double total = 8.0 + std::exp(-0.5) + std::exp(-1.0);
  const auto got = chances(p, flat, history);
  CHECK(got.at(0) == doctest::Approx(1.0 / total));
  CHECK(got.at(7) == doctest::Approx(std::exp(-0.5) / total));
  CHECK(got.at(9) == doctest::Approx(std::exp(-1.0) / total));
  p.dry_penalty_last_n = 6;
  CHECK(chances(p, flat, history).at(9) == doctest::Approx(1.0 / (9.0 + std::exp(-0.5))));
  p.dry_penalty_last_n = -1;
  p.dry_base = 100.0f;
  check(chances(p, {0.0f, 0.0f}, std::vector<TokenId>(500, 1)), {{0, 1.0}, {1, 0.0}});  // finite all the same
}

TEST_CASE("DRY finds a breaker however tokens spell it") {
  const GgufFile file(BITNET_DEMO_MODEL);
  const Tokenizer tokenizer(file);
  const std::string breaker = "king:";
  const DryBreakers breakers = dry_breakers(tokenizer, std::vector<std::string>{breaker, ""});
  CHECK_FALSE(breakers.empty());
  for (const auto& [head, tail] : breakers) {
    std::string text = tokenizer.decode(head, true);
    text += tokenizer.decode(tail, true);
    CHECK(text.find(breaker) != std::string::npos);
  }
  for (const char* text : {"The king: he", "king:", "a barking: he"}) {
    const std::vector<TokenId> ids = tokenizer.encode(text, false);
    bool found = false;
    for (size_t i = 0; i < ids.size(); i++) {
      const auto [first, last] = breakers.equal_range(ids[i]);
      for (auto it = first; it != last; ++it)
        found |= it->second.size() < ids.size() - i &&
                 std::equal(it->second.begin(), it->second.end(), ids.begin() + static_cast<std::ptrdiff_t>(i + 1));
    }
    CHECK(found);
  }
}

TEST_CASE("Mirostat 2 cuts by surprise and learns") {
  SamplingParams p = open();
  p.mirostat = 2;
  p.top_k = 1;            // not used
  p.mirostat_tau = 1.0f;  // μ begins with 2 bits: of 0.4 (1.32), 0.3 (1.74), 0.2 (2.32) and 0.1 the first two stay
  check(chances(p, kLogits), {{1, 4.0 / 7.0}, {2, 3.0 / 7.0}});
  p.mirostat_tau = 0.5f;  // μ = 1: none is below, the best stays
  check(chances(p, kLogits), {{1, 1.0}});
  // Surprise 0 each time: μ grows by eta · tau = 0.25 a draw; after two it is 1.5 and lets the best alone through as
  // before, after three 1.75 and the second too.
  p.mirostat_eta = 0.5f;
  Sampler sampler(p, 4);
  for (const size_t n : {1, 1, 1, 2}) {
    draw(sampler, kLogits);
    CHECK(sampler.candidates().size() == n);
  }
}

TEST_CASE("Mirostat 1 cuts where a Zipf distribution would") {
  SamplingParams p = open();
  p.mirostat = 1;
  p.mirostat_tau = 1.0f;
  // pᵢ ∝ 1 / i²: s = 2, ε = 1, k = (1 · 2² / (1 − 1 / 8))^½ = 2.138: two stay.
  std::vector<float> logits;
  for (int i = 1; i <= 8; i++) logits.push_back(-2.0f * std::log(static_cast<float>(i)));
  check(chances(p, logits), {{0, 0.8}, {1, 0.2}});
  p.mirostat_tau = 3.0f;  // (2⁶ / (1 − 1 / 8))^½ = 8.55: all
  CHECK(chances(p, logits).size() == 8);
  p.temperature = 0.0f;
  check(chances(p, logits), {{0, 1.0}});
  p.temperature = 1.0f;
  CHECK(chances(p, {1.0f}).size() == 1);
  CHECK(chances(p, {1.0f, 1.0f}).size() <= 2);
}

TEST_CASE("a bias is added to its logit") {
  SamplingParams p = open();
  p.logit_bias = {{0, 1.0f}, {0, std::log(4.0f) - 1.0f}, {3, -1e6f}};  // 0.1 → 0.4
  check(chances(p, kLogits), {{0, 0.4 / 1.1}, {1, 0.4 / 1.1}, {2, 0.3 / 1.1}, {3, 0.0}});
}

TEST_CASE("samplers work in the order that is asked for") {
  SamplingParams p = open();
  p.temperature = 0.5f;
  p.top_p = 0.5f;
  p.samplers = {Stage::kTopP, Stage::kTemperature};  // 0.4 and 0.3
  CHECK(chances(p, kLogits).size() == 2);
  p.samplers = {Stage::kTemperature, Stage::kTopP};  // 0.53 alone
  CHECK(chances(p, kLogits).size() == 1);
  p.samplers = {Stage::kTopP};
  check(chances(p, kLogits), {{1, 4.0 / 7.0}, {2, 3.0 / 7.0}});
  p.temperature = 0.0f;  // not asked for
  CHECK(chances(p, kLogits).size() == 2);
  p.samplers = {};
  CHECK(chances(p, kLogits).size() == 4);
}

TEST_CASE("a penalty after a temperature looks at the same signs") {
  SamplingParams p = open();
  p.repeat_penalty = 2.0f;
  p.repeat_last_n = -1;
  const std::vector<float> logits = {3.0f, 2.0f, -1.0f};
  p.samplers = {Stage::kPenalties, Stage::kTemperature};
  const std::map<TokenId, double> expected = chances(p, logits, {0, 2});
  p.samplers = {Stage::kTemperature, Stage::kPenalties};
  check(chances(p, logits, {0, 2}), expected);
  p.temperature = 1e-38f;  // by which no logit can be divided
  check(chances(p, {3.0f, 2.0f}), {{0, 1.0}, {1, 0.0}});
}

TEST_CASE("the best candidates are enough where prepare says so") {
  std::vector<float> logits(4000);
  std::vector<TokenId> history;
  for (size_t i = 0; i < logits.size(); i++) logits[i] = static_cast<float>(i * 7919 % 4001) * 0.005f;
  for (size_t i = 0; i < 200; i++) history.push_back(static_cast<TokenId>(i * i % 97 + (i % 3) * 1000));
  std::vector<SamplingParams> all;
  for (const float temperature : {0.0f, 0.8f})
    for (int variant = 0; variant < 9; variant++) {
      SamplingParams p;
      p.temperature = temperature;
      p.seed = 3;
      if (variant == 1) p.repeat_penalty = 1.3f;
      if (variant == 2) p.presence_penalty = p.frequency_penalty = 2.0f;
      if (variant == 3) p.logit_bias = {{2, -5.0f}, {3999, -20.0f}};
      if (variant == 4) p.dry_multiplier = 3.0f;
      if (variant == 5) p.top_k = 3;
      if (variant == 6) p.typical_p = 0.7f;
      if (variant == 7) p.samplers = {Stage::kTemperature, Stage::kPenalties, Stage::kTopK, Stage::kMinP};
      if (variant == 8) p.xtc_probability = 0.5f;
      all.push_back(p);
    }
  for (const SamplingParams& p : all) {
    Sampler screened(p, logits.size()), whole(p, logits.size());
    for (int i = 0; i < 50; i++) {
      const size_t wanted = screened.prepare(history);
      REQUIRE(wanted > 0);
      std::vector<Candidate> best = best_of(logits, wanted);
      std::sort(best.begin(), best.end(), better);
      const TokenId token = screened.sample(best);
      CHECK(token == draw(whole, logits, history));
      history[static_cast<size_t>(i)] = token;
    }
  }
  const auto wants_all = [&](auto change) {
    SamplingParams p;
    change(p);
    return Sampler(p, 4000).prepare(history) == 0;
  };
  CHECK(wants_all([](SamplingParams& p) { p.logit_bias = {{1, 0.5f}}; }));
  CHECK(wants_all([](SamplingParams& p) { p.repeat_penalty = 0.9f; }));
  CHECK(wants_all([](SamplingParams& p) { p.presence_penalty = -0.1f; }));
  CHECK(wants_all([](SamplingParams& p) { p.top_k = 0; }));
  CHECK(wants_all([](SamplingParams& p) { p.top_k = 1000; }));
  CHECK(wants_all([](SamplingParams& p) { p.top_n_sigma = 1.0f; }));
  CHECK(wants_all([](SamplingParams& p) { p.mirostat = 2; }));
  CHECK(wants_all([](SamplingParams& p) { p.samplers = {Stage::kTopP, Stage::kTopK}; }));
}

TEST_CASE("probabilities of the model, and the best of them") {
  const TokenProbability p = log_probability(kLogits, 3, 2);
  CHECK(p.chosen.token == 3);
  CHECK(p.chosen.value == doctest::Approx(std::log(0.2)));
  REQUIRE(p.best.size() == 2);
  CHECK(p.best[0].token == 1);
  CHECK(p.best[0].value == doctest::Approx(std::log(0.4)));
  CHECK(p.best[1].token == 2);
  CHECK(log_probability(kLogits, 0, 0).best.empty());
}

TEST_CASE("a seed repeats its draws") {
  SamplingParams p = open();
  p.top_k = 40;
  p.xtc_probability = 0.3f;
  Sampler a(p, 4), b(p, 4);
  for (int i = 0; i < 100; i++) CHECK(draw(a, kLogits) == draw(b, kLogits));
}
