// How well the model foretells a text.
#pragma once

#include <span>

#include "engine.h"

namespace bitnet {

struct PerplexityResult {
  size_t n_scored = 0;  // tokens whose probability was taken
  size_t n_windows = 0;
  double nats_per_token = 0.0;
};

// Cuts the tokens into windows of the engine's context (BOS first, where the model has one) and scores the second half
// of each, as llama.cpp does; a shorter text is scored whole (without BOS: from its second token on). Error(kUsage) for
// fewer than two tokens or a context of fewer than three.
PerplexityResult perplexity(Engine& engine, std::span<const TokenId> tokens);

}  // namespace bitnet
