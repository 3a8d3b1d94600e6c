// GGUF version 3 container, read through a memory map. Source: shared GGUF specification of the ggml project.
// Every count, offset and length from the file is checked before it is used; views point into the map and live as long
// as it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "error.h"

namespace bitnet {

// Packed files (pack.h) say under this key which version of them they are; this program reads one.
inline constexpr std::string_view kPackVersionKey = "bitnet.pack.version";
inline constexpr unsigned kPackVersion = 2;

// From 9000 on: types of packed files.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ8_0 = 8,
  kQ6_K = 14,
  kBF16 = 30,
  kI2_S = 36,
  kTrits = 9000,
};

std::string_view name_of(TensorType type);

struct Tensor {
  std::string_view name;
  TensorType type;
  std::vector<uint64_t> shape;       // ne: shape[0] is the contiguous (input) dimension, shape[1] the rows (outputs)
  std::span<const std::byte> bytes;  // the whole tensor; for I2_S the codes, then the scale, then 28 bytes of padding
  uint64_t elements() const;
};

// The elements of an array of strings, each a view into the map.
using GgufStrings = std::vector<std::string_view>;

class GgufFile {
 public:
  // Throws Error: kFileUnreadable, kFileTruncated, kNotGguf, kGgufVersion, kUnsupportedModel (a tensor type or a
  // version of packed files that this program does not know), kInvalidModel (names twice, impossible counts or shapes,
  // misaligned tensors).
  explicit GgufFile(const std::string& path);
  ~GgufFile();
  GgufFile(GgufFile&& other) noexcept;
  GgufFile& operator=(GgufFile&&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return data_.get_deleter().size; }  // bytes

  // Copies what `at`, a place in a tensor's bytes, holds: by reading the file, so that no pages of the map are taken
  // up.
  void read(const void* at, std::span<uint8_t> out) const;

  // A scalar key; empty when it is absent, Error(kInvalidModel) naming the key when it has another type.
  std::optional<uint64_t> find_uint(std::string_view key) const;  // any integer type that is not negative
  std::optional<double> find_float(std::string_view key) const;   // f32, f64
  std::optional<bool> find_bool(std::string_view key) const;
  std::optional<std::string_view> find_string(std::string_view key) const;
  std::optional<GgufStrings> find_strings(std::string_view key) const;        // array of strings
  std::optional<std::vector<int32_t>> find_ints(std::string_view key) const;  // array of i32 or u32

  // The same for keys that must be there: Error(kInvalidModel) naming the key when it is absent.
  uint64_t get_uint(std::string_view key) const;
  double get_float(std::string_view key) const;
  std::string_view get_string(std::string_view key) const;
  GgufStrings get_strings(std::string_view key) const;
  std::vector<int32_t> get_ints(std::string_view key) const;

  // Throws Error(code): "<path>: key "<key>": <message>".
  [[noreturn]] void fail(std::string_view key, const std::string& message,
                         ExitCode code = ExitCode::kInvalidModel) const;

  std::span<const Tensor> tensors() const { return tensors_; }
  const Tensor* find_tensor(std::string_view name) const;  // nullptr when absent

  // All keys and values as they stand in the file, and how many they are: to copy them.
  std::span<const std::byte> key_bytes() const { return key_bytes_; }
  size_t n_keys() const { return value_index_.size(); }

  // Keys in the order of the file, each with its value printed for people (arrays: type, length and the first
  // elements).
  std::vector<std::pair<std::string_view, std::string>> describe_keys() const;

 private:
  struct Value;  // type and where its bytes are
  struct Unmap {
    size_t size;
    int fd;
    void operator()(const std::byte* data) const;
  };

  static std::unique_ptr<const std::byte, Unmap> map(const std::string& path);
  void read();
  const Value* find(std::string_view key) const;
  template <typename T>
  T require(std::optional<T> value, std::string_view key) const;

  std::string path_;
  std::unique_ptr<const std::byte, Unmap> data_;
  std::span<const std::byte> key_bytes_;
  std::vector<std::pair<std::string_view, Value>> values_;
  std::unordered_map<std::string_view, size_t> value_index_;
  std::vector<Tensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;
};

}  // namespace bitnet
