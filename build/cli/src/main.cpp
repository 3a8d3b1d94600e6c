// The command line: options in, exit code out. docs/cli.md describes it.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "bench.h"
#include "engine.h"
#include "error.h"
#include "machine.h"
#include "perplexity.h"
#include "session.h"
#include "timings.h"
#include "utf8.h"
#include "version.h"
#include "worker.h"

namespace bitnet {
namespace {

using Json = nlohmann::ordered_json;

std::string read_all(std::istream& in) {
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(ExitCode::kFileUnreadable, path + ": cannot be read: " + std::strerror(errno));
  std::string text = read_all(file);
  if (file.bad()) throw Error(ExitCode::kFileUnreadable, path + ": cannot be read");
  return text;
}

void write_out(std::string_view text) {
  std::cout.write(text.data(), static_cast<std::streamsize>(text.size()));
  std::cout.flush();
}

// The options that every command with a loaded model has.
struct ModelOptions {
  EngineOptions engine;

  void add(CLI::App& command) {
    command.add_option("--model,-m", engine.model_path, "GGUF file")->required();
    command.add_option("--ctx-size,-c", engine.n_ctx, "positions of context; default: the model's, at most 2048")
        ->check(CLI::PositiveNumber);
    command.add_option("--threads,-t", engine.n_threads, "default: the processors this process may use")
        ->check(CLI::Range(size_t{1}, kMaxThreads));
    command.add_option("--batch-size", engine.batch_size, "prompt tokens computed together; changes no result")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();
    command
        .add_option("--isa", engine.isa,
                    "scalar, avx2 or avx512; default: the best this processor has; changes no result")
        ->transform(CLI::Transformer(
            std::map<std::string, Isa>{{"scalar", Isa::kScalar}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}}))
        ->check([](const std::string& value) {
          const Isa isa = static_cast<Isa>(std::stoi(value));
          return supported(isa) ? std::string() : "this processor does not have " + std::string(name_of(isa));
        });
    command.add_option("--kv-type", engine.kv_type, "f16 (default) or f32: how keys and values are kept")
        ->transform(
            CLI::Transformer(std::map<std::string, CacheType>{{"f16", CacheType::kF16}, {"f32", CacheType::kF32}}));
  }
};

std::vector<TokenId> parse_tokens(const std::string& list, size_t n_vocab) {
  std::vector<TokenId> ids;
  for (const std::string& word : CLI::detail::split(list, ',')) {
    char* end = nullptr;
    errno = 0;
    const long id = std::strtol(word.c_str(), &end, 10);
    if (word.empty() || *end != '\0' || errno != 0 || id < 0 || static_cast<size_t>(id) >= n_vocab)
      throw Error(ExitCode::kUsage,
                  "--tokens: \"" + word + "\" is not a token id from 0 to " + std::to_string(n_vocab - 1));
    ids.push_back(static_cast<TokenId>(id));
  }
  return ids;
}

struct Generate {
  ModelOptions model;
  std::string prompt, prompt_file;
  Completion completion;
  int64_t seed = -1;
  bool no_bos = false, special = false, chat = false, json = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("generate", "continue a text");
    model.add(c);
    SamplingParams& s = completion.sampling;
    CLI::Option* text = c.add_option("--prompt,-p", prompt, "text to continue");
    c.add_option("--prompt-file,-f", prompt_file, "file with the text to continue")->excludes(text);
    c.add_option("--n-predict,-n", completion.n_predict, "tokens at most; -1: until the context is full")
        ->check(CLI::Range(-1, 1 << 30))
        ->capture_default_str();
    c.add_option("--temperature", s.temperature, "0: always the best token")
        ->check(CLI::Range(0.0, 100.0))
        ->capture_default_str();
    c.add_option("--top-k", s.top_k, "0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
    c.add_option("--top-p", s.top_p, "1: all")->check(CLI::Range(1e-9, 1.0))->capture_default_str();
    c.add_option("--min-p", s.min_p, "0: all")->check(CLI::Range(0.0, 1.0))->capture_default_str();
    c.add_option("--repeat-penalty", s.repeat_penalty, "1: none")
        ->check(CLI::Range(1e-9, 100.0))
        ->capture_default_str();
    c.add_option("--repeat-last-n", s.repeat_last_n, "tokens that penalties look back on; -1: all")
        ->check(CLI::Range(-1, 1 << 30))
        ->capture_default_str();
    c.add_option("--presence-penalty", s.presence_penalty, "0: none")
        ->check(CLI::Range(-100.0, 100.0))
        ->capture_default_str();
    c.add_option("--frequency-penalty", s.frequency_penalty, "0: none")
        ->check(CLI::Range(-100.0, 100.0))
        ->capture_default_str();
    c.add_option("--seed", seed, "-1: a random one")
        ->check(CLI::Range(int64_t{-1}, std::numeric_limits<int64_t>::max()))
        ->capture_default_str();
    c.add_option("--stop", completion.stop, "end before this text; may be given several times")
        ->allow_extra_args(false);
    c.add_flag("--ignore-eos", completion.ignore_eos, "never choose an end-of-generation token");
    c.add_flag("--no-bos", no_bos, "do not begin with the BOS token");
    c.add_flag("--special", special, "parse control tokens spelled in the prompt");
    c.add_flag("--chat", chat, "the prompt is the user's turn of the model's chat template");
    c.add_flag("--json", json, "one JSON object at the end instead of text");
    c.callback([this] { run(); });
  }

