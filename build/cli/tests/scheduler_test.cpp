// Many completions at once on the demo model: what each of them gets, when, and how it ends.
#include "scheduler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>

#include "engine.h"
#include "prompt.h"

using namespace bitnet;

namespace {

EngineOptions options(size_t n_parallel, size_t batch_size = 128, Isa isa = best_isa()) {
  EngineOptions o;
  o.model_path = BITNET_DEMO_MODEL;
  o.isa = isa;
  o.n_threads = 2;
  o.n_parallel = n_parallel;
  o.batch_size = batch_size;
  return o;
}

Completion request_for(const Engine& engine, std::string_view text, int32_t n_predict = 30) {
  Completion request;
  request.prompt = text_prompt(engine.tokenizer, text, true, false);
  request.n_predict = n_predict;
  request.sampling.temperature = 0.0f;
  return request;
}

// Writes down what becomes of a request.
struct Recorder : CompletionObserver {
  void on_piece(size_t index, std::string_view text, std::span<const TokenId> tokens,
                std::span<const TokenProbability>) override {
    pieces[index] += text;
    streamed[index].insert(streamed[index].end(), tokens.begin(), tokens.end());
  }
  void on_mask(size_t index, std::span<const TokenId> tokens) override {
    asked[index].emplace_back(tokens.begin(), tokens.end());
  }
  void on_done(size_t index, const CompletionResult& result) override {
    CHECK_FALSE(done.contains(index));
    done[index] = result;
  }
  void on_error(const std::exception& e) override {
    CHECK(error.empty());
    error = e.what();
  }

  std::map<size_t, std::string> pieces;
  std::map<size_t, std::vector<TokenId>> streamed;
  std::map<size_t, std::vector<std::vector<TokenId>>> asked;
  std::map<size_t, CompletionResult> done;
  std::string error;
};

std::shared_ptr<const Completion> shared(const Completion& request) {
  return std::make_shared<const Completion>(request);
}

CompletionResult only(Scheduler& scheduler, const Completion& request) { return complete(scheduler, request).front(); }

void run(Scheduler& scheduler) {
  while (!scheduler.idle()) REQUIRE(scheduler.step());
}

// Requests that differ in everything: length, sampling, end.
std::vector<Completion> mixture(const Engine& engine) {
  std::vector<Completion> requests;
  const char* texts[] = {"Once upon a time", "The wolf ate the goat. The wolf ate the goat. The wolf",
                         "There was once a king who had three daughters, and the youngest of them was so beautiful "
                         "that the sun himself, who had seen so much, wondered each time he shone upon her face",
                         "Hansel"};
  for (size_t i = 0; i < 12; i++) {
    Completion request = request_for(engine, texts[i % 4], static_cast<int32_t>(8 + i * 5));
    request.sampling.temperature = i % 3 == 0 ? 0.0f : 0.4f * static_cast<float>(i % 3);
    request.sampling.repeat_penalty = i % 5 == 4 ? 1.2f : 1.0f;
    request.sampling.top_k = i % 7 == 6 ? 0 : 40;
    request.sampling.seed = i;
    request.speculate = i % 4 != 3;
    request.ignore_eos = i % 2 == 0;
    if (i == 5) request.stop = {" was"};
    if (i == 6) request.sampling.xtc_probability = 0.5f;
    if (i == 7) request.sampling.mirostat = 2;
    if (i == 8) request.sampling.dry_multiplier = 0.8f;
    if (i == 9) request.logprobs = true;
    if (i == 10) request.n_probs = 5;
    if (i == 11) request.post_sampling_probs = request.logprobs = true;
    requests.push_back(request);
  }
  return requests;
}

}  // namespace

