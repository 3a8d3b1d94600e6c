#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <system_error>
#include <utility>

#include "utf8.h"

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

namespace bitnet {

namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr uint32_t kVersion = 3;
constexpr std::string_view kAlignmentKey = "general.alignment";
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMinAlignment = 8;
constexpr uint64_t kMaxAlignment = uint64_t{1} << 30;
constexpr uint64_t kMaxKeys = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 16;
constexpr uint32_t kMaxDimensions = 4;
constexpr int kMaxArrayDepth = 4;
constexpr size_t kShownElements = 4;  // of an array in describe_keys

enum class ValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

struct ValueTypeTraits {
  std::string_view name;
  uint64_t size;  // bytes; 0: it depends on the value
};

constexpr std::array<ValueTypeTraits, 13> kValueTypes = {{{"u8", 1},
                                                          {"i8", 1},
                                                          {"u16", 2},
                                                          {"i16", 2},
                                                          {"u32", 4},
                                                          {"i32", 4},
                                                          {"f32", 4},
                                                          {"bool", 1},
                                                          {"string", 0},
                                                          {"array", 0},
                                                          {"u64", 8},
                                                          {"i64", 8},
                                                          {"f64", 8}}};

const ValueTypeTraits& traits_of(ValueType type) { return kValueTypes[static_cast<uint32_t>(type)]; }

struct TensorTypeTraits {
  TensorType type;
  std::string_view name;
  uint64_t block_elements;  // a row is a whole number of blocks
  uint64_t block_bytes;
  uint64_t tail_bytes;           // after the last block of the tensor
  uint64_t blocks_per_unit = 1;  // blocks that share block_bytes; a row's last unit may lack some
};

// I2_S: blocks of 128 two-bit codes, then for the whole tensor a float32 scale and 28 bytes of padding.
constexpr std::array<TensorTypeTraits, 7> kTensorTypes = {{{TensorType::kF32, "F32", 1, 4, 0},
                                                           {TensorType::kF16, "F16", 1, 2, 0},
                                                           {TensorType::kQ8_0, "Q8_0", 32, 34, 0},
                                                           {TensorType::kQ6_K, "Q6_K", 256, 210, 0},
                                                           {TensorType::kBF16, "BF16", 1, 2, 0},
                                                           {TensorType::kI2_S, "I2_S", 128, 32, 32},
                                                           {TensorType::kTrits, "TRITS", 128, 128, 32, 5}}};

const TensorTypeTraits* find_traits(TensorType type) {
  const auto found = std::find_if(kTensorTypes.begin(), kTensorTypes.end(),
                                  [type](const auto& traits) { return traits.type == type; });
  return found == kTensorTypes.end() ? nullptr : &*found;
}

template <typename T>
T load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

bool is_integer(ValueType type) {
  return type != ValueType::kF32 && type != ValueType::kF64 && type != ValueType::kBool && type != ValueType::kString &&
         type != ValueType::kArray;
}

std::string_view string_at(const std::byte* bytes) {
  return {reinterpret_cast<const char*>(bytes + sizeof(uint64_t)), load<uint64_t>(bytes)};
}

// Calls `visit` with the number of type `type` at `bytes`; a bool is a uint8_t.
template <typename Visitor>
auto visit_number(ValueType type, const std::byte* bytes, Visitor visit) {
  switch (type) {
    case ValueType::kI8:
      return visit(load<int8_t>(bytes));
    case ValueType::kU16:
      return visit(load<uint16_t>(bytes));
    case ValueType::kI16:
      return visit(load<int16_t>(bytes));
    case ValueType::kU32:
      return visit(load<uint32_t>(bytes));
    case ValueType::kI32:
      return visit(load<int32_t>(bytes));
    case ValueType::kU64:
      return visit(load<uint64_t>(bytes));
    case ValueType::kI64:
      return visit(load<int64_t>(bytes));
    case ValueType::kF32:
      return visit(load<float>(bytes));
    case ValueType::kF64:
      return visit(load<double>(bytes));
    default:
      return visit(load<uint8_t>(bytes));
  }
}

template <typename Number>
std::string printed(Number number) {
  std::array<char, 32> text;
  const auto [end, error] = std::to_chars(text.begin(), text.end(), number);
  return std::string(text.begin(), end);
}

// The scalar at `at`, printed; `at` moves behind it.
std::string print_element(ValueType type, const std::byte*& at) {
  if (type == ValueType::kString) {
    const std::string_view string = string_at(at);
    at += sizeof(uint64_t) + string.size();
    return quoted(string);
  }
  const std::byte* value = at;
  at += traits_of(type).size;
  if (type == ValueType::kBool) return load<uint8_t>(value) != 0 ? "true" : "false";
  return visit_number(type, value, [](auto number) { return printed(number); });
}

// A sequential reader of the header. Nothing is read before it is known to lie within the file.
class Reader {
 public:
  Reader(const std::string& path, std::span<const std::byte> file) : path_(path), file_(file) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return file_.size() - position_; }
  const std::byte* here() const { return file_.data() + position_; }
  void set_context(std::string context) { context_ = std::move(context); }

