// The `timings` object of answers, with llama.cpp's names.
#pragma once

#include <nlohmann/json.hpp>

#include "sequence.h"

namespace bitnet {

inline nlohmann::ordered_json timings(const CompletionResult& r) {
  const auto per_second = [](size_t n, double ms) { return ms > 0.0 ? static_cast<double>(n) * 1000.0 / ms : 0.0; };
  const size_t n_computed = r.n_prompt - r.n_cached;
  return {{"prompt_n", n_computed},
          {"prompt_ms", r.prompt_ms},
          {"prompt_per_second", per_second(n_computed, r.prompt_ms)},
          {"predicted_n", r.tokens.size()},
          {"predicted_ms", r.predicted_ms},
          {"predicted_per_second", per_second(r.tokens.size(), r.predicted_ms)},
          {"draft_n", r.n_drafted},
          {"draft_n_accepted", r.n_accepted}};
}

}  // namespace bitnet
