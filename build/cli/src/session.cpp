#include "session.h"

namespace bitnet {

void Session::evaluate(std::span<const TokenId> tokens, size_t n_outputs) {
  std::vector<BatchToken> batch;
  for (size_t done = 0; done < tokens.size(); done += batch.size()) {
    const size_t n = std::min(engine_.transformer.max_batch(), tokens.size() - done);
    batch.clear();
    for (size_t i = done; i < done + n; i++)
      batch.push_back({tokens[i], static_cast<uint32_t>(n_cached_++), &cache_, i + n_outputs >= tokens.size()});
    engine_.transformer.forward(batch);
  }
}

}  // namespace bitnet