  [[noreturn]] void fail(ExitCode code, const std::string& message) const {
    throw Error(code, path_ + ": " + (context_.empty() ? "" : context_ + ": ") + message);
  }

  void skip(uint64_t n_bytes) {
    if (n_bytes > remaining()) fail_truncated(n_bytes);
    position_ += n_bytes;
  }

  // `count` elements of `size` bytes each.
  void skip(uint64_t count, uint64_t size) {
    if (count > remaining() / size) {
      fail(ExitCode::kFileTruncated, std::to_string(count) + " elements of at least " + std::to_string(size) +
                                         " bytes at offset " + std::to_string(position_) + ", but only " +
                                         std::to_string(remaining()) + " bytes remain");
    }
    position_ += count * size;
  }

  template <typename T>
  T read() {
    if (sizeof(T) > remaining()) fail_truncated(sizeof(T));
    const T value = load<T>(here());
    position_ += sizeof(T);
    return value;
  }

  std::string_view read_string() {
    const auto length = read<uint64_t>();
    const auto* text = reinterpret_cast<const char*>(here());
    skip(length);
    return {text, length};
  }

  ValueType read_value_type() {
    const auto type = read<uint32_t>();
    if (type >= kValueTypes.size()) {
      fail(ExitCode::kInvalidModel,
           "value type " + std::to_string(type) + ", expected 0 to " + std::to_string(kValueTypes.size() - 1));
    }
    return static_cast<ValueType>(type);
  }

  void skip_elements(ValueType type, uint64_t count, int depth) {
    if (depth > kMaxArrayDepth) {
      fail(ExitCode::kInvalidModel, "arrays nested deeper than " + std::to_string(kMaxArrayDepth));
    }
    if (type == ValueType::kString) {
      for (uint64_t i = 0; i < count; ++i) skip(read<uint64_t>());
    } else if (type == ValueType::kArray) {
      for (uint64_t i = 0; i < count; ++i) {
        const auto element = read_value_type();
        skip_elements(element, read<uint64_t>(), depth + 1);
      }
    } else {
      skip(count, traits_of(type).size);
    }
  }

 private:
  [[noreturn]] void fail_truncated(uint64_t n_bytes) const {
    fail(ExitCode::kFileTruncated, "the file ends at byte " + std::to_string(file_.size()) + ", expected " +
                                       std::to_string(n_bytes) + " bytes at offset " + std::to_string(position_));
  }

  const std::string& path_;
  std::span<const std::byte> file_;
  uint64_t position_ = 0;
  std::string context_;  // what is being read, for messages
};

void read_magic_and_version(Reader& reader, std::span<const std::byte> file) {
  const std::string_view start(reinterpret_cast<const char*>(file.data()), std::min(kMagic.size(), file.size()));
  if (!kMagic.starts_with(start)) {
    reader.fail(ExitCode::kNotGguf, "not a GGUF file: it begins with " + quoted(start) + ", expected \"GGUF\"");
  }
  reader.set_context("header");
  reader.skip(kMagic.size());
  const auto version = reader.read<uint32_t>();
  if (version != kVersion) {
    const bool big_endian = version == __builtin_bswap32(kVersion);
    reader.fail(ExitCode::kGgufVersion,
                big_endian ? "big-endian GGUF, expected little-endian"
                           : "GGUF version " + std::to_string(version) + ", expected " + std::to_string(kVersion));
  }
}

