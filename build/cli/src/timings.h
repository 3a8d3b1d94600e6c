// The `timings` object of answers, with llama.cpp's names.
#pragma once

#include <nlohmann/json.hpp>

namespace bitnet {

inline nlohmann::ordered_json timings(size_t prompt_n, double prompt_ms, size_t predicted_n, double predicted_ms) {
  const auto per_second = [](size_t n, double ms) { return ms > 0.0 ? static_cast<double>(n) * 1000.0 / ms : 0.0; };
  return {{"prompt_n", prompt_n},
          {"prompt_ms", prompt_ms},
          {"prompt_per_second", per_second(prompt_n, prompt_ms)},
          {"predicted_n", predicted_n},
          {"predicted_ms", predicted_ms},
          {"predicted_per_second", per_second(predicted_n, predicted_ms)}};
}

}  // namespace bitnet
