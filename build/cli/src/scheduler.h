// Many completions at once: requests in, observers told. Each step reads the weights once, for one token of every
// completion that generates, its guesses, and some tokens of every prompt. What a completion gets never depends on what
// runs beside it. Knows nothing of JSON and has no threads of its own.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "draft.h"
#include "engine.h"
#include "kv_cache.h"
#include "sequence.h"

namespace bitnet {

class Scheduler {
 public:
  explicit Scheduler(Engine& engine, Guesses guesses = Guesses::kWhereTheyPay);

  using Ticket = uint64_t;

  // Queues a request; `observer` is kept until it is over. Throws ContextExceeded.
  Ticket submit(std::shared_ptr<const Completion> request, std::shared_ptr<CompletionObserver> observer);

  // Of a request that may be over already: then nothing happens.
  void cancel(Ticket ticket);
  void answer(Ticket ticket, size_t index, MaskAnswer answer);
  void fail(Ticket ticket, const std::exception& error);  // it ends with on_error

  // Goes on with everything by one token or some. `poll` brings in what is new, by the calls above; it is asked first
  // and, while something computes, before every layer. False when there was nothing to do: until somebody calls.
  bool step(const std::function<void()>& poll = {});

  bool idle() const { return requests_.empty(); }
  std::optional<Clock::time_point> next_deadline() const;
  void fail_waiting(const std::exception& error);  // all that wait for a mask

 private:
  struct Request {
    std::shared_ptr<const Completion> completion;
    std::shared_ptr<CompletionObserver> observer;
    size_t n_begun = 0;  // completions that have or had a slot
    size_t n_over = 0;
    bool prompt_known = false;  // the first completion has computed it, or is over
    bool failed = false;

    size_t n_left() const { return completion->n - n_begun; }
  };

  // Room for one completion. `tokens` are those whose keys and values are in the cache; they stay for the next one.
  struct Slot {
    explicit Slot(const Engine& engine) : cache(engine.config(), engine.n_ctx, engine.kv_type) {}

    KvCache cache;
    std::vector<TokenId> tokens;
    std::unique_ptr<Sequence> sequence;
    Ticket ticket = 0;
    uint64_t last_used = 0;
    size_t n_next = 0;                       // tokens of the history in the next batch
    std::vector<TokenId> draft;              // what follows them there
    size_t first_output = 0, n_outputs = 0;  // the transformer's, of the history's last token and the draft
    size_t n_used = 0;                       // of them, those drawn from

    bool runs() const { return sequence && !sequence->over(); }
    size_t n_pending() const { return sequence->history().size() - tokens.size(); }
  };

  void expire();
  void end(Ticket ticket, Request& request, StopType type);
  bool settle();
  void admit();
  void begin(Ticket ticket, Request& request);
  Slot& take_slot(Ticket ticket, const Completion& completion);
  CacheFileUse restore_prompt(Slot& slot, const Completion& completion);
  bool save_prompt(const Slot& slot);
  void draw(Slot& slot);
  void draw_one(Sequence& sequence, size_t which);
  void tell_prompt(Slot& slot, size_t first_output, const std::function<bool()>& abandoned);
  std::vector<Slot*> plan();
  void compute(const std::vector<Slot*>& slots, const std::function<void()>& poll);
  template <class F>
  void for_each_running(Ticket ticket, F&& f);
  template <class F>
  void guarded(Ticket ticket, F&& f);

  Engine& engine_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::map<Ticket, Request> requests_;  // in the order of their arrival
  Ticket last_ticket_ = 0;
  uint64_t n_steps_ = 0;
  std::vector<float> logits_;  // (n_vocab)

  // What the last pass took for each of its slots.
  const Guesses guesses_;
  GuessBudget budget_;
  bool pass_timed_ = false;  // the last one, which was not for prompts
  double pass_share_s_ = 0.0;
  size_t n_in_pass_ = 0;
};

// One request from its beginning to its end, when nothing else is asked for. Throws what it ends with.
std::vector<CompletionResult> complete(
    Scheduler& scheduler, const Completion& request,
    const std::function<void(std::string_view text, std::span<const TokenId> tokens)>& on_piece = {});

}  // namespace bitnet
