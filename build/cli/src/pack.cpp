#include "pack.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "error.h"
#include "gguf.h"
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "model.h"

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

// 2-bit codes of four weights as a number of base 3.
uint8_t base3(uint8_t codes) {
  return static_cast<uint8_t>((codes >> 6) * 27 + (codes >> 4 & 3) * 9 + (codes >> 2 & 3) * 3 + (codes & 3));
}

size_t trit_bytes(const TernaryMatrix& w) {
  return w.rows * TernaryRows{TernaryType::kTrits, nullptr, w.rows, w.cols}.row_bytes();
}

Bytes pack_ternary(const GgufFile& file, const std::string& name, const TernaryMatrix& w) {
  Bytes out(trit_bytes(w) + kTailBytes, 0);
  uint8_t* packed = out.data();
  for (size_t r = 0; r < w.rows; r++)
    for (size_t done = 0; done < w.cols / 4; done += kCodeUnit, packed += kTritUnit) {
      uint8_t codes[kCodeUnit] = {};
      std::memcpy(codes, w.data + r * (w.cols / 4) + done, std::min(sizeof codes, w.cols / 4 - done));
      for (const uint8_t byte : codes)
        if ((byte & byte >> 1 & 0x55) != 0)
          throw Error(ExitCode::kInvalidModel,
                      file.path() + ": tensor " + name + " has a code 3, which stands for no weight");
      for (size_t i = 0; i < 4; i++)
        for (size_t p = 0; p < 32; p++)
          packed[i * 32 + p] =
              static_cast<uint8_t>(base3(codes[i * 32 + p]) + 81 * (codes[128 + p] >> (6 - 2 * i) & 3));
    }
  std::memcpy(packed, &w.scale, sizeof w.scale);
  return out;
}

struct Planes {
  Bytes high, low;
};

// One row of whole numbers below 2^bits, `zero` meaning 0, and their scales, appended to the planes.
void split_row(std::span<const uint8_t> numbers, std::span<const uint16_t> scales, unsigned bits, Planes& out) {
  const size_t high_at = out.high.size(), cols = numbers.size(), scale_bytes = scales.size_bytes(),
               low_at = out.low.size();
  out.high.resize(high_at + scale_bytes + cols / 2);
  out.low.resize(low_at + cols * (bits - 4) / 8);
  std::memcpy(&out.high[high_at], scales.data(), scale_bytes);
  uint8_t* high = &out.high[high_at + scale_bytes];
  uint8_t* low = &out.low[low_at];
  for (size_t i = 0; i < cols; i++) {
    high[i / 64 * 32 + i % 32] |= static_cast<uint8_t>(numbers[i] >> (bits - 4) << (i / 32 % 2 * 4));
    if (bits == 8)
      low[i / 64 * 32 + i % 32] |= static_cast<uint8_t>((numbers[i] & 15) << (i / 32 % 2 * 4));
    else
      low[i / 128 * 32 + i % 32] |= static_cast<uint8_t>((numbers[i] & 3) << (i / 32 % 4 * 2));
  }
}

Planes split(const FloatRows& w, unsigned bits) {
  Planes out;
  const bool exact = w.type == RowType::kQ8_0 && bits == 8;
  const float most = bits == 8 ? 127.0f : 31.0f, zero = bits == 8 ? 128.0f : 32.0f;
  std::vector<float> row(w.cols);
  std::vector<uint8_t> numbers(w.cols);
  std::vector<uint16_t> scales(w.cols / kScaleBlock);
  for (size_t r = 0; r < w.rows; r++) {
    if (exact) {
      const uint8_t* blocks = w.slice(r, 1).data;
      for (size_t b = 0; b < scales.size(); b++) {
        std::memcpy(&scales[b], blocks + b * 34, sizeof(uint16_t));
        for (size_t i = 0; i < kScaleBlock; i++)
          numbers[b * kScaleBlock + i] = static_cast<uint8_t>(blocks[b * 34 + 2 + i] + 128);
      }
    } else {
      decode_row(w, r, row.data());
      for (size_t b = 0; b < scales.size();
           b++) {  // as ggml quantises Q8_0: largest magnitude → 127, halves away from zero
        const std::span<const float> block(&row[b * kScaleBlock], kScaleBlock);
        float largest = 0.0f;
        for (const float x : block) largest = std::max(largest, std::fabs(x));
        const float scale = largest / most, inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
        scales[b] = float_to_half(scale);
        for (size_t i = 0; i < kScaleBlock; i++)
          numbers[b * kScaleBlock + i] =
              static_cast<uint8_t>(std::clamp(std::round(block[i] * inverse), -zero, zero - 1.0f) + zero);
      }
    }
    split_row(numbers, scales, bits, out);
  }
  return out;
}

struct OutputTensor {
  std::string name;
  TensorType type;
  std::vector<uint64_t> shape;
  Bytes bytes;
  uint64_t offset = 0;
};

