// Byte-level BPE with the Llama 3 pre-tokenizer (docs/architecture.md, "Text"): the same ids as Hugging Face
// `tokenizers`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"

namespace bitnet {

using TokenId = int32_t;

class Tokenizer {
 public:
  // Reads the tokenizer.ggml.* keys; `file` must outlive the tokenizer. Error(kUnsupportedModel) for a
  // tokenizer.ggml.model other than gpt2, Error(kInvalidModel) for missing or inconsistent keys.
  explicit Tokenizer(const GgufFile& file);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  // Text → ids, without BOS. Control tokens spelled in the text are matched only when parse_special, user-defined ones
  // always (as Hugging Face does with added tokens that are not special); the longest of those that begin first. Bytes
  // that are not UTF-8 are encoded byte by byte. O(n log n) for any text up to 2 GiB, Error(kUsage) beyond.
  std::vector<TokenId> encode(std::string_view text, bool parse_special) const;

  // Ids → bytes. Control tokens give their spelling when render_special, else nothing. Ids must be within the
  // vocabulary.
  std::string decode(std::span<const TokenId> ids, bool render_special) const;
  std::string decode(TokenId id, bool render_special) const;

  size_t vocab_size() const;
  bool is_control(TokenId id) const;
  std::optional<TokenId> bos() const;
  bool add_bos() const;  // tokenizer.ggml.add_bos_token, true when absent and there is a BOS
  std::span<const TokenId> end_of_generation()
      const;  // eos_token_id, eot_token_id, <|eot_id|>, <|end_of_text|>, found by name; sorted
  std::optional<TokenId> find(std::string_view spelling) const;  // a token by its text (control tokens: as spelled)

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitnet
