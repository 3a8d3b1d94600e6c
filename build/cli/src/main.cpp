// The command line: options in, exit code out. docs/cli.md describes it.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <system_error>

#include "bench.h"
#include "engine.h"
#include "error.h"
#include "machine.h"
#include "pack.h"
#include "perplexity.h"
#include "prompt.h"
#include "scheduler.h"
#include "timings.h"
#include "utf8.h"
#include "version.h"
#include "worker.h"

namespace bitnet {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxCount = 1 << 30;  // of tokens, in any option

[[noreturn]] void fail_errno(const std::string& path, const std::string& what) {
  throw Error(ExitCode::kFileUnreadable, path + ": " + what + ": " + std::strerror(errno));
}

std::string read_all(std::FILE* file, const std::string& path) {
  std::string text;
  std::array<char, 65536> bytes;
  while (const size_t n = std::fread(bytes.data(), 1, bytes.size(), file)) text.append(bytes.data(), n);
  if (std::ferror(file)) fail_errno(path, "cannot be read");
  return text;
}

std::string read_stdin() { return read_all(stdin, "standard input"); }

std::string read_file(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), std::fclose);
  if (!file) fail_errno(path, "cannot be read");
  return read_all(file.get(), path);
}

// Out at once, with whatever was printed before.
void write_out(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) fail_errno("standard output", "cannot be written");
}

// Takes a decimal number from `least` to `most`. CLI::Range would let NaN pass, and CLI11 read 010 as 8 and cut what is
// too large.
template <class T>
CLI::Validator in_range(T least, T most) {
  const std::string limits = Json(least).dump() + " to " + Json(most).dump();
  const auto check = [=](std::string& value) {
    T number{};
    const char* end = value.data() + value.size();
    const auto [last, error] = std::from_chars(value.data(), end, number);
    if (error != std::errc() || last != end || !(number >= least && number <= most))
      return (std::is_integral_v<T> ? "must be an integer from " : "must be a number from ") + limits + ", got " +
             bitnet::quoted(value);
    value = Json(number).dump();
    return std::string();
  };
  return {check, limits};
}

// Takes one of some values by its name.
template <class T>
CLI::Validator one_of(const std::vector<T>& values) {
  std::string names;
  for (const T value : values) names += (names.empty() ? "" : "|") + std::string(name_of(value));
  const auto check = [=](std::string& value) {
    const auto found = std::find_if(values.begin(), values.end(), [&](T known) { return name_of(known) == value; });
    if (found == values.end()) return "must be " + names + ", got " + bitnet::quoted(value);
    value = std::to_string(static_cast<int>(*found));
    return std::string();
  };
  return {check, names};
}

// Nothing is written over what is being read.
void keep_model(const std::string& output, const std::string& model) {
  std::error_code not_there;
  if (std::filesystem::equivalent(output, model, not_there))
    throw Error(ExitCode::kFileUnreadable, output + ": cannot be written: it is the model");
}

// The options that every command with a loaded model has.
struct ModelOptions {
  EngineOptions engine;

  void add(CLI::App& command) {
    command.add_option("--model,-m", engine.model_path, "GGUF file")->required();
    command.add_option("--ctx-size,-c", engine.n_ctx, "positions of context; default: the model's, at most 2048")
        ->transform(in_range<size_t>(1, kMaxCount));
    command.add_option("--threads,-t", engine.n_threads, "default: what a trial of 50 ms shows to be the fastest")
        ->transform(in_range<size_t>(1, kMaxThreads));
    command.add_option("--batch-size", engine.batch_size, "prompt tokens computed together; changes no result")
        ->transform(in_range<size_t>(1, 1024))
        ->capture_default_str();
    command.add_option("--isa", engine.isa, "kernels; default: the best this processor has; changes no result")
        ->transform(one_of<Isa>({std::begin(kIsas), std::end(kIsas)}))
        ->check([](const std::string& value) {
          const Isa isa = static_cast<Isa>(std::stoi(value));
          return supported(isa) ? std::string() : "this processor does not have " + std::string(name_of(isa));
        });
    command.add_option("--kv-type", engine.kv_type, "how keys and values are kept; default: f16")
        ->transform(one_of<CacheType>({std::begin(kCacheTypes), std::end(kCacheTypes)}));
  }
};

