#include "request.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

namespace bitnet {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 8;  // of arrays and objects in each other: brackets alone, 16 MiB of them, would take 1.3 GB
constexpr size_t kMaxIdBytes = 128;
constexpr size_t kMaxStopStrings = 64;
constexpr size_t kMaxStopBytes = 4096;
constexpr int64_t kMaxCompletions = 16;
constexpr int64_t kMaxProbs = 100;
constexpr size_t kMaxPathBytes = 4000;  // below PATH_MAX, with what a temporary name adds
constexpr size_t kMaxBiases = 1024;
constexpr double kMaxBias = 1e6;
constexpr size_t kMaxBreakerBytes = 40;  // llama.cpp's
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr std::string_view kBase64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr int64_t kMaxTimeoutMs = 86'400'000;

[[noreturn]] void refuse(const std::string& field, const std::string& message) {
  throw RequestError("invalid_request", field, field + ": " + message);
}

// What a value is, for a message; never a text that the user wrote.
std::string shown(const Json& value) {
  if (value.is_number() || value.is_boolean() || value.is_null()) return value.dump();
  return std::string("a value of type ") + value.type_name();
}

// Reads the fields of one object and remembers which were asked for, so that what is left can be refused.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {}

  const Json* find(const std::string& name) {
    known_.insert(name);
    const auto it = object_.find(name);
    return it == object_.end() ? nullptr : &*it;
  }

  int64_t integer(const std::string& name, int64_t fallback, int64_t least, int64_t most) {
    const Json* value = find(name);
    if (!value) return fallback;
    const bool fits = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(kMaxInt64)
                                                  : value->is_number_integer();
    if (!fits || value->get<int64_t>() < least || value->get<int64_t>() > most)
      refuse(name, "must be an integer from " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                       shown(*value));
    return value->get<int64_t>();
  }

  float number(const std::string& name, float fallback, double least, double most, bool least_allowed = true) {
    const Json* value = find(name);
    if (!value) return fallback;
    const double x = value->is_number() ? value->get<double>() : std::nan("");
    if (!(x >= least && x <= most) || (!least_allowed && x == least))
      refuse(name, "must be a number " + std::string(least_allowed ? "from " : "above ") + Json(least).dump() +
                       (least_allowed ? " to " : " and up to ") + Json(most).dump() + ", got " + shown(*value));
    return static_cast<float>(x);
  }

  bool boolean(const std::string& name, bool fallback) {
    const Json* value = find(name);
    if (!value) return fallback;
    if (!value->is_boolean()) refuse(name, "must be true or false, got " + shown(*value));
    return value->get<bool>();
  }

  std::string text(const std::string& name) {
    const Json* value = find(name);
    if (!value) refuse(name, "is missing");
    if (!value->is_string()) refuse(name, "must be a string, got " + shown(*value));
    return value->get<std::string>();
  }

  std::vector<TokenId> tokens(const std::string& name, size_t vocab_size) {
    const Json* value = find(name);
    if (!value) refuse(name, "is missing");
    if (!value->is_array()) refuse(name, "must be an array of token ids, got " + shown(*value));
    std::vector<TokenId> ids;
    for (const Json& id : *value) ids.push_back(token(name, id, vocab_size));
    return ids;
  }

  static TokenId token(const std::string& name, const Json& id, size_t vocab_size) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() < vocab_size;
    if (!fits)
      refuse(name, "token ids are integers from 0 to " + std::to_string(vocab_size - 1) + ", got " + shown(id));
    return id.get<TokenId>();
  }

  void refuse_unknown() const {
    for (const auto& [name, value] : object_.items())
      if (!known_.contains(name))
        refuse(name.size() <= kMaxIdBytes ? name : name.substr(0, kMaxIdBytes), "is not a field of this request");
  }

 private:
  static constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
  const Json& object_;
  std::set<std::string> known_;
};

uint64_t random_seed() {
  std::random_device device;
  return device();  // 32 bits: a seed that every client can write back as a number
}

std::vector<PromptPart> parts(const Json& prompt, size_t vocab_size) {
  std::vector<PromptPart> parts(1);
  for (const Json& element : prompt) {
    if (element.is_string())
      parts.push_back({element.get<std::string>(), {}});
    else
      parts.back().tokens.push_back(Fields::token("prompt", element, vocab_size));
  }
  return parts;
}

