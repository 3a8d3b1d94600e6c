#include "draft.h"

namespace bitnet {

std::vector<TokenId> Drafter::propose(std::span<const TokenId> history, size_t limit) const {
  const size_t length = std::min(length_, limit);
  if (length == 0 || history.size() <= kMatch) return {};
  const std::span<const TokenId> tail = history.last(kMatch);
  for (size_t end = history.size() - 1; end >= kMatch; end--)  // the latest place first
    if (std::equal(tail.begin(), tail.end(), history.begin() + static_cast<std::ptrdiff_t>(end - kMatch))) {
      std::vector<TokenId> next;
      for (size_t i = end; i < end + length; i++)  // past its end the text goes on as it is guessed to
        next.push_back(i < history.size() ? history[i] : next[i - history.size()]);
      return next;
    }
  return {};
}

void Drafter::learn(size_t n_drafted, size_t n_accepted) {
  length_ = n_accepted == n_drafted ? std::min(2 * length_, max_length_) : n_accepted + 1;
}

}  // namespace bitnet
