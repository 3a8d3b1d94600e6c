#include "text_stream.h"

#include <algorithm>
#include <iterator>

namespace bitnet {

TextStream::TextStream(std::span<const std::string> stop) {
  std::copy_if(stop.begin(), stop.end(), std::back_inserter(stop_), [](const std::string& s) { return !s.empty(); });
}

std::string_view TextStream::take(bool all) {
  size_t end = text_.size();
  if (!all)
    for (const std::string& word : stop_) end = std::min(end, text_.size() - overlap(word));
  end = std::max(end, shown_);
  const std::string_view piece = std::string_view(text_).substr(shown_, end - shown_);
  shown_ = end;
  return piece;
}

bool TextStream::append(const std::string& characters) {
  text_ += characters;
  size_t first = std::string::npos;
  for (const std::string& word : stop_)
    if (const size_t at = text_.find(word, shown_); at < first) {
      first = at;
      stopping_word_ = word;
    }
  if (first == std::string::npos) return false;
  text_.resize(first);
  return true;
}

// Length of the longest end of the text that begins `word`.
size_t TextStream::overlap(const std::string& word) const {
  const std::string_view unseen = std::string_view(text_).substr(shown_);
  for (size_t n = std::min(word.size() - 1, unseen.size()); n > 0; n--)
    if (unseen.substr(unseen.size() - n) == std::string_view(word).substr(0, n)) return n;
  return 0;
}

}  // namespace bitnet
