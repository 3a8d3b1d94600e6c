// "Don't repeat yourself": which tokens would go on with something that the text has said before. As llama.cpp defines
// it (after oobabooga/text-generation-webui, pull request 5677).
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "tokenizer.h"

namespace bitnet {

// Where repetition ends: a token and those that must follow it. Several may begin with the same token.
using DryBreakers = std::multimap<TokenId, std::vector<TokenId>>;

// All ways in which tokens can spell a string, wherever it begins in the first. Looks at the whole vocabulary.
DryBreakers dry_breakers(const Tokenizer& tokenizer, std::span<const std::string> strings);

// For each token that would go on with a repetition of at least `allowed_length` tokens: how many of the last tokens
// stand before it somewhere in `history`, the longest such run. Runs do not reach over a breaker; a token that is one
// by itself never counts. O(n).
std::unordered_map<TokenId, size_t> dry_repeats(std::span<const TokenId> history, size_t allowed_length,
                                                const DryBreakers& breakers);

}  // namespace bitnet