std::vector<TokenId> parse_tokens(std::string_view list, size_t n_vocab) {
  std::vector<TokenId> ids;
  for (;;) {
    const std::string_view word = list.substr(0, list.find(','));
    TokenId id = -1;
    const auto [last, error] = std::from_chars(word.begin(), word.end(), id);
    if (error != std::errc() || last != word.end() || id < 0 || static_cast<size_t>(id) >= n_vocab)
      throw Error(ExitCode::kUsage, "--tokens: must be token ids from 0 to " + std::to_string(n_vocab - 1) + ", got " +
                                        bitnet::quoted(word));
    ids.push_back(id);
    if (word.size() == list.size()) return ids;
    list.remove_prefix(word.size() + 1);
  }
}

struct Generate {
  ModelOptions model;
  std::string prompt, prompt_file;
  CLI::Option* prompt_file_option = nullptr;
  Completion completion;
  int64_t seed = -1;
  bool no_bos = false, special = false, chat = false, json = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("generate", "continue a text");
    model.add(c);
    SamplingParams& s = completion.sampling;
    CLI::Option* text = c.add_option("--prompt,-p", prompt, "text to continue");
    prompt_file_option =
        c.add_option("--prompt-file,-f", prompt_file, "file with the text to continue")->excludes(text);
    c.add_option("--n-predict,-n", completion.n_predict, "tokens at most; -1: until the context is full")
        ->transform(in_range(-1, kMaxCount))
        ->capture_default_str();
    c.add_option("--temperature", s.temperature, "0: always the best token")
        ->transform(in_range(0.0, 100.0))
        ->capture_default_str();
    c.add_option("--top-k", s.top_k, "0: all")->transform(in_range(0, kMaxCount))->capture_default_str();
    c.add_option("--top-p", s.top_p, "1: all")->transform(in_range(0.0, 1.0))->capture_default_str();
    c.add_option("--min-p", s.min_p, "0: all")->transform(in_range(0.0, 1.0))->capture_default_str();
    c.add_option("--repeat-penalty", s.repeat_penalty, "1: none")
        ->transform(in_range(kLeastRepeatPenalty, 100.0))
        ->capture_default_str();
    c.add_option("--repeat-last-n", s.repeat_last_n, "tokens that penalties look back on; -1: all")
        ->transform(in_range(-1, kMaxCount))
        ->capture_default_str();
    c.add_option("--presence-penalty", s.presence_penalty, "0: none")
        ->transform(in_range(-100.0, 100.0))
        ->capture_default_str();
    c.add_option("--frequency-penalty", s.frequency_penalty, "0: none")
        ->transform(in_range(-100.0, 100.0))
        ->capture_default_str();
    c.add_option("--seed", seed, "-1: a random one")
        ->transform(in_range(int64_t{-1}, std::numeric_limits<int64_t>::max()))
        ->capture_default_str();
    c.add_option("--stop", completion.stop, "end before this text; may be given several times")
        ->allow_extra_args(false)
        ->check([](const std::string& stop) {
          return is_valid_utf8(stop) ? std::string() : "must be UTF-8, got " + bitnet::quoted(stop);
        });
    c.add_flag("!--no-speculation", completion.speculate, "do not guess ahead; changes no result");
    c.add_flag("--ignore-eos", completion.ignore_eos, "never choose an end-of-generation token");
    c.add_flag("--no-bos", no_bos, "do not begin with the BOS token");
    c.add_flag("--special", special, "parse control tokens spelled in the prompt");
    c.add_flag("--chat", chat, "the prompt is the user's turn of the model's chat template");
    c.add_flag("--json", json, "one JSON object at the end instead of text");
    c.callback([this] { run(); });
  }

  void run() {
    if (prompt_file_option->count() > 0) prompt = read_file(prompt_file);
    completion.sampling.seed = seed < 0 ? std::random_device()() : static_cast<uint64_t>(seed);
    Engine engine(model.engine);
    const Tokenizer& tokenizer = engine.tokenizer;
    completion.prompt =
        chat ? chat_prompt(tokenizer, prompt) : text_prompt(tokenizer, prompt, !no_bos && tokenizer.add_bos(), special);
    if (completion.prompt.empty()) throw Error(ExitCode::kUsage, "--prompt: must have at least 1 token, got 0");
    Scheduler scheduler(engine);
    const CompletionResult r = complete(scheduler, completion, [this](std::string_view text, std::span<const TokenId>) {
                                 if (!json) write_out(text);
                               }).front();
    if (!json) return write_out("\n");
    const Json out = {{"content", r.content},
                      {"tokens", r.tokens},
                      {"stop_type", name_of(r.stop_type)},
                      {"stopping_word", r.stopping_word},
                      {"tokens_predicted", r.tokens.size()},
                      {"tokens_evaluated", r.n_prompt},
                      {"truncated", r.truncated},
                      {"seed", completion.sampling.seed},
                      {"timings", timings(r)}};
    write_out(out.dump() + "\n");
  }
};