std::vector<std::string> strings(Fields& fields, const std::string& name, size_t most, size_t most_bytes,
                                 std::vector<std::string> fallback) {
  const Json* value = fields.find(name);
  if (!value) return fallback;
  if (!value->is_array() || value->size() > most)
    refuse(name, "must be an array of at most " + std::to_string(most) + " strings, got " +
                     (value->is_array() ? std::to_string(value->size()) + " elements" : shown(*value)));
  std::vector<std::string> strings;
  for (const Json& element : *value) {
    if (!element.is_string()) refuse(name, "must be an array of strings, got " + shown(element));
    strings.push_back(element.get<std::string>());
    if (strings.back().size() > most_bytes)
      refuse(name, "a string has at most " + std::to_string(most_bytes) + " bytes, got " +
                       std::to_string(strings.back().size()));
  }
  return strings;
}

std::vector<SamplerStage> samplers(Fields& fields, std::vector<SamplerStage> all) {
  const Json* value = fields.find("samplers");
  if (!value) return all;
  std::string names;
  for (const SamplerStage stage : all) names += (names.empty() ? "" : ", ") + std::string(name_of(stage));
  if (!value->is_array()) refuse("samplers", "must be an array of names, got " + shown(*value));
  std::vector<SamplerStage> stages;
  for (const Json& name : *value) {
    const auto known = std::find_if(all.begin(), all.end(), [&](SamplerStage stage) {
      return name.is_string() && name.get_ref<const std::string&>() == name_of(stage);
    });
    if (known == all.end()) refuse("samplers", "must be some of " + names + ", each at most once");
    stages.push_back(*known);
    all.erase(known);
  }
  return stages;
}

void read_logit_bias(Fields& fields, size_t vocab_size, Completion& c) {
  const Json* value = fields.find("logit_bias");
  if (!value) return;
  if (!value->is_array() || value->size() > kMaxBiases)
    refuse("logit_bias", "must be an array of at most " + std::to_string(kMaxBiases) + " pairs, got " +
                             (value->is_array() ? std::to_string(value->size()) + " elements" : shown(*value)));
  for (const Json& pair : *value) {
    if (!pair.is_array() || pair.size() != 2)
      refuse("logit_bias", "must be an array of pairs of a token id and a number or false, got " + shown(pair));
    const TokenId token = Fields::token("logit_bias", pair[0], vocab_size);
    if (pair[1].is_boolean() && !pair[1].get<bool>()) {
      c.banned.push_back(token);
      continue;
    }
    const double bias = pair[1].is_number() ? pair[1].get<double>() : std::nan("");
    if (!(std::fabs(bias) <= kMaxBias))
      refuse("logit_bias", "a bias is a number from " + Json(-kMaxBias).dump() + " to " + Json(kMaxBias).dump() +
                               ", or false, got " + shown(pair[1]));
    c.sampling.logit_bias.push_back({token, static_cast<float>(bias)});
  }
}

