// One running completion: what it has, what it waits for, what it shows. Computes nothing and knows nothing of JSON.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "clock.h"
#include "draft.h"
#include "engine.h"
#include "error.h"
#include "sampler.h"
#include "text_stream.h"

namespace bitnet {

// What is asked for: one prompt, continued n times.
struct Completion {
  std::vector<TokenId> prompt;
  size_t n = 1;             // completions; number i draws with seed + i
  int32_t n_predict = 128;  // −1: until the context is full
  SamplingParams sampling;
  std::vector<std::string> stop;  // empty strings are ignored
  bool ignore_eos = false;
  bool cache_prompt = true;
  bool speculate = true;                     // guess ahead and check; changes no result
  bool mask = false;                         // every token waits for a MaskAnswer
  std::vector<TokenId> banned;               // never chosen
  bool logprobs = false;                     // tell how probable each token was, …
  size_t n_probs = 0;                        // … and the best of its rivals
  bool post_sampling_probs = false;          // by the distribution that it was drawn from, not the model's
  bool prompt_logprobs = false;              // the same of the prompt's tokens, by the model's
  std::chrono::milliseconds max_predict{0};  // after this and a line's end generation stops; 0: it goes on
  std::string cache_file;                    // where the prompt's keys and values may be; empty: nowhere
  bool cache_save = false;                   // and are to be afterwards
  std::optional<Clock::time_point> deadline;

  bool wants_probabilities() const { return logprobs || n_probs > 0; }
};

// Which token may come next.
struct MaskAnswer {
  std::optional<std::vector<uint64_t>> allowed;  // token t is bit t mod 64 of word t / 64; none: every token
  std::vector<TokenId> forced;                   // not empty: these follow without a choice
  bool stop = false;                             // none: the text is complete
};

enum class StopType { kEos, kLimit, kWord, kDeadline, kCancelled };
std::string_view name_of(StopType type);

// What became of Completion::cache_file.
struct CacheFileUse {
  bool restored = false, saved = false;
  bool invalid = false;  // it was there, but of no use
};

struct CompletionResult {
  std::string content;
  std::vector<TokenId> tokens;                         // everything generated, an end-of-generation token included
  std::vector<TokenProbability> probabilities;         // of the tokens, where wanted
  std::vector<TokenProbability> prompt_probabilities;  // of those of the prompt but the first, where wanted
  StopType stop_type = StopType::kLimit;
  std::string stopping_word;
  bool truncated = false;  // the context was full before n_predict
  size_t n_prompt = 0;     // tokens of the prompt
  size_t n_cached = 0;     // of them, taken from a cache
  CacheFileUse cache_file;
  size_t n_drafted = 0;   // tokens guessed ahead
  size_t n_accepted = 0;  // of them, right
  uint64_t seed = 0;
  double prompt_ms = 0.0;
  double predicted_ms = 0.0;
};

// The prompt has more tokens than the context can hold together with one generated token.
class ContextExceeded : public Error {
 public:
  ContextExceeded(size_t prompt, size_t ctx);
  size_t n_prompt, n_ctx;
};

// A request that cannot be served; becomes an error event.
class RequestError : public std::runtime_error {
 public:
  RequestError(std::string code, std::string field, const std::string& message)
      : std::runtime_error(message), code(std::move(code)), field(std::move(field)) {}
  std::string code;   // invalid_json, invalid_request
  std::string field;  // empty when no field is to blame
};

// Hears what becomes of one request. `index` counts its completions from 0. After on_done for each of them, or one
// on_error, nothing more comes.
class CompletionObserver {
 public:
  virtual ~CompletionObserver() = default;
  // A piece of text (whole UTF-8 characters, never empty) and the tokens generated since the piece before, with their
  // probabilities where wanted.
  virtual void on_piece(size_t index, std::string_view text, std::span<const TokenId> tokens,
                        std::span<const TokenProbability> probabilities) = 0;
  // A mask is needed for the token after these: those generated since the last time.
  virtual void on_mask(size_t index, std::span<const TokenId> tokens) = 0;
  virtual void on_done(size_t index, const CompletionResult& result) = 0;
  virtual void on_error(const std::exception& error) = 0;
};

class Sequence {
 public:
  // `engine` and `observer` must outlive the sequence. `n_cached` tokens of the prompt need not be computed.
  Sequence(std::shared_ptr<const Completion> request, size_t index, size_t n_cached, CacheFileUse cache_file,
           const Engine& engine, CompletionObserver& observer);

  const Completion& request() const { return *request_; }
  const CacheFileUse& cache_file() const { return result_.cache_file; }
  size_t index() const { return index_; }
  std::span<const TokenId> history() const { return history_; }  // the prompt and what was generated after it
  bool over() const { return over_; }
  bool in_prompt() const { return in_prompt_; }
  bool tells_prompt() const { return in_prompt_ && index_ == 0 && request_->prompt_logprobs; }
  void end_prompt(bool saved);  // it has been computed, and saved in its cache file

  // What follows without a choice, or else, if it may, guesses at what follows the history, `most` at the most.
  std::vector<TokenId> propose(size_t most, bool may_guess);
  void guessed_right() { result_.n_accepted += !request_->mask; }  // the token accepted last
  void learn(size_t n_drafted, size_t n_accepted) { drafter_.learn(n_drafted, n_accepted); }

  // What stands between the logits and the next token.
  bool waits_for_mask() const { return mask_state_ == MaskState::kAsked; }
  void answer(MaskAnswer answer);  // RequestError where none was asked for
  std::optional<TokenId> forced() const;
  std::span<const uint64_t> allowed() const { return allowed_; }  // a bit for each token, or empty: every token
  Sampler& sampler() { return sampler_; }

  void accept(TokenId token, std::optional<TokenProbability> probability = {});  // the next one
  void add_prompt_probability(TokenProbability p) { result_.prompt_probabilities.push_back(std::move(p)); }
  void finish(StopType type);  // tells the observer; the sequence is over
  void drop() { over_ = true; }

  static CompletionResult not_begun(const Completion& request, size_t index, StopType type);

 private:
  enum class MaskState { kNone, kAsked, kAnswered };

  size_t room() const { return engine_.n_ctx - request_->prompt.size(); }
  bool has_taken_long() const;
  void show(bool all);
  void ask_for_mask();

  std::shared_ptr<const Completion> request_;
  size_t index_;
  const Engine& engine_;
  CompletionObserver& observer_;
  size_t limit_;  // tokens to generate at most
  CompletionResult result_;
  std::vector<TokenId> history_;
  TextStream stream_;
  Sampler sampler_;
  Drafter drafter_;
  bool in_prompt_ = true;
  bool over_ = false;
  size_t n_shown_ = 0;   // tokens
  size_t n_masked_ = 0;  // tokens that the mask's owner knows
  MaskState mask_state_ = MaskState::kNone;
  std::deque<TokenId> forced_;
  std::vector<uint64_t> choosable_;  // whatever the mask; empty: all
  std::vector<uint64_t> allowed_;    // of them, those of the mask
  Clock::time_point start_, prompt_end_;
};

}  // namespace bitnet
