#include "tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <queue>
#include <utility>

#include "utf8.h"

namespace bitnet {

namespace {

constexpr std::string_view kModelKey = "tokenizer.ggml.model";
constexpr std::string_view kTokensKey = "tokenizer.ggml.tokens";
constexpr std::string_view kTypesKey = "tokenizer.ggml.token_type";
constexpr std::string_view kMergesKey = "tokenizer.ggml.merges";
constexpr std::string_view kBosKey = "tokenizer.ggml.bos_token_id";
constexpr std::string_view kEosKey = "tokenizer.ggml.eos_token_id";
constexpr std::string_view kEotKey = "tokenizer.ggml.eot_token_id";
constexpr std::string_view kEomKey = "tokenizer.ggml.eom_token_id";
constexpr std::string_view kPreKey = "tokenizer.ggml.pre";
constexpr std::string_view kAddBosKey = "tokenizer.ggml.add_bos_token";

constexpr size_t kMaxTextBytes = std::numeric_limits<int32_t>::max();

// Values of tokenizer.ggml.token_type.
enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

// Byte-pair encoding makes only these; control and user-defined tokens are matched in the text before it is split.
bool is_mergeable(int32_t type) { return type == kNormal || type == kByte; }

// The classes of the pre-tokenizer's pattern, as in Unicode 16, which Hugging Face tokenizers (0.23) goes by. PCRE2
// brings the tables of its own release, Unicode 14 in Debian 12, and counts U+180E as white space: what differs is
// spelled out.
constexpr std::string_view kWhiteSpace =
    R"(\x09-\x0D\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::string_view kLetter =
    R"(\p{L}\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65}\x{10D6F}-\x{10D85})"
    R"(\x{10EC2}-\x{10EC4}\x{1123F}-\x{11240}\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7}\x{113D1})"
    R"(\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10}\x{11F12}-\x{11F33}\x{1342F}\x{13441}-\x{13446})"
    R"(\x{13460}-\x{143FA}\x{16100}-\x{1611D}\x{16D40}-\x{16D6C}\x{18CFF}\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A})"
    R"(\x{1E030}-\x{1E06D}\x{1E4D0}-\x{1E4EB}\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})";
constexpr std::string_view kNumber =
    R"(\p{N}\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59}\x{16130}-\x{16139})"
    R"(\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1D2C0}-\x{1D2D3}\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";

// The Llama 3 pre-tokenizer, <S>, <L> and <N> standing for the classes above. Source: tokenizer.json of
// meta-llama/Meta-Llama-3-8B.
constexpr std::string_view kPiecePattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n<L><N>]?[<L>]+|[<N>]{1,3}| ?[^<S><L><N>]+[\r\n]*|[<S>]*[\r\n]+|[<S>]+(?![^<S>])|[<S>]+)";

std::string piece_pattern() {
  std::string pattern(kPiecePattern);
  for (const auto& [name, members] :
       {std::pair("<S>", kWhiteSpace), std::pair("<L>", kLetter), std::pair("<N>", kNumber)}) {
    for (size_t at; (at = pattern.find(name)) != std::string::npos;) pattern.replace(at, 3, members);
  }
  return pattern;
}

// The GPT-2 byte alphabet: each byte spelled as one printable character below U+0144, in UTF-8.
// Source: bytes_to_unicode() in encoder.py of openai/gpt-2.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(kNoByte);
    uint16_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const uint16_t character = printable ? static_cast<uint16_t>(byte) : next++;
      byte_of_[character] = static_cast<int16_t>(byte);
      std::string& spelling = spellings_[static_cast<size_t>(byte)];
      if (character < 0x80) {
        spelling = {static_cast<char>(character)};
      } else {
        spelling = {static_cast<char>(0xC0 | character >> 6), static_cast<char>(0x80 | (character & 0x3F))};
      }
    }
  }

  std::string_view spelling(uint8_t byte) const { return spellings_[byte]; }

  // Appends the bytes that `spelling` stands for; the spelling itself when it has a character from outside the
  // alphabet.
  void append_bytes(std::string_view spelling, std::string& bytes) const {
    const size_t start = bytes.size();
    for (size_t i = 0; i < spelling.size(); ++i) {
      size_t character = static_cast<uint8_t>(spelling[i]);
      if (character >= 0x80) {
        const bool in_two_bytes = (character & 0xE0) == 0xC0 && i + 1 < spelling.size();
        character =
            in_two_bytes ? (character & 0x1F) << 6 | (static_cast<uint8_t>(spelling[++i]) & 0x3F) : kNoCharacter;
      }
      if (character >= byte_of_.size() || byte_of_[character] == kNoByte) {
        bytes.resize(start);
        bytes += spelling;
        return;
      }
      bytes += static_cast<char>(byte_of_[character]);
    }
  }

 private:
  static constexpr int16_t kNoByte = -1;
  static constexpr size_t kNoCharacter = SIZE_MAX;
  std::array<std::string, 256> spellings_;
  std::array<int16_t, 0x144> byte_of_;
};