void read_sampling(Fields& fields, const Tokenizer& tokenizer, Completion& c) {
  SamplingParams& s = c.sampling;
  const auto count = [&](const char* name, int32_t& value, int64_t least) {
    value = static_cast<int32_t>(fields.integer(name, value, least, kMaxInt32));
  };
  s.samplers = samplers(fields, s.samplers);
  read_logit_bias(fields, tokenizer.vocab_size(), c);
  s.temperature = fields.number("temperature", s.temperature, 0.0, 100.0);
  s.dynatemp_range = fields.number("dynatemp_range", s.dynatemp_range, 0.0, 100.0);
  s.dynatemp_exponent = fields.number("dynatemp_exponent", s.dynatemp_exponent, 0.0, 100.0);
  count("top_k", s.top_k, 0);
  s.top_p = fields.number("top_p", s.top_p, 0.0, 1.0);
  s.min_p = fields.number("min_p", s.min_p, 0.0, 1.0);
  s.typical_p = fields.number("typical_p", s.typical_p, 0.0, 1.0, false);
  s.top_n_sigma = fields.number("top_n_sigma", s.top_n_sigma, -1.0, 100.0);
  count("min_keep", s.min_keep, 0);
  s.xtc_probability = fields.number("xtc_probability", s.xtc_probability, 0.0, 1.0);
  s.xtc_threshold = fields.number("xtc_threshold", s.xtc_threshold, 0.0, 1.0);
  s.repeat_penalty = std::max(fields.number("repeat_penalty", s.repeat_penalty, 0.0, 100.0, false),
                              static_cast<float>(kLeastRepeatPenalty));
  count("repeat_last_n", s.repeat_last_n, -1);
  s.presence_penalty = fields.number("presence_penalty", s.presence_penalty, -100.0, 100.0);
  s.frequency_penalty = fields.number("frequency_penalty", s.frequency_penalty, -100.0, 100.0);
  s.dry_multiplier = fields.number("dry_multiplier", s.dry_multiplier, 0.0, 100.0);
  s.dry_base = fields.number("dry_base", s.dry_base, 1.0, 100.0);
  count("dry_allowed_length", s.dry_allowed_length, 0);
  count("dry_penalty_last_n", s.dry_penalty_last_n, -1);
  const std::vector<std::string> breakers =
      strings(fields, "dry_sequence_breakers", kMaxStopStrings, kMaxBreakerBytes, {"\n", ":", "\"", "*"});
  if (s.dry_multiplier > 0.0f) s.dry_breakers = std::make_shared<const DryBreakers>(dry_breakers(tokenizer, breakers));
  s.mirostat = static_cast<int32_t>(fields.integer("mirostat", s.mirostat, 0, 2));
  s.mirostat_tau = fields.number("mirostat_tau", s.mirostat_tau, 0.0, 100.0);
  s.mirostat_eta = fields.number("mirostat_eta", s.mirostat_eta, 0.0, 100.0);
  const int64_t seed = fields.integer("seed", -1, -1, std::numeric_limits<int64_t>::max());
  s.seed = seed < 0 ? random_seed() : static_cast<uint64_t>(seed);
}

CompletionRequest completion(Fields& fields, const Tokenizer& tokenizer, Clock::time_point received) {
  CompletionRequest request;
  Completion& c = request.completion;
  const Json* prompt = fields.find("prompt");
  if (!prompt) refuse("prompt", "is missing");
  if (prompt->is_string())
    request.text = prompt->get<std::string>();
  else if (prompt->is_array())
    request.parts = parts(*prompt, tokenizer.vocab_size());
  else
    refuse("prompt", "must be a string or an array of token ids and strings, got " + shown(*prompt));
  request.add_bos = fields.boolean("add_bos", request.text && tokenizer.add_bos());
  request.special = fields.boolean("special", false);
  request.chat = fields.boolean("chat", false);
  if (request.chat && !request.text) refuse("chat", "needs a prompt that is a string");
  request.stream = fields.boolean("stream", false);
  c.n_predict = static_cast<int32_t>(fields.integer("n_predict", 128, -1, kMaxInt32));
  c.max_predict = std::chrono::milliseconds(std::max<int64_t>(fields.integer("t_max_predict_ms", 0, -1, kMaxInt32), 0));
  c.logprobs = fields.boolean("logprobs", false);
  c.n_probs = static_cast<size_t>(fields.integer("n_probs", 0, 0, kMaxProbs));
  c.post_sampling_probs = fields.boolean("post_sampling_probs", false);
  c.prompt_logprobs = fields.boolean("prompt_logprobs", false);
  read_sampling(fields, tokenizer, c);
  c.ignore_eos = fields.boolean("ignore_eos", false);
  c.cache_prompt = fields.boolean("cache_prompt", true);
  c.speculate = fields.boolean("speculate", true);
  c.n = static_cast<size_t>(fields.integer("n", 1, 1, kMaxCompletions));
  c.mask = fields.boolean("mask", false);
  c.stop = strings(fields, "stop", kMaxStopStrings, kMaxStopBytes, {});
  c.cache_save = fields.boolean("cache_save", false);
  if (fields.find("cache_file")) {
    c.cache_file = fields.text("cache_file");
    if (c.cache_file.empty() || c.cache_file.size() > kMaxPathBytes || c.cache_file.find('\0') != std::string::npos)
      refuse("cache_file", "must be a path of 1 to " + std::to_string(kMaxPathBytes) + " bytes without NUL, got " +
                               std::to_string(c.cache_file.size()));
  } else if (c.cache_save) {
    refuse("cache_save", "needs a cache_file");
  }
  if (const int64_t timeout = fields.integer("timeout_ms", 0, 1, kMaxTimeoutMs); timeout > 0)
    c.deadline = received + std::chrono::milliseconds(timeout);
  return request;
}