uint64_t read_count(Reader& reader, std::string_view what, uint64_t limit) {
  const auto count = reader.read<uint64_t>();
  if (count > limit) {
    reader.fail(ExitCode::kInvalidModel,
                std::to_string(count) + " " + std::string(what) + ", expected at most " + std::to_string(limit));
  }
  return count;
}

struct TensorPlace {
  uint64_t offset;  // from the start of the data
  uint64_t n_bytes;
};

// Fills all of `tensor` but its bytes.
TensorPlace read_tensor_info(Reader& reader, Tensor& tensor) {
  tensor.name = reader.read_string();
  reader.set_context("tensor " + quoted(tensor.name));

  const auto n_dimensions = reader.read<uint32_t>();
  if (n_dimensions == 0 || n_dimensions > kMaxDimensions) {
    reader.fail(ExitCode::kInvalidModel,
                std::to_string(n_dimensions) + " dimensions, expected 1 to " + std::to_string(kMaxDimensions));
  }
  uint64_t elements = 1;
  for (uint32_t i = 0; i < n_dimensions; ++i) {
    const auto length = reader.read<uint64_t>();
    if (length == 0) reader.fail(ExitCode::kInvalidModel, "dimension " + std::to_string(i) + " is 0");
    if (__builtin_mul_overflow(elements, length, &elements)) {
      reader.fail(ExitCode::kInvalidModel,
                  "more than 2^64 elements (dimension " + std::to_string(i) + " is " + std::to_string(length) + ")");
    }
    tensor.shape.push_back(length);
  }

  const auto type = reader.read<uint32_t>();
  tensor.type = static_cast<TensorType>(type);
  const TensorTypeTraits* traits = find_traits(tensor.type);
  if (traits == nullptr) {
    reader.fail(ExitCode::kUnsupportedModel,
                "unknown tensor type " + std::to_string(type) +
                    ", expected F32 (0), F16 (1), Q8_0 (8), Q6_K (14), BF16 (30) or I2_S (36)");
  }
  if (tensor.shape[0] % traits->block_elements != 0) {
    reader.fail(ExitCode::kInvalidModel, "row length " + std::to_string(tensor.shape[0]) + ", expected a multiple of " +
                                             std::to_string(traits->block_elements) + " for type " +
                                             std::string(traits->name));
  }
  uint64_t n_bytes = 0;
  const uint64_t row_blocks = tensor.shape[0] / traits->block_elements;
  const uint64_t row_units = (row_blocks + traits->blocks_per_unit - 1) / traits->blocks_per_unit;
  if (__builtin_mul_overflow(elements / tensor.shape[0], row_units, &n_bytes) ||
      __builtin_mul_overflow(n_bytes, traits->block_bytes, &n_bytes) ||
      __builtin_add_overflow(n_bytes, traits->tail_bytes, &n_bytes)) {
    reader.fail(ExitCode::kInvalidModel, std::to_string(elements) + " elements take more than 2^64 bytes");
  }
  return {reader.read<uint64_t>(), n_bytes};
}

}  // namespace

struct GgufFile::Value {
  ValueType type;
  ValueType element;      // of an array
  uint64_t count;         // elements of an array, else 1
  const std::byte* data;  // the value; of an array, its first element

  std::string type_name() const {
    if (type != ValueType::kArray) return std::string(traits_of(type).name);
    return "array of " + std::to_string(count) + " " + std::string(traits_of(element).name);
  }

  std::string print() const {
    const std::byte* at = data;
    if (type != ValueType::kArray) return print_element(type, at);
    if (element == ValueType::kArray) return type_name();
    std::string text = type_name() + ": [";
    for (uint64_t i = 0; i < std::min<uint64_t>(count, kShownElements); ++i) {
      text += (i == 0 ? "" : ", ") + print_element(element, at);
    }
    return text + (count > kShownElements ? ", …]" : "]");
  }
};

std::string_view name_of(TensorType type) {
  const TensorTypeTraits* traits = find_traits(type);
  return traits == nullptr ? "unknown" : traits->name;
}

uint64_t Tensor::elements() const {
  uint64_t product = 1;
  for (const uint64_t length : shape) product *= length;
  return product;
}

GgufFile::GgufFile(const std::string& path) : path_(path), data_(map(path)) { read(); }
GgufFile::~GgufFile() = default;
GgufFile::GgufFile(GgufFile&&) noexcept = default;