// The first 8 bytes of `text`, or all of them with zeros behind.
uint64_t head_of(std::string_view text) {
  const char* bytes = text.data();
  const size_t size = text.size();
  const auto load = [bytes]<typename T>(size_t at, T) {
    T value;
    std::memcpy(&value, bytes + at, sizeof value);
    return uint64_t{value};
  };
  if (size >= 8) return load(0, uint64_t{});
  if (size >= 4) return load(0, uint32_t{}) | load(size - 4, uint32_t{}) << (8 * (size - 4));
  if (size >= 2) return load(0, uint16_t{}) | load(size - 2, uint16_t{}) << (8 * (size - 2));
  return size == 1 ? load(0, uint8_t{}) : 0;
}

uint64_t mix(uint64_t bits) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
  bits *= kOdd;
  return bits ^ bits >> 32;
}

uint64_t hash_of(std::string_view text) {
  uint64_t hash = text.size();
  for (; text.size() > sizeof hash; text.remove_prefix(sizeof hash)) hash = mix(hash ^ head_of(text));
  return mix(hash ^ head_of(text));
}

// Numbers below 2^24, found by the hash of what they stand for: open addressing, linear probing. A slot holds a number
// and 8 bits of its hash, so that nearly every wrong slot is passed by without a look at what it stands for, and the
// tables of 128,256 tokens and 280,147 merges take 3 MB.
class HashIndex {
 public:
  static constexpr uint32_t kNone = (1 << 24) - 1;
  static constexpr size_t kMaxEntries = kNone;

  explicit HashIndex(size_t n_entries) : slots_(std::bit_ceil(n_entries + n_entries / 2 + 1), kEmpty) {}

  // The entry with this hash for which equal(entry) holds, else kNone.
  template <typename Equal>
  uint32_t find(uint64_t hash, Equal equal) const {
    return slots_[slot_of(hash, equal)] & kNone;
  }

  // Sets the entry that find() gives; gives back the one that was there, else kNone.
  template <typename Equal>
  uint32_t put(uint64_t hash, size_t entry, Equal equal) {
    return std::exchange(slots_[slot_of(hash, equal)], tag_of(hash) | static_cast<uint32_t>(entry)) & kNone;
  }

 private:
  static constexpr uint32_t kEmpty = std::numeric_limits<uint32_t>::max();

  static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 56) << 24; }

  template <typename Equal>
  size_t slot_of(uint64_t hash, Equal equal) const {
    const size_t mask = slots_.size() - 1;
    size_t i = hash & mask;
    for (; slots_[i] != kEmpty; i = (i + 1) & mask) {
      if ((slots_[i] & ~kNone) == tag_of(hash) && equal(slots_[i] & kNone)) break;
    }
    return i;
  }

  std::vector<uint32_t> slots_;
};

// The tokens that byte-pair encoding can make.
class Vocabulary {
 public:
  // `spellings` of all tokens, in the order of their ids, must outlive this.
  explicit Vocabulary(const GgufStrings& spellings) : spellings_(spellings), index_(spellings.size()) {}

  // The other token with the same spelling, if there is one.
  std::optional<TokenId> insert(TokenId id) {
    const std::string_view spelling = (*this)[id];
    return found(index_.put(hash_of(spelling), static_cast<size_t>(id), Is{spellings_, spelling}));
  }

  std::optional<TokenId> find(std::string_view spelling) const {
    return found(index_.find(hash_of(spelling), Is{spellings_, spelling}));
  }

  std::string_view operator[](TokenId id) const { return spellings_[static_cast<size_t>(id)]; }

 private:
  struct Is {
    const GgufStrings& spellings;
    std::string_view spelling;
    bool operator()(uint32_t entry) const { return spellings[entry] == spelling; }
  };

  static std::optional<TokenId> found(uint32_t entry) {
    return entry == HashIndex::kNone ? std::nullopt : std::optional(static_cast<TokenId>(entry));
  }

