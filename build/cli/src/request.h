// Requests of the worker protocol: JSON in, checked values out.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "sampler.h"
#include "sequence.h"

namespace bitnet {

// A piece of a prompt that is an array: a text, then token ids.
struct PromptPart {
  std::string text;
  std::vector<TokenId> tokens;
};

struct CompletionRequest {
  Completion completion;            // the prompt is still empty: it is `text` or `parts`
  std::optional<std::string> text;  // of a prompt that is a string
  std::vector<PromptPart> parts;    // of one that is an array
  bool add_bos = false;
  bool special = false;
  bool chat = false;
  bool stream = false;
};
struct TokenizeRequest {
  std::string content;
  bool add_bos = false;
  bool special = false;
};
struct DetokenizeRequest {
  std::vector<TokenId> tokens;
};
struct VocabularyRequest {};
struct CancelRequest {};
struct MaskRequest {
  size_t index = 0;
  MaskAnswer answer;
  std::optional<RequestError> error;  // what is wrong with the answer: the completion cannot go on
};

struct Request {
  std::string id;
  std::variant<CompletionRequest, TokenizeRequest, DetokenizeRequest, VocabularyRequest, CancelRequest, MaskRequest>
      body;
};

// `received` is when the line was read: timeouts count from there. Throws RequestError; `id` is set as soon as it is
// known.
Request parse_request(const std::string& line, const Tokenizer& tokenizer, Clock::time_point received, std::string& id);

}  // namespace bitnet
