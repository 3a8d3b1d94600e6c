// A GGUF file of a test's own making, valid or not.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "gguf.h"

namespace bitnet {

template <typename T>
std::string bytes_of(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

inline std::string gguf_string(std::string_view text) { return bytes_of<uint64_t>(text.size()) + std::string(text); }

class GgufBuilder {
 public:
  // The value's type is that of GGUF with the same name; std::string_view is a string.
  template <typename T>
  GgufBuilder& key(std::string_view name, T value) {
    if constexpr (std::is_convertible_v<T, std::string_view>) {
      return raw_key(name, type_of<T>(), gguf_string(value));
    } else {
      return raw_key(name, type_of<T>(), bytes_of(value));
    }
  }

  template <typename T>
  GgufBuilder& array(std::string_view name, const std::vector<T>& elements) {
    std::string bytes = bytes_of<uint32_t>(type_of<T>()) + bytes_of<uint64_t>(elements.size());
    for (const T& element : elements) {
      if constexpr (std::is_convertible_v<T, std::string_view>) {
        bytes += gguf_string(element);
      } else {
        bytes += bytes_of(element);
      }
    }
    return raw_key(name, 9, bytes);
  }

  // `bytes` as they follow the type in the file.
  GgufBuilder& raw_key(std::string_view name, uint32_t type, const std::string& bytes) {
    keys_ += gguf_string(name) + bytes_of(type) + bytes;
    ++n_keys_;
    return *this;
  }

  // With its data at the next multiple of the alignment.
  GgufBuilder& tensor(std::string_view name, const std::vector<uint64_t>& shape, uint32_t type,
                      const std::string& data) {
    data_.resize((data_.size() + alignment_ - 1) / alignment_ * alignment_);
    raw_tensor(name, shape, type, data_.size());
    data_ += data;
    return *this;
  }

  GgufBuilder& raw_tensor(std::string_view name, const std::vector<uint64_t>& shape, uint32_t type, uint64_t offset) {
    tensors_ += gguf_string(name) + bytes_of(static_cast<uint32_t>(shape.size()));
    for (const uint64_t length : shape) tensors_ += bytes_of(length);
    tensors_ += bytes_of(type) + bytes_of(offset);
    ++n_tensors_;
    return *this;
  }

  GgufBuilder& alignment(uint32_t bytes) {
    alignment_ = bytes;
    return key("general.alignment", bytes);
  }

  std::string bytes() const {
    std::string file = "GGUF" + bytes_of<uint32_t>(3) + bytes_of(n_tensors_) + bytes_of(n_keys_) + keys_ + tensors_;
    if (n_tensors_ != 0) file.resize((file.size() + alignment_ - 1) / alignment_ * alignment_);
    return file + data_;
  }

 private:
  template <typename T>
  static uint32_t type_of() {
    if constexpr (std::is_convertible_v<T, std::string_view>) return 8;
    if constexpr (std::is_same_v<T, uint8_t>) return 0;
    if constexpr (std::is_same_v<T, int8_t>) return 1;
    if constexpr (std::is_same_v<T, uint16_t>) return 2;
    if constexpr (std::is_same_v<T, int16_t>) return 3;
    if constexpr (std::is_same_v<T, uint32_t>) return 4;
    if constexpr (std::is_same_v<T, int32_t>) return 5;
    if constexpr (std::is_same_v<T, float>) return 6;
    if constexpr (std::is_same_v<T, bool>) return 7;
    if constexpr (std::is_same_v<T, uint64_t>) return 10;
    if constexpr (std::is_same_v<T, int64_t>) return 11;
    if constexpr (std::is_same_v<T, double>) return 12;
  }

  uint64_t n_keys_ = 0;
  uint64_t n_tensors_ = 0;
  uint32_t alignment_ = 32;
  std::string keys_;
  std::string tensors_;
  std::string data_;
};

// A folder that goes when the test ends.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "bitnet-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::filesystem::filesystem_error("mkdtemp", pattern, {});
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string path(std::string_view name) const { return path_ / name; }

  // The path of a new file with these bytes. One of that name is removed first: some file systems make overwriting
  // slow.
  std::string write(std::string_view name, std::string_view bytes) const {
    std::filesystem::remove(path(name));
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }

 private:
  std::filesystem::path path_;
};

}  // namespace bitnet