void GgufFile::Unmap::operator()(const std::byte* data) const {
  ::munmap(const_cast<std::byte*>(data), size);
  ::close(fd);
}

void GgufFile::read(const void* at, std::span<uint8_t> out) const {
  const auto offset = static_cast<const std::byte*>(at) - data_.get();
  const ssize_t n = ::pread(data_.get_deleter().fd, out.data(), out.size(), offset);
  if (n != static_cast<ssize_t>(out.size())) std::memcpy(out.data(), at, out.size());
}

std::unique_ptr<const std::byte, GgufFile::Unmap> GgufFile::map(const std::string& path) {
  const auto fail = [&path](ExitCode code, const std::string& message) { throw Error(code, path + ": " + message); };
  const auto fail_errno = [&fail](int error) {
    fail(error == ENOMEM ? ExitCode::kOutOfMemory : ExitCode::kFileUnreadable, std::generic_category().message(error));
  };
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_errno(errno);
  const auto close = [](const int* open_fd) { ::close(*open_fd); };
  std::unique_ptr<const int, decltype(close)> closer(&fd, close);

  struct stat status {};
  if (::fstat(fd, &status) != 0) fail_errno(errno);
  if (S_ISDIR(status.st_mode)) fail(ExitCode::kFileUnreadable, "is a directory, expected a file");
  if (!S_ISREG(status.st_mode)) fail(ExitCode::kFileUnreadable, "not a regular file");
  if (status.st_size == 0) fail(ExitCode::kFileTruncated, "the file is empty");
  const auto size = static_cast<size_t>(status.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) fail_errno(errno);
  closer.release();
  return {static_cast<const std::byte*>(data), Unmap{size, fd}};
}

void GgufFile::read() {
  const std::span<const std::byte> file(data_.get(), size());
  Reader reader(path_, file);
  read_magic_and_version(reader, file);
  const uint64_t n_tensors = read_count(reader, "tensors", kMaxTensors);
  const uint64_t n_keys = read_count(reader, "keys", kMaxKeys);

  const std::byte* first_key = reader.here();
  for (uint64_t i = 0; i < n_keys; ++i) {
    reader.set_context("key " + std::to_string(i + 1) + " of " + std::to_string(n_keys));
    const std::string_view key = reader.read_string();
    reader.set_context("key " + quoted(key));
    Value value{};
    value.type = reader.read_value_type();
    value.count = 1;
    if (value.type == ValueType::kArray) {
      value.element = reader.read_value_type();
      value.count = reader.read<uint64_t>();
    }
    value.data = reader.here();
    if (value.type == ValueType::kArray) {
      reader.skip_elements(value.element, value.count, 1);
    } else {
      reader.skip_elements(value.type, 1, 0);
    }
    if (!value_index_.emplace(key, values_.size()).second) reader.fail(ExitCode::kInvalidModel, "is there twice");
    values_.emplace_back(key, value);
  }
  key_bytes_ = {first_key, reader.here()};
  if (const uint64_t version = find_uint(kPackVersionKey).value_or(kPackVersion); version != kPackVersion) {
    fail(kPackVersionKey,
         "version " + std::to_string(version) + ", this program reads version " + std::to_string(kPackVersion) +
             ": pack the original again",
         ExitCode::kUnsupportedModel);
  }

  const uint64_t alignment = find_uint(kAlignmentKey).value_or(kDefaultAlignment);
  if (!std::has_single_bit(alignment) || alignment < kMinAlignment || alignment > kMaxAlignment) {
    fail(kAlignmentKey, std::to_string(alignment) + ", expected a power of two from " + std::to_string(kMinAlignment) +
                            " to " + std::to_string(kMaxAlignment));
  }

  std::vector<TensorPlace> places;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    reader.set_context("tensor " + std::to_string(i + 1) + " of " + std::to_string(n_tensors));
    Tensor tensor{};
    places.push_back(read_tensor_info(reader, tensor));
    if (!tensor_index_.emplace(tensor.name, i).second) reader.fail(ExitCode::kInvalidModel, "is there twice");
    tensors_.push_back(std::move(tensor));
  }

  const uint64_t data_start = (reader.position() + alignment - 1) & ~(alignment - 1);
  const uint64_t data_size = data_start < file.size() ? file.size() - data_start : 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const auto [offset, n_bytes] = places[i];
    reader.set_context("tensor " + quoted(tensors_[i].name));
    if (offset % alignment != 0) {
      reader.fail(ExitCode::kInvalidModel,
                  "offset " + std::to_string(offset) + ", expected a multiple of " + std::to_string(alignment));
    }
    if (offset > data_size || n_bytes > data_size - offset) {
      reader.fail(ExitCode::kFileTruncated, "expected " + std::to_string(n_bytes) + " bytes at offset " +
                                                std::to_string(offset) + " of the data, which has " +
                                                std::to_string(data_size) + " bytes");
    }
    tensors_[i].bytes = file.subspan(data_start + offset, n_bytes);
  }
}

