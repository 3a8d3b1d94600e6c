#include "perplexity.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "sampler.h"

namespace bitnet {
namespace {

constexpr size_t kLogitRows = 32;  // positions whose logits are kept at a time: 16 MB for 128,256 tokens

}  // namespace

PerplexityResult perplexity(Engine& engine, std::span<const TokenId> tokens) {
  const std::optional<TokenId> bos = engine.tokenizer.bos();
  const size_t step = engine.n_ctx - (bos ? 1 : 0), n_vocab = engine.config().n_vocab;
  if (tokens.size() < 2 || engine.n_ctx < 3)
    throw Error(ExitCode::kUsage, "perplexity needs a text of at least 2 tokens and a context of at least 3, got " +
                                      std::to_string(tokens.size()) + " and " + std::to_string(engine.n_ctx));
  const size_t rows = std::min(kLogitRows, engine.transformer.max_batch());
  std::vector<float> logits(rows * n_vocab);
  std::vector<double> losses(rows);
  KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
  PerplexityResult result;
  double total = 0.0;
  for (size_t start = 0; start < tokens.size(); start += step) {
    const size_t n = std::min(step, tokens.size() - start);
    if (n < step && start > 0) break;  // a rest has less context than the others
    std::vector<TokenId> window(tokens.begin() + static_cast<std::ptrdiff_t>(start),
                                tokens.begin() + static_cast<std::ptrdiff_t>(start + n));
    if (bos) window.insert(window.begin(), *bos);
    const size_t first_scored = n < step ? 0 : window.size() / 2;  // position whose successor is the first one scored
    for (size_t done = 0; done < window.size();) {
      const size_t count = std::min(rows, window.size() - done);
      std::vector<BatchToken> batch;
      std::vector<TokenId> targets;
      for (size_t i = done; i < done + count; i++) {
        const bool scored = i >= first_scored && i + 1 < window.size();
        batch.push_back({window[i], static_cast<uint32_t>(i), &cache, scored});
        if (scored) targets.push_back(window[i + 1]);
      }
      engine.transformer.forward(batch);
      engine.transformer.output().logits(logits.data());
      engine.pool.for_each(targets.size(), [&](size_t i, size_t) {
        losses[i] = -log_probability(std::span(logits).subspan(i * n_vocab, n_vocab), targets[i], 0).chosen.value;
      });
      for (size_t i = 0; i < targets.size(); i++) total += losses[i];
      result.n_scored += targets.size();
      done += count;
    }
    result.n_windows++;
  }
  result.nats_per_token = total / static_cast<double>(result.n_scored);
  return result;
}

}  // namespace bitnet