TEST_CASE("the same text with and without the cache, and an end where it should be") {
  Engine engine(options(1));
  Completion request = request_for(engine, "Once upon a time there was");
  Scheduler scheduler(engine);
  std::string pieces;
  const auto collect = [&](std::string_view text, std::span<const TokenId>) { pieces += text; };
  const CompletionResult first = complete(scheduler, request, collect).front();
  CHECK(first.tokens.size() == 30);
  CHECK(first.stop_type == StopType::kLimit);
  CHECK_FALSE(first.truncated);
  CHECK(first.n_cached == 0);
  CHECK(pieces == first.content);

  const CompletionResult again = only(scheduler, request);
  CHECK(again.n_cached == request.prompt.size() - 1);
  CHECK(again.tokens == first.tokens);
  request.cache_prompt = false;
  CHECK(only(scheduler, request).tokens == first.tokens);

  SUBCASE("a stop string, never shown, even in part") {
    const size_t at = first.content.find(" who");
    REQUIRE(at != std::string::npos);
    request.stop = {"", " who had"};
    pieces.clear();
    const CompletionResult r = complete(scheduler, request, collect).front();
    CHECK(r.stop_type == StopType::kWord);
    CHECK(r.stopping_word == " who had");
    CHECK(r.content == first.content.substr(0, first.content.find(" who had")));
    CHECK(pieces == r.content);
  }
  SUBCASE("a cancel acts within one token") {
    request.n_predict = -1;
    request.speculate = false;
    const auto heard = std::make_shared<Recorder>();
    const Scheduler::Ticket ticket = scheduler.submit(shared(request), heard);
    while (heard->streamed[0].size() < 20) REQUIRE(scheduler.step());
    scheduler.step([&] { scheduler.cancel(ticket); });
    CHECK(heard->done.at(0).stop_type == StopType::kCancelled);
    CHECK(heard->done.at(0).tokens.size() == 20);
    CHECK(heard->done.at(0).content == heard->pieces[0]);
    CHECK(scheduler.idle());
  }
  SUBCASE("a deadline that has passed leaves the prompt uncomputed") {
    request.deadline = Clock::now();
    const CompletionResult r = complete(scheduler, request, collect).front();
    CHECK(r.stop_type == StopType::kDeadline);
    CHECK(r.tokens.empty());
  }
  SUBCASE("the context's end truncates") {
    request.n_predict = -1;
    request.ignore_eos = true;
    const CompletionResult r = only(scheduler, request);
    CHECK(r.stop_type == StopType::kLimit);
    CHECK(r.truncated);
    CHECK(r.tokens.size() + r.n_prompt == engine.n_ctx);
  }
  SUBCASE("a prompt that fills the context is refused with both numbers") {
    request.prompt.assign(engine.n_ctx, 5);
    CHECK_THROWS_WITH_AS(only(scheduler, request), doctest::Contains("256 tokens"), ContextExceeded);
    request.n_predict = 0;
    CHECK(only(scheduler, request).tokens.empty());
  }
}

TEST_CASE("guessing ahead changes nothing but the number of passes") {
  size_t accepted = 0;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kAmx}) {
    if (!supported(isa)) continue;
    Engine engine(options(2, 128, isa));
    for (const float temperature : {0.0f, 0.4f, 1.0f})
      for (const float repeat_penalty : {1.0f, 1.1f})
        for (const char* text :
             {"Once upon a time", "The wolf ate the goat. The wolf ate the goat. The wolf ate the goat. The wolf"})
          for (const int32_t n_predict : {1, 2, 40, -1}) {
            Completion request;
            request.prompt = text_prompt(engine.tokenizer, text, true, false);
            request.n_predict = n_predict;
            request.sampling.temperature = temperature;
            request.sampling.repeat_penalty = repeat_penalty;
            request.sampling.seed = 5;
            Scheduler scheduler(engine, Guesses::kAlways);
            const CompletionResult with = only(scheduler, request);
            request.cache_prompt = false;
            request.speculate = false;
            const CompletionResult without = only(scheduler, request);
            CHECK(with.tokens == without.tokens);
            CHECK(with.content == without.content);
            CHECK(with.stop_type == without.stop_type);
            CHECK(with.truncated == without.truncated);
            CHECK(without.n_drafted == 0);
            CHECK(with.n_accepted <= with.n_drafted);
            accepted += with.n_accepted;
            // The cache that guesses leave behind is as good as one without.
            Completion again = request;
            again.prompt.insert(again.prompt.end(), with.tokens.begin(),
                                with.tokens.begin() + static_cast<std::ptrdiff_t>(with.tokens.size() / 2));
            if (again.prompt.size() + 8 > engine.n_ctx) continue;
            again.n_predict = 8;
            again.sampling.temperature = 0.0f;
            const std::vector<TokenId> fresh = only(scheduler, again).tokens;
            Scheduler other(engine, Guesses::kAlways);
            request.cache_prompt = again.cache_prompt = request.speculate = true;
            only(other, request);
            CHECK(only(other, again).tokens == fresh);
          }
  }
  CHECK(accepted > 100);
}

