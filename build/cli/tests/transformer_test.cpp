// The whole forward pass on the demo model: one result, whatever computes it.
#include "transformer.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "engine.h"
#include "session.h"

using namespace bitnet;

namespace {

constexpr size_t kTokens = 75;

std::vector<TokenId> some_tokens(size_t n) {
  std::vector<TokenId> ids{4093};
  for (size_t i = 1; i < n; i++) ids.push_back(static_cast<TokenId>(i * i * 31 % 4000));
  return ids;
}

EngineOptions options(Isa isa, size_t n_threads, size_t batch_size, CacheType kv_type = CacheType::kF16) {
  EngineOptions o;
  o.model_path = BITNET_DEMO_MODEL;
  o.isa = isa;
  o.n_threads = n_threads;
  o.batch_size = batch_size;
  o.kv_type = kv_type;
  return o;
}

// Logits of every position, computed in batches of the engine's size.
std::vector<float> all_logits(const EngineOptions& o) {
  Engine engine(o);
  const size_t n_vocab = engine.config().n_vocab;
  KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
  const std::vector<TokenId> ids = some_tokens(kTokens);
  std::vector<float> logits(ids.size() * n_vocab);
  for (size_t done = 0; done < ids.size();) {
    std::vector<BatchToken> batch;
    for (size_t i = done; i < ids.size() && batch.size() < o.batch_size; i++)
      batch.push_back({ids[i], static_cast<uint32_t>(i), &cache, true});
    engine.transformer.forward(batch);
    engine.transformer.logits(&logits[done * n_vocab]);
    done += batch.size();
  }
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("the same bits for every instruction set, thread count and batch size") {
  for (const CacheType kv : {CacheType::kF16, CacheType::kF32}) {
    const std::vector<float> expected = all_logits(options(Isa::kScalar, 1, 1, kv));
    for (const Isa isa : kIsas) {
      if (!supported(isa)) continue;
      for (const size_t n_threads : {1, 2, 3, 5})
        for (const size_t batch_size : {1, 2, 3, 4, 7, 16, 31, 32, 33, 64, 128}) {
          if (isa == Isa::kScalar && (n_threads > 2 || batch_size % 3 != 1)) continue;  // slow, and the same code
          CAPTURE(name_of(isa));
          CAPTURE(n_threads);
          CAPTURE(batch_size);
          CHECK(same_bits(all_logits(options(isa, n_threads, batch_size, kv)), expected));
        }
    }
  }
}

TEST_CASE("sequences in one batch do not touch each other") {
  Engine engine(options(best_isa(), 2, 64));
  const size_t n_vocab = engine.config().n_vocab;
  const std::vector<TokenId> a = some_tokens(20), b = {4093, 7, 8, 9, 10, 11, 12};
  const auto alone = [&](const std::vector<TokenId>& ids) {
    Session session(engine);
    session.evaluate(ids);
    std::vector<float> logits(n_vocab);
    engine.transformer.logits(logits.data());
    return logits;
  };
  KvCache cache_a(engine.config(), engine.n_ctx, engine.kv_type),
      cache_b(engine.config(), engine.n_ctx, engine.kv_type);
  std::vector<BatchToken> batch;
  for (size_t i = 0; i < a.size(); i++) {  // interleaved: b's tokens stand between a's
    batch.push_back({a[i], static_cast<uint32_t>(i), &cache_a, i + 1 == a.size()});
    if (i < b.size()) batch.push_back({b[i], static_cast<uint32_t>(i), &cache_b, i + 1 == b.size()});
  }
  std::vector<float> logits(2 * n_vocab);
  engine.transformer.forward(batch);
  engine.transformer.logits(logits.data());
  CHECK(same_bits(std::vector<float>(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(n_vocab)), alone(b)));
  CHECK(same_bits(std::vector<float>(logits.begin() + static_cast<std::ptrdiff_t>(n_vocab), logits.end()), alone(a)));
}

TEST_CASE("a session gives the same text with and without its cache, and stops where it should") {
  Engine engine(options(best_isa(), 2, 128));
  Completion request;
  request.prompt = text_prompt(engine.tokenizer, "Once upon a time there was", true, false);
  request.n_predict = 30;
  request.sampling.temperature = 0.0f;
  Session session(engine);
  std::string pieces;
  const auto collect = [&](std::string_view text, std::span<const TokenId>) { pieces += text; };
  const CompletionResult first = session.complete(request, collect, {});
  CHECK(first.tokens.size() == 30);
  CHECK(first.stop_type == StopType::kLimit);
  CHECK_FALSE(first.truncated);
  CHECK(first.n_cached == 0);
  CHECK(pieces == first.content);

  const CompletionResult again = session.complete(request, {}, {});
  CHECK(again.n_cached == request.prompt.size() - 1);
  CHECK(again.tokens == first.tokens);
  request.cache_prompt = false;
  CHECK(session.complete(request, {}, {}).tokens == first.tokens);

  SUBCASE("a stop string, never shown, even in part") {
    const size_t at = first.content.find(" who");
    REQUIRE(at != std::string::npos);
    request.stop = {"", " who had"};
    pieces.clear();
    const CompletionResult r = session.complete(request, collect, {});
    CHECK(r.stop_type == StopType::kWord);
    CHECK(r.stopping_word == " who had");
    CHECK(r.content == first.content.substr(0, first.content.find(" who had")));
    CHECK(pieces == r.content);
  }
  SUBCASE("a cancel acts within one token") {
    int asked = 0;
    request.n_predict = -1;
    const CompletionResult r = session.complete(request, collect, [&] { return ++asked > 40; });
    CHECK(r.stop_type == StopType::kCancelled);
    CHECK(r.tokens.size() < 40);
  }
  SUBCASE("a deadline that has passed leaves the prompt uncomputed") {
    request.deadline = Clock::now();
    const CompletionResult r = session.complete(request, collect, {});
    CHECK(r.stop_type == StopType::kDeadline);
    CHECK(r.tokens.empty());
  }
  SUBCASE("the context's end truncates") {
    request.n_predict = -1;
    request.ignore_eos = true;
    const CompletionResult r = session.complete(request, {}, {});
    CHECK(r.stop_type == StopType::kLimit);
    CHECK(r.truncated);
    CHECK(r.tokens.size() + r.n_prompt == engine.n_ctx);
  }
  SUBCASE("a prompt that fills the context is refused with both numbers") {
    request.prompt.assign(engine.n_ctx, 5);
    CHECK_THROWS_WITH_AS(session.complete(request, {}, {}), doctest::Contains("256 tokens"), ContextExceeded);
    request.n_predict = 0;
    CHECK(session.complete(request, {}, {}).tokens.empty());
  }
}

TEST_CASE("far back: attention cut up for one token gives the bits of a batch") {
  // The demo model with a longer context in its header: beyond 256 positions the text has no sense, but every bit is
  // defined.
  std::ifstream stream(BITNET_DEMO_MODEL, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const std::string key = "bitnet-b1.58.context_length";
  const uint32_t context = 1024;
  std::memcpy(&bytes[bytes.find(key) + key.size() + 4], &context, sizeof context);
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("bitnet-long-" + std::to_string(getpid()) + ".gguf");
  std::ofstream(path, std::ios::binary) << bytes;
  const std::vector<TokenId> ids = some_tokens(700);
  std::vector<float> expected;
  for (const Isa isa : kIsas)
    for (const size_t n_threads : {1, 2, 5})
      for (const size_t n_alone : {0, 3}) {  // the last tokens one by one, or all in batches
        if (!supported(isa) || (isa == Isa::kScalar && n_threads != 2)) continue;
        EngineOptions o = options(isa, n_threads, 128);
        o.model_path = path;
        Engine engine(o);
        Session session(engine);
        session.evaluate(std::span(ids).first(ids.size() - n_alone));
        for (size_t i = ids.size() - n_alone; i < ids.size(); i++) session.evaluate(std::span(ids).subspan(i, 1));
        std::vector<float> logits(engine.config().n_vocab);
        engine.transformer.logits(logits.data());
        if (expected.empty()) expected = logits;
        CHECK(same_bits(logits, expected));
      }
  std::filesystem::remove(path);
}

TEST_CASE("guessing ahead changes nothing but the number of passes") {
  size_t accepted = 0;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi}) {
    if (!supported(isa)) continue;
    Engine engine(options(isa, 2, 128));
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
            Session session(engine);
            const CompletionResult with = session.complete(request, {}, {});
            request.cache_prompt = false;
            request.speculate = false;
            const CompletionResult without = session.complete(request, {}, {});
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
            const std::vector<TokenId> fresh = session.complete(again, {}, {}).tokens;
            Session other(engine);
            request.cache_prompt = again.cache_prompt = request.speculate = true;
            other.complete(request, {}, {});
            CHECK(other.complete(again, {}, {}).tokens == fresh);
          }
  }
  CHECK(accepted > 100);
}