std::vector<OutputTensor> packed_tensors(const GgufFile& file, const Model& model, unsigned bits) {
  std::vector<OutputTensor> out;
  const auto copy = [&](const std::string& name) {
    const Tensor& tensor = *file.find_tensor(name);
    const uint8_t* data = reinterpret_cast<const uint8_t*>(tensor.bytes.data());
    out.push_back({name, tensor.type, tensor.shape, Bytes(data, data + tensor.bytes.size())});
  };
  const auto add_split = [&](const std::string& name, const FloatRows& w) {
    if (w.cols % (2 * kScaleBlock) != 0 || w.cols / kScaleBlock > kMaxScreenBlocks)
      throw Error(ExitCode::kUnsupportedModel, file.path() + ": tensor " + name + " has rows of " +
                                                   std::to_string(w.cols) +
                                                   " weights; packing takes multiples of 128 up to " +
                                                   std::to_string(kMaxScreenBlocks * kScaleBlock));
    Planes planes = split(w, bits);
    const std::vector<uint64_t> shape{w.cols, w.rows};
    out.push_back({name, TensorType::kHigh4, shape, std::move(planes.high)});
    out.push_back(
        {name + kLowPlaneSuffix, bits == 8 ? TensorType::kLow4 : TensorType::kLow2, shape, std::move(planes.low)});
  };
  const auto add_ternary = [&](const std::string& name, const TernaryMatrix& w) {
    if (trit_bytes(w) >= w.bytes()) return copy(name);  // short rows, that do not fill a unit
    out.push_back({name, TensorType::kTrits, {w.cols, w.rows}, pack_ternary(file, name, w)});
  };
  add_split("token_embd.weight", model.token_embedding());
  for (size_t i = 0; i < model.layers().size(); i++) {
    const Layer& layer = model.layers()[i];
    const std::string block = "blk." + std::to_string(i) + ".";
    copy(block + "attn_norm.weight");
    add_ternary(block + "attn_q.weight", layer.q);
    add_ternary(block + "attn_k.weight", layer.k);
    add_ternary(block + "attn_v.weight", layer.v);
    copy(block + "attn_sub_norm.weight");
    add_ternary(block + "attn_output.weight", layer.attn_output);
    copy(block + "ffn_norm.weight");
    add_ternary(block + "ffn_gate.weight", layer.gate);
    add_ternary(block + "ffn_up.weight", layer.up);
    copy(block + "ffn_sub_norm.weight");
    add_ternary(block + "ffn_down.weight", layer.down);
  }
  copy("output_norm.weight");
  if (file.find_tensor("rope_freqs.weight")) copy("rope_freqs.weight");
  if (file.find_tensor("output.weight")) add_split("output.weight", model.output());
  return out;
}

// A file that appears under its name only when it is whole.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path) : path_(path), temporary_(path + ".part") {
    struct stat status {};
    if (stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))  // a rename would replace a device
      throw Error(ExitCode::kFileUnreadable, path_ + ": cannot be written: not a regular file");
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ < 0) fail();
  }
  ~OutputFile() {
    if (fd_ >= 0) close(fd_);
    if (!finished_) unlink(temporary_.c_str());
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const uint8_t> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail();
      bytes = bytes.subspan(static_cast<size_t>(n));
    }
  }
  void finish() {
    if (fsync(fd_) != 0 || close(std::exchange(fd_, -1)) != 0) fail();
    if (rename(temporary_.c_str(), path_.c_str()) != 0) fail();
    finished_ = true;
  }

 private:
  [[noreturn]] void fail() const {
    throw Error(ExitCode::kFileUnreadable, path_ + ": cannot be written: " + std::generic_category().message(errno));
  }
  std::string path_, temporary_;
  int fd_ = -1;
  bool finished_ = false;
};

}  // namespace

void pack(const std::string& input, const std::string& output, unsigned output_bits) {
  const GgufFile file(input);
  if (file.find_uint("bitnet.pack.version")) throw Error(ExitCode::kUnsupportedModel, input + ": is packed already");
  const Model model(file);
  std::vector<OutputTensor> tensors = packed_tensors(file, model, output_bits);

  const uint64_t alignment = file.find_uint("general.alignment").value_or(32);
  const auto aligned = [alignment](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };
  uint64_t data_size = 0;
  for (OutputTensor& tensor : tensors) {
    tensor.offset = data_size;
    data_size = aligned(data_size + tensor.bytes.size());
  }
  std::vector<uint32_t> checksums;
  size_t in_chunk = 0;
  const auto checksum = [&](std::span<const uint8_t> bytes) {
    while (!bytes.empty()) {
      if (in_chunk == 0) checksums.push_back(static_cast<uint32_t>(crc32(0, nullptr, 0)));
      const size_t n = std::min(bytes.size(), kPackChunkBytes - in_chunk);
      checksums.back() = static_cast<uint32_t>(crc32(checksums.back(), bytes.data(), static_cast<uInt>(n)));
      in_chunk = (in_chunk + n) % kPackChunkBytes;
      bytes = bytes.subspan(n);
    }
  };
  for (OutputTensor& tensor : tensors) {
    tensor.bytes.insert(tensor.bytes.end(), aligned(tensor.bytes.size()) - tensor.bytes.size(), 0);
    checksum(tensor.bytes);
  }

  Bytes header;
  put(header, kMagic);
  put(header, uint32_t{3});
  put(header, static_cast<uint64_t>(tensors.size()));
  put(header, static_cast<uint64_t>(file.n_keys() + 3));
  const std::span<const std::byte> keys = file.key_bytes();
  const uint8_t* first = reinterpret_cast<const uint8_t*>(keys.data());
  header.insert(header.end(), first, first + keys.size());
  put_string(header, "bitnet.pack.version");
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
  header.insert(header.end(), aligned(header.size()) - header.size(), 0);

  OutputFile out(output);
  out.write(header);
  for (const OutputTensor& tensor : tensors) out.write(tensor.bytes);
  out.finish();
}

}  // namespace bitnet
