// Speed of the model on this machine, and of the memory it is read from, measured in one run.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "engine.h"

namespace bitnet {

struct BenchOptions {
  size_t prompt_tokens = 512;
  size_t predict_tokens = 64;
  size_t depth = 0;  // positions already in the context
  size_t repetitions = 3;
  size_t sequences = 1;  // texts that grow side by side, a token each at a time
  // A text to say again after a prompt, as if the model had drawn it: what guessing ahead gains with it.
  std::vector<TokenId> replay_prompt, replay;
};

// Every figure is the median over the repetitions, `<figure>_spread` beside it the distance from the least to the
// greatest.
nlohmann::ordered_json bench(Engine& engine, const BenchOptions& options);

}  // namespace bitnet