struct WorkerCommand {
  ModelOptions model;

  void add(CLI::App& app) {
    CLI::App& c =
        *app.add_subcommand("worker", "serve JSON lines on standard input and output (docs/worker-protocol.md)");
    model.add(c);
    model.engine.n_parallel = 0;
    c.add_option("--parallel", model.engine.n_parallel,
                 "completions at a time; default: as the memory allows, at most 8")
        ->transform(in_range<size_t>(1, kMaxParallel));
    c.callback([this] { run_worker(model.engine); });
  }
};

struct Tokenize {
  std::string model;
  bool bos = false, special = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("tokenize", "text on standard input → JSON array of token ids");
    c.add_option("--model,-m", model, "GGUF file")->required();
    c.add_flag("--bos", bos, "begin with the BOS token");
    c.add_flag("--special", special, "parse control tokens spelled in the text");
    c.callback([this] {
      const GgufFile file(model);
      const Tokenizer tokenizer(file);
      write_out(Json(text_prompt(tokenizer, read_stdin(), bos, special)).dump() + "\n");
    });
  }
};

struct Detokenize {
  std::string model;

  void add(CLI::App& app) {
    CLI::App& c =
        *app.add_subcommand("detokenize", "JSON array of token ids on standard input → the bytes they stand for");
    c.add_option("--model,-m", model, "GGUF file")->required();
    c.callback([this] {
      const GgufFile file(model);
      const Tokenizer tokenizer(file);
      const Json list = Json::parse(read_stdin(), nullptr, false);
      if (!list.is_array()) throw Error(ExitCode::kUsage, "standard input must be a JSON array of token ids");
      std::vector<TokenId> ids;
      for (const Json& id : list) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() >= tokenizer.vocab_size())
          throw Error(ExitCode::kUsage,
                      "standard input: token ids are integers from 0 to " + std::to_string(tokenizer.vocab_size() - 1) +
                          ", got " +
                          (id.is_structured() ? std::string("an ") + id.type_name() : bitnet::quoted(id.dump())));
        ids.push_back(id.get<TokenId>());
      }
      write_out(tokenizer.decode(ids, true));
    });
  }
};

struct Logits {
  ModelOptions model;
  std::string tokens, output;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand(
        "logits", "logits of every position of a list of tokens, as little-endian float32 (n_tokens, n_vocab)");
    model.add(c);
    c.add_option("--tokens", tokens, "ids, separated by commas")->required();
    c.add_option("--output,-o", output, "file to write")->required();
    c.callback([this] { run(); });
  }

  void run() {
    Engine engine(model.engine);
    const size_t n_vocab = engine.config().n_vocab;
    const std::vector<TokenId> ids = parse_tokens(tokens, n_vocab);
    if (ids.size() > engine.n_ctx) throw ContextExceeded(ids.size(), engine.n_ctx);
    KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
    std::vector<float> logits(std::min(engine.transformer.max_batch(), ids.size()) * n_vocab);
    keep_model(output, model.engine.model_path);
    std::ofstream file(output, std::ios::binary | std::ios::trunc);
    if (!file) fail_errno(output, "cannot be written");
    for (size_t done = 0; done < ids.size();) {
      std::vector<BatchToken> batch;
      for (size_t i = done; i < ids.size() && batch.size() < engine.transformer.max_batch(); i++)
        batch.push_back({ids[i], static_cast<uint32_t>(i), &cache, true});
      engine.transformer.forward(batch);
      engine.transformer.output().logits(logits.data());
      file.write(reinterpret_cast<const char*>(logits.data()),
                 static_cast<std::streamsize>(batch.size() * n_vocab * sizeof(float)));
      done += batch.size();
    }
    if (!file.flush()) fail_errno(output, "cannot be written");
  }
};

