#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <exception>

#include "cache_file.h"
namespace bitnet {
namespace {

// Tokens of a batch that computes prompts while others generate: they wait for it, so it is short.
constexpr size_t kSharedBatch = 32;

size_t shared_prefix(std::span<const TokenId> a, std::span<const TokenId> b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace

Scheduler::Scheduler(Engine& engine, Guesses guesses)
    : engine_(engine), logits_(engine.config().n_vocab), guesses_(guesses) {
  for (size_t i = 0; i < engine.n_parallel; i++) slots_.push_back(std::make_unique<Slot>(engine));
}

Scheduler::Ticket Scheduler::submit(std::shared_ptr<const Completion> request,
                                    std::shared_ptr<CompletionObserver> observer) {
  if (request->prompt.size() + (request->n_predict == 0 ? 0 : 1) > engine_.n_ctx)
    throw ContextExceeded(request->prompt.size(), engine_.n_ctx);
  const Ticket ticket = ++last_ticket_;
  requests_[ticket] = {std::move(request), std::move(observer)};
  return ticket;
}

void Scheduler::cancel(Ticket ticket) {
  if (const auto it = requests_.find(ticket); it != requests_.end()) end(ticket, it->second, StopType::kCancelled);
}

void Scheduler::answer(Ticket ticket, size_t index, MaskAnswer answer) {
  const auto it = requests_.find(ticket);
  if (it == requests_.end()) return;
  guarded(ticket, [&] {
    if (index >= it->second.n_begun)
      throw RequestError("invalid_request", "index", "index: completion " + std::to_string(index) + " has not begun");
    for_each_running(ticket, [&](Sequence& sequence) {
      if (sequence.index() == index) sequence.answer(std::move(answer));
    });
  });
}

void Scheduler::fail(Ticket ticket, const std::exception& error) {
  const auto it = requests_.find(ticket);
  if (it == requests_.end() || it->second.failed) return;
  Request& request = it->second;
  request.failed = true;
  request.n_over += request.n_left();
  request.n_begun = request.completion->n;
  for_each_running(ticket, [](Sequence& sequence) { sequence.drop(); });
  request.observer->on_error(error);
}

void Scheduler::fail_waiting(const std::exception& error) {
  for (const auto& slot : slots_)
    if (slot->runs() && slot->sequence->waits_for_mask()) fail(slot->ticket, error);
}

std::optional<Clock::time_point> Scheduler::next_deadline() const {
  std::optional<Clock::time_point> next;
  for (const auto& [ticket, request] : requests_)
    if (const auto& deadline = request.completion->deadline) next = next ? std::min(*next, *deadline) : *deadline;
  return next;
}

bool Scheduler::step(const std::function<void()>& poll) {
  n_steps_++;
  if (poll) poll();
  expire();
  for (const auto& slot : slots_)
    if (slot->runs() && !slot->sequence->in_prompt()) guarded(slot->ticket, [&] { draw(*slot); });
  const bool ended = settle();
  admit();
  const std::vector<Slot*> slots = plan();
  try {
    if (!slots.empty()) compute(slots, poll);
  } catch (const std::exception& e) {  // no memory for the batch
    for (const Slot* slot : slots) fail(slot->ticket, e);
  }
  settle();
  return ended || !slots.empty();
}

// f(sequence) for the completions of a request that are not over.
template <class F>
void Scheduler::for_each_running(Ticket ticket, F&& f) {
  for (const auto& slot : slots_)
    if (slot->ticket == ticket && slot->runs()) f(*slot->sequence);
}

// What goes wrong in f is the end of this request and of no other.
template <class F>
void Scheduler::guarded(Ticket ticket, F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    fail(ticket, e);
  }
}

void Scheduler::expire() {
  std::optional<Clock::time_point> now;
  for (auto& [ticket, request] : requests_) {
    if (!request.completion->deadline) continue;
    if (!now) now = Clock::now();
    if (*now >= *request.completion->deadline) end(ticket, request, StopType::kDeadline);
  }
}

// Ends the completions of a request that run, and those that have not begun.
void Scheduler::end(Ticket ticket, Request& request, StopType type) {
  guarded(ticket, [&] {
    for_each_running(ticket, [&](Sequence& sequence) { sequence.finish(type); });
    while (request.n_left() > 0) {
      const size_t index = request.n_begun++;
      request.n_over++;
      request.observer->on_done(index, Sequence::not_begun(*request.completion, index, type));
    }
  });
}

// Gives free what is over, if anything is. Not while something computes: slots and requests are in use then.
bool Scheduler::settle() {
  for (const auto& slot : slots_) {
    if (!slot->sequence || !slot->sequence->over()) continue;
    slot->tokens.resize(std::min(slot->tokens.size(), slot->sequence->history().size()));  // no guesses
    slot->sequence.reset();
    slot->n_outputs = slot->n_used = 0;
    slot->last_used = n_steps_;
    Request& request = requests_.at(slot->ticket);
    request.n_over++;
    request.prompt_known = true;
  }
  return std::erase_if(requests_, [](const auto& entry) { return entry.second.n_over == entry.second.completion->n; }) >
         0;
}

// In the order of their arrival. The completions of one prompt wait until the first has computed it.
void Scheduler::admit() {
  const auto is_free = [](const auto& slot) { return slot->sequence == nullptr; };
  for (auto& [ticket, request] : requests_)
    while (request.n_left() > 0 && (request.n_begun == 0 || request.prompt_known)) {
      if (std::none_of(slots_.begin(), slots_.end(), is_free)) return;
      guarded(ticket, [&] { begin(ticket, request); });
    }
}

void Scheduler::begin(Ticket ticket, Request& request) {
  Slot& slot = take_slot(ticket, *request.completion);
  CacheFileUse use;
  if (request.n_begun == 0) use = restore_prompt(slot, *request.completion);
  slot.sequence = std::make_unique<Sequence>(request.completion, request.n_begun, slot.tokens.size(), use, engine_,
                                             *request.observer);
  slot.ticket = ticket;
  slot.draft.clear();
  request.n_begun++;
}

// A free slot, with as much of the prompt in its cache as any slot has, but for the last token: its logits are needed.
Scheduler::Slot& Scheduler::take_slot(Ticket ticket, const Completion& completion) {
  const std::span<const TokenId> prompt(completion.prompt);
  const bool reuse = completion.cache_prompt && !completion.prompt_logprobs;  // which need all outputs
  Slot* donor = nullptr;
  size_t n_shared = 0;
  for (const auto& slot : slots_) {
    if (!reuse && slot->ticket != ticket) continue;
    const size_t n = std::min(shared_prefix(slot->tokens, prompt), prompt.size() - 1);
    if (n > n_shared) {
      donor = slot.get();
      n_shared = n;
    }
  }
  Slot* target = nullptr;
  if (donor && !donor->sequence && donor->tokens.size() == n_shared) {
    target = donor;
  } else {  // what it has beyond that is worth more than a copy costs
    for (const auto& slot : slots_)
      if (!slot->sequence &&
          (!target || target == donor || (slot.get() != donor && slot->last_used < target->last_used)))
        target = slot.get();
    if (target != donor) {
      target->tokens.clear();
      if (donor) target->cache.copy_prefix(donor->cache, n_shared);
    }
  }
  target->tokens.assign(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(n_shared));
  return *target;
}

// Takes the prompt's keys and values from its cache file, where that has more of them than the slot.
CacheFileUse Scheduler::restore_prompt(Slot& slot, const Completion& completion) {
  const std::string& path = completion.cache_file;
  CacheFileUse use;
  if (path.empty() || completion.prompt_logprobs || !CacheFile::exists(path)) return use;
  try {
    CacheFile file(path, engine_.model, slot.cache);
    const std::span<const TokenId> prompt(completion.prompt);
    const size_t n = std::min(shared_prefix(file.tokens(), prompt), prompt.size() - 1);
    if (n <= slot.tokens.size()) return use;
    slot.tokens.clear();
    file.restore(slot.cache);
    slot.tokens.assign(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(n));
    use.restored = true;
  } catch (const Error& e) {
    std::fprintf(stderr, "bitnet: %s\n", e.what());
    use.invalid = true;
  }
  return use;
}

// Writes the prompt's keys and values to its cache file, unless that has them; whether it did.
bool Scheduler::save_prompt(const Slot& slot) {
  const Sequence& sequence = *slot.sequence;
  const Completion& completion = sequence.request();
  const std::string& path = completion.cache_file;
  if (!completion.cache_save || sequence.index() > 0) return false;
  try {
    if (!sequence.cache_file().invalid && CacheFile::exists(path)) {
      const CacheFile file(path, engine_.model, slot.cache);
      if (std::equal(file.tokens().begin(), file.tokens().end(), completion.prompt.begin(), completion.prompt.end()))
        return false;
    }
  } catch (const Error&) {
    // of no use: it is overwritten
  }
  try {
    CacheFile::save(path, engine_.model, slot.cache, completion.prompt);
    return true;
  } catch (const Error& e) {
    std::fprintf(stderr, "bitnet: %s\n", e.what());
    return false;
  }
}

// Takes the tokens that the last batch, or a mask, has made known.
void Scheduler::draw(Slot& slot) {
  Sequence& sequence = *slot.sequence;
  const Clock::time_point start = Clock::now();
  while (!sequence.over() && !sequence.waits_for_mask()) {
    const bool has_output = slot.n_used < slot.n_outputs;
    if (!has_output) {
      const std::optional<TokenId> forced = sequence.forced();
      if (!forced || sequence.request().wants_probabilities()) break;  // which only its output tells
      sequence.accept(*forced);
      continue;
    }
    draw_one(sequence, slot.first_output + slot.n_used);
    const TokenId token = sequence.history().back();
    if (!sequence.over() && slot.n_used < slot.draft.size() && slot.draft[slot.n_used] == token) {
      slot.n_used++;
      sequence.guessed_right();
      continue;
    }
    if (!slot.draft.empty()) sequence.learn(slot.draft.size(), slot.n_used);
    if (pass_timed_ && !sequence.request().mask)
      budget_.weigh(pass_share_s_ + seconds_since(start), n_in_pass_, slot.draft.size(), slot.n_used);
    slot.n_outputs = slot.n_used = 0;
    slot.tokens.resize(
        std::min(slot.tokens.size(), sequence.history().size() - 1));  // without what was guessed wrongly
  }
}

// The next token of a sequence, from one of the transformer's outputs.
void Scheduler::draw_one(Sequence& sequence, size_t which) {
  const Completion& request = sequence.request();
  const bool tells = request.wants_probabilities(), tells_model = tells && !request.post_sampling_probs;
  const std::optional<TokenId> forced = sequence.forced();
  Sampler& sampler = sequence.sampler();
  const size_t wanted = sampler.prepare(sequence.history());
  const bool needs_all = tells_model || (!forced && wanted == 0);
  if (needs_all) engine_.transformer.output().logits(logits_.data(), which);
  TokenId token;
  if (forced) {
    token = *forced;
  } else {
    const std::span<const uint64_t> allowed = sequence.allowed();
    std::vector<Candidate> candidates =
        needs_all ? candidates_of(logits_, allowed) : engine_.transformer.output().best(which, wanted, allowed);
    if (candidates.empty()) throw RequestError("invalid_request", "logit_bias", "logit_bias: no token may be drawn");
    token = sampler.sample(std::move(candidates));
  }
  if (!tells) return sequence.accept(token);
  if (tells_model) return sequence.accept(token, log_probability(logits_, token, request.n_probs));
  if (forced) return sequence.accept(token, TokenProbability{{token, 1.0}, {}});
  TokenProbability probability{{token, 0.0}, {}};
  for (size_t i = 0; i < sampler.candidates().size(); i++) {
    const TokenProbability::Entry entry{sampler.candidates()[i].token, sampler.probabilities()[i]};
    if (entry.token == token) probability.chosen = entry;
    if (i < request.n_probs) probability.best.push_back(entry);
  }
  sequence.accept(token, std::move(probability));
}

// Which slots take part in the next batch, and with what. Everybody gets one token, in turn where there is no room for
// all; what room is left goes to prompts, in equal shares, or else to guesses.
std::vector<Scheduler::Slot*> Scheduler::plan() {
  const size_t max_batch = engine_.transformer.max_batch();
  std::vector<Slot*> slots, long_ones;
  for (size_t i = 0; i < slots_.size() && slots.size() < max_batch; i++) {
    Slot& slot = *slots_[(i + n_steps_) % slots_.size()];
    if (!slot.runs() || slot.n_outputs > 0) continue;
    if (slot.n_pending() == 0) {  // its outputs were lost while it waited for a mask
      if (slot.sequence->waits_for_mask()) continue;
      slot.tokens.pop_back();
    }
    slot.n_next = 1;
    slot.draft.clear();
    slots.push_back(&slot);
    if (slot.n_pending() > 1) long_ones.push_back(&slot);
  }
  if (long_ones.empty()) {
    const size_t each = (engine_.max_draft() + 1) / std::max<size_t>(slots.size(), 1);
    const bool may_guess = guesses_ == Guesses::kAlways || budget_.allows(slots.size());
    for (Slot* slot : slots)
      if (each > 1 && !slot->sequence->in_prompt()) slot->draft = slot->sequence->propose(each - 1, may_guess);
    return slots;
  }
  const size_t size = long_ones.size() < slots.size() ? std::min(kSharedBatch, max_batch) : max_batch;
  size_t room = size - std::min(size, slots.size());
  std::stable_sort(long_ones.begin(), long_ones.end(),
                   [](const Slot* a, const Slot* b) { return a->n_pending() < b->n_pending(); });
  for (size_t i = 0; i < long_ones.size(); i++) {  // what a short one leaves goes to the longer ones
    const size_t share = (room + long_ones.size() - i - 1) / (long_ones.size() - i);
    const size_t n = std::min(share, long_ones[i]->n_pending() - 1);
    long_ones[i]->n_next += n;
    room -= n;
  }
  return slots;
}

void Scheduler::compute(const std::vector<Slot*>& slots, const std::function<void()>& poll) {
  std::vector<BatchToken> batch;
  for (const auto& slot : slots_) slot->n_outputs = slot->n_used = 0;
  for (Slot* slot : slots) {
    const std::span<const TokenId> history = slot->sequence->history();
    const bool tells = slot->sequence->tells_prompt();
    const auto add = [&](TokenId token, size_t position) {
      batch.push_back({token, static_cast<uint32_t>(position), &slot->cache, tells || position + 1 >= history.size()});
    };
    const size_t first = slot->tokens.size();
    for (size_t i = 0; i < slot->n_next; i++) add(history[first + i], first + i);
    for (size_t i = 0; i < slot->draft.size(); i++) add(slot->draft[i], history.size() + i);
  }
  const auto abandoned = [&] {
    if (poll) poll();
    expire();
    return std::none_of(slots.begin(), slots.end(), [](const Slot* slot) { return slot->runs(); });
  };
  const Clock::time_point start = Clock::now();
  pass_timed_ = false;
  if (!engine_.transformer.forward(batch, abandoned)) return;
  pass_timed_ = std::all_of(slots.begin(), slots.end(), [](const Slot* slot) { return slot->n_next == 1; });
  n_in_pass_ = slots.size();
  pass_share_s_ = seconds_since(start) / static_cast<double>(n_in_pass_);
  size_t n_outputs = 0;
  for (Slot* slot : slots) {
    const std::span<const TokenId> computed = slot->sequence->history().subspan(slot->tokens.size(), slot->n_next);
    if (slot->sequence->tells_prompt()) {
      guarded(slot->ticket, [&] { tell_prompt(*slot, n_outputs, abandoned); });
      n_outputs += slot->n_next - (computed.size() == slot->n_pending() ? 1 : 0);
    }
    slot->tokens.insert(slot->tokens.end(), computed.begin(), computed.end());
    if (slot->n_pending() > 0) continue;
    slot->tokens.insert(slot->tokens.end(), slot->draft.begin(), slot->draft.end());
    slot->first_output = n_outputs;
    slot->n_outputs = 1 + slot->draft.size();
    n_outputs += slot->n_outputs;
    if (!slot->sequence->in_prompt()) continue;
    requests_.at(slot->ticket).prompt_known = true;
    if (slot->runs()) guarded(slot->ticket, [&] { slot->sequence->end_prompt(save_prompt(*slot)); });
  }
}

// How probable the model found the prompt's tokens that follow those of the batch.
void Scheduler::tell_prompt(Slot& slot, size_t first_output, const std::function<bool()>& abandoned) {
  Sequence& sequence = *slot.sequence;
  const std::span<const TokenId> next = sequence.history().subspan(slot.tokens.size() + 1);
  for (size_t i = 0; i < std::min(slot.n_next, next.size()); i++) {
    if (abandoned() || sequence.over()) return;
    engine_.transformer.output().logits(logits_.data(), first_output + i);
    sequence.add_prompt_probability(log_probability(logits_, next[i], sequence.request().n_probs));
  }
}

namespace {

class Collector : public CompletionObserver {
 public:
  using OnPiece = std::function<void(std::string_view text, std::span<const TokenId> tokens)>;

  Collector(size_t n, const OnPiece& on_piece) : results(n), on_piece_(on_piece) {}
  void on_piece(size_t, std::string_view text, std::span<const TokenId> tokens,
                std::span<const TokenProbability>) override {
    if (on_piece_) on_piece_(text, tokens);
  }
  void on_mask(size_t, std::span<const TokenId>) override {}
  void on_done(size_t index, const CompletionResult& result) override { results[index] = result; }
  void on_error(const std::exception&) override { error = std::current_exception(); }

  std::vector<CompletionResult> results;
  std::exception_ptr error;

 private:
  const OnPiece& on_piece_;
};

}  // namespace

std::vector<CompletionResult> complete(
    Scheduler& scheduler, const Completion& request,
    const std::function<void(std::string_view text, std::span<const TokenId> tokens)>& on_piece) {
  const auto collector = std::make_shared<Collector>(request.n, on_piece);
  scheduler.submit(std::make_shared<const Completion>(request), collector);
  while (!scheduler.idle()) scheduler.step();
  if (collector->error) std::rethrow_exception(collector->error);
  return std::move(collector->results);
}

}  // namespace bitnet
