#include "gguf.h"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <utility>

#include "error.h"
#include "gguf_builder.h"
#include "utf8.h"

using namespace bitnet;

namespace {

std::optional<Error> error_of(const std::string& path) {
  try {
    const GgufFile file(path);
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

// The file is refused with this code, in one line that begins with the path and holds all of `fragments`.
void check_refused(const std::string& path, ExitCode code, const std::vector<std::string>& fragments = {}) {
  const std::optional<Error> error = error_of(path);
  REQUIRE(error);
  const std::string message = error->what();
  CAPTURE(message);
  CHECK(static_cast<int>(error->code()) == static_cast<int>(code));
  CHECK(message.starts_with(path + ": "));
  CHECK(message.find('\n') == std::string::npos);
  for (const std::string& fragment : fragments) CHECK_MESSAGE(message.find(fragment) != std::string::npos, fragment);
}

void check_bytes_refused(const std::string& bytes, ExitCode code, const std::vector<std::string>& fragments = {}) {
  const TemporaryFolder folder;
  check_refused(folder.write("model.gguf", bytes), code, fragments);
}

void check_throws(const std::function<void()>& call, const std::vector<std::string>& fragments) {
  try {
    call();
    FAIL("nothing thrown");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kInvalidModel);
    const std::string message = error.what();
    for (const std::string& fragment : fragments) CHECK_MESSAGE(message.find(fragment) != std::string::npos, message);
  }
}

std::string string_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Some of everything, in about a kilobyte.
GgufBuilder sample() {
  const std::string nested = bytes_of<uint32_t>(9) + bytes_of<uint64_t>(2) +                         // array of arrays
                             bytes_of<uint32_t>(8) + bytes_of<uint64_t>(1) + gguf_string("inner") +  // of strings
                             bytes_of<uint32_t>(2) + bytes_of<uint64_t>(3) + std::string("\1\0\2\0\3", 6);  // of u16
  GgufBuilder builder;
  builder.key<std::string_view>("general.architecture", "bitnet")
      .key<uint8_t>("u8", 200)
      .key<int8_t>("i8", -100)
      .key<uint16_t>("u16", 60000)
      .key<int16_t>("i16", -30000)
      .key<uint32_t>("u32", 4000000000)
      .key<int32_t>("i32", 2000000000)
      .key<float>("f32", 1e-5F)
      .key<bool>("bool", true)
      .key<uint64_t>("u64", std::numeric_limits<uint64_t>::max())
      .key<int64_t>("i64", 1)
      .key<double>("f64", 0.1)
      .array<std::string_view>("strings", {"one", "", "zwei\n", "trois", "cuatro"})
      .array<int32_t>("ints", {-1, 0, 1})
      .array<uint32_t>("unsigned", {1, 2})
      .array<float>("floats", {0.5F})
      .raw_key("nested", 9, nested)
      .tensor("f32", {3, 2}, 0, std::string(24, 'a'))
      .tensor("f16", {5}, 1, std::string(10, 'b'))
      .tensor("q8_0", {64, 2}, 8, std::string(4 * 34, 'c'))
      .tensor("q6_k", {256}, 14, std::string(210, 'd'))
      .tensor("bf16", {1, 1, 2, 2}, 30, std::string(8, 'e'))
      .tensor("i2_s", {128, 3}, 36, std::string(3 * 32 + 32, 'f'));
  return builder;
}

}  // namespace

TEST_CASE("scalars are read as their type allows") {
  const TemporaryFolder folder;
  const GgufFile file(folder.write("model.gguf", sample().bytes()));
  CHECK(file.find_uint("u8") == 200);
  CHECK(file.find_uint("u16") == 60000);
  CHECK(file.find_uint("u32") == 4000000000);
  CHECK(file.find_uint("u64") == std::numeric_limits<uint64_t>::max());
  CHECK(file.find_uint("i32") == 2000000000);
  CHECK(file.find_uint("i64") == 1);
  CHECK(file.find_float("f32") == static_cast<double>(1e-5F));
  CHECK(file.find_float("f64") == 0.1);
  CHECK(file.find_bool("bool") == true);
  CHECK(file.find_string("general.architecture") == "bitnet");
  CHECK(file.get_uint("u8") == 200);
  CHECK(file.get_float("f64") == 0.1);
  CHECK(file.get_string("general.architecture") == "bitnet");

  check_throws([&] { file.find_uint("i8"); }, {file.path(), "\"i8\"", "-100", "expected 0 or more"});
  check_throws([&] { file.find_uint("i16"); }, {"\"i16\"", "-30000"});
  check_throws([&] { file.find_uint("f32"); }, {"\"f32\"", "type f32", "expected an integer"});
  check_throws([&] { file.find_uint("bool"); }, {"\"bool\"", "type bool"});
  check_throws([&] { file.find_uint("ints"); }, {"\"ints\"", "array of 3 i32"});
  check_throws([&] { file.find_float("u8"); }, {"\"u8\"", "type u8", "expected f32 or f64"});
  check_throws([&] { file.find_bool("u8"); }, {"\"u8\"", "expected bool"});
  check_throws([&] { file.find_string("strings"); }, {"\"strings\"", "array of 5 string", "expected string"});
}

TEST_CASE("arrays of strings and integers") {
  const TemporaryFolder folder;
  const GgufFile file(folder.write("model.gguf", sample().bytes()));
  CHECK(file.find_strings("strings") == GgufStrings{"one", "", "zwei\n", "trois", "cuatro"});
  CHECK(file.find_ints("ints") == std::vector<int32_t>{-1, 0, 1});
  CHECK(file.find_ints("unsigned") == std::vector<int32_t>{1, 2});
  CHECK(file.get_strings("strings").size() == 5);
  CHECK(file.get_ints("ints").size() == 3);
  check_throws([&] { file.find_strings("ints"); }, {"\"ints\"", "array of 3 i32", "expected array of string"});
  check_throws([&] { file.find_strings("nested"); }, {"\"nested\"", "array of 2 array"});
  check_throws([&] { file.find_ints("floats"); }, {"\"floats\"", "expected array of i32 or u32"});
  check_throws([&] { file.find_ints("u32"); }, {"\"u32\"", "type u32"});

  const GgufFile large(folder.write("large.gguf", GgufBuilder().array<uint32_t>("ids", {7, 3000000000}).bytes()));
  check_throws([&] { large.find_ints("ids"); }, {"\"ids\"", "element 1 is 3000000000", "2147483647"});
}

TEST_CASE("keys that are not there") {
  const TemporaryFolder folder;
  const GgufFile file(folder.write("model.gguf", sample().bytes()));
  CHECK(!file.find_uint("absent"));
  CHECK(!file.find_float("absent"));
  CHECK(!file.find_bool("absent"));
  CHECK(!file.find_string("absent"));
  CHECK(!file.find_strings("absent"));
  CHECK(!file.find_ints("absent"));
  for (const auto& get : std::vector<std::function<void()>>{
           [&] { file.get_uint("absent"); }, [&] { file.get_float("absent"); }, [&] { file.get_string("absent"); },
           [&] { file.get_strings("absent"); }, [&] { file.get_ints("absent"); }}) {
    check_throws(get, {file.path(), "\"absent\"", "is missing"});
  }
}

TEST_CASE("tensors are views of their bytes") {
  const TemporaryFolder folder;
  GgufFile original(folder.write("model.gguf", sample().bytes()));
  const GgufFile file = std::move(original);
  CHECK(file.size() == sample().bytes().size());
  REQUIRE(file.tensors().size() == 6);

  const auto check = [&](std::string_view name, TensorType type, std::vector<uint64_t> shape, const std::string& data) {
    const Tensor* tensor = file.find_tensor(name);
    REQUIRE(tensor != nullptr);
    CHECK(tensor->name == name);
    CHECK(tensor->type == type);
    CHECK(tensor->shape == shape);
    CHECK(string_of(tensor->bytes) == data);
    CHECK(reinterpret_cast<uintptr_t>(tensor->bytes.data()) % 32 == 0);
  };
  check("f32", TensorType::kF32, {3, 2}, std::string(24, 'a'));
  check("f16", TensorType::kF16, {5}, std::string(10, 'b'));
  check("q8_0", TensorType::kQ8_0, {64, 2}, std::string(136, 'c'));
  check("q6_k", TensorType::kQ6_K, {256}, std::string(210, 'd'));
  check("bf16", TensorType::kBF16, {1, 1, 2, 2}, std::string(8, 'e'));
  check("i2_s", TensorType::kI2_S, {128, 3}, std::string(128, 'f'));
  CHECK(file.find_tensor("bf16")->elements() == 4);
  CHECK(file.find_tensor("absent") == nullptr);
  CHECK(name_of(TensorType::kI2_S) == "I2_S");
}

TEST_CASE("keys are described on one line each, in the order of the file") {
  const TemporaryFolder folder;
  GgufBuilder builder = sample();
  builder.key<std::string_view>("template", std::string(100, 'x') + "é").key<std::string_view>("odd", "a\"b\x1b\xff");
  const GgufFile file(folder.write("model.gguf", builder.bytes()));
  const auto keys = file.describe_keys();
  const auto text_of = [&](std::string_view key) {
    const auto found = std::find_if(keys.begin(), keys.end(), [&](const auto& entry) { return entry.first == key; });
    REQUIRE(found != keys.end());
    return found->second;
  };
  CHECK(keys.size() == 19);
  CHECK(text_of("i8") == "-100");
  CHECK(text_of("u64") == "18446744073709551615");
  CHECK(text_of("f32") == "1e-05");
  CHECK(text_of("bool") == "true");
  CHECK(text_of("general.architecture") == "\"bitnet\"");
  CHECK(text_of("strings") == "array of 5 string: [\"one\", \"\", \"zwei\\n\", \"trois\", …]");
  CHECK(text_of("ints") == "array of 3 i32: [-1, 0, 1]");
  CHECK(text_of("nested") == "array of 2 array");
  CHECK(text_of("template") == "\"" + std::string(64, 'x') + "\"… (102 bytes)");
  CHECK(text_of("odd") == "\"a\\\"b\\x1b\xEF\xBF\xBD\"");
}

TEST_CASE("alignment") {
  const TemporaryFolder folder;
  for (const uint32_t bytes : {8U, 64U, 4096U}) {
    GgufBuilder builder;
    builder.alignment(bytes).tensor("one", {1}, 0, "1111").tensor("two", {1}, 0, "2222");
    const GgufFile file(folder.write("model.gguf", builder.bytes()));
    CHECK(string_of(file.find_tensor("two")->bytes) == "2222");
    CHECK(file.find_tensor("two")->bytes.data() - file.find_tensor("one")->bytes.data() == bytes);
  }
  for (const uint32_t bytes : {0U, 1U, 4U, 24U, 2147483648U}) {
    check_bytes_refused(GgufBuilder().key("general.alignment", bytes).bytes(), ExitCode::kInvalidModel,
                        {"\"general.alignment\"", std::to_string(bytes) + ", expected a power of two"});
  }
  check_bytes_refused(GgufBuilder().key<float>("general.alignment", 32).bytes(), ExitCode::kInvalidModel, {"type f32"});
  check_bytes_refused(GgufBuilder().raw_tensor("t", {1}, 0, 8).bytes() + std::string(64, '\0'), ExitCode::kInvalidModel,
                      {"tensor \"t\"", "offset 8, expected a multiple of 32"});
}

TEST_CASE("a file without tensors needs no padding") {
  const TemporaryFolder folder;
  CHECK(GgufFile(folder.write("model.gguf", GgufBuilder().key<uint8_t>("k", 1).bytes())).tensors().empty());
}

TEST_CASE("what cannot be read") {
  const TemporaryFolder folder;
  check_refused(folder.path("absent"), ExitCode::kFileUnreadable, {"No such file"});
  check_refused(std::filesystem::temp_directory_path().string(), ExitCode::kFileUnreadable, {"directory"});
  check_refused("/dev/null", ExitCode::kFileUnreadable, {"not a regular file"});
  check_refused(folder.write("empty", ""), ExitCode::kFileTruncated, {"empty"});
  REQUIRE(::mkfifo(folder.path("fifo").c_str(), 0600) == 0);
  check_refused(folder.path("fifo"), ExitCode::kFileUnreadable, {"not a regular file"});
  const std::string secret = folder.write("secret", sample().bytes());
  REQUIRE(::chmod(secret.c_str(), 0) == 0);
  if (::access(secret.c_str(), R_OK) != 0) check_refused(secret, ExitCode::kFileUnreadable, {"Permission denied"});
}

TEST_CASE("other formats and versions") {
  check_bytes_refused("PK\x03\x04 and so on", ExitCode::kNotGguf, {"\"PK\\x03\\x04\"", "expected \"GGUF\""});
  check_bytes_refused("GG", ExitCode::kFileTruncated, {"ends at byte 2"});
  check_bytes_refused("GGUE", ExitCode::kNotGguf);
  for (const uint32_t version : {0U, 1U, 2U, 4U}) {
    check_bytes_refused("GGUF" + bytes_of(version) + std::string(16, '\0'), ExitCode::kGgufVersion,
                        {"version " + std::to_string(version) + ", expected 3"});
  }
  check_bytes_refused("GGUF" + bytes_of<uint32_t>(3U << 24) + std::string(16, '\0'), ExitCode::kGgufVersion,
                      {"big-endian"});
}

TEST_CASE("versions of packed files") {
  const TemporaryFolder folder;
  const auto packed = [](uint32_t version) { return GgufBuilder().key("bitnet.pack.version", version).bytes(); };
  CHECK(GgufFile(folder.write("packed.gguf", packed(kPackVersion))).get_uint(kPackVersionKey) == kPackVersion);
  for (const uint32_t version : {0U, kPackVersion - 1, kPackVersion + 1})
    check_bytes_refused(packed(version), ExitCode::kUnsupportedModel,
                        {"bitnet.pack.version", "version " + std::to_string(version),
                         "reads version " + std::to_string(kPackVersion), "pack the original again"});
}

TEST_CASE("counts, lengths and types that cannot be") {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const std::string start = "GGUF" + bytes_of<uint32_t>(3);
  check_bytes_refused(start + bytes_of(kHuge) + bytes_of<uint64_t>(0), ExitCode::kInvalidModel,
                      {"18446744073709551615 tensors, expected at most"});
  check_bytes_refused(start + bytes_of<uint64_t>(0) + bytes_of(kHuge), ExitCode::kInvalidModel, {"keys, expected"});
  check_bytes_refused(start + bytes_of<uint64_t>(0) + bytes_of<uint64_t>(1) + bytes_of(kHuge), ExitCode::kFileTruncated,
                      {"key 1 of 1", "expected 18446744073709551615 bytes at offset 32"});
  const auto refused = [](uint32_t type, const std::string& bytes, ExitCode code, const std::string& fragment) {
    check_bytes_refused(GgufBuilder().raw_key("k", type, bytes).bytes(), code, {"key \"k\"", fragment});
  };
  refused(13, "", ExitCode::kInvalidModel, "value type 13, expected 0 to 12");
  refused(8, bytes_of(kHuge), ExitCode::kFileTruncated, "the file ends at byte");
  refused(9, bytes_of<uint32_t>(4) + bytes_of(kHuge), ExitCode::kFileTruncated, "18446744073709551615 elements");
  refused(9, bytes_of<uint32_t>(10) + bytes_of(kHuge / 8 + 2) + std::string(8, 0), ExitCode::kFileTruncated,
          "elements");  // overflows
  refused(9, bytes_of<uint32_t>(8) + bytes_of(kHuge), ExitCode::kFileTruncated, "the file ends");
  refused(9, bytes_of<uint32_t>(99) + bytes_of<uint64_t>(0), ExitCode::kInvalidModel, "value type 99");
  std::string nested;
  for (int i = 0; i < 100000; ++i) nested += bytes_of<uint32_t>(9) + bytes_of<uint64_t>(1);
  refused(9, nested, ExitCode::kInvalidModel, "nested deeper than 4");
  check_bytes_refused(GgufBuilder().key<uint8_t>("k", 1).key<uint8_t>("k", 1).bytes(), ExitCode::kInvalidModel,
                      {"key \"k\"", "is there twice"});
}

TEST_CASE("tensors that cannot be") {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const auto refused = [](const std::vector<uint64_t>& shape, uint32_t type, ExitCode code,
                          const std::string& fragment) {
    const std::string bytes = GgufBuilder().tensor("t", shape, type, std::string(64, '\0')).bytes();
    check_bytes_refused(bytes, code, {"tensor \"t\"", fragment});
  };
  refused({}, 0, ExitCode::kInvalidModel, "0 dimensions, expected 1 to 4");
  refused({1, 1, 1, 1, 1}, 0, ExitCode::kInvalidModel, "5 dimensions");
  refused({4, 0}, 0, ExitCode::kInvalidModel, "dimension 1 is 0");
  refused({kHuge, 2}, 0, ExitCode::kInvalidModel, "more than 2^64 elements");
  refused({kHuge}, 0, ExitCode::kInvalidModel, "more than 2^64 bytes");
  refused({kHuge - 127}, 36, ExitCode::kFileTruncated, "expected 4611686018427387904 bytes");
  refused({uint64_t{1} << 62}, 1, ExitCode::kFileTruncated, "expected 9223372036854775808 bytes");
  refused({16}, 2, ExitCode::kUnsupportedModel, "unknown tensor type 2, expected F32 (0)");
  refused({33}, 8, ExitCode::kInvalidModel, "row length 33, expected a multiple of 32 for type Q8_0");
  refused({128}, 14, ExitCode::kInvalidModel, "row length 128, expected a multiple of 256");
  refused({64, 2}, 36, ExitCode::kInvalidModel, "row length 64, expected a multiple of 128");
  refused({17}, 0, ExitCode::kFileTruncated, "expected 68 bytes at offset 0 of the data, which has 64 bytes");
  check_bytes_refused(GgufBuilder().raw_tensor("t", {1}, 0, kHuge - 31).bytes(), ExitCode::kFileTruncated,
                      {"tensor \"t\""});
  check_bytes_refused(GgufBuilder().tensor("t", {1}, 0, "1111").tensor("t", {1}, 0, "2222").bytes(),
                      ExitCode::kInvalidModel, {"tensor \"t\"", "is there twice"});
}

TEST_CASE("names in messages are short and printable") {
  const std::string name = "line\nbreak \xff" + std::string(1000, 'n');
  const TemporaryFolder folder;
  const std::string path = folder.write("model.gguf", GgufBuilder().raw_key(name, 13, "").bytes());
  check_refused(path, ExitCode::kInvalidModel, {"\"line\\nbreak \xEF\xBF\xBD", "(1012 bytes)"});
  CHECK(std::string(error_of(path)->what()).size() < path.size() + 200);
}

TEST_CASE("every truncation of a file is told from other damage") {
  const TemporaryFolder folder;
  const std::string bytes = sample().bytes();
  for (size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    const std::optional<Error> error = error_of(folder.write("model.gguf", bytes.substr(0, length)));
    REQUIRE(error);
    REQUIRE(error->code() == ExitCode::kFileTruncated);
  }
}

TEST_CASE("damaged bytes give an error or a file whose every part can be read") {
  const TemporaryFolder folder;
  const std::string intact = sample().bytes();
  std::mt19937 random(20250101);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  constexpr std::array<unsigned char, 6> kEdges = {0x00, 0x01, 0x7F, 0x80, 0xFF, 0x09};
  size_t n_valid = 0;
  unsigned sum = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = intact;
    for (size_t n = 1 + below(4); n > 0; --n) {
      bytes[below(bytes.size())] = static_cast<char>(below(2) == 0 ? kEdges[below(kEdges.size())] : below(256));
    }
    const std::string path = folder.write("model.gguf", bytes);
    CAPTURE(round);
    const std::optional<Error> error = error_of(path);
    if (error) {
      REQUIRE(std::string(error->what()).find('\n') == std::string::npos);
      REQUIRE(is_valid_utf8(error->what()));
      continue;
    }
    ++n_valid;
    const GgufFile file(path);
    for (const auto& [key, text] : file.describe_keys()) {
      REQUIRE(is_valid_utf8(text));
      const auto read = [&, key = key](auto member) {
        try {
          (file.*member)(key);
        } catch (const Error& wrong_type) {
          REQUIRE(wrong_type.code() == ExitCode::kInvalidModel);
        }
      };
      read(&GgufFile::find_uint);
      read(&GgufFile::find_float);
      read(&GgufFile::find_bool);
      read(&GgufFile::find_string);
      read(&GgufFile::find_strings);
      read(&GgufFile::find_ints);
    }
    for (const Tensor& tensor : file.tensors()) {
      REQUIRE(file.find_tensor(tensor.name) == &tensor);
      for (const std::byte byte : tensor.bytes) sum += std::to_integer<unsigned>(byte);
    }
  }
  CHECK(n_valid > 100);
  CHECK(sum != 0);
}

TEST_CASE("the demo model") {
  const GgufFile file(BITNET_DEMO_MODEL);
  CHECK(file.get_string("general.architecture").starts_with("bitnet"));
  CHECK(file.get_strings("tokenizer.ggml.tokens").size() == 4096);
  REQUIRE(file.find_tensor("token_embd.weight") != nullptr);
  CHECK(file.find_tensor("token_embd.weight")->shape == std::vector<uint64_t>{256, 4096});
}