  const GgufStrings& spellings_;
  HashIndex index_;
};

// What two neighbouring tokens merge into. Merges are found by the spellings of the two: to find them by id, loading
// would have to look up 560,000 ids and take three times as long. A merge of what is not in the vocabulary is never
// asked for.
class Merges {
 public:
  static constexpr uint32_t kNoRank = HashIndex::kNone;

  // `lines` are "left right", the one to apply first at the front. Of equal ones the last counts, as in Hugging Face
  // tokenizers.
  explicit Merges(GgufStrings lines) : lines_(std::move(lines)), index_(lines_.size()) {
    merged_.reserve(lines_.size());
  }

  size_t size() const { return lines_.size(); }

  // Left and right of a line; right is empty when it has no space.
  std::pair<std::string_view, std::string_view> line(size_t rank) const {
    const std::string_view line = lines_[rank];
    const size_t space = std::min(line.find(' '), line.size());
    return {line.substr(0, space), line.substr(std::min(space + 1, line.size()))};
  }

  // Takes in the next line, which is of these two.
  void append(std::string_view left, std::string_view right, TokenId merged) {
    index_.put(hash_of(left, right), merged_.size(), Is{lines_, left, right});
    merged_.push_back(merged);
  }

  uint32_t rank(std::string_view left, std::string_view right) const {
    return index_.find(hash_of(left, right), Is{lines_, left, right});
  }
  TokenId merged(uint32_t rank) const { return merged_[rank]; }

 private:
  static uint64_t hash_of(std::string_view left, std::string_view right) {
    return mix(bitnet::hash_of(left) + std::rotl(bitnet::hash_of(right), 32));
  }

  struct Is {
    const GgufStrings& lines;
    std::string_view left;
    std::string_view right;
    bool operator()(uint32_t rank) const {
      const std::string_view line = lines[rank];
      return line.size() == left.size() + 1 + right.size() && line.starts_with(left) && line.ends_with(right);
    }
  };

  GgufStrings lines_;
  HashIndex index_;
  std::vector<TokenId> merged_;
};

// Tokens that are matched in the text before it is split into pieces.
class AddedTokens {
 public:
  struct Token {
    std::string_view spelling;
    TokenId id;
  };
  struct Match {
    size_t position;
    size_t length;
    TokenId id;
  };

  // Sorted by spelling, which are all different and not empty.
  explicit AddedTokens(std::vector<Token> tokens) : tokens_(std::move(tokens)) {
    for (const Token& token : tokens_) begins_token_[static_cast<uint8_t>(token.spelling[0])] = true;
  }

  std::optional<TokenId> find(std::string_view spelling) const {
    const auto found =
        std::lower_bound(tokens_.begin(), tokens_.end(), spelling,
                         [](const Token& token, std::string_view text) { return token.spelling < text; });
    if (found == tokens_.end() || found->spelling != spelling) return std::nullopt;
    return found->id;
  }

  // The first match in the text, the longest of those that begin there.
  std::optional<Match> search(std::string_view text) const {
    if (tokens_.empty()) return std::nullopt;
    for (size_t position = 0; position < text.size(); ++position) {
      if (!begins_token_[static_cast<uint8_t>(text[position])]) continue;
      if (const auto match = longest_at(text, position)) return match;
    }
    return std::nullopt;
  }

 private:
  std::optional<Match> longest_at(std::string_view text, size_t position) const {
    std::optional<Match> longest;
    // The tokens that share `length` bytes with the text: a range, since they are sorted, the shortest first.
    auto first = tokens_.begin();
    auto last = tokens_.end();
    for (size_t length = 0; first != last; ++length) {
      if (first->spelling.size() == length) longest = Match{position, length, first++->id};
      if (position + length == text.size()) break;
      const auto byte = static_cast<uint8_t>(text[position + length]);
      const auto byte_of = [length](const Token& token) { return static_cast<uint8_t>(token.spelling[length]); };
      first = std::partition_point(first, last, [&](const Token& token) { return byte_of(token) < byte; });
      last = std::partition_point(first, last, [&](const Token& token) { return byte_of(token) == byte; });
    }
    return longest;
  }

  std::vector<Token> tokens_;
  std::array<bool, 256> begins_token_{};
};