  void run() {
    if (!prompt_file.empty()) prompt = read_file(prompt_file);
    completion.sampling.seed = seed < 0 ? std::random_device()() : static_cast<uint64_t>(seed);
    Engine engine(model.engine);
    const Tokenizer& tokenizer = engine.tokenizer;
    completion.prompt =
        chat ? chat_prompt(tokenizer, prompt) : text_prompt(tokenizer, prompt, !no_bos && tokenizer.add_bos(), special);
    if (completion.prompt.empty()) throw Error(ExitCode::kUsage, "--prompt: must have at least 1 token, got 0");
    Session session(engine);
    const Session::OnPiece print = [](std::string_view text, std::span<const TokenId>) { write_out(text); };
    const CompletionResult r = session.complete(completion, json ? Session::OnPiece() : print, {});
    if (!json) return write_out("\n");
    const Json out = {{"content", r.content},
                      {"tokens", r.tokens},
                      {"stop_type", name_of(r.stop_type)},
                      {"stopping_word", r.stopping_word},
                      {"tokens_predicted", r.tokens.size()},
                      {"tokens_evaluated", r.n_prompt},
                      {"truncated", r.truncated},
                      {"seed", completion.sampling.seed},
                      {"timings", timings(r.n_prompt, r.prompt_ms, r.tokens.size(), r.predicted_ms)}};
    write_out(out.dump() + "\n");
  }
};

struct WorkerCommand {
  ModelOptions model;

  void add(CLI::App& app) {
    CLI::App& c =
        *app.add_subcommand("worker", "serve JSON lines on standard input and output (docs/worker-protocol.md)");
    model.add(c);
    c.callback([this] {
      const Clock::time_point start = Clock::now();
      Engine engine(model.engine);
      run_worker(engine, std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    });
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
      write_out(Json(text_prompt(tokenizer, read_all(std::cin), bos, special)).dump() + "\n");
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
      std::vector<TokenId> ids;
      try {
        ids = Json::parse(read_all(std::cin)).get<std::vector<TokenId>>();
      } catch (const Json::exception&) {
        throw Error(ExitCode::kUsage, "standard input must be a JSON array of token ids");
      }
      for (const TokenId id : ids)
        if (id < 0 || static_cast<size_t>(id) >= tokenizer.vocab_size())
          throw Error(ExitCode::kUsage, "token id " + std::to_string(id) + " is not from 0 to " +
                                            std::to_string(tokenizer.vocab_size() - 1));
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
    std::ofstream file(output, std::ios::binary | std::ios::trunc);
    if (!file) throw Error(ExitCode::kFileUnreadable, output + ": cannot be written: " + std::strerror(errno));
    KvCache cache(engine.config(), engine.n_ctx, engine.kv_type);
    std::vector<float> logits(engine.transformer.max_batch() * n_vocab);
    for (size_t done = 0; done < ids.size();) {
      std::vector<BatchToken> batch;
      for (size_t i = done; i < ids.size() && batch.size() < engine.transformer.max_batch(); i++)
        batch.push_back({ids[i], static_cast<uint32_t>(i), &cache, true});
      engine.transformer.forward(batch, logits.data());
      file.write(reinterpret_cast<const char*>(logits.data()),
                 static_cast<std::streamsize>(batch.size() * n_vocab * sizeof(float)));
      done += batch.size();
    }
    if (!file.flush()) throw Error(ExitCode::kFileUnreadable, output + ": cannot be written: " + std::strerror(errno));
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
    std::printf("\nparameters %zu, weights read for a token %zu bytes\n", model.n_params(), model.bytes_per_token());
    for (const CacheType type : {CacheType::kF16, CacheType::kF32})
      std::printf("KV cache (%s) %zu bytes a position, %zu for %zu\n", std::string(name_of(type)).c_str(),
                  KvCache::bytes_per_position(c, type), c.n_ctx * KvCache::bytes_per_position(c, type), c.n_ctx);
    const EngineOptions defaults;
    std::printf("this processor: %s kernels, %zu threads\n", std::string(name_of(defaults.isa)).c_str(),
                usable_processors());
  }
};

struct Bench {
  ModelOptions model;
  BenchOptions options;
  bool json = false;

  void add(CLI::App& app) {
    CLI::App& c = *app.add_subcommand("bench", "speed of prompt and generation, and of the memory");
    model.add(c);
    c.add_option("--prompt-tokens", options.prompt_tokens, "0: no prefill")->capture_default_str();
    c.add_option("--predict-tokens", options.predict_tokens, "0: no decode")->capture_default_str();
    c.add_option("--depth", options.depth, "positions already filled")->capture_default_str();
    c.add_option("--repetitions", options.repetitions, "the median is reported")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    c.add_flag("--json", json, "print JSON");
    c.callback([this] { run(); });
  }

  void run() {
    Engine engine(model.engine);
    const Json out = bench(engine, options);
    if (json) return write_out(out.dump() + "\n");
    for (const auto& [key, value] : out.items()) std::printf("%-42s %s\n", key.c_str(), value.dump().c_str());
  }
};

int run(int argc, char** argv) {
  CLI::App app("BitNet: ternary language models on a processor", "bitnet");
  app.set_version_flag("--version", std::string(kVersion));
  app.require_subcommand(1);
  Generate generate;
  WorkerCommand worker;
  Tokenize tokenize;
  Detokenize detokenize;
  Logits logits;
  Perplexity perplexity;
  Info info;
  Bench bench;
  generate.add(app);
  worker.add(app);
  tokenize.add(app);
  detokenize.add(app);
  logits.add(app);
  perplexity.add(app);
  info.add(app);
  bench.add(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    std::cerr << "bitnet: " << e.what() << "\n";
    return static_cast<int>(ExitCode::kUsage);
  } catch (const Error& e) {
    std::cerr << "bitnet: " << e.what() << "\n";
    return static_cast<int>(e.code());
  } catch (const std::bad_alloc&) {
    std::cerr << "bitnet: not enough memory\n";
    return static_cast<int>(ExitCode::kOutOfMemory);
  } catch (const std::exception& e) {
    std::cerr << "bitnet: internal error: " << e.what() << "\n";
    return static_cast<int>(ExitCode::kInternal);
  }
  return 0;
}

}  // namespace
}  // namespace bitnet

int main(int argc, char** argv) {
  if (!bitnet::supported(bitnet::Isa::kAvx2)) {
    std::fputs("bitnet: this processor lacks AVX2, FMA or F16C, which bitnet needs\n", stderr);
    return static_cast<int>(bitnet::ExitCode::kUnsupportedProcessor);
  }
  return bitnet::run(argc, argv);
}