TEST_CASE("in company every completion gets what it gets alone") {
  std::vector<CompletionResult> alone;
  {
    Engine engine(options(1));
    for (const Completion& request : mixture(engine)) {
      Scheduler scheduler(engine, Guesses::kAlways);
      alone.push_back(only(scheduler, request));
    }
  }
  for (const size_t n_parallel : {1, 2, 3, 8})
    for (const size_t batch_size : {1, 2, 5, 128}) {
      CAPTURE(n_parallel);
      CAPTURE(batch_size);
      Engine engine(options(n_parallel, batch_size));
      Scheduler scheduler(engine, Guesses::kAlways);
      std::vector<std::shared_ptr<Recorder>> heard;
      for (const Completion& request : mixture(engine)) {
        heard.push_back(std::make_shared<Recorder>());
        scheduler.submit(shared(request), heard.back());
        for (size_t steps = heard.size() % 4; steps > 0; steps--) scheduler.step();  // they come at any time
      }
      run(scheduler);
      for (size_t i = 0; i < alone.size(); i++) {
        CAPTURE(i);
        const CompletionResult& r = heard[i]->done.at(0);
        CHECK(r.tokens == alone[i].tokens);
        CHECK(r.content == alone[i].content);
        CHECK(r.content == heard[i]->pieces[0]);
        CHECK(r.stop_type == alone[i].stop_type);
        CHECK(r.stopping_word == alone[i].stopping_word);
      }
    }
}

TEST_CASE("n completions of a prompt are those of n seeds, and compute it once") {
  for (const size_t n_parallel : {1, 3, 8})
    for (const bool cache_prompt : {true, false}) {
      Engine engine(options(n_parallel));
      Completion request = request_for(engine, "There was once a miller who was poor, but he had a beautiful daughter");
      request.sampling.temperature = 1.0f;
      request.sampling.seed = 100;
      request.cache_prompt = cache_prompt;
      request.n = 5;
      Scheduler scheduler(engine);
      const std::vector<CompletionResult> several = complete(scheduler, request);
      REQUIRE(several.size() == 5);
      request.n = 1;
      for (size_t i = 0; i < 5; i++) {
        CHECK(several[i].seed == 100 + i);
        CHECK(several[i].n_prompt == request.prompt.size());
        CHECK(several[i].n_cached == (i == 0 ? 0 : request.prompt.size() - 1));
        request.sampling.seed = 100 + i;
        Scheduler alone(engine);
        CHECK(only(alone, request).tokens == several[i].tokens);
      }
    }
}