// Splits text into the pieces that are encoded on their own.
class PieceSplitter {
 public:
  PieceSplitter() {
    int error = 0;
    size_t offset = 0;
    const std::string pattern = piece_pattern();
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, nullptr));
    if (!code_) throw Error(ExitCode::kInternal, "pre-tokenizer: PCRE2 error " + std::to_string(error));
    // Where no executable memory can be had this fails, and pcre2_match() interprets the pattern.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
    context_.reset(pcre2_match_context_create(nullptr));
    if (!context_) throw std::bad_alloc();
    // The pattern backtracks at most once over a run of white space: no text needs a limit.
    constexpr uint32_t kNoLimit = std::numeric_limits<uint32_t>::max();
    pcre2_set_match_limit(context_.get(), kNoLimit);
    pcre2_set_depth_limit(context_.get(), kNoLimit);
    pcre2_set_heap_limit(context_.get(), kNoLimit);
  }

  // Calls `take` with each piece of the text, which must be valid UTF-8. Every character belongs to one piece.
  template <typename Take>
  void split(std::string_view text, Take take) const {
    const std::unique_ptr<pcre2_match_data, Free> match(pcre2_match_data_create(1, nullptr));
    if (!match) throw std::bad_alloc();
    for (size_t begin = 0; begin < text.size();) {
      const int n_groups = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), begin,
                                       PCRE2_NO_UTF_CHECK, match.get(), context_.get());
      if (n_groups < 0) throw Error(ExitCode::kInternal, "pre-tokenizer: PCRE2 error " + std::to_string(n_groups));
      const size_t end = pcre2_get_ovector_pointer(match.get())[1];
      take(text.substr(begin, end - begin));
      begin = end;
    }
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
  std::unique_ptr<pcre2_match_context, Free> context_;
};

void check_count(const GgufFile& file, std::string_view key, size_t count) {
  if (count > HashIndex::kMaxEntries) {
    file.fail(key, std::to_string(count) + " elements, expected at most " + std::to_string(HashIndex::kMaxEntries));
  }
}

GgufStrings read_spellings(const GgufFile& file) {
  const std::string_view model = file.get_string(kModelKey);
  if (model != "gpt2") file.fail(kModelKey, quoted(model) + ", expected \"gpt2\"", ExitCode::kUnsupportedModel);
  GgufStrings spellings = file.get_strings(kTokensKey);
  check_count(file, kTokensKey, spellings.size());
  return spellings;
}

std::vector<int32_t> read_types(const GgufFile& file, size_t n_tokens) {
  std::vector<int32_t> types = file.get_ints(kTypesKey);
  if (types.size() != n_tokens) {
    file.fail(kTypesKey, std::to_string(types.size()) + " elements, expected " + std::to_string(n_tokens) + " as in " +
                             std::string(kTokensKey));
  }
  for (size_t i = 0; i < n_tokens; ++i) {
    if (types[i] < kNormal || types[i] > kByte) {
      file.fail(kTypesKey, "element " + std::to_string(i) + " is " + std::to_string(types[i]) + ", expected 1 to 6");
    }
  }
  return types;
}

[[noreturn]] void fail_same(const GgufFile& file, TokenId one, TokenId other) {
  file.fail(kTokensKey, "elements " + std::to_string(one) + " and " + std::to_string(other) + " are the same");
}

Vocabulary read_vocabulary(const GgufFile& file, const GgufStrings& spellings, std::span<const int32_t> types) {
  Vocabulary vocabulary(spellings);
  for (size_t i = 0; i < spellings.size(); ++i) {
    if (!is_mergeable(types[i])) continue;
    if (const auto other = vocabulary.insert(static_cast<TokenId>(i))) {
      fail_same(file, *other, static_cast<TokenId>(i));
    }
  }
  return vocabulary;
}

AddedTokens read_added_tokens(const GgufFile& file, const GgufStrings& spellings, std::span<const int32_t> types,
                              std::initializer_list<int32_t> added_types) {
  std::vector<AddedTokens::Token> tokens;
  for (size_t i = 0; i < spellings.size(); ++i) {
    const bool added = std::find(added_types.begin(), added_types.end(), types[i]) != added_types.end();
    if (added && !spellings[i].empty()) tokens.push_back({spellings[i], static_cast<TokenId>(i)});
  }
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.spelling < b.spelling; });
  const auto same = std::adjacent_find(tokens.begin(), tokens.end(),
                                       [](const auto& a, const auto& b) { return a.spelling == b.spelling; });
  if (same != tokens.end()) fail_same(file, same[0].id, same[1].id);
  return AddedTokens(std::move(tokens));
}

