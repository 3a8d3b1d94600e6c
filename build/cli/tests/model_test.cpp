// How weights settle.
#include "model.h"

#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <vector>

#include "gguf_builder.h"

using namespace bitnet;

namespace {

constexpr size_t kDim = 640, kFfnDim = 768, kKvDim = 128, kVocab = 256;
constexpr uint32_t kF32 = 0, kI2S = 36;  // types of GGUF

// A model of one layer with random weights, a bad code among those of `bad`.
std::string model_bytes(std::string_view bad) {
  std::mt19937 random(1);
  GgufBuilder file;
  const std::string prefix = "bitnet-b1.58.";
  file.key("general.architecture", "bitnet-b1.58")
      .key(prefix + "embedding_length", static_cast<uint32_t>(kDim))
      .key(prefix + "block_count", uint32_t{1})
      .key(prefix + "feed_forward_length", static_cast<uint32_t>(kFfnDim))
      .key(prefix + "context_length", uint32_t{64})
      .key(prefix + "attention.head_count", static_cast<uint32_t>(kDim / kKvDim))
      .key(prefix + "attention.head_count_kv", uint32_t{1})
      .key(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
  const auto floats = [&](const std::string& name, std::vector<uint64_t> shape) {
    size_t n = 1;
    for (const uint64_t length : shape) n *= length;
    std::string data(n * sizeof(float), '\0');
    for (size_t i = 0; i < n; i++) {
      const float value = static_cast<float>(random() % 1000) * 1e-3f;
      std::memcpy(&data[i * sizeof value], &value, sizeof value);
    }
    file.tensor(name, shape, kF32, data);
  };
  const auto ternary = [&](const std::string& name, size_t rows, size_t cols) {
    std::string data(rows * cols / 4 + 32, '\0');
    for (size_t i = 0; i < rows * cols / 4; i++)
      for (int code = 0; code < 4; code++) data[i] = static_cast<char>(data[i] << 2 | random() % 3);
    if (name == bad) data[rows * cols / 8] |= 0x0c;
    const float scale = 0.5f;
    std::memcpy(&data[rows * cols / 4], &scale, sizeof scale);
    file.tensor(name, {cols, rows}, kI2S, data);
  };
  floats("token_embd.weight", {kDim, kVocab});
  floats("output_norm.weight", {kDim});
  floats("blk.0.attn_norm.weight", {kDim});
  floats("blk.0.attn_sub_norm.weight", {kDim});
  floats("blk.0.ffn_norm.weight", {kDim});
  floats("blk.0.ffn_sub_norm.weight", {kFfnDim});
  ternary("blk.0.attn_q.weight", kDim, kDim);
  ternary("blk.0.attn_k.weight", kKvDim, kDim);
  ternary("blk.0.attn_v.weight", kKvDim, kDim);
  ternary("blk.0.attn_output.weight", kDim, kDim);
  ternary("blk.0.ffn_gate.weight", kFfnDim, kDim);
  ternary("blk.0.ffn_up.weight", kFfnDim, kDim);
  ternary("blk.0.ffn_down.weight", kDim, kFfnDim);
  return file.bytes();
}

// x times a settled matrix.
std::vector<int32_t> product(const TernaryMatrix& m, const Kernels& kernels, const std::vector<int8_t>& x) {
  int32_t total = 0;
  for (const int8_t v : x) total += v;
  std::vector<int32_t> out(m.rows + 320);  // a whole unit of columns
  const bool trits = m.type == TernaryType::kTrits;
  if (m.by_columns)
    for (size_t c = 0; c < m.cols; c += 128)
      (trits ? kernels.add_trit_columns : kernels.add_columns)(m.columns(), x.data(), {c, 128}, {}, out.data());
  else
    (trits ? kernels.trit_matmul : kernels.ternary_matmul)(m.all(), {x.data(), &total, 1}, out.data(), m.rows);
  out.resize(m.rows);
  return out;
}

}  // namespace

TEST_CASE("codes settle into trits where the kernels compute from them, but not a code that stands for no weight") {
  const TemporaryFolder folder;
  std::mt19937 random(2);
  std::vector<int8_t> x(kFfnDim);
  for (int8_t& v : x) v = static_cast<int8_t>(random());
  for (const char* bad : {"", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}) {
    const GgufFile file(folder.write("model.gguf", model_bytes(bad)));
    for (const Isa isa : kIsas) {
      if (!supported(isa)) continue;
      const Kernels& kernels = kernels_for(isa);
      ThreadPool pool(2);
      Model model(file);
      const auto products = [&](const Kernels& by) {
        const Layer& l = model.layers()[0];
        std::vector<std::vector<int32_t>> out;
        for (const TernaryMatrix* m : {&l.gate, &l.up, &l.down})
          out.push_back(product(*m, by, {x.begin(), x.begin() + static_cast<std::ptrdiff_t>(m->cols)}));
        return out;
      };
      const std::vector<std::vector<int32_t>> expected = products(kScalarKernels);
      while (model.settle(pool, kernels)) {
      }
      const Layer& after = model.layers()[0];
      const bool trits = kernels.trit_matmul != nullptr;
      CHECK((after.gate.type == TernaryType::kTrits) == trits);
      CHECK((after.up.type == TernaryType::kTrits) == (trits && std::string_view(bad) != "blk.0.ffn_up.weight"));
      CHECK((after.down.type == TernaryType::kTrits) == (trits && std::string_view(bad) != "blk.0.ffn_down.weight"));
      CHECK(after.down.by_columns == (std::string_view(bad) != "blk.0.ffn_down.weight"));
      CHECK(products(kernels) == expected);
    }
  }
}