struct Perplexity {
  ModelOptions model;
  std::string path;
  bool json = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("perplexity", "how well the model foretells a text");
    model.add(c);
    c.add_option("--file,-f", path, "text file")->required();
    c.add_flag("--json", json, "print JSON");
    c.callback([this] { run(); });
  }

  void run() {
    Engine engine(model.engine);
    const std::vector<TokenId> tokens = engine.tokenizer.encode(read_file(path), false);
    const PerplexityResult r = perplexity(engine, tokens);
    const double value = std::exp(r.nats_per_token);
    if (json)
      return write_out(Json{{"perplexity", value},
                            {"nats_per_token", r.nats_per_token},
                            {"tokens", tokens.size()},
                            {"tokens_scored", r.n_scored},
                            {"windows", r.n_windows},
                            {"n_ctx", engine.n_ctx}}
                           .dump() +
                       "\n");
    std::printf("perplexity %.4f (%.4f nats a token over %zu of %zu tokens, %zu windows of %zu)\n", value,
                r.nats_per_token, r.n_scored, tokens.size(), r.n_windows, engine.n_ctx);
    write_out("");
  }
};

struct Info {
  std::string path;

  void add(CLI::App& app) {
    CLI::App& c =
        *app.add_subcommand("info", "keys, tensors and sizes of a GGUF file, and what this processor will use");
    c.add_option("file", path, "GGUF file")->required();
    c.callback([this] { run(); });
  }

  void run() {
    const GgufFile file(path);
    std::printf("%s: GGUF 3, %zu bytes, %zu tensors\n\n", path.c_str(), static_cast<size_t>(file.size()),
                file.tensors().size());
    for (const auto& [key, value] : file.describe_keys())
      std::printf("  %-44s %s\n", to_valid_utf8(key).c_str(), to_valid_utf8(value).c_str());
    std::printf("\n");
    for (const Tensor& tensor : file.tensors()) {
      std::string shape;
      for (const uint64_t n : tensor.shape) shape += (shape.empty() ? "" : " x ") + std::to_string(n);
      std::printf("  %-32s %-6s %-18s %12zu bytes\n", to_valid_utf8(tensor.name).c_str(),
                  std::string(name_of(tensor.type)).c_str(), shape.c_str(), tensor.bytes.size());
    }
    const Model model(file);
    const Config& c = model.config();
    std::printf("\nparameters %zu, weights read for a token %zu bytes at most\n", model.n_params(),
                model.bytes_per_token(kernels_for(best_isa())));
    for (const CacheType type : kCacheTypes)
      std::printf("KV cache (%s) %zu bytes a position, %zu for %zu\n", std::string(name_of(type)).c_str(),
                  KvCache::bytes_per_position(c, type), KvCache::bytes(c, c.n_ctx, type), c.n_ctx);
    const EngineOptions defaults;
    std::printf("this processor: %s kernels, %zu threads\n", std::string(name_of(defaults.isa)).c_str(),
                usable_processors());
    write_out("");
  }
};

enum class OutputBits { kSix = 6, kEight = 8 };

std::string_view name_of(OutputBits bits) { return bits == OutputBits::kSix ? "6" : "8"; }

struct Pack {
  std::string input, output;
  unsigned output_bits = 8;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("pack", "write a model in the small layout that loads and runs fastest");
    c.add_option("--model,-m", input, "GGUF file")->required();
    c.add_option("--output,-o", output, "file to write")->required();
    c.add_option("--output-bits", output_bits, "8 or 6: bits of a weight of the output matrix")
        ->transform(one_of<OutputBits>({OutputBits::kEight, OutputBits::kSix}))
        ->capture_default_str();
    c.callback([this] {
      keep_model(output, input);
      pack(input, output, output_bits);
    });
  }
};

struct Bench {
  ModelOptions model;
  BenchOptions options;
  std::string replay;
  bool json = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("bench", "speed of prompt and generation, and of the memory");
    model.add(c);
    for (const auto& [name, value, help] : {std::tuple{"--prompt-tokens", &options.prompt_tokens, "0: no prefill"},
                                            std::tuple{"--predict-tokens", &options.predict_tokens, "0: no decode"},
                                            std::tuple{"--depth", &options.depth, "positions already filled"}})
      c.add_option(name, *value, help)->transform(in_range<size_t>(0, kMaxCount))->capture_default_str();
    c.add_option("--sequences", options.sequences, "texts that grow side by side, a token each at a time")
        ->transform(in_range<size_t>(1, kMaxParallel))
        ->capture_default_str();
    c.add_option("--repetitions", options.repetitions, "the median is reported")
        ->transform(in_range<size_t>(1, 1000))
        ->capture_default_str();
    c.add_option("--replay", replay,
                 "file: a prompt, a line \"---\", and a text that is said as if the model had drawn it");
    c.add_flag("--json", json, "print JSON");
    c.callback([this] { run(); });
  }

  void run() {
    Engine engine(model.engine);
    if (!replay.empty()) {
      constexpr std::string_view kLine = "\n---\n";
      const std::string file = read_file(replay);
      const size_t line = file.find(kLine);
      if (line == std::string::npos)
        throw Error(ExitCode::kUsage, "--replay: " + replay + " has no line \"---\" between a prompt and a text");
      const std::string_view all(file);
      options.replay_prompt = text_prompt(engine.tokenizer, all.substr(0, line + 1), true, false);
      options.replay = engine.tokenizer.encode(all.substr(line + kLine.size()), false);
      if (options.replay.empty())
        throw Error(ExitCode::kUsage, "--replay: " + replay + " has no text after its \"---\"");
    }
    const Json out = bench(engine, options);
    if (json) return write_out(out.dump() + "\n");
    for (const auto& [key, value] : out.items()) std::printf("%-42s %s\n", key.c_str(), value.dump().c_str());
    write_out("");
  }
};

