#include "prompt.h"

#include <optional>
#include <string>

namespace bitnet {
namespace {

// Without white space around it, as Python's str.strip() takes it away.
std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kSpaces[] = {
      "\t",       "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",   "\x1e",   "\x1f",   " ",
      "\xc2\x85", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
      "\u2007",   "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  const auto cut = [&](auto&& is_at, auto&& remove) {
    for (bool any = true; any;) {
      any = false;
      for (const std::string_view space : kSpaces)
        if (is_at(space)) {
          remove(space.size());
          any = true;
        }
    }
  };
  cut([&](std::string_view s) { return text.starts_with(s); }, [&](size_t n) { text.remove_prefix(n); });
  cut([&](std::string_view s) { return text.ends_with(s); }, [&](size_t n) { text.remove_suffix(n); });
  return text;
}

}  // namespace

std::vector<TokenId> text_prompt(const Tokenizer& tokenizer, std::string_view text, bool add_bos, bool parse_special) {
  std::vector<TokenId> ids = tokenizer.encode(text, parse_special);
  const std::optional<TokenId> bos = tokenizer.bos();
  if (add_bos && bos && (ids.empty() || ids.front() != *bos)) ids.insert(ids.begin(), *bos);
  return ids;
}

std::vector<TokenId> chat_prompt(const Tokenizer& tokenizer, std::string_view user) {
  std::vector<TokenId> ids = text_prompt(tokenizer, "User: " + std::string(trimmed(user)), true, false);
  if (const std::optional<TokenId> end = tokenizer.find("<|eot_id|>")) ids.push_back(*end);
  const std::vector<TokenId> reply = tokenizer.encode("Assistant: ", false);
  ids.insert(ids.end(), reply.begin(), reply.end());
  return ids;
}

}  // namespace bitnet
