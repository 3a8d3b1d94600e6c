#include "tokenizer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <utility>

#include "error.h"
#include "gguf_builder.h"
#include "utf8.h"

using namespace bitnet;

namespace {

using Ids = std::vector<TokenId>;

std::string spell(std::string_view bytes) {
  std::string spelling;
  int next = 256;
  static const std::vector<std::string> alphabet = [&] {
    std::vector<std::string> characters;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      const int c = printable ? byte : next++;
      characters.push_back(c < 128 ? std::string{static_cast<char>(c)}
                                   : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))});
    }
    return characters;
  }();
  for (const char byte : bytes) spelling += alphabet[static_cast<uint8_t>(byte)];
  return spelling;
}

// A vocabulary in the making: the 256 bytes (ids as the bytes), then what is added.
struct VocabularyBuilder {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<std::string> merges;
  std::function<void(GgufBuilder&)> more_keys = [](GgufBuilder&) {};

  VocabularyBuilder() {
    for (int byte = 0; byte < 256; ++byte) add(spell(std::string{static_cast<char>(byte)}));
  }

  TokenId add(const std::string& spelling, int32_t type = 1) {
    tokens.push_back(spelling);
    types.push_back(type);
    return static_cast<TokenId>(tokens.size() - 1);
  }

  // The token that the two merge into.
  TokenId merge(std::string_view left, std::string_view right) {
    merges.push_back(spell(left) + " " + spell(right));
    const std::string merged = spell(left) + spell(right);
    const auto found = std::find(tokens.begin(), tokens.end(), merged);
    return found == tokens.end() ? add(merged) : static_cast<TokenId>(found - tokens.begin());
  }

  GgufBuilder gguf() const {
    GgufBuilder builder;
    builder.key<std::string_view>("tokenizer.ggml.model", "gpt2")
        .array("tokenizer.ggml.tokens", tokens)
        .array("tokenizer.ggml.token_type", types)
        .array("tokenizer.ggml.merges", merges);
    more_keys(builder);
    return builder;
  }
};

// A tokenizer together with the file that it views.
struct Loaded {
  TemporaryFolder folder;
  GgufFile file;
  Tokenizer tokenizer;
  explicit Loaded(const GgufBuilder& builder)
      : file(folder.write("vocabulary.gguf", builder.bytes())), tokenizer(file) {}
  explicit Loaded(const VocabularyBuilder& vocabulary) : Loaded(vocabulary.gguf()) {}

  Ids encode(std::string_view text, bool parse_special = false) const { return tokenizer.encode(text, parse_special); }
};

Ids bytes_of_text(std::string_view text) {
  Ids ids;
  for (const char byte : text) ids.push_back(static_cast<uint8_t>(byte));
  return ids;
}

std::string random_text(std::mt19937& random, std::string_view letters, size_t max_length) {
  std::string text;
  for (size_t n = std::uniform_int_distribution<size_t>(0, max_length)(random); n > 0; --n) {
    text += letters[std::uniform_int_distribution<size_t>(0, letters.size() - 1)(random)];
  }
  return text;
}

void check_refused(const GgufBuilder& builder, ExitCode code, const std::vector<std::string>& fragments) {
  const TemporaryFolder folder;
  const GgufFile file(folder.write("vocabulary.gguf", builder.bytes()));
  try {
    const Tokenizer tokenizer(file);
    FAIL("nothing thrown, expected " << fragments[0]);
  } catch (const Error& error) {
    const std::string message = error.what();
    CAPTURE(message);
    CHECK(static_cast<int>(error.code()) == static_cast<int>(code));
    CHECK(message.find('\n') == std::string::npos);
    for (const std::string& fragment : fragments) CHECK_MESSAGE(message.find(fragment) != std::string::npos, fragment);
  }
}

void check_refused(const VocabularyBuilder& vocabulary, const std::vector<std::string>& fragments) {
  check_refused(vocabulary.gguf(), ExitCode::kInvalidModel, fragments);
}

// The text is split into these pieces. With each of them a token, any other split gives other ids.
void check_pieces(const std::vector<std::string>& pieces) {
  VocabularyBuilder vocabulary;
  std::map<std::string, TokenId> ids;
  for (int byte = 0; byte < 256; ++byte) ids[std::string{static_cast<char>(byte)}] = byte;
  std::string text;
  Ids expected;
  for (const std::string& piece : pieces) {
    text += piece;
    const auto [id, is_new] = ids.try_emplace(piece, static_cast<TokenId>(vocabulary.tokens.size()));
    if (is_new) vocabulary.add(spell(piece));
    expected.push_back(id->second);
  }
  CHECK_MESSAGE(Loaded(vocabulary).encode(text) == expected, text);
}

