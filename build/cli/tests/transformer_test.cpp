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
    engine.transformer.output().logits(&logits[done * n_vocab]);
    done += batch.size();
  }
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("the same bits for every instruction set, thread count and batch size") {
  for (const CacheType kv : kCacheTypes) {
    const std::vector<float> expected = all_logits(options(Isa::kScalar, 1, 1, kv));
    for (const Isa isa : kIsas) {
      if (!supported(isa)) continue;
      for (const size_t n_threads : {1, 2, 3, 5})
        for (const size_t batch_size : {1, 2, 3, 4, 7, 16, 31, 32, 33, 64, 128}) {
          if (isa == Isa::kScalar && (n_threads != 2 || (batch_size != 7 && batch_size != 64))) continue;  // slow
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
    engine.transformer.output().logits(logits.data());
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
  engine.transformer.output().logits(logits.data());
  CHECK(same_bits(std::vector<float>(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(n_vocab)), alone(b)));
  CHECK(same_bits(std::vector<float>(logits.begin() + static_cast<std::ptrdiff_t>(n_vocab), logits.end()), alone(a)));
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
        if (!supported(isa) || (isa == Isa::kScalar && (n_threads != 2 || n_alone > 0))) continue;  // slow
        EngineOptions o = options(isa, n_threads, 128);
        o.model_path = path;
        Engine engine(o);
        Session session(engine);
        session.evaluate(std::span(ids).first(ids.size() - n_alone));
        for (size_t i = ids.size() - n_alone; i < ids.size(); i++) session.evaluate(std::span(ids).subspan(i, 1));
        std::vector<float> logits(engine.config().n_vocab);
        engine.transformer.output().logits(logits.data());
        if (expected.empty()) expected = logits;
        CHECK(same_bits(logits, expected));
      }
  std::filesystem::remove(path);
}
