// The largest logits, looked for in a sketch of the output matrix.
#include "output_layer.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine.h"
#include "output_sketch.h"
#include "pack.h"
#include "session.h"

using namespace bitnet;

namespace {

constexpr size_t kCols = 256;

// What the planes up to `last` make of a row.
std::vector<float> restored(const OutputSketch& sketch, size_t row, size_t last) {
  std::vector<float> out(sketch.means.size());
  for (size_t i = 0; i < out.size(); i++) {
    const size_t byte = i / 128 * 32 + i % 32, shift = 6 - i % 128 / 32 * 2;
    for (size_t p = 0; p <= last; p++) {
      const OutputSketch::Plane& plane = sketch.planes[p];
      const float code = static_cast<float>(plane.codes.slice(row, 1).data[byte] >> shift & 3);
      out[i] = plane.gains[row] * out[i] + plane.steps[row] * (code - 1.5f);
    }
    out[i] = sketch.means[i] + sketch.scales[i] * out[i];
  }
  return out;
}

}  // namespace

TEST_CASE("a sketch says itself how far it is off, the same everywhere") {
  constexpr size_t kRows = 200, kOutlier = 17;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> weights(kRows * kCols);
  for (size_t r = 0; r < kRows; r++)
    for (size_t c = 0; c < kCols; c++)
      weights[r * kCols + c] =
          (c == kOutlier ? 30.0f + 9.0f * normal(random) : normal(random)) * (r == 3 ? 50.0f : 0.02f);
  std::fill_n(&weights[7 * kCols], kCols, 0.0f);
  weights[11 * kCols + 1] = std::numeric_limits<float>::quiet_NaN();
  const FloatRows w{RowType::kF32, reinterpret_cast<const uint8_t*>(weights.data()), kRows, kCols};
  // The columns' means and deviations are those of all rows but the wrong one.
  std::vector<float> right = weights;
  right[11 * kCols + 1] = 0.0f;
  const FloatRows sound{RowType::kF32, reinterpret_cast<const uint8_t*>(right.data()), kRows, kCols};

  std::vector<uint8_t> expected;
  for (const Isa isa : kIsas) {
    if (!supported(isa)) continue;
    CAPTURE(name_of(isa));
    std::vector<uint8_t> memory(OutputSketch::bytes(w));
    std::vector<float> work(2 * kCols);
    OutputSketch sketch(sound, memory.data());
    for (size_t r = 0; r < kRows; r++) sketch.add(w, r, kernels_for(isa), work.data());
    if (expected.empty()) expected = memory;
    CHECK(memory == expected);
    for (size_t r = 0; r < kRows; r++) {
      if (r == 11) {
        CHECK(std::isnan(sketch.planes[0].steps[r]));  // so that no bound can leave the row out
        continue;
      }
      for (size_t p = 0; p < kSketchPlanes; p++) {
        const std::vector<float> got = restored(sketch, r, p);
        double squares = 0.0, of_row = 0.0, of_planes = 0.0, along = 0.0;
        for (size_t i = 0; i < kCols; i++) {
          const double scale = static_cast<double>(sketch.scales[i]);
          const double error = static_cast<double>(got[i] - weights[r * kCols + i]) / scale;
          const double u = static_cast<double>(weights[r * kCols + i] - sketch.means[i]) / scale;
          squares += error * error;
          of_row += u * u;
          of_planes += (u + error) * (u + error);
          along += error * u;
        }
        CHECK(std::sqrt(squares / kCols) ==
              doctest::Approx(static_cast<double>(sketch.planes[p].errors[r])).epsilon(0.01));
        CHECK(std::sqrt(of_planes) <= static_cast<double>(sketch.norms[r]) * 1.01);
        // What is left has no part along the row, or a vector like the row would be taken for one less like it.
        CHECK(std::abs(along) <= 1e-4 * of_row);
        if (r == 0) {
          constexpr std::array<double, kSketchPlanes> kMost = {0.43, 0.18, 0.13};  // of a row like most
          CHECK(std::sqrt(squares / of_row) < kMost[p]);
        }
      }
    }
  }
}

TEST_CASE("products with vectors that are like rows are estimated as well as others") {
  constexpr size_t kManyCols = 2560, kRows = 256, kAlike = 128;
  constexpr double kDeviations = 5.0;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> weights(kRows * kManyCols), common(kManyCols);
  for (float& x : common) x = normal(random);
  for (size_t r = 0; r < kRows; r++)
    for (size_t c = 0; c < kManyCols; c++)
      weights[r * kManyCols + c] = r < kAlike ? common[c] + 0.03f * normal(random) : normal(random);
  const FloatRows w{RowType::kF32, reinterpret_cast<const uint8_t*>(weights.data()), kRows, kManyCols};
  std::vector<uint8_t> memory(OutputSketch::bytes(w));
  std::vector<float> work(2 * kManyCols);
  OutputSketch sketch(w, memory.data());
  for (size_t r = 0; r < kRows; r++) sketch.add(w, r, kernels_for(best_isa()), work.data());
  for (size_t r = 0; r < kRows; r++)
    for (size_t p = 0; p < kSketchPlanes; p++) {
      const std::vector<float> got = restored(sketch, r, p);
      for (const size_t like : {r, size_t{0}, kAlike, kRows - 1}) {
        double error = 0.0, squares = 0.0;
        for (size_t i = 0; i < kManyCols; i++) {
          const double x = static_cast<double>(weights[like * kManyCols + i]);
          error += static_cast<double>(weights[r * kManyCols + i] - got[i]) * x;
          squares += std::pow(x * static_cast<double>(sketch.scales[i]), 2);
        }
        CAPTURE(r);
        CAPTURE(like);
        CHECK(std::abs(error) <= kDeviations * std::sqrt(squares) * static_cast<double>(sketch.planes[p].errors[r]));
      }
    }
}