// Byte-pair encoding word by word as its definition says it, in quadratic time.
Ids naive_bpe(const VocabularyBuilder& vocabulary, std::string_view piece) {
  std::vector<std::string> symbols;
  for (const char byte : piece) symbols.push_back(spell(std::string{byte}));
  const auto id_of = [&](const std::string& spelling) {
    return static_cast<TokenId>(std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), spelling) -
                                vocabulary.tokens.begin());
  };
  if (const TokenId whole = id_of(spell(piece)); static_cast<size_t>(whole) < vocabulary.tokens.size()) return {whole};
  for (;;) {
    size_t best_rank = vocabulary.merges.size();
    size_t best = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const std::string line = symbols[i] + " " + symbols[i + 1];
      const auto rank = static_cast<size_t>(std::find(vocabulary.merges.begin(), vocabulary.merges.end(), line) -
                                            vocabulary.merges.begin());
      if (rank < best_rank) {
        best_rank = rank;
        best = i;
      }
    }
    if (best_rank == vocabulary.merges.size()) break;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  Ids ids;
  for (const std::string& symbol : symbols) ids.push_back(id_of(symbol));
  return ids;
}

}  // namespace

TEST_CASE("without merges a text is its bytes") {
  const Loaded loaded{VocabularyBuilder()};
  CHECK(loaded.encode("").empty());
  CHECK(loaded.encode("Hi é\n") == bytes_of_text("Hi é\n"));
  CHECK(loaded.tokenizer.vocab_size() == 256);
}

TEST_CASE("the merge of lowest rank comes first, the leftmost of equal ones") {
  VocabularyBuilder vocabulary;
  const TokenId bc = vocabulary.merge("b", "c");
  const TokenId ab = vocabulary.merge("a", "b");
  const TokenId aa = vocabulary.merge("a", "a");
  const TokenId aaaa = vocabulary.merge("aa", "aa");
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("abc") == Ids{'a', bc});
  CHECK(loaded.encode("abd") == Ids{ab, 'd'});
  CHECK(loaded.encode("aaa") == Ids{aa, 'a'});
  CHECK(loaded.encode("aaaaa") == Ids{aaaa, 'a'});
  CHECK(loaded.encode("aaaaaaab") == Ids{aaaa, aa, ab});
}

TEST_CASE("merges end at the pieces of the pre-tokenizer") {
  VocabularyBuilder vocabulary;
  vocabulary.merge("a", "1");
  vocabulary.merge(".", "a");
  const TokenId space_a = vocabulary.merge(" ", "a");
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("a1") == Ids{'a', '1'});
  CHECK(loaded.encode(" a") == Ids{space_a});
  CHECK(loaded.encode("  a") == Ids{' ', space_a});
}

TEST_CASE("a piece that is a token is that token, whatever the merges say") {
  VocabularyBuilder vocabulary;
  const TokenId ab = vocabulary.merge("a", "b");
  const TokenId bc = vocabulary.merge("b", "c");
  const TokenId abc = vocabulary.add("abc");
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("abc") == Ids{abc});
  CHECK(loaded.encode("abcd") == Ids{ab, 'c', 'd'});
  CHECK(loaded.encode("xbc") == Ids{'x', bc});
}

TEST_CASE("of a merge that is there twice the last rank counts") {
  VocabularyBuilder vocabulary;
  vocabulary.merge("a", "b");
  const TokenId bc = vocabulary.merge("b", "c");
  vocabulary.merge("a", "b");
  CHECK(Loaded(vocabulary).encode("abcd") == Ids{'a', bc, 'd'});
}

TEST_CASE("the same ids as byte-pair encoding by definition") {
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    VocabularyBuilder vocabulary;
    std::vector<std::string> known = {"a", "b", "c"};
    for (int i = 0; i < 30; ++i) {
      const auto any = [&] { return known[std::uniform_int_distribution<size_t>(0, known.size() - 1)(random)]; };
      const std::string left = any();
      const std::string right = any();
      const auto& merges = vocabulary.merges;
      if (left.size() + right.size() > 9 ||
          std::find(merges.begin(), merges.end(), left + " " + right) != merges.end()) {
        continue;
      }
      vocabulary.merge(left, right);
      known.push_back(left + right);
    }
    const Loaded loaded(vocabulary);
    for (int i = 0; i < 50; ++i) {
      const std::string text = random_text(random, "abc", 40);
      CAPTURE(text);
      REQUIRE(loaded.encode(text) == naive_bpe(vocabulary, text));
    }
  }
}