TEST_CASE("one of several is cancelled, expires or fails, and the others do not notice") {
  Engine engine(options(4));
  Scheduler scheduler(engine);
  const Completion request = request_for(engine, "Once upon a time there was a king", 60);
  const std::vector<TokenId> expected = only(scheduler, request).tokens;
  Completion late = request;
  late.deadline = Clock::now() + std::chrono::hours(1);
  std::vector<std::shared_ptr<Recorder>> heard;
  std::vector<Scheduler::Ticket> tickets;
  for (const Completion& c : {request, late, request, request, request, request}) {
    heard.push_back(std::make_shared<Recorder>());
    tickets.push_back(scheduler.submit(shared(c), heard.back()));
  }
  CHECK(scheduler.next_deadline() == late.deadline);
  while (heard[1]->streamed[0].size() < 10) REQUIRE(scheduler.step());
  SUBCASE("between batches") {
    scheduler.cancel(tickets[1]);
    scheduler.cancel(tickets[5]);  // still queued
    scheduler.fail(tickets[2], RequestError("internal", "", "broken"));
  }
  SUBCASE("inside of one") {
    int layer = 0;
    scheduler.step([&] {
      if (++layer != 4) return;
      scheduler.cancel(tickets[1]);
      scheduler.cancel(tickets[5]);
      scheduler.fail(tickets[2], RequestError("internal", "", "broken"));
      CHECK(heard[1]->done.contains(0));  // at once
    });
    CHECK(layer > 4);
  }
  CHECK(heard[1]->done.at(0).stop_type == StopType::kCancelled);
  CHECK(heard[1]->done.at(0).tokens.size() >= 10);
  CHECK(std::equal(heard[1]->done.at(0).tokens.begin(), heard[1]->done.at(0).tokens.end(), expected.begin()));
  CHECK(heard[5]->done.at(0).tokens.empty());
  CHECK(heard[2]->error == "broken");
  run(scheduler);
  CHECK(heard[2]->done.empty());
  for (const size_t i : {0, 3, 4}) CHECK(heard[i]->done.at(0).tokens == expected);
  CHECK(only(scheduler, request).tokens == expected);  // their caches are as good as any
}

TEST_CASE("a batch of nobody is given up, and what it left half done does no harm") {
  Engine engine(options(2));
  Scheduler scheduler(engine);
  const Completion request = request_for(engine, "Once upon a time there was a king who had a daughter");
  Scheduler fresh(engine);
  const std::vector<TokenId> expected = only(fresh, request).tokens;
  const auto a = std::make_shared<Recorder>(), b = std::make_shared<Recorder>();
  const Scheduler::Ticket first = scheduler.submit(shared(request), a), second = scheduler.submit(shared(request), b);
  int layer = 0;
  scheduler.step([&] {
    if (++layer == 3) scheduler.cancel(first);
    if (layer == 4) scheduler.cancel(second);
  });
  CHECK(layer == 4);  // the layers after that were not computed
  CHECK(scheduler.idle());
  CHECK(a->done.at(0).stop_type == StopType::kCancelled);
  CHECK(only(scheduler, request).n_cached == 0);
  CHECK(only(scheduler, request).tokens == expected);
}

TEST_CASE("a long prompt does not hold up what is being written, nor a short prompt") {
  Engine engine(options(4));
  Scheduler scheduler(engine);
  const auto writing = std::make_shared<Recorder>(), reading = std::make_shared<Recorder>(),
             brief = std::make_shared<Recorder>();
  Completion request = request_for(engine, "Once upon a time", 100);
  request.speculate = false;
  request.ignore_eos = true;
  scheduler.submit(shared(request), writing);
  while (writing->streamed[0].empty()) REQUIRE(scheduler.step());
  Completion much = request_for(engine, "x", 1);
  much.prompt.assign(200, 5);
  scheduler.submit(shared(much), reading);
  scheduler.submit(shared(request_for(engine, "Hansel and Gretel went", 1)), brief);
  const size_t before = writing->streamed[0].size();
  size_t steps = 0;
  for (; reading->done.empty(); steps++) REQUIRE(scheduler.step());
  CHECK(steps > 5);                                          // in pieces
  CHECK(writing->streamed[0].size() + 2 >= before + steps);  // a token in every step; one may be half a character
  CHECK_FALSE(brief->done.empty());
}

TEST_CASE("of many prompts and texts none waits while there is a slot for it") {
  for (const size_t batch_size : {1, 3, 128}) {
    Engine engine(options(8, batch_size));
    Scheduler scheduler(engine);
    std::vector<std::shared_ptr<Recorder>> heard;
    for (size_t i = 0; i < 8; i++) {
      heard.push_back(std::make_shared<Recorder>());
      Completion request = request_for(engine, "Once upon a time", 40);
      request.ignore_eos = true;
      request.speculate = false;
      request.cache_prompt = false;
      scheduler.submit(shared(request), heard.back());
    }
    run(scheduler);
    // All got as far as the first to end, but for the tokens of a step or two.
    for (const auto& recorder : heard) CHECK(recorder->done.at(0).tokens.size() == 40);
  }
}