TEST_CASE("every type of row is sketched as its numbers are") {
  std::mt19937 random(6);
  std::vector<uint8_t> bytes(row_bytes(RowType::kF32, kCols));
  const std::vector<float> means(kCols, 0.01f), inverse_scales(kCols, 2.0f);
  for (const RowType type : {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8_0, RowType::kQ6_K}) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() % 60);  // finite in every type
    const FloatRows w{type, bytes.data(), 1, kCols};
    std::vector<float> numbers(kCols), work(2 * kCols);
    decode_row(w, 0, numbers.data());
    const FloatRows same{RowType::kF32, reinterpret_cast<const uint8_t*>(numbers.data()), 1, kCols};
    const auto sketch_with = [&](const FloatRows& rows, const Kernels& kernels) {
      std::vector<uint8_t> memory(kSketchPlanes * kCols / 4);
      uint8_t* codes[kSketchPlanes];
      for (size_t p = 0; p < kSketchPlanes; p++) codes[p] = &memory[p * kCols / 4];
      const RowSketch sketch = kernels.sketch_row(rows, means.data(), inverse_scales.data(), work.data(), codes);
      memory.resize(memory.size() + sizeof sketch);
      std::memcpy(&memory[memory.size() - sizeof sketch], &sketch, sizeof sketch);
      return memory;
    };
    for (const Isa isa : kIsas)
      if (supported(isa)) CHECK(sketch_with(w, kernels_for(isa)) == sketch_with(same, kScalarKernels));
  }
}

TEST_CASE("the best logits are the largest of all, while the model settles and afterwards") {
  const std::string packed =
      std::filesystem::temp_directory_path() / ("bitnet-output-" + std::to_string(getpid()) + ".gguf");
  for (const unsigned bits : {0u, 8u, 6u}) {  // 0: the model as it is
    if (bits > 0) pack(BITNET_DEMO_MODEL, packed, bits);
    for (const Isa isa : kIsas)
      for (const size_t n_threads : {1, 3}) {
        if (!supported(isa)) continue;
        EngineOptions o;
        o.model_path = bits > 0 ? packed : BITNET_DEMO_MODEL;
        o.isa = isa;
        o.n_threads = n_threads;
        Engine engine(o);
        const size_t n_vocab = engine.config().n_vocab;
        KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
        std::vector<BatchToken> batch;
        for (uint32_t i = 0; i < 7; i++) batch.push_back({static_cast<int32_t>(i * 571 % n_vocab), i, &cache, i != 2});
        engine.transformer.forward(batch);
        OutputLayer& output = engine.transformer.output();
        std::vector<float> all(6 * n_vocab);
        output.logits(all.data());
        CHECK(engine.model.n_sketched() == 0);
        // Every second token, too, which are more than are computed at once.
        const std::vector<uint64_t> allowed((n_vocab + 63) / 64, 0x5555555555555555);
        std::vector<std::vector<Candidate>> sorted, sorted_allowed;
        for (size_t which = 0; which < 6; which++) {
          sorted.push_back(best_of(std::span(all).subspan(which * n_vocab, n_vocab), n_vocab));
          std::sort(sorted.back().begin(), sorted.back().end(), better);
          sorted_allowed.push_back(sorted.back());
          std::erase_if(sorted_allowed.back(), [](const Candidate& c) { return c.token % 2 != 0; });
        }
        const auto first = [](const std::vector<Candidate>& of, size_t k) {
          return std::vector<Candidate>(of.begin(), of.begin() + static_cast<std::ptrdiff_t>(std::min(k, of.size())));
        };
        for (bool settling = true; settling;) {
          settling = engine.model.settle(engine.pool, kernels_for(isa), std::chrono::nanoseconds(0)) &&
                     engine.model.n_sketched() < n_vocab;
          CAPTURE(engine.model.n_sketched());
          for (const size_t which : {0, 5, 1, 2, 3, 4})  // what is estimated together need not be asked for in order
            for (const size_t k : {size_t{1}, size_t{40}, size_t{100}, n_vocab}) {
              CHECK(output.best(which, k) == first(sorted[which], k));
              CHECK(output.best(which, k, allowed) == first(sorted_allowed[which], k));
            }
        }
        CHECK(output.bytes_refined() > 0);
      }
  }
  std::filesystem::remove(packed);
}
