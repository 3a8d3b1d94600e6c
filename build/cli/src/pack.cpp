#include "pack.h"

#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "error.h"
#include "gguf.h"
#include "kernels/kernels.h"
#include "machine.h"
#include "model.h"
#include "new_file.h"
#include "quantize.h"
#include "rounding.h"
#include "thread_pool.h"

namespace bitnet {
namespace {

constexpr uint32_t kMagic = 0x46554747;   // "GGUF"
constexpr uint32_t kU32 = 4, kArray = 9;  // GGUF value types
constexpr size_t kTailBytes = 32;         // of TRITS, as of I2_S

using Bytes = std::vector<uint8_t>;

template <class T>
void put(Bytes& out, T value) {
  const size_t at = out.size();
  out.resize(at + sizeof value);
  std::memcpy(&out[at], &value, sizeof value);
}

void put_string(Bytes& out, std::string_view text) {
  put(out, static_cast<uint64_t>(text.size()));
  out.insert(out.end(), text.begin(), text.end());
}

// Rows that are made one by one, in any order, and at the end of ternary ones the scale.
struct OutputTensor {
  std::string name;
  TensorType type;
  std::vector<uint64_t> shape;
  size_t n_rows, row_bytes;
  std::function<bool(size_t row, float* scratch, uint8_t* out)> make_row;  // scratch: (shape[0])
  std::string obstacle;                                                    // why a row cannot be made
  std::optional<float> scale;
  uint64_t offset = 0;

  size_t bytes() const { return n_rows * row_bytes + (scale ? kTailBytes : 0); }
};

OutputTensor copied(const std::string& name, TensorType type, const std::vector<uint64_t>& shape, const uint8_t* data,
                    size_t n_rows, size_t row_bytes, std::optional<float> scale = {}) {
  const auto make_row = [=](size_t row, float*, uint8_t* out) {
    std::memcpy(out, data + row * row_bytes, row_bytes);
    return true;
  };
  return {name, type, shape, n_rows, row_bytes, make_row, "", scale};
}

OutputTensor ternary(const std::string& name, const TernaryMatrix& w) {
  const std::vector<uint64_t> shape{w.cols, w.rows};
  const size_t from_bytes = w.all().row_bytes();
  const size_t to_bytes = TernaryRows{TernaryType::kTrits, nullptr, w.rows, w.cols}.row_bytes();
  const bool packs = w.type == TernaryType::kCodes && to_bytes < from_bytes;  // short rows do not fill a unit
  const auto make_row = [=](size_t row, float*, uint8_t* out) {
    const uint8_t* from = w.data + row * from_bytes;
    if (!are_ternary(w.type, {from, from_bytes})) return false;
    if (packs)
      pack_rows(kernels_for(best_isa()).pack_trits, w.all().slice(row, 1), out);
    else
      std::memcpy(out, from, from_bytes);
    return true;
  };
  const TensorType type = packs || w.type == TernaryType::kTrits ? TensorType::kTrits : TensorType::kI2_S;
  return {name,   type, shape, w.rows, packs ? to_bytes : from_bytes, make_row, "has a code that stands for no weight",
          w.scale};
}

OutputTensor quantized(const GgufFile& file, const std::string& name, const FloatRows& w, unsigned bits) {
  const std::vector<uint64_t> shape{w.cols, w.rows};
  const TensorType type = bits == 8 ? TensorType::kQ8_0 : TensorType::kQ6_K;
  const RowType row_type = bits == 8 ? RowType::kQ8_0 : RowType::kQ6_K;
  const size_t multiple = bits == 8 ? kQ8Block : kQ6Block, to_bytes = row_bytes(row_type, w.cols);
  if (w.cols % multiple != 0)
    throw Error(ExitCode::kUnsupportedModel, file.path() + ": tensor " + name + " has rows of " +
                                                 std::to_string(w.cols) + " weights; " + std::to_string(bits) +
                                                 " bits take multiples of " + std::to_string(multiple));
  if (w.type == row_type) return copied(name, type, shape, w.data, w.rows, to_bytes);
  const auto make_row = [=](size_t row, float* scratch, uint8_t* out) {
    decode_row(w, row, scratch);
    const std::span<const float> weights(scratch, w.cols);
    return bits == 8 ? quantize_q8_0(weights, out) : quantize_q6_k(weights, out);
  };
  return {name, type, shape, w.rows, to_bytes, make_row, "has a weight that is not finite, or too large for its scale",
          {}};
}

std::vector<OutputTensor> packed_tensors(const GgufFile& file, const Model& model, unsigned bits) {
  std::vector<OutputTensor> out;
  const auto copy = [&](const std::string& name) {
    const Tensor& tensor = *file.find_tensor(name);
    out.push_back(copied(name, tensor.type, tensor.shape, reinterpret_cast<const uint8_t*>(tensor.bytes.data()), 1,
                         tensor.bytes.size()));
  };
  const auto add = [&](const std::string& name, const TernaryMatrix& w) { out.push_back(ternary(name, w)); };
  out.push_back(quantized(file, "token_embd.weight", model.token_embedding(), bits));
  for (size_t i = 0; i < model.layers().size(); i++) {
    const Layer& layer = model.layers()[i];
    const std::string block = "blk." + std::to_string(i) + ".";
    copy(block + "attn_norm.weight");
    add(block + "attn_q.weight", layer.q);
    add(block + "attn_k.weight", layer.k);
    add(block + "attn_v.weight", layer.v);
    copy(block + "attn_sub_norm.weight");
    add(block + "attn_output.weight", layer.attn_output);
    copy(block + "ffn_norm.weight");
    add(block + "ffn_gate.weight", layer.gate);
    add(block + "ffn_up.weight", layer.up);
    copy(block + "ffn_sub_norm.weight");
    add(block + "ffn_down.weight", layer.down);
  }
  copy("output_norm.weight");
  if (file.find_tensor("rope_freqs.weight")) copy("rope_freqs.weight");
  if (file.find_tensor("output.weight")) out.push_back(quantized(file, "output.weight", model.output(), bits));
  return out;
}

// What stands behind the header, written one piece after another, and the checksums of its chunks.
class DataSection {
 public:
  DataSection(NewFile& out, uint64_t start) : out_(out), start_(start) {}