void GgufFile::fail(std::string_view key, const std::string& message, ExitCode code) const {
  throw Error(code, path_ + ": key " + quoted(key) + ": " + message);
}

const GgufFile::Value* GgufFile::find(std::string_view key) const {
  const auto found = value_index_.find(key);
  return found == value_index_.end() ? nullptr : &values_[found->second].second;
}

std::optional<uint64_t> GgufFile::find_uint(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!is_integer(value->type)) fail(key, "type " + value->type_name() + ", expected an integer");
  return visit_number(value->type, value->data, [&](auto number) {
    if (number < 0) fail(key, printed(number) + ", expected 0 or more");
    return static_cast<uint64_t>(number);
  });
}

std::optional<double> GgufFile::find_float(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != ValueType::kF32 && value->type != ValueType::kF64) {
    fail(key, "type " + value->type_name() + ", expected f32 or f64");
  }
  return visit_number(value->type, value->data, [](auto number) { return static_cast<double>(number); });
}

std::optional<bool> GgufFile::find_bool(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != ValueType::kBool) fail(key, "type " + value->type_name() + ", expected bool");
  return load<uint8_t>(value->data) != 0;
}

std::optional<std::string_view> GgufFile::find_string(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != ValueType::kString) fail(key, "type " + value->type_name() + ", expected string");
  return string_at(value->data);
}

std::optional<GgufStrings> GgufFile::find_strings(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != ValueType::kArray || value->element != ValueType::kString) {
    fail(key, "type " + value->type_name() + ", expected array of string");
  }
  GgufStrings strings(value->count);
  const std::byte* at = value->data;
  for (std::string_view& string : strings) {
    string = string_at(at);
    at += sizeof(uint64_t) + string.size();
  }
  return strings;
}

std::optional<std::vector<int32_t>> GgufFile::find_ints(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != ValueType::kArray || (value->element != ValueType::kI32 && value->element != ValueType::kU32)) {
    fail(key, "type " + value->type_name() + ", expected array of i32 or u32");
  }
  std::vector<int32_t> ints(value->count);
  if (!ints.empty()) std::memcpy(ints.data(), value->data, ints.size() * sizeof ints[0]);
  if (value->element == ValueType::kU32) {
    const auto negative = std::find_if(ints.begin(), ints.end(), [](int32_t number) { return number < 0; });
    if (negative != ints.end()) {
      fail(key, "element " + std::to_string(negative - ints.begin()) + " is " +
                    std::to_string(static_cast<uint32_t>(*negative)) + ", expected at most 2147483647");
    }
  }
  return ints;
}

template <typename T>
T GgufFile::require(std::optional<T> value, std::string_view key) const {
  if (!value) fail(key, "is missing");
  return *std::move(value);
}

uint64_t GgufFile::get_uint(std::string_view key) const { return require(find_uint(key), key); }
double GgufFile::get_float(std::string_view key) const { return require(find_float(key), key); }
std::string_view GgufFile::get_string(std::string_view key) const { return require(find_string(key), key); }
GgufStrings GgufFile::get_strings(std::string_view key) const { return require(find_strings(key), key); }
std::vector<int32_t> GgufFile::get_ints(std::string_view key) const { return require(find_ints(key), key); }

const Tensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

std::vector<std::pair<std::string_view, std::string>> GgufFile::describe_keys() const {
  std::vector<std::pair<std::string_view, std::string>> keys;
  for (const auto& [key, value] : values_) keys.emplace_back(key, value.print());
  return keys;
}

}  // namespace bitnet
