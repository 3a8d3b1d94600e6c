// The tokens of one text and the cache they are in, for whoever computes logits and no completions.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "engine.h"
#include "kv_cache.h"

namespace bitnet {

class Session {
 public:
  explicit Session(Engine& engine) : engine_(engine), cache_(engine.config(), engine.n_ctx, engine.kv_type) {}

  // Computes the tokens after those already there, in batches. The transformer then has the outputs of the last
  // n_outputs, which must fit into a batch with those before them.
  void evaluate(std::span<const TokenId> tokens, size_t n_outputs = 1);
  void truncate(size_t n_tokens) { n_cached_ = std::min(n_tokens, n_cached_); }

 private:
  Engine& engine_;
  KvCache cache_;
  size_t n_cached_ = 0;
};

}  // namespace bitnet