TEST_CASE("what does not fit waits for a slot, in its turn") {
  Engine engine(options(2));
  Scheduler scheduler(engine);
  std::vector<std::shared_ptr<Recorder>> heard;
  for (int i = 0; i < 6; i++) {
    heard.push_back(std::make_shared<Recorder>());
    scheduler.submit(shared(request_for(engine, "Once upon a time", 20)), heard.back());
  }
  size_t most = 0;
  while (!scheduler.idle()) {
    REQUIRE(scheduler.step());
    const auto begun = static_cast<size_t>(std::count_if(
        heard.begin(), heard.end(), [](const auto& r) { return !r->streamed[0].empty() && r->done.empty(); }));
    most = std::max(most, begun);
    for (size_t i = 2; i < heard.size(); i++)
      if (!heard[i]->streamed[0].empty()) CHECK_FALSE(heard[i - 2]->done.empty());
  }
  CHECK(most == 2);
}

TEST_CASE("a prompt finds what any slot has, and takes it from nobody") {
  Engine engine(options(3));
  Scheduler scheduler(engine);
  Completion first = request_for(engine, "Once upon a time there was a king who had a daughter", 0);
  Completion second = request_for(engine, "Once upon a time there was a king who had a son, and the son", 0);
  only(scheduler, first);
  const size_t n_shared = only(scheduler, second).n_cached;
  CHECK(n_shared > 8);
  CHECK(only(scheduler, first).n_cached == first.prompt.size() - 1);
  CHECK(only(scheduler, second).n_cached == second.prompt.size() - 1);
  // From a slot that runs.
  first.n_predict = 100;
  first.ignore_eos = true;
  const auto running = std::make_shared<Recorder>();
  scheduler.submit(shared(first), running);
  while (running->streamed[0].empty()) REQUIRE(scheduler.step());
  Completion longer = first;
  longer.prompt.insert(longer.prompt.end(), running->streamed[0].begin(), running->streamed[0].end());
  longer.n_predict = 10;
  const auto beside = std::make_shared<Recorder>();
  scheduler.submit(shared(longer), beside);
  while (beside->done.empty()) REQUIRE(scheduler.step());
  CHECK(running->done.empty());
  CHECK(beside->done.at(0).n_cached >= first.prompt.size());
  run(scheduler);
  Scheduler fresh(engine);
  CHECK(only(fresh, longer).tokens == beside->done.at(0).tokens);
  CHECK(only(fresh, first).tokens == running->done.at(0).tokens);
}