TEST_CASE("the pieces of the Llama 3 pre-tokenizer") {
  check_pieces({"Hello", ",", " world", "!"});
  check_pieces({"don", "'t", " I", "'LL", " we", "'Ve", "'re", "'d", "x"});
  check_pieces({"it", "'s", " o", "'clock", " '", "tis"});
  check_pieces({"x", "'\u017F", "y"});  // the long s is an s to a pattern that ignores case
  check_pieces({"123", "456", "7", " ", "89"});
  check_pieces({"a", "\n\n", "b", " \n", " c", "  \t\n", "  ", " d", "   "});
  check_pieces({"\r\n", "x", ".\r\n\n", "y"});
  check_pieces({"#include", " <", "stdio", ".h", ">\n"});
  check_pieces({"\tx", "\t\t", "\ty", " =", " ", "1", ";"});
  check_pieces({"naïve", " 中文", "。日本", " 👩\u200D👩", " 👍🏽"});
  check_pieces({"e", "\u0301e", "\u0301"});       // a combining mark is no letter
  check_pieces({"a", "\u0085", "1", "\u0085b"});  // white space
  check_pieces({"a", "\u00A0", "\u3000", "1"});   // white space
  check_pieces({"٣٤٥", "६"});                     // digits of other scripts
  check_pieces({std::string("\0\0", 2), "a"});
}

TEST_CASE("the classes of characters are those of Unicode 16") {
  check_pieces({"1", "\u1C89", "1"});                  // a letter since Unicode 16
  check_pieces({"a\U00031350"});                       // a letter since Unicode 15
  check_pieces({"1\U00010D40", "a"});                  // a digit since Unicode 16
  check_pieces({" \u180E", "1", "\u180E", " ", "2"});  // white space no more since Unicode 6.3
}

TEST_CASE("control tokens are matched where the caller allows it") {
  VocabularyBuilder vocabulary;
  const TokenId eot = vocabulary.add("<|eot_id|>", 3);
  const TokenId end = vocabulary.add("<|end|>", 3);
  const TokenId end_end = vocabulary.add("<|end|><|end|>", 3);
  const TokenId accented = vocabulary.add("é", 3);  // as spelled, not in the byte alphabet
  const TokenId ab = vocabulary.merge("a", "b");
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("ab<|eot_id|>ab") == [&] {
    Ids ids{ab};
    for (const TokenId id : bytes_of_text("<|eot_id|>")) ids.push_back(id);
    ids.push_back(ab);
    return ids;
  }());
  CHECK(loaded.encode("ab<|eot_id|>ab", true) == Ids{ab, eot, ab});
  CHECK(loaded.encode("a<|eot_id|>b", true) == Ids{'a', eot, 'b'});
  CHECK(loaded.encode("<|end|><|end|><|end|>", true) == Ids{end_end, end});
  CHECK(loaded.encode("<|end|><|eot_id|>", true) == Ids{end, eot});
  CHECK(loaded.encode("<|end|><|en", true) == Ids{end, '<', '|', 'e', 'n'});
  CHECK(loaded.encode("<<|end|>>", true) == Ids{'<', end, '>'});
  CHECK(loaded.encode("<|EOT_ID|>", true) == bytes_of_text("<|EOT_ID|>"));
  CHECK(loaded.encode("é", true) == Ids{accented});
  CHECK(loaded.encode("é") == Ids{0xC3, 0xA9});
  CHECK(loaded.encode(" \n<|end|> ", true) == Ids{' ', '\n', end, ' '});

  CHECK(loaded.tokenizer.is_control(eot));
  CHECK(!loaded.tokenizer.is_control(ab));
  CHECK(loaded.tokenizer.decode(Ids{'a', eot, accented}, true) == "a<|eot_id|>é");
  CHECK(loaded.tokenizer.decode(Ids{'a', eot, accented}, false) == "a");
  CHECK(loaded.tokenizer.decode(eot, true) == "<|eot_id|>");
  CHECK(loaded.tokenizer.find("<|eot_id|>") == eot);
  CHECK(loaded.tokenizer.find("ab") == ab);
  CHECK(!loaded.tokenizer.find("absent"));
}

TEST_CASE("a control token is never the result of plain text") {
  VocabularyBuilder vocabulary;
  vocabulary.add("stop", 3);
  vocabulary.add("pad", 5);
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("stop") == bytes_of_text("stop"));
  CHECK(loaded.encode("pad") == bytes_of_text("pad"));

  vocabulary.merges = {"s t", "st op"};
  check_refused(vocabulary, {"tokenizer.ggml.merges", "element 0"});
}