  void write(std::span<const uint8_t> bytes) {
    out_.write(bytes.data(), bytes.size(), start_ + size_);
    while (!bytes.empty()) {
      const size_t in_chunk = size_ % kPackChunkBytes, n = std::min(bytes.size(), kPackChunkBytes - in_chunk);
      if (in_chunk == 0) checksums_.push_back(0);
      checksums_.back() = static_cast<uint32_t>(crc32(checksums_.back(), bytes.data(), static_cast<uInt>(n)));
      size_ += n;
      bytes = bytes.subspan(n);
    }
  }
  uint64_t size() const { return size_; }
  std::span<const uint32_t> checksums() const { return checksums_; }

 private:
  NewFile& out_;
  uint64_t start_, size_ = 0;
  std::vector<uint32_t> checksums_;
};

uint64_t alignment_of(const GgufFile& file) { return file.find_uint("general.alignment").value_or(32); }

Bytes header_of(const GgufFile& file, std::span<const OutputTensor> tensors, std::span<const uint32_t> checksums) {
  Bytes header;
  put(header, kMagic);
  put(header, uint32_t{3});
  put(header, static_cast<uint64_t>(tensors.size()));
  put(header, static_cast<uint64_t>(file.n_keys() + 3));
  const std::span<const std::byte> keys = file.key_bytes();
  const uint8_t* first = reinterpret_cast<const uint8_t*>(keys.data());
  header.insert(header.end(), first, first + keys.size());
  put_string(header, kPackVersionKey);
  put(header, kU32);
  put(header, uint32_t{kPackVersion});
  put_string(header, "bitnet.pack.chunk_bytes");
  put(header, kU32);
  put(header, static_cast<uint32_t>(kPackChunkBytes));
  put_string(header, "bitnet.pack.chunk_crc32");
  put(header, kArray);
  put(header, kU32);
  put(header, static_cast<uint64_t>(checksums.size()));
  for (const uint32_t sum : checksums) put(header, sum);
  for (const OutputTensor& tensor : tensors) {
    put_string(header, tensor.name);
    put(header, static_cast<uint32_t>(tensor.shape.size()));
    for (const uint64_t n : tensor.shape) put(header, n);
    put(header, static_cast<uint32_t>(tensor.type));
    put(header, tensor.offset);
  }
  header.resize(round_up(header.size(), alignment_of(file)));
  return header;
}

// Rows go to the file some megabytes at a time.
void write_tensor(const OutputTensor& tensor, const std::string& path, ThreadPool& pool, DataSection& out) {
  constexpr size_t kBufferBytes = size_t{8} << 20;
  const size_t at_once = std::min(tensor.n_rows, std::max(kBufferBytes / tensor.row_bytes, size_t{1}));
  Bytes buffer(at_once * tensor.row_bytes);
  std::vector<std::vector<float>> scratch(pool.size(), std::vector<float>(tensor.shape.front()));
  for (size_t row = 0; row < tensor.n_rows; row += at_once) {
    const size_t n = std::min(at_once, tensor.n_rows - row);
    std::atomic<bool> made = true;
    pool.for_each(n, [&](size_t i, size_t thread) {
      if (!tensor.make_row(row + i, scratch[thread].data(), &buffer[i * tensor.row_bytes])) made = false;
    });
    if (!made) throw Error(ExitCode::kInvalidModel, path + ": tensor " + tensor.name + " " + tensor.obstacle);
    out.write(std::span(buffer).first(n * tensor.row_bytes));
  }
  if (tensor.scale) {
    uint8_t tail[kTailBytes] = {};
    std::memcpy(tail, &*tensor.scale, sizeof *tensor.scale);
    out.write(tail);
  }
}

}  // namespace

void pack(const std::string& input, const std::string& output, unsigned output_bits) {
  const GgufFile file(input);
  if (file.find_uint(kPackVersionKey)) throw Error(ExitCode::kUnsupportedModel, input + ": is packed already");
  const Model model(file);
  std::vector<OutputTensor> tensors = packed_tensors(file, model, output_bits);
  const uint64_t alignment = alignment_of(file);
  uint64_t data_size = 0;
  for (OutputTensor& tensor : tensors) {
    tensor.offset = data_size;
    data_size = round_up(data_size + tensor.bytes(), alignment);
  }
  // The header stands before what it has the checksums of: it is written last.
  const std::vector<uint32_t> no_checksums(ceil_div(data_size, kPackChunkBytes));
  NewFile out(output, output + ".part", output + ":", 0644);
  DataSection data(out, header_of(file, tensors, no_checksums).size());
  ThreadPool pool(usable_processors());
  for (const OutputTensor& tensor : tensors) {
    write_tensor(tensor, input, pool, data);
    data.write(Bytes(round_up(data.size(), alignment) - data.size(), 0));
  }
  const Bytes header = header_of(file, tensors, data.checksums());
  out.write(header.data(), header.size(), 0);
  out.finish(true);
}

}  // namespace bitnet