TEST_CASE("masks") {
  Engine engine(options(3));
  Scheduler scheduler(engine);
  const size_t n_vocab = engine.config().n_vocab;
  Completion request = request_for(engine, "Once upon a time there was", 12);
  const std::vector<TokenId> free_text = only(scheduler, request).tokens;
  request.mask = true;
  const auto heard = std::make_shared<Recorder>();
  const Scheduler::Ticket ticket = scheduler.submit(shared(request), heard);
  const auto ask = [&](size_t n) {
    while (heard->asked[0].size() < n) REQUIRE(scheduler.step());
  };
  const auto bits = [&](std::initializer_list<TokenId> tokens) {
    std::vector<uint64_t> allowed((n_vocab + 63) / 64);
    for (const TokenId t : tokens) allowed[static_cast<size_t>(t) / 64] |= uint64_t{1} << t % 64;
    return allowed;
  };
  ask(1);
  CHECK(heard->asked[0][0].empty());
  while (scheduler.step()) {
  }  // until there is nothing to do but to wait
  CHECK(heard->streamed[0].empty());

  SUBCASE("a mask decides what is drawn, and is asked for before the token is computed") {
    scheduler.answer(ticket, 0, {bits({17, 300}), {}, false});
    int layers = 0;
    size_t asked_at_layer_1 = 0;
    scheduler.step([&] {
      if (++layers == 2) asked_at_layer_1 = heard->asked[0].size();
    });
    CHECK(asked_at_layer_1 == 2);
    REQUIRE(heard->asked[0][1].size() == 1);
    CHECK((heard->asked[0][1][0] == 17 || heard->asked[0][1][0] == 300));
    scheduler.answer(ticket, 0, {std::nullopt, {}, false});
    ask(3);
    scheduler.answer(ticket, 0, {std::nullopt, {}, true});
    scheduler.step();
    CHECK(heard->done.at(0).stop_type == StopType::kEos);
    CHECK(heard->done.at(0).tokens.size() == 2);
    CHECK(scheduler.idle());
  }
  SUBCASE("with a mask that allows everything the text is that without one") {
    for (size_t i = 1; heard->done.empty(); i++) {
      scheduler.answer(ticket, 0, {std::nullopt, {}, false});
      while (heard->asked[0].size() <= i && heard->done.empty()) REQUIRE(scheduler.step());
    }
    CHECK(heard->done.at(0).tokens == free_text);
    CHECK(heard->done.at(0).n_drafted == 0);
  }
  SUBCASE("who waits for a mask holds up nobody, and loses nothing by it") {
    for (size_t i = 1; heard->done.empty(); i++) {
      const auto other = std::make_shared<Recorder>();
      Completion beside = request;
      beside.mask = false;
      scheduler.submit(shared(beside), other);
      while (other->done.empty()) REQUIRE(scheduler.step());
      CHECK(other->done.at(0).tokens == free_text);
      scheduler.answer(ticket, 0, {std::nullopt, {}, false});
      while (heard->asked[0].size() <= i && heard->done.empty()) REQUIRE(scheduler.step());
    }
    CHECK(heard->done.at(0).tokens == free_text);
  }
  SUBCASE("forced tokens follow at once and count") {
    scheduler.answer(ticket, 0, {std::nullopt, {free_text.begin(), free_text.begin() + 5}, false});
    scheduler.step();
    CHECK(heard->asked[0].at(1) == std::vector<TokenId>(free_text.begin(), free_text.begin() + 5));
    scheduler.answer(ticket, 0, {std::nullopt, {7}, false});
    ask(3);
    scheduler.answer(ticket, 0,
                     {std::nullopt, {free_text.begin(), free_text.begin() + 10}, false});  // beyond the limit
    run(scheduler);
    std::vector<TokenId> expected(free_text.begin(), free_text.begin() + 5);
    expected.push_back(7);
    expected.insert(expected.end(), free_text.begin(), free_text.begin() + 6);
    CHECK(heard->done.at(0).tokens == expected);
    CHECK(heard->done.at(0).stop_type == StopType::kLimit);
  }
  SUBCASE("one that allows nothing, or was not asked for, ends the request with an error") {
    SUBCASE("nothing") { scheduler.answer(ticket, 0, {bits({}), {}, false}); }
    SUBCASE("twice") {
      scheduler.answer(ticket, 0, {bits({5}), {}, false});
      scheduler.answer(ticket, 0, {bits({5}), {}, false});
    }
    SUBCASE("of a completion that there is not") { scheduler.answer(ticket, 1, {bits({5}), {}, false}); }
    CHECK_FALSE(heard->error.empty());
    scheduler.step();
    CHECK(scheduler.idle());
    scheduler.answer(ticket, 0, {bits({5}), {}, false});  // too late: nothing
  }
  SUBCASE("a cancel does not wait for a mask") {
    scheduler.cancel(ticket);
    CHECK(heard->done.at(0).stop_type == StopType::kCancelled);
  }
}