TEST_CASE("user-defined tokens are matched in any text") {
  VocabularyBuilder vocabulary;
  const TokenId tag = vocabulary.add("<tag>", 4);
  const TokenId eot = vocabulary.add("<|eot_id|>", 3);
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("a<tag>b") == Ids{'a', tag, 'b'});
  CHECK(loaded.encode("<tag><|eot_id|>", true) == Ids{tag, eot});
  CHECK(loaded.encode("<tag><|eot_id|>").size() == 11);
  CHECK(!loaded.tokenizer.is_control(tag));
  CHECK(loaded.tokenizer.decode(tag, false) == "<tag>");
}

TEST_CASE("bytes that are no UTF-8 are encoded one by one") {
  VocabularyBuilder vocabulary;
  const TokenId accented = vocabulary.merge("\xC3", "\xA9");
  const TokenId space_x = vocabulary.merge(" ", "x");
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("\xC3\xA9\xC3") == Ids{accented, 0xC3});
  CHECK(loaded.encode("\xFF\xC3\xA9 x\x80") == Ids{0xFF, accented, space_x, 0x80});
  CHECK(loaded.encode("\xC3 \xA9") == Ids{0xC3, ' ', 0xA9});
  CHECK(loaded.encode("\xED\xA0\x80") == Ids{0xED, 0xA0, 0x80});
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  CHECK(loaded.tokenizer.decode(loaded.encode(all), false) == all);
}

TEST_CASE("decoding gives the bytes back") {
  const GgufFile file(BITNET_DEMO_MODEL);
  const Tokenizer tokenizer(file);
  std::mt19937 random(4);
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes += static_cast<char>(byte);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_text(random, round % 2 ? bytes : "abehst.,' \n12", 60);
    for (const bool parse_special : {false, true}) {
      REQUIRE(tokenizer.decode(tokenizer.encode(text, parse_special), true) == text);
    }
  }
}

TEST_CASE("spellings from outside the byte alphabet stand for themselves") {
  VocabularyBuilder vocabulary;
  const TokenId chinese = vocabulary.add("中Ġ");
  const TokenId beyond = vocabulary.add("ń");  // U+0144, the first after the alphabet
  const TokenId ill_formed = vocabulary.add("a\xC4");
  const TokenId continuation = vocabulary.add("\xA1");
  const Loaded loaded(vocabulary);
  CHECK(loaded.tokenizer.decode(chinese, false) == "中Ġ");
  CHECK(loaded.tokenizer.decode(beyond, false) == "ń");
  CHECK(loaded.tokenizer.decode(ill_formed, false) == "a\xC4");
  CHECK(loaded.tokenizer.decode(continuation, false) == "\xA1");
  CHECK(loaded.tokenizer.decode(loaded.encode(" "), false) == " ");
}

TEST_CASE("tokens that begin and end a text") {
  VocabularyBuilder vocabulary;
  const auto bos = static_cast<uint32_t>(vocabulary.add("<|begin_of_text|>", 3));
  const auto end = static_cast<uint32_t>(vocabulary.add("<|end_of_text|>", 3));
  const auto eot = static_cast<uint32_t>(vocabulary.add("<|eot_id|>", 3));
  const auto other = static_cast<uint32_t>(vocabulary.add("<|other|>", 3));
  const auto of = [](std::span<const TokenId> ids) { return Ids(ids.begin(), ids.end()); };
  {
    const Loaded loaded(vocabulary);
    CHECK(!loaded.tokenizer.bos());
    CHECK(!loaded.tokenizer.add_bos());
    CHECK(of(loaded.tokenizer.end_of_generation()) == Ids{static_cast<TokenId>(end), static_cast<TokenId>(eot)});
  }
  vocabulary.more_keys = [&](GgufBuilder& builder) {
    builder.key("tokenizer.ggml.bos_token_id", bos)
        .key("tokenizer.ggml.eos_token_id", other)
        .key("tokenizer.ggml.eot_token_id", eot);
  };
  {
    const Loaded loaded(vocabulary);
    CHECK(loaded.tokenizer.bos() == static_cast<TokenId>(bos));
    CHECK(loaded.tokenizer.add_bos());
    CHECK(of(loaded.tokenizer.end_of_generation()) ==
          Ids{static_cast<TokenId>(end), static_cast<TokenId>(eot), static_cast<TokenId>(other)});
  }
  vocabulary.more_keys = [&](GgufBuilder& builder) {
    builder.key("tokenizer.ggml.bos_token_id", bos).key("tokenizer.ggml.add_bos_token", false);
  };
  CHECK(!Loaded(vocabulary).tokenizer.add_bos());
  vocabulary.more_keys = [](GgufBuilder& builder) { builder.key("tokenizer.ggml.eos_token_id", 260U); };
  check_refused(vocabulary, {"tokenizer.ggml.eos_token_id", "260, expected less than the 260 tokens"});
  vocabulary.more_keys = [](GgufBuilder& builder) { builder.key("tokenizer.ggml.bos_token_id", -1); };
  check_refused(vocabulary, {"tokenizer.ggml.bos_token_id", "-1"});
}

