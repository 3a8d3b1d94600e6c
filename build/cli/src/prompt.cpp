#include "prompt.h"

#include <optional>
#include <string>

namespace bitnet {

std::vector<TokenId> text_prompt(const Tokenizer& tokenizer, std::string_view text, bool add_bos, bool parse_special) {
  std::vector<TokenId> ids = tokenizer.encode(text, parse_special);
  const std::optional<TokenId> bos = tokenizer.bos();
  if (add_bos && bos && (ids.empty() || ids.front() != *bos)) ids.insert(ids.begin(), *bos);
  return ids;
}

std::vector<TokenId> chat_prompt(const Tokenizer& tokenizer, std::string_view user) {
  constexpr std::string_view kSpace = " \t\n\r\f\v";
  const size_t first = user.find_first_not_of(kSpace);
  const std::string_view trimmed = first == std::string_view::npos
                                       ? std::string_view()
                                       : user.substr(first, user.find_last_not_of(kSpace) - first + 1);
  std::vector<TokenId> ids = text_prompt(tokenizer, "User: " + std::string(trimmed), true, false);
  if (const std::optional<TokenId> end = tokenizer.find("<|eot_id|>")) ids.push_back(*end);
  const std::vector<TokenId> reply = tokenizer.encode("Assistant: ", false);
  ids.insert(ids.end(), reply.begin(), reply.end());
  return ids;
}

}  // namespace bitnet