TEST_CASE("probabilities are those of the logits, whatever makes the token known") {
  Engine engine(options(2));
  const size_t n_vocab = engine.config().n_vocab;
  Completion request = request_for(engine, "The wolf ate the goat. The wolf ate the goat. The wolf", 80);
  request.n_probs = 3;
  request.prompt_logprobs = true;
  Scheduler scheduler(engine);
  const CompletionResult r = only(scheduler, request);
  // Of every position, from a batch of its own.
  std::vector<TokenId> all = request.prompt;
  all.insert(all.end(), r.tokens.begin(), r.tokens.end());
  KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
  std::vector<BatchToken> batch;
  for (size_t i = 0; i < all.size(); i++) batch.push_back({all[i], static_cast<uint32_t>(i), &cache, true});
  std::vector<float> logits(all.size() * n_vocab);
  engine.transformer.forward(batch);
  engine.transformer.output().logits(logits.data());
  REQUIRE(r.prompt_probabilities.size() == request.prompt.size() - 1);
  REQUIRE(r.probabilities.size() == r.tokens.size());
  const auto same = [](const TokenProbability& a, const TokenProbability& b) {
    const auto equal = [](const TokenProbability::Entry& x, const TokenProbability::Entry& y) {
      return x.token == y.token && x.value == y.value;
    };
    return equal(a.chosen, b.chosen) && std::equal(a.best.begin(), a.best.end(), b.best.begin(), b.best.end(), equal);
  };
  const auto expected = [&](size_t position) {
    return log_probability(std::span(logits).subspan((position - 1) * n_vocab, n_vocab), all[position], 3);
  };
  for (size_t i = 1; i < all.size(); i++)
    CHECK(same(i < request.prompt.size() ? r.prompt_probabilities[i - 1] : r.probabilities[i - request.prompt.size()],
               expected(i)));
  CHECK(r.n_accepted > 0);
  request.mask = true;
  request.prompt_logprobs = false;
  const auto heard = std::make_shared<Recorder>();
  const Scheduler::Ticket ticket = scheduler.submit(shared(request), heard);
  scheduler.step();
  REQUIRE(heard->asked[0].size() == 1);
  scheduler.answer(ticket, 0, {std::nullopt, r.tokens, false});
  run(scheduler);
  CHECK(heard->asked[0].size() == 1);
  const CompletionResult& forced = heard->done.at(0);
  CHECK(forced.tokens == r.tokens);
  REQUIRE(forced.probabilities.size() == r.tokens.size());
  for (size_t i = 0; i < r.tokens.size(); i++) CHECK(same(forced.probabilities[i], r.probabilities[i]));
  CHECK(forced.n_accepted == 0);
}

TEST_CASE("a prompt whose tokens are told comes in pieces like any other") {
  Engine small(options(2, 5)), large(options(1, 128));
  Completion request = request_for(large, "Once upon a time there was a king who had a daughter", 5);
  request.prompt_logprobs = true;
  Scheduler a(small), b(large);
  only(a, request);  // the cache is of no use
  const CompletionResult x = only(a, request), y = only(b, request);
  CHECK(x.n_cached == 0);
  REQUIRE(x.prompt_probabilities.size() == y.prompt_probabilities.size());
  for (size_t i = 0; i < x.prompt_probabilities.size(); i++)
    CHECK(x.prompt_probabilities[i].chosen.value == y.prompt_probabilities[i].chosen.value);
  CHECK(x.tokens == y.tokens);
}

TEST_CASE("masked completions of one prompt have masks of their own") {
  Engine engine(options(2));
  Scheduler scheduler(engine);
  Completion request = request_for(engine, "Once upon a time there was", 6);
  request.mask = true;
  request.n = 3;
  const auto heard = std::make_shared<Recorder>();
  const Scheduler::Ticket ticket = scheduler.submit(shared(request), heard);
  std::map<size_t, size_t> answered;
  while (!scheduler.idle()) {
    scheduler.step();
    for (const auto& [index, asked] : heard->asked)
      for (; answered[index] < asked.size(); answered[index]++)
        scheduler.answer(ticket, index, {std::nullopt, {static_cast<TokenId>(100 * index + answered[index])}, false});
  }
  for (size_t index = 0; index < 3; index++)
    for (size_t i = 0; i < 6; i++) CHECK(heard->done.at(index).tokens.at(i) == static_cast<TokenId>(100 * index + i));
}
