#include "dry.h"

#include <algorithm>
#include <map>
#include <string_view>

namespace bitnet {
namespace {

constexpr size_t kMaxTail = 20;  // tokens of a breaker after its first

// Tokens after the last breaker, or all of them.
size_t longest_run(std::span<const TokenId> history, const DryBreakers& breakers) {
  for (size_t after = 0; after < history.size(); after++) {
    const size_t at = history.size() - 1 - after;
    const auto [first, last] = breakers.equal_range(history[at]);
    size_t run = history.size();
    for (auto it = first; it != last; ++it) {
      const std::vector<TokenId>& tail = it->second;
      if (tail.size() <= after &&
          std::equal(tail.begin(), tail.end(), history.begin() + static_cast<std::ptrdiff_t>(at + 1)))
        run = std::min(run, after - tail.size());
    }
    if (run < history.size()) return run;
  }
  return history.size();
}

// For every k: how many tokens before the end stand likewise before place n − k (the Z function of the text read
// backwards; Gusfield, "Algorithms on Strings, Trees, and Sequences", 1.4).
std::vector<size_t> common_ends(std::span<const TokenId> history) {
  const size_t n = history.size();
  const auto at = [&](size_t i) { return history[n - 1 - i]; };
  std::vector<size_t> z(n, 0);
  size_t left = 0, right = 0;  // [left, right) is the furthest-reaching match so far
  for (size_t k = 1; k < n; k++) {
    if (k < right) z[k] = std::min(right - k, z[k - left]);
    while (k + z[k] < n && at(z[k]) == at(k + z[k])) z[k]++;
    if (k + z[k] > right) {
      left = k;
      right = k + z[k];
    }
  }
  return z;
}

}  // namespace

DryBreakers dry_breakers(const Tokenizer& tokenizer, std::span<const std::string> strings) {
  DryBreakers breakers;
  // Of each string, what is left after its first bytes: many tokens end with the same.
  std::map<std::string_view, std::vector<TokenId>> tails;
  const auto tail_of = [&](std::string_view rest) -> const std::vector<TokenId>& {
    const auto [at, is_new] = tails.try_emplace(rest);
    if (is_new) {
      at->second = tokenizer.encode(rest, false);
      at->second.resize(std::min(at->second.size(), kMaxTail));
    }
    return at->second;
  };
  const auto add = [&](TokenId head, const std::vector<TokenId>& tail) {
    const auto [first, last] = breakers.equal_range(head);
    if (std::none_of(first, last, [&](const auto& known) { return known.second == tail; }))
      breakers.emplace(head, tail);
  };
  for (size_t token = 0; token < tokenizer.vocab_size(); token++) {
    const auto id = static_cast<TokenId>(token);
    const std::string text = tokenizer.decode(id, true);
    for (const std::string& breaker : strings) {
      if (breaker.empty()) continue;
      if (text.find(breaker) != std::string::npos) {
        add(id, {});
        continue;
      }
      const size_t most = std::min(text.size(), breaker.size() - 1);
      for (size_t n = 1; n <= most; n++)  // the token ends with the breaker's first n bytes
        if (text.compare(text.size() - n, n, breaker, 0, n) == 0) add(id, tail_of(std::string_view(breaker).substr(n)));
    }
  }
  return breakers;
}

std::unordered_map<TokenId, size_t> dry_repeats(std::span<const TokenId> history, size_t allowed_length,
                                                const DryBreakers& breakers) {
  std::unordered_map<TokenId, size_t> repeats;
  if (history.size() <= allowed_length) return repeats;
  const size_t most = longest_run(history, breakers);
  if (most < allowed_length) return repeats;
  const std::vector<size_t> ends = common_ends(history);
  for (size_t k = 1; k < history.size(); k++) {
    const size_t length = std::min(ends[k], most);
    if (length < allowed_length) continue;
    const TokenId next = history[history.size() - k];
    const auto [first, last] = breakers.equal_range(next);
    if (std::any_of(first, last, [](const auto& breaker) { return breaker.second.empty(); })) continue;
    size_t& longest = repeats[next];
    longest = std::max(longest, length);
  }
  return repeats;
}

}  // namespace bitnet
