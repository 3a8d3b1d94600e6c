// One conversation with the model: prompt in, text out, with the KV cache kept from one prompt to the next. Knows
// nothing of JSON.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"
#include "error.h"
#include "kv_cache.h"
#include "sampler.h"

namespace bitnet {

using Clock = std::chrono::steady_clock;

struct Completion {
  std::vector<TokenId> prompt;
  int32_t n_predict = 128;  // −1: until the context is full
  SamplingParams sampling;
  std::vector<std::string> stop;  // empty strings are ignored
  bool ignore_eos = false;
  bool cache_prompt = true;
  bool speculate = true;  // guess ahead and check; changes no result
  std::optional<Clock::time_point> deadline;
};

enum class StopType { kEos, kLimit, kWord, kDeadline, kCancelled };
std::string_view name_of(StopType type);

struct CompletionResult {
  std::string content;
  std::vector<TokenId> tokens;  // everything generated, an end-of-generation token included
  StopType stop_type = StopType::kLimit;
  std::string stopping_word;
  bool truncated = false;  // the context was full before n_predict
  size_t n_prompt = 0;     // tokens of the prompt
  size_t n_cached = 0;     // of them, taken from the cache
  size_t n_drafted = 0;    // tokens guessed ahead
  size_t n_accepted = 0;   // of them, right
  double prompt_ms = 0.0;
  double predicted_ms = 0.0;
};

// The prompt has more tokens than the context can hold together with one generated token.
class ContextExceeded : public Error {
 public:
  ContextExceeded(size_t prompt, size_t ctx);
  size_t n_prompt, n_ctx;
};

class Session {
 public:
  explicit Session(Engine& engine);

  // A piece of text (whole UTF-8 characters, never empty) and the tokens generated since the piece before.
  using OnPiece = std::function<void(std::string_view text, std::span<const TokenId> tokens)>;

  // `cancelled` is asked before every token and, in the prompt, before every layer.
  CompletionResult complete(const Completion& request, const OnPiece& on_piece, const std::function<bool()>& cancelled);

  // Computes the tokens after those already cached, in batches; false when it was abandoned. The transformer then has
  // the outputs of the last n_outputs tokens, all of which must fit into one batch.
  bool evaluate(std::span<const TokenId> tokens, const std::function<bool()>& abandon = {}, size_t n_outputs = 1);
  void truncate(size_t n_tokens);  // forgets the positions from n_tokens on
  size_t n_cached() const { return cached_.size(); }

 private:
  // From the transformer's output number `which`.
  TokenId next_token(Sampler& sampler, size_t which, std::span<const TokenId> history);

  Engine& engine_;
  KvCache cache_;
  std::vector<TokenId> cached_;  // the tokens whose keys and values are in the cache
  std::vector<float> logits_;    // (n_vocab)
};

// The model's chat template around one user turn (docs/architecture.md, "Text"): ids, BOS included.
std::vector<TokenId> chat_prompt(const Tokenizer& tokenizer, std::string_view user);

// Text → prompt ids: BOS in front where asked for and not there yet.
std::vector<TokenId> text_prompt(const Tokenizer& tokenizer, std::string_view text, bool add_bos, bool parse_special);

}  // namespace bitnet
