// Packed models: the expansion of trits, the planes of the output matrix, and the best logits without reading it whole.
#include "pack.h"

#include <doctest/doctest.h>
#include <unistd.h>
#include <zlib.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>

#include "engine.h"
#include "kernels/half.h"
#include "prompt.h"
#include "session.h"

using namespace bitnet;

namespace {

class TemporaryFolder {
 public:
  TemporaryFolder() : path_(std::filesystem::temp_directory_path() / ("bitnet-pack-" + std::to_string(getpid()))) {
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

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

TEST_CASE("split rows: dot products and estimates, the same bits everywhere") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const RowType type : {RowType::kSplit8, RowType::kSplit6})
    for (const size_t cols : {128, 256, 640, 2560}) {
      const size_t rows = 9, blocks = cols / kScaleBlock, padded = (blocks + kLanes - 1) / kLanes * kLanes;
      std::vector<uint8_t> data(rows * row_bytes(type, cols)), low(rows * low_row_bytes(type, cols));
      for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
      for (uint8_t& byte : low) byte = static_cast<uint8_t>(random());
      for (size_t r = 0; r < rows; r++)
        for (size_t b = 0; b < blocks; b++) {
          const uint16_t scale = float_to_half(0.001f * static_cast<float>(1 + random() % 100));
          std::memcpy(&data[r * row_bytes(type, cols) + 2 * b], &scale, 2);
        }
      const FloatRows w{type, data.data(), low.data(), rows, cols};
      std::vector<float> x(3 * cols), expected(3 * rows), got(3 * rows), row(cols);
      for (float& v : x) v = normal(random);
      kScalarKernels.dot_rows(w, x.data(), 3, expected.data(), rows);
      for (size_t r = 0; r < rows; r++) {
        decode_row(w, r, row.data());
        double dot = 0.0, magnitude = 0.0;
        for (size_t i = 0; i < cols; i++) {
          dot += static_cast<double>(row[i]) * x[i];
          magnitude += std::fabs(static_cast<double>(row[i]) * x[i]);
        }
        CHECK(std::fabs(expected[r] - dot) <= 1e-6 * magnitude);
      }
      constexpr size_t kVectors = 7;  // go in groups of four, two and one
      std::vector<int8_t> values(kVectors * cols);
      for (int8_t& v : values) v = static_cast<int8_t>(random() % 255 - 127);
      std::vector<float> corrections(kVectors * padded, 0.0f), variances(kVectors * padded, 0.0f),
          estimates(kVectors * rows), deviations(kVectors * rows), e(kVectors * rows), d(kVectors * rows);
      std::vector<Screen> screens;
      for (size_t t = 0; t < kVectors; t++) {
        for (size_t b = t * padded; b < t * padded + blocks; b++)
          corrections[b] = normal(random) * 100.0f, variances[b] = std::fabs(normal(random));
        screens.push_back({&values[t * cols], &corrections[t * padded], &variances[t * padded], 0.37f});
        kScalarKernels.screen_rows(w, &screens[t], 1, &estimates[t * rows], &deviations[t * rows], rows);
      }
      for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi}) {
        if (!supported(isa)) continue;
        kernels_for(isa).dot_rows(w, x.data(), 3, got.data(), rows);
        CHECK(got == expected);
        kernels_for(isa).screen_rows(w, screens.data(), kVectors, e.data(), d.data(), rows);
        CHECK(e == estimates);
        CHECK(d == deviations);
      }
    }
}

TEST_CASE("a packed model: smaller, checksums of its chunks, best logits equal to the largest of all") {
  const TemporaryFolder folder;
  for (const unsigned bits : {8u, 6u}) {
    const std::string path = folder.file("packed.gguf");
    pack(BITNET_DEMO_MODEL, path, bits);
    CHECK(std::filesystem::file_size(path) < std::filesystem::file_size(BITNET_DEMO_MODEL));

    std::ifstream stream(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
    const GgufFile file(path);
    const size_t chunk = file.get_uint("bitnet.pack.chunk_bytes");
    const std::vector<int32_t> sums = file.get_ints("bitnet.pack.chunk_crc32");
    const std::span<const std::byte> first_tensor = file.tensors().front().bytes;
    size_t start = std::string_view(bytes).find(
        std::string_view(reinterpret_cast<const char*>(first_tensor.data()), first_tensor.size()));
    REQUIRE(start != std::string::npos);
    for (const int32_t expected : sums) {
      const size_t n = std::min(chunk, bytes.size() - start);
      CHECK(static_cast<uint32_t>(expected) ==
            crc32(0, reinterpret_cast<const Bytef*>(&bytes[start]), static_cast<uInt>(n)));
      start += n;
    }
    CHECK(start == bytes.size());

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
  CHECK_THROWS_AS(pack(folder.file("packed.gguf"), folder.file("again.gguf"), 8), Error);
  CHECK_FALSE(std::filesystem::exists(folder.file("again.gguf")));
  CHECK_THROWS_AS(pack(BITNET_DEMO_MODEL, folder.file("no/such/folder.gguf"), 8), Error);
}