TEST_CASE("vocabularies that cannot be") {
  const VocabularyBuilder good;
  const auto without = [&](std::string_view key) {
    GgufBuilder builder;
    if (key != "model") builder.key<std::string_view>("tokenizer.ggml.model", "gpt2");
    if (key != "tokens") builder.array("tokenizer.ggml.tokens", good.tokens);
    if (key != "token_type") builder.array("tokenizer.ggml.token_type", good.types);
    if (key != "merges") builder.array("tokenizer.ggml.merges", good.merges);
    return builder;
  };
  for (const std::string key : {"model", "tokens", "token_type", "merges"}) {
    check_refused(without(key), ExitCode::kInvalidModel, {"\"tokenizer.ggml." + key + "\"", "is missing"});
  }
  check_refused(without("model").key<std::string_view>("tokenizer.ggml.model", "llama\n"), ExitCode::kUnsupportedModel,
                {"\"llama\\n\", expected \"gpt2\""});
  check_refused(without("token_type").array<int32_t>("tokenizer.ggml.token_type", {1, 1}), ExitCode::kInvalidModel,
                {"2 elements, expected 256"});
  check_refused(without("tokens").array<std::string_view>("tokenizer.ggml.tokens", {}), ExitCode::kInvalidModel,
                {"256 elements, expected 0"});

  const auto refused = [&](const std::function<void(VocabularyBuilder&)>& spoil,
                           const std::vector<std::string>& fragments) {
    VocabularyBuilder vocabulary;
    spoil(vocabulary);
    check_refused(vocabulary, fragments);
  };
  refused([](auto& v) { v.types[7] = 0; }, {"token_type", "element 7 is 0, expected 1 to 6"});
  refused([](auto& v) { v.types[7] = 7; }, {"element 7 is 7"});
  refused([](auto& v) { v.tokens['x'] = "xx"; }, {"tokens", "no token for byte 120"});
  refused([](auto& v) { v.types['x'] = 3; }, {"no token for byte 120"});
  refused([](auto& v) { v.add("a"); }, {"elements 97 and 256 are the same"});
  refused([](auto& v) { v.add("<|x|>", 3), v.add("<|x|>", 4); }, {"elements 256 and 257 are the same"});
  refused([](auto& v) { v.merges = {"a b"}; }, {"merges", "element 0", "not in the vocabulary"});
  for (const std::string line : {"ab", "", " ", "a ", " a"}) {
    refused([&](auto& v) { v.add("ab"), v.merges = {line}; }, {"merges", "element 0", "\"left right\""});
  }
}

TEST_CASE("merges in any order and of what is not in the vocabulary") {
  VocabularyBuilder vocabulary;
  const TokenId abcd = vocabulary.add("abcd");
  const TokenId cd = vocabulary.add("cd");
  const TokenId ab = vocabulary.add("ab");
  vocabulary.merges = {"ab cd", "a bcd", "c d", "a b"};  // there is no token bcd: its merge can never be asked for
  const Loaded loaded(vocabulary);
  CHECK(loaded.encode("xabcd") == Ids{'x', abcd});
  CHECK(loaded.encode("xabxcd") == Ids{'x', ab, 'x', cd});
}

TEST_CASE("an empty control token matches nothing") {
  VocabularyBuilder vocabulary;
  vocabulary.add("", 3);
  CHECK(Loaded(vocabulary).encode("ab", true) == Ids{'a', 'b'});
}

TEST_CASE("long texts of one kind") {
  const GgufFile file(BITNET_DEMO_MODEL);
  const Tokenizer tokenizer(file);
  constexpr size_t kBytes = 1'000'000;  // where anything of second order would take minutes
  for (const std::string unit :
       {"a", " ", "7", "😀", "\n", "\r\n", " \n", " \t", "!", "'", "<|", "中", "\xFF", "\u0301"}) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    CAPTURE(unit);
    CHECK(tokenizer.decode(tokenizer.encode(text, true), true) == text);
    text += 'x';  // a run of white space ends otherwise when something follows
    CHECK(tokenizer.decode(tokenizer.encode(text, false), true) == text);
  }
}
