#include "utf8.h"

#include <cstdint>
#include <utility>

namespace bitnet {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Sequence {
  enum Kind { kWellFormed, kIllFormed, kUnfinished } kind;
  size_t length;  // bytes of the character, of the maximal subpart, or of what is there of an unfinished character
};

// What `bytes`, not empty, begins with. Source: Unicode 15, table 3-7, "Well-Formed UTF-8 Byte Sequences".
Sequence first_sequence(std::string_view bytes) {
  const auto lead = static_cast<uint8_t>(bytes[0]);
  if (lead < 0x80) return {Sequence::kWellFormed, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Sequence::kIllFormed, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte alone decides against overlong forms, surrogates and what lies above U+10FFFF.
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Sequence::kUnfinished, i};
    const auto byte = static_cast<uint8_t>(bytes[i]);
    if (byte < low || byte > high) return {Sequence::kIllFormed, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Sequence::kWellFormed, length};
}

// Appends to `text` the valid text of `bytes`; gives back the bytes of an unfinished character at the end.
std::string_view append_valid(std::string_view bytes, std::string& text) {
  while (!bytes.empty()) {
    const size_t valid = valid_utf8_prefix(bytes);
    text += bytes.substr(0, valid);
    bytes.remove_prefix(valid);
    if (bytes.empty()) break;
    const Sequence sequence = first_sequence(bytes);
    if (sequence.kind == Sequence::kUnfinished) break;
    text += kReplacement;
    bytes.remove_prefix(sequence.length);
  }
  return bytes;
}

}  // namespace

size_t valid_utf8_prefix(std::string_view bytes) {
  size_t valid = 0;
  while (valid < bytes.size()) {
    const Sequence sequence = first_sequence(bytes.substr(valid));
    if (sequence.kind != Sequence::kWellFormed) break;
    valid += sequence.length;
  }
  return valid;
}

bool is_valid_utf8(std::string_view bytes) { return valid_utf8_prefix(bytes) == bytes.size(); }

std::string to_valid_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  if (!append_valid(bytes, text).empty()) text += kReplacement;
  return text;
}

std::string quoted(std::string_view bytes) {
  constexpr size_t kShownBytes = 64;
  const bool cut = bytes.size() > kShownBytes;
  std::string text = "\"";
  for (const char c : cut ? Utf8Stream().push(bytes.substr(0, kShownBytes)) : to_valid_utf8(bytes)) {
    const auto byte = static_cast<uint8_t>(c);
    if (c == '\n') {
      text += "\\n";
    } else if (c == '"' || c == '\\') {
      (text += '\\') += c;
    } else if (byte < 0x20 || byte == 0x7F) {
      constexpr std::string_view kDigits = "0123456789abcdef";
      ((text += "\\x") += kDigits[byte >> 4]) += kDigits[byte & 0xF];
    } else {
      text += c;
    }
  }
  text += '"';
  if (cut) text += "… (" + std::to_string(bytes.size()) + " bytes)";
  return text;
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string text;
  const size_t held_back = append_valid(pending_, text).size();
  pending_.erase(0, pending_.size() - held_back);
  return text;
}

std::string Utf8Stream::finish() {
  return std::exchange(pending_, {}).empty() ? std::string() : std::string(kReplacement);
}

}  // namespace bitnet
