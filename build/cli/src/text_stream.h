// What a completion shows of its text, and when.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "utf8.h"

namespace bitnet {

// Collects the bytes of tokens into whole characters and holds back what may be the start of a stop string.
class TextStream {
 public:
  explicit TextStream(std::span<const std::string> stop);  // empty strings are ignored

  // Takes the bytes of a token; true when a stop string is complete, the text then ends before it.
  bool push(std::string_view bytes) { return append(utf8_.push(bytes)); }
  bool finish() { return append(utf8_.finish()); }

  const std::string& text() const { return text_; }
  const std::string& stopping_word() const { return stopping_word_; }

  // Text that can be shown now and was not before: everything when `all`, else up to what may begin a stop string.
  std::string_view take(bool all);

 private:
  bool append(const std::string& characters);
  size_t overlap(const std::string& word) const;

  std::vector<std::string> stop_;
  Utf8Stream utf8_;
  std::string text_, stopping_word_;
  size_t shown_ = 0;
};

}  // namespace bitnet