Merges read_merges(const GgufFile& file, const Vocabulary& vocabulary, std::span<const int32_t> types) {
  GgufStrings lines = file.get_strings(kMergesKey);
  check_count(file, kMergesKey, lines.size());
  Merges merges(std::move(lines));
  const auto makes = [&](std::string_view left, std::string_view right, size_t id) {
    if (id >= types.size() || !is_mergeable(types[id])) return false;
    const std::string_view spelling = vocabulary[static_cast<TokenId>(id)];
    return spelling.size() == left.size() + right.size() && spelling.starts_with(left) && spelling.ends_with(right);
  };
  // Converters write merges in the order of the tokens they make: as a rule the last one again, or the next.
  size_t merged = 0;
  std::string concatenation;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges.line(rank);
    if (left.empty() || right.empty()) {
      file.fail(kMergesKey, "element " + std::to_string(rank) + " has no two parts, expected \"left right\"");
    }
    if (!makes(left, right, merged) && !makes(left, right, ++merged)) {
      const auto found = vocabulary.find(concatenation.assign(left).append(right));
      if (!found) {
        file.fail(kMergesKey, "element " + std::to_string(rank) + " makes a token that is not in the vocabulary");
      }
      merged = static_cast<size_t>(*found);
    }
    merges.append(left, right, static_cast<TokenId>(merged));
  }
  return merges;
}

std::optional<TokenId> read_id(const GgufFile& file, std::string_view key, size_t n_tokens) {
  const auto id = file.find_uint(key);
  if (id && *id >= n_tokens) {
    file.fail(key, std::to_string(*id) + ", expected less than the " + std::to_string(n_tokens) + " tokens");
  }
  return id ? std::optional(static_cast<TokenId>(*id)) : std::nullopt;
}

// A file that names no split, as the published one, means Llama 3's.
void refuse_other_splits(const GgufFile& file) {
  const auto split = file.find_string(kPreKey);
  if (split && *split != "llama-bpe" && *split != "llama3" && *split != "llama-v3")
    file.fail(kPreKey, quoted(*split) + ", expected \"llama-bpe\", or no such key", ExitCode::kUnsupportedModel);
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const GgufFile& file);

  TokenType type(TokenId id) const { return static_cast<TokenType>(types[static_cast<size_t>(id)]); }
  std::optional<TokenId> find(std::string_view spelling) const;
  void encode_text(std::string_view text, std::vector<TokenId>& ids) const;
  void encode_piece(std::string_view piece, std::vector<TokenId>& ids) const;

  GgufStrings spellings;       // (vocab_size)
  std::vector<int32_t> types;  // (vocab_size), TokenType
  Vocabulary vocabulary;       // all tokens but the added ones
  Merges merges;
  AddedTokens always_matched;     // user-defined
  AddedTokens specially_matched;  // control and user-defined
  std::array<TokenId, 256> byte_tokens;
  std::optional<TokenId> bos;
  bool add_bos = false;
  std::vector<TokenId> end_of_generation;
  ByteAlphabet alphabet;
  PieceSplitter splitter;
};

Tokenizer::Impl::Impl(const GgufFile& file)
    : spellings(read_spellings(file)),
      types(read_types(file, spellings.size())),
      vocabulary(read_vocabulary(file, spellings, types)),
      merges(read_merges(file, vocabulary, types)),
      always_matched(read_added_tokens(file, spellings, types, {kUserDefined})),
      specially_matched(read_added_tokens(file, spellings, types, {kUserDefined, kControl})) {
  refuse_other_splits(file);
  for (size_t byte = 0; byte < byte_tokens.size(); ++byte) {
    const auto id = vocabulary.find(alphabet.spelling(static_cast<uint8_t>(byte)));
    if (!id) file.fail(kTokensKey, "no token for byte " + std::to_string(byte));
    byte_tokens[byte] = *id;
  }

  bos = read_id(file, kBosKey, spellings.size());
  add_bos = bos && file.find_bool(kAddBosKey).value_or(true);
  for (const auto& id : {read_id(file, kEosKey, spellings.size()), read_id(file, kEotKey, spellings.size()),
                         read_id(file, kEomKey, spellings.size()), specially_matched.find("<|eot_id|>"),
                         specially_matched.find("<|end_of_text|>")}) {
    if (id) end_of_generation.push_back(*id);
  }
  std::sort(end_of_generation.begin(), end_of_generation.end());
  end_of_generation.erase(std::unique(end_of_generation.begin(), end_of_generation.end()), end_of_generation.end());
}