// Base64 (RFC 4648, section 4) of a bitmap, least bit first → bits of n_vocab tokens.
std::vector<uint64_t> bitmap(const std::string& text, size_t n_vocab) {
  const size_t n_bytes = (n_vocab + 7) / 8, n_characters = (n_bytes + 2) / 3 * 4;
  if (text.size() != n_characters)
    refuse("allow", "must be null or " + std::to_string(n_characters) + " characters of base64, " +
                        std::to_string(n_bytes) + " bytes, got " + std::to_string(text.size()) + " characters");
  std::vector<uint64_t> bits((n_vocab + 63) / 64);
  uint32_t buffer = 0;
  size_t n_bits = 0, n = 0;
  for (const char c : text.substr(0, (n_bytes * 8 + 5) / 6)) {
    const size_t digit = kBase64.find(c);
    if (digit == std::string_view::npos) refuse("allow", "must be base64, got another character");
    buffer = buffer << 6 | static_cast<uint32_t>(digit);
    n_bits += 6;
    if (n_bits < 8 || n == n_bytes) continue;
    n_bits -= 8;
    bits[n / 8] |= static_cast<uint64_t>(buffer >> n_bits & 0xFF) << n % 8 * 8;
    n++;
  }
  if (n_vocab % 64 != 0) bits.back() &= (uint64_t{1} << n_vocab % 64) - 1;
  return bits;
}

MaskRequest mask(Fields& fields, size_t n_vocab) {
  MaskRequest request;
  request.index = static_cast<size_t>(fields.integer("index", 0, 0, kMaxCompletions - 1));
  MaskAnswer& answer = request.answer;
  const Json* allow = fields.find("allow");
  answer.stop = fields.boolean("stop", false);
  if (const bool forces = fields.find("forced"); forces) answer.forced = fields.tokens("forced", n_vocab);
  if (!allow && !answer.stop && answer.forced.empty()) refuse("allow", "is missing");
  if (!allow || allow->is_null()) return request;
  if (!allow->is_string()) refuse("allow", "must be null or a string, got " + shown(*allow));
  answer.allowed = bitmap(allow->get<std::string>(), n_vocab);
  return request;
}

}  // namespace

Request parse_request(const std::string& line, const Tokenizer& tokenizer, Clock::time_point received,
                      std::string& id) {
  const auto check_depth = [](int depth, Json::parse_event_t, const Json&) {
    if (depth > kMaxDepth)
      throw RequestError("invalid_request", "", "the line has values more than " + std::to_string(kMaxDepth) + " deep");
    return true;
  };
  Json json;
  try {
    json = Json::parse(line, check_depth);
  } catch (const Json::exception& e) {
    throw RequestError("invalid_json", "",
                       "the line is not valid JSON (" + std::string("error ") + std::to_string(e.id) + ")");
  }
  if (!json.is_object()) throw RequestError("invalid_json", "", "the line must be a JSON object, got " + shown(json));
  Fields fields(json);
  const std::string given = fields.text("id");
  if (given.empty() || given.size() > kMaxIdBytes)
    refuse("id", "must have 1 to " + std::to_string(kMaxIdBytes) + " bytes, got " + std::to_string(given.size()));
  id = given;
  Request request{id, CancelRequest{}};
  const std::string op = fields.text("op");
  if (op == "completion") {
    request.body = completion(fields, tokenizer, received);
  } else if (op == "tokenize") {
    const std::string content = fields.text("content");
    const bool add_bos = fields.boolean("add_bos", false);
    request.body = TokenizeRequest{content, add_bos, fields.boolean("special", false)};
  } else if (op == "detokenize") {
    request.body = DetokenizeRequest{fields.tokens("tokens", tokenizer.vocab_size())};
  } else if (op == "vocabulary") {
    request.body = VocabularyRequest{};
  } else if (op == "mask") {
    try {
      request.body = mask(fields, tokenizer.vocab_size());
      fields.refuse_unknown();
    } catch (const RequestError& e) {
      request.body = MaskRequest{0, {}, e};
    }
    return request;
  } else if (op != "cancel") {
    refuse("op", "must be completion, tokenize, detokenize, vocabulary, cancel or mask");
  }
  fields.refuse_unknown();
  return request;
}

}  // namespace bitnet
