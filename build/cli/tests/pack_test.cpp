// Packed models: the expansion of trits, what the file holds, and what it computes.
#include "pack.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>

#include "engine.h"
#include "gguf_builder.h"
#include "prompt.h"
#include "session.h"

using namespace bitnet;

namespace {

EngineOptions options(const std::string& path, Isa isa = best_isa(), size_t n_threads = 2) {
  EngineOptions o;
  o.model_path = path;
  o.isa = isa;
  o.n_threads = n_threads;
  return o;
}

std::vector<TokenId> words(const Engine& engine) {
  return text_prompt(engine.tokenizer,
                     "The little girl said to the old king: \"I have three golden apples, and a wolf.\"", true, false);
}

std::vector<Candidate> sorted_best(std::span<const float> logits, size_t k) {
  std::vector<Candidate> best = best_of(logits, k);
  std::sort(best.begin(), best.end(), better);
  return best;
}

}  // namespace

TEST_CASE("expand_trits: every byte, the same everywhere") {
  std::vector<uint8_t> packed(128 * 243), expected(160 * 243), got(expected.size());
  for (size_t i = 0; i < packed.size(); i++) packed[i] = static_cast<uint8_t>(i * 7 % 243);
  kScalarKernels.expand_trits(packed.data(), 243, expected.data());
  for (size_t u = 0; u < 243; u++)
    for (size_t p = 0; p < 32; p++)
      for (size_t i = 0; i < 4; i++) {
        const unsigned v = packed[u * 128 + i * 32 + p], codes = expected[u * 160 + i * 32 + p];
        CHECK((codes >> 6) * 27 + (codes >> 4 & 3) * 9 + (codes >> 2 & 3) * 3 + (codes & 3) == v % 81);
        CHECK((expected[u * 160 + 128 + p] >> (6 - 2 * i) & 3) == v / 81);
      }
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi}) {
    if (!supported(isa)) continue;
    kernels_for(isa).expand_trits(packed.data(), 243, got.data());
    CHECK(got == expected);
  }
}

TEST_CASE("a packed model: smaller, its best logits are the largest of all") {
  const TemporaryFolder folder;
  for (const unsigned bits : {8u, 6u}) {
    const std::string path = folder.path("packed.gguf");
    pack(BITNET_DEMO_MODEL, path, bits);
    CHECK(std::filesystem::file_size(path) < std::filesystem::file_size(BITNET_DEMO_MODEL));

    const GgufFile file(path);
    const GgufFile original(BITNET_DEMO_MODEL);
    const Tensor& embedding = *file.find_tensor("token_embd.weight");
    CHECK(embedding.type == (bits == 8 ? TensorType::kQ8_0 : TensorType::kQ6_K));
    CHECK(embedding.shape == original.find_tensor("token_embd.weight")->shape);
    CHECK(file.tensors().size() == original.tensors().size());

    std::vector<float> expected;
    for (const Isa isa : kIsas)
      for (const size_t n_threads : {1, 3}) {
        if (!supported(isa)) continue;
        Engine engine(options(path, isa, n_threads));
        Session session(engine);
        std::vector<float> logits(engine.config().n_vocab);
        const std::vector<TokenId> tokens = words(engine);
        for (size_t i = 0; i < tokens.size(); i++) {
          session.evaluate(std::span(tokens).subspan(i, 1));
          engine.transformer.output().logits(logits.data());
          for (const size_t k : {1, 40, 100}) {
            CHECK(engine.transformer.output().best(0, k) == sorted_best(logits, k));
            // Few allowed tokens, and nearly all.
            for (const size_t every : {2, 3, 50}) {
              std::vector<uint64_t> allowed((logits.size() + 63) / 64, every == 2 ? ~uint64_t{1} : 0);
              if (every > 2)
                for (size_t t = 0; t < logits.size(); t += every) allowed[t / 64] |= uint64_t{1} << t % 64;
              std::vector<float> masked = logits;
              for (size_t t = 0; t < logits.size(); t++)
                if ((allowed[t / 64] >> t % 64 & 1) == 0) masked[t] = -std::numeric_limits<float>::infinity();
              std::vector<Candidate> all = sorted_best(masked, k);
              std::erase_if(all, [](const Candidate& c) { return std::isinf(c.logit); });
              CHECK(engine.transformer.output().best(0, k, allowed) == all);
            }
          }
        }
        if (expected.empty()) expected = logits;
        CHECK(std::memcmp(expected.data(), logits.data(), logits.size() * sizeof(float)) == 0);
      }
  }
  CHECK_THROWS_AS(pack(folder.path("packed.gguf"), folder.path("again.gguf"), 8), Error);
  CHECK_FALSE(std::filesystem::exists(folder.path("again.gguf")));
  CHECK_THROWS_AS(pack(BITNET_DEMO_MODEL, folder.path("no/such/folder.gguf"), 8), Error);
}
