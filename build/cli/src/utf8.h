// UTF-8 at the edges: whole characters out of a stream of bytes, and valid text out of any bytes.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace bitnet {

bool is_valid_utf8(std::string_view bytes);

// Length in bytes of the longest well-formed prefix.
size_t valid_utf8_prefix(std::string_view bytes);

// Replaces every maximal ill-formed subsequence by U+FFFD (Unicode 15, section 3.9, "substitution of maximal
// subparts").
std::string to_valid_utf8(std::string_view bytes);

// For messages: in double quotes, on one line, valid UTF-8, control characters escaped, cut after 64 bytes.
std::string quoted(std::string_view bytes);

// Takes the bytes of tokens one after another and gives back whole characters. Bytes that can still become a character
// are held back; bytes that never can become U+FFFD at once. Concatenated output == to_valid_utf8(concatenated input).
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string finish();  // an unfinished character becomes U+FFFD; the stream is empty again

 private:
  std::string pending_;
};

}  // namespace bitnet
