// Text → the token ids of a prompt.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer.h"

namespace bitnet {

// The model's chat template around one user turn (docs/architecture.md, "Text"): ids, BOS included.
std::vector<TokenId> chat_prompt(const Tokenizer& tokenizer, std::string_view user);

// Text → prompt ids: BOS in front where asked for and not there yet.
std::vector<TokenId> text_prompt(const Tokenizer& tokenizer, std::string_view text, bool add_bos, bool parse_special);

}  // namespace bitnet
