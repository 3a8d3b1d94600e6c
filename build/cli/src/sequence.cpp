#include "sequence.h"

#include <algorithm>
#include <limits>

namespace bitnet {
namespace {

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

// Of the completion of that index; what a request may ask for, since clients write it back.
uint64_t seed_of(const SamplingParams& params, size_t index) {
  return (params.seed + index) & static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

SamplingParams with_seed(SamplingParams params, size_t index) {
  params.seed = seed_of(params, index);
  return params;
}

size_t max_draft(const Completion& request, const Engine& engine) {
  if (!request.speculate || request.mask) return 0;
  return engine.max_draft();
}

std::vector<TokenId> banned_tokens(const Completion& request, const Tokenizer& tokenizer) {
  std::vector<TokenId> banned = request.banned;
  const std::span<const TokenId> ends = tokenizer.end_of_generation();
  if (request.ignore_eos) banned.insert(banned.end(), ends.begin(), ends.end());
  return banned;
}

// Bits of all tokens but these; empty when there are none.
std::vector<uint64_t> all_but(std::span<const TokenId> tokens, size_t n_vocab) {
  if (tokens.empty()) return {};
  std::vector<uint64_t> bits((n_vocab + 63) / 64, ~uint64_t{0});
  for (const TokenId token : tokens) bits[static_cast<size_t>(token) / 64] &= ~(uint64_t{1} << token % 64);
  return bits;
}

}  // namespace

std::string_view name_of(StopType type) {
  switch (type) {
    case StopType::kEos:
      return "eos";
    case StopType::kLimit:
      return "limit";
    case StopType::kWord:
      return "word";
    case StopType::kDeadline:
      return "deadline";
    case StopType::kCancelled:
      break;
  }
  return "cancelled";
}

ContextExceeded::ContextExceeded(size_t prompt, size_t ctx)
    : Error(ExitCode::kContextExceeded, "the prompt has " + std::to_string(prompt) +
                                            " tokens and exceeds the available context size of " +  // llama.cpp's words
                                            std::to_string(ctx) + " tokens, which the generated ones are part of"),
      n_prompt(prompt),
      n_ctx(ctx) {}

Sequence::Sequence(std::shared_ptr<const Completion> request, size_t index, size_t n_cached, CacheFileUse cache_file,
                   const Engine& engine, CompletionObserver& observer)
    : request_(std::move(request)),
      index_(index),
      engine_(engine),
      observer_(observer),
      limit_(request_->n_predict < 0 ? room() : std::min(room(), static_cast<size_t>(request_->n_predict))),
      result_(not_begun(*request_, index, StopType::kLimit)),
      history_(request_->prompt),
      stream_(request_->stop),
      sampler_(with_seed(request_->sampling, index), engine.config().n_vocab),
      drafter_(max_draft(*request_, engine)),
      choosable_(all_but(banned_tokens(*request_, engine.tokenizer), engine.config().n_vocab)),
      allowed_(choosable_),
      start_(Clock::now()) {
  result_.n_cached = n_cached;
  result_.cache_file = cache_file;
  n_masked_ = history_.size();
  if (request_->mask && limit_ > 0) ask_for_mask();
}

CompletionResult Sequence::not_begun(const Completion& request, size_t index, StopType type) {
  CompletionResult result;
  result.stop_type = type;
  result.n_prompt = request.prompt.size();
  result.seed = seed_of(request.sampling, index);
  return result;
}

void Sequence::end_prompt(bool saved) {
  in_prompt_ = false;
  result_.cache_file.saved = saved;
  prompt_end_ = Clock::now();
  result_.prompt_ms = ms_between(start_, prompt_end_);
  if (limit_ == 0) finish(StopType::kLimit);
}

std::vector<TokenId> Sequence::propose(size_t most, bool may_guess) {
  most = std::min(most, limit_ - result_.tokens.size() - 1);
  if (!forced_.empty())
    return {forced_.begin(), forced_.begin() + static_cast<std::ptrdiff_t>(std::min(most, forced_.size()))};
  if (!may_guess) return {};
  std::vector<TokenId> draft = drafter_.propose(history_, most);
  result_.n_drafted += draft.size();
  return draft;
}

void Sequence::ask_for_mask() {
  mask_state_ = MaskState::kAsked;
  observer_.on_mask(index_, std::span<const TokenId>(history_).subspan(n_masked_));
  n_masked_ = history_.size();
}

void Sequence::answer(MaskAnswer answer) {
  if (over_) return;  // it ended while the answer was on its way
  if (!waits_for_mask())
    throw RequestError("invalid_request", "index",
                       "index: completion " + std::to_string(index_) + " needs no mask now");
  mask_state_ = MaskState::kAnswered;
  if (answer.stop) return finish(StopType::kEos);
  forced_.assign(answer.forced.begin(), answer.forced.end());
  allowed_ = choosable_;
  if (!answer.allowed || !forced_.empty()) return;
  if (allowed_.empty()) {
    allowed_ = std::move(*answer.allowed);
  } else {
    for (size_t i = 0; i < allowed_.size(); i++) allowed_[i] &= (*answer.allowed)[i];
  }
  if (std::all_of(allowed_.begin(), allowed_.end(), [](uint64_t word) { return word == 0; }))
    throw RequestError("invalid_request", "allow", "allow: no token may be drawn");
}

std::optional<TokenId> Sequence::forced() const {
  return forced_.empty() ? std::nullopt : std::optional<TokenId>(forced_.front());
}

void Sequence::accept(TokenId token, std::optional<TokenProbability> probability) {
  if (!forced_.empty()) forced_.pop_front();
  result_.tokens.push_back(token);
  if (probability) result_.probabilities.push_back(std::move(*probability));
  history_.push_back(token);
  const std::span<const TokenId> end_tokens = engine_.tokenizer.end_of_generation();
  if (std::binary_search(end_tokens.begin(), end_tokens.end(), token)) return finish(StopType::kEos);
  if (stream_.push(engine_.tokenizer.decode(token, false))) return finish(StopType::kWord);
  show(false);
  if (result_.tokens.size() == limit_ || has_taken_long()) return finish(StopType::kLimit);
  if (request_->mask && forced_.empty()) ask_for_mask();
}

bool Sequence::has_taken_long() const {
  return request_->max_predict.count() > 0 && stream_.text().find('\n') != std::string::npos &&
         Clock::now() - prompt_end_ > request_->max_predict;
}

void Sequence::show(bool all) {
  const std::string_view piece = stream_.take(all);
  if (piece.empty()) return;
  const std::span<const TokenProbability> probabilities(result_.probabilities);
  observer_.on_piece(index_, piece, std::span<const TokenId>(result_.tokens).subspan(n_shown_),
                     probabilities.subspan(std::min(n_shown_, probabilities.size())));
  n_shown_ = result_.tokens.size();
}

void Sequence::finish(StopType type) {
  over_ = true;
  if (in_prompt_)
    result_.prompt_ms = ms_between(start_, Clock::now());
  else
    result_.predicted_ms = ms_between(prompt_end_, Clock::now());
  if (type != StopType::kWord && stream_.finish()) type = StopType::kWord;
  result_.stop_type = type;
  show(true);
  result_.content = stream_.text();
  if (type == StopType::kWord) result_.stopping_word = stream_.stopping_word();
  result_.truncated = type == StopType::kLimit && result_.tokens.size() == room() &&
                      (request_->n_predict < 0 || static_cast<size_t>(request_->n_predict) > room());
  observer_.on_done(index_, result_);
}

}  // namespace bitnet