std::optional<TokenId> Tokenizer::Impl::find(std::string_view spelling) const {
  const auto added = specially_matched.find(spelling);
  return added ? added : vocabulary.find(spelling);
}

// Text without added tokens.
void Tokenizer::Impl::encode_text(std::string_view text, std::vector<TokenId>& ids) const {
  while (!text.empty()) {
    const size_t valid = valid_utf8_prefix(text);
    splitter.split(text.substr(0, valid), [&](std::string_view piece) { encode_piece(piece, ids); });
    text.remove_prefix(valid);
    if (text.empty()) break;
    ids.push_back(byte_tokens[static_cast<uint8_t>(text[0])]);
    text.remove_prefix(1);
  }
}

// Byte-pair encoding: of all neighbours that can merge, those with the lowest rank do, the leftmost first.
void Tokenizer::Impl::encode_piece(std::string_view piece, std::vector<TokenId>& ids) const {
  std::string spelling;
  for (const char byte : piece) spelling += alphabet.spelling(static_cast<uint8_t>(byte));
  if (const auto id = vocabulary.find(spelling)) {
    ids.push_back(*id);
    return;
  }

  struct Symbol {
    TokenId id;
    uint32_t rank;  // of its merge with the next symbol
    uint32_t previous;
    uint32_t next;
  };
  const auto end = static_cast<uint32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  // Merges to do: rank in the high half, position in the low half.
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;
  const auto look_up_merge = [&](uint32_t position) {
    Symbol& symbol = symbols[position];
    symbol.rank =
        symbol.next == end ? Merges::kNoRank : merges.rank(vocabulary[symbol.id], vocabulary[symbols[symbol.next].id]);
    if (symbol.rank != Merges::kNoRank) queue.push(uint64_t{symbol.rank} << 32 | position);
  };
  for (uint32_t i = 0; i < end; ++i) {
    symbols[i] = {byte_tokens[static_cast<uint8_t>(piece[i])], Merges::kNoRank, i - 1, i + 1};
  }
  for (uint32_t i = 0; i < end; ++i) look_up_merge(i);
  while (!queue.empty()) {
    const auto position = static_cast<uint32_t>(queue.top());
    const auto rank = static_cast<uint32_t>(queue.top() >> 32);
    queue.pop();
    Symbol& left = symbols[position];
    if (left.rank != rank) continue;  // one of the two has merged with another symbol since
    Symbol& right = symbols[left.next];
    left.id = merges.merged(rank);
    left.next = right.next;
    right.rank = Merges::kNoRank;
    if (left.next != end) symbols[left.next].previous = position;
    look_up_merge(position);
    if (position != 0) look_up_merge(left.previous);
  }
  for (uint32_t i = 0; i < end; i = symbols[i].next) ids.push_back(symbols[i].id);
}

Tokenizer::Tokenizer(const GgufFile& file) : impl_(std::make_unique<Impl>(file)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool parse_special) const {
  if (text.size() > kMaxTextBytes) {
    throw Error(ExitCode::kUsage,
                "text of " + std::to_string(text.size()) + " bytes, expected at most " + std::to_string(kMaxTextBytes));
  }
  std::vector<TokenId> ids;
  const AddedTokens& added = parse_special ? impl_->specially_matched : impl_->always_matched;
  while (const auto match = added.search(text)) {
    impl_->encode_text(text.substr(0, match->position), ids);
    ids.push_back(match->id);
    text.remove_prefix(match->position + match->length);
  }
  impl_->encode_text(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool render_special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    const std::string_view spelling = impl_->spellings[static_cast<size_t>(id)];
    switch (impl_->type(id)) {
      case kControl:
        if (render_special) bytes += spelling;
        break;
      case kUserDefined:
        bytes += spelling;
        break;
      default:
        impl_->alphabet.append_bytes(spelling, bytes);
    }
  }
  return bytes;
}

std::string Tokenizer::decode(TokenId id, bool render_special) const {
  return decode(std::span(&id, 1), render_special);
}

size_t Tokenizer::vocab_size() const { return impl_->spellings.size(); }
bool Tokenizer::is_control(TokenId id) const { return impl_->type(id) == kControl; }
std::optional<TokenId> Tokenizer::bos() const { return impl_->bos; }
bool Tokenizer::add_bos() const { return impl_->add_bos; }
std::span<const TokenId> Tokenizer::end_of_generation() const { return impl_->end_of_generation; }
std::optional<TokenId> Tokenizer::find(std::string_view spelling) const { return impl_->find(spelling); }

}  // namespace bitnet
