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

void GuessBudget::weigh(double seconds, size_t n_texts, size_t n_guesses, size_t n_right) {
  balance_ += kAllowance * static_cast<double>(1 + n_right);
  if (n_guesses == 0) {
    constexpr double kNewest = 0.1;  // its weight in the mean
    plain_s_ = n_texts == n_texts_ ? plain_s_ + kNewest * (seconds - plain_s_) : seconds;
    n_texts_ = n_texts;
  } else if (n_texts == n_texts_) {  // else nothing is known to compare it with
    const double more = seconds / plain_s_ - 1.0, most = 2.0 * static_cast<double>(n_guesses);
    balance_ += static_cast<double>(n_right) - std::clamp(more, 0.0, most);
  }
  balance_ = std::min(balance_, kMost);
}

}  // namespace bitnet
