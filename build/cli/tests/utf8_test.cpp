#include "utf8.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

using namespace bitnet;

namespace {

const std::string kReplacement = "\xEF\xBF\xBD";

std::string replacements(size_t n) {
  std::string text;
  for (size_t i = 0; i < n; ++i) text += kReplacement;
  return text;
}

// UTF-8 of any number below 2^21, surrogates and numbers above U+10FFFF included.
std::string encode(uint32_t c) {
  const auto byte = [](uint32_t value) { return static_cast<char>(value); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xC0 | c >> 6), byte(0x80 | (c & 0x3F))};
  if (c < 0x10000) return {byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F))};
  return {byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F)), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F))};
}

// Bytes that are nearly text: whole characters, beginnings of characters, stray bytes.
std::string random_bytes(std::mt19937& random) {
  const auto below = [&](uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(random); };
  std::string bytes;
  for (uint32_t n = below(12); n > 0; --n) {
    const std::string character = encode(below(4) == 0 ? 0xD000 + below(0x2000) : below(1U << (1 + below(21))));
    switch (below(4)) {
      case 0:
        bytes += character.substr(0, 1 + below(static_cast<uint32_t>(character.size())));
        break;
      case 1:
        bytes += static_cast<char>(below(256));
        break;
      default:
        bytes += character;
    }
  }
  return bytes;
}

}  // namespace

TEST_CASE("exactly the Unicode scalar values are valid UTF-8") {
  size_t n_wrong = 0;
  for (uint32_t c = 0; c < 1U << 21; ++c) {
    const bool scalar = c < 0xD800 || (c > 0xDFFF && c < 0x110000);
    n_wrong += is_valid_utf8(encode(c)) != scalar;
  }
  CHECK(n_wrong == 0);
  CHECK(is_valid_utf8(""));
  CHECK(is_valid_utf8(std::string("a\0b", 3)));
  for (const char* overlong : {"\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xF0\x8F\xBF\xBF"})
    CHECK(!is_valid_utf8(overlong));
}

TEST_CASE("the well-formed prefix ends at a character") {
  CHECK(valid_utf8_prefix("") == 0);
  CHECK(valid_utf8_prefix("aé€😀") == 10);
  CHECK(valid_utf8_prefix("aé\x80z") == 3);
  CHECK(valid_utf8_prefix("aé\xF0\x9F\x98") == 3);
  CHECK(valid_utf8_prefix("\xFFz") == 0);
}

TEST_CASE("maximal subparts are replaced as in Unicode 15, tables 3-8 to 3-11") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"aé€😀", "aé€😀"},
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", replacements(8) + "A"},  // overlong forms
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", replacements(8) + "A"},  // surrogates
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", replacements(5) + "A" + replacements(2) + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", replacements(4) + "A"},  // truncated sequences
      {"\xF0\x9F\x98", kReplacement},
      {"x\xE2\x82", "x" + kReplacement},
      {"\xE2\x82\xE2\x82\xAC", kReplacement + "€"},
  };
  for (const auto& [bytes, text] : cases) CHECK(to_valid_utf8(bytes) == text);
}

TEST_CASE("whatever the bytes, what comes out is valid and valid text stays") {
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    const std::string bytes = random_bytes(random);
    const std::string text = to_valid_utf8(bytes);
    REQUIRE(is_valid_utf8(text));
    REQUIRE((text == bytes) == is_valid_utf8(bytes));
    REQUIRE(to_valid_utf8(text) == text);
  }
}

TEST_CASE("a stream gives whole characters as soon as they are there") {
  Utf8Stream stream;
  CHECK(stream.push("a\xF0") == "a");
  CHECK(stream.push("\x9F\x98") == "");
  CHECK(stream.push("\x80\xE2") == "😀");
  CHECK(stream.push("") == "");
  CHECK(stream.push("\xFF"
                    "b") == replacements(2) + "b");
  CHECK(stream.push("\xED") == "");
  CHECK(stream.push("\xA0") == replacements(2));  // a surrogate: no third byte could make it valid
  CHECK(stream.push("\xC3") == "");
  CHECK(stream.finish() == kReplacement);
  CHECK(stream.finish() == "");
  CHECK(stream.push("\xA9") == kReplacement);
}

TEST_CASE("however bytes are split, the pieces are valid and join to the same text") {
  std::mt19937 random(2);
  for (int round = 0; round < 20000; ++round) {
    const std::string bytes = random_bytes(random);
    Utf8Stream stream;
    std::string joined;
    for (size_t begin = 0; begin < bytes.size();) {
      const size_t n = std::uniform_int_distribution<size_t>(0, 5)(random);
      const std::string piece = stream.push(std::string_view(bytes).substr(begin, n));
      REQUIRE(is_valid_utf8(piece));
      joined += piece;
      begin += n;
    }
    joined += stream.finish();
    REQUIRE(joined == to_valid_utf8(bytes));
  }
}

TEST_CASE("text in messages") {
  CHECK(quoted("plain é") == "\"plain é\"");
  CHECK(quoted("a\n\"\\\x01\x7F") == R"("a\n\"\\\x01\x7f")");
  CHECK(quoted("\xFF") == "\"" + kReplacement + "\"");
  CHECK(quoted(std::string(63, 'x') + "é") == "\"" + std::string(63, 'x') + "\"… (65 bytes)");  // é is not cut in two
}