// One line on standard error, whatever a path or a value contains.
int fail(ExitCode code, const std::string& message) {
  std::string line = "bitnet: ";
  for (const char c : to_valid_utf8(message)) {
    const bool control = static_cast<unsigned char>(c) < 0x20 || c == 0x7F;
    line += control ? ' ' : c;
  }
  std::fputs((line + "\n").c_str(), stderr);
  return static_cast<int>(code);
}

int report_out_of_memory() {
  std::fputs("bitnet: not enough memory\n", stderr);  // without taking any
  return static_cast<int>(ExitCode::kOutOfMemory);
}

// Says in one line what the exception that is being handled means, and gives the exit code.
int report_exception() {
  try {
    throw;
  } catch (const Error& e) {
    return fail(e.code(), e.what());
  } catch (const std::bad_alloc&) {
    return report_out_of_memory();
  } catch (const std::system_error& e) {  // of all that is called only starting a thread throws it
    return fail(ExitCode::kOutOfMemory, std::string("not enough memory to start a thread: ") + e.what());
  } catch (const std::exception& e) {
    return fail(ExitCode::kInternal, std::string("internal error: ") + e.what());
  }
}

int run(int argc, char** argv) {
  CLI::App app("BitNet: ternary language models on a processor", "bitnet");
  app.set_version_flag("--version", std::string(kVersion));
  app.require_subcommand(0, 1);
  Generate generate;
  WorkerCommand worker;
  Tokenize tokenize;
  Detokenize detokenize;
  Logits logits;
  Perplexity perplexity;
  Info info;
  Bench bench;
  Pack pack;
  generate.add(app);
  worker.add(app);
  tokenize.add(app);
  detokenize.add(app);
  logits.add(app);
  perplexity.add(app);
  info.add(app);
  bench.add(app);
  pack.add(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    if (argc > 1 && app.get_subcommands().empty())
      return fail(ExitCode::kUsage, bitnet::quoted(argv[1]) + " is not a command; bitnet --help lists them");
    return fail(ExitCode::kUsage, e.what());
  }
  if (app.get_subcommands().empty()) return fail(ExitCode::kUsage, "a command is missing; bitnet --help lists them");
  return static_cast<int>(ExitCode::kOk);
}

}  // namespace
}  // namespace bitnet

int main(int argc, char** argv) {
  // A standard stream that is closed would become the next file that is opened.
  for (int fd = 0; fd >= 0 && fd <= STDERR_FILENO;) {
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (fd > STDERR_FILENO) close(fd);
  }
  std::signal(SIGBUS, [](int) {
    constexpr std::string_view kMessage = "bitnet: a file became shorter, or unreadable, while it was in use\n";
    [[maybe_unused]] const ssize_t n = write(STDERR_FILENO, kMessage.data(), kMessage.size());
    _exit(static_cast<int>(bitnet::ExitCode::kFileTruncated));
  });
  if (!bitnet::supported(bitnet::Isa::kAvx2)) {
    std::fputs("bitnet: this processor lacks AVX2, FMA, F16C or BMI2, which bitnet needs\n", stderr);
    return static_cast<int>(bitnet::ExitCode::kUnsupportedProcessor);
  }
  // Memory can run out where nothing may be thrown: in a thread, in a destructor of the JSON library. GCC before 13
  // does not always know the exception then.
  std::set_terminate(
      [] { _exit(std::current_exception() ? bitnet::report_exception() : bitnet::report_out_of_memory()); });
  try {
    return bitnet::run(argc, argv);
  } catch (...) {
    return bitnet::report_exception();
  }
}
