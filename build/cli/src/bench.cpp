#include "bench.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "clock.h"
#include "draft.h"
#include "error.h"
#include "machine.h"
#include "session.h"
#include "utf8.h"

namespace bitnet {
namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // well above any cache
constexpr size_t kTopK = 40;                      // candidates that the default sampling draws from
constexpr size_t kReadPieceBytes = size_t{1} << 20;
constexpr size_t kShortContext = 128;  // that a longer one is compared with

// A buffer larger than the caches, to measure what plain reading gives at the pool's threads.
class ReadBuffer {
 public:
  ReadBuffer() : data_(mmap(nullptr, kReadBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (data_ == MAP_FAILED || available_memory() < kReadBytes)
      throw Error(ExitCode::kOutOfMemory, "not enough memory: measuring the bandwidth takes 256 MiB");
    madvise(data_, kReadBytes, MADV_HUGEPAGE);
    std::fill_n(static_cast<uint64_t*>(data_), kReadBytes / sizeof(uint64_t), uint64_t{1});
  }
  ~ReadBuffer() { munmap(data_, kReadBytes); }
  ReadBuffer(const ReadBuffer&) = delete;
  ReadBuffer& operator=(const ReadBuffer&) = delete;

  double bytes_per_second(ThreadPool& pool) {
    const Clock::time_point start = Clock::now();
    std::vector<uint64_t> sums(kReadBytes / kReadPieceBytes);
    pool.for_each(sums.size(), [&](size_t piece, size_t) {
      const uint64_t* words = static_cast<const uint64_t*>(data_) + piece * (kReadPieceBytes / sizeof(uint64_t));
      uint64_t lanes[16] = {};
      for (size_t i = 0; i < kReadPieceBytes / sizeof(uint64_t); i += 16)
        for (size_t j = 0; j < 16; j++) lanes[j] += words[i + j];
      for (const uint64_t lane : lanes) sums[piece] += lane;
    });
    const double seconds = seconds_since(start);
    uint64_t total = 0;
    for (const uint64_t sum : sums) total += sum;
    if (total != kReadBytes / sizeof(uint64_t))
      throw Error(ExitCode::kInternal, "the bandwidth test read something else than it wrote");
    return static_cast<double>(kReadBytes) / seconds;
  }

 private:
  void* data_;
};

void report(nlohmann::ordered_json& out, const std::string& name, std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  out[name] = (samples[(n - 1) / 2] + samples[n / 2]) / 2.0;
  out[name + "_spread"] = samples.back() - samples.front();
}

// A token for each of several texts at a time.
class SideBySide {
 public:
  // Fills every cache with the tokens.
  SideBySide(Engine& engine, size_t n, std::span<const TokenId> tokens) : engine_(engine) {
    for (size_t i = 0; i < n; i++)
      caches_.push_back(std::make_unique<KvCache>(engine.config(), engine.n_ctx, engine.kv_type));
    std::vector<BatchToken> batch;
    for (size_t done = 0; done < tokens.size(); done += batch.size()) {
      batch.clear();
      for (size_t i = done; i < std::min(tokens.size(), done + engine.transformer.max_batch()); i++)
        batch.push_back({tokens[i], static_cast<uint32_t>(i), caches_.front().get(), false});
      engine.transformer.forward(batch);
    }
    for (size_t i = 1; i < n; i++) caches_[i]->copy_prefix(*caches_.front(), tokens.size());
  }

  void evaluate(TokenId token, size_t position) {
    std::vector<BatchToken> batch;
    for (const auto& cache : caches_) batch.push_back({token, static_cast<uint32_t>(position), cache.get(), true});
    engine_.transformer.forward(batch);
    for (size_t i = 0; i < batch.size(); i++) engine_.transformer.output().best(i, kTopK);
  }

 private:
  Engine& engine_;
  std::vector<std::unique_ptr<KvCache>> caches_;
};

struct Replay {
  double tokens_per_second;
  size_t n_guesses = 0, n_right = 0;
};

// Says `text` after `prompt`, token by token, each looked for among the logits as if it had to be found.
Replay replay(Engine& engine, std::span<const TokenId> prompt, std::span<const TokenId> text, bool may_guess) {
  Session session(engine);
  std::vector<TokenId> history(prompt.begin(), prompt.end());
  session.evaluate(prompt.first(prompt.size() - 1));
  Drafter drafter(may_guess ? engine.max_draft() : 0);
  GuessBudget budget;
  Replay result{};
  const Clock::time_point start = Clock::now();
  for (size_t done = 0; done < text.size();) {
    const Clock::time_point pass = Clock::now();
    std::vector<TokenId> draft;
    if (budget.allows(1)) draft = drafter.propose(history, text.size() - done - 1);
    std::vector<TokenId> batch{history.back()};
    batch.insert(batch.end(), draft.begin(), draft.end());
    session.truncate(history.size() - 1);
    session.evaluate(batch, batch.size());
    size_t n_right = 0;
    for (;; n_right++) {
      engine.transformer.output().best(n_right, kTopK);
      history.push_back(text[done++]);
      if (n_right == draft.size() || draft[n_right] != history.back()) break;
    }
    if (!draft.empty()) drafter.learn(draft.size(), n_right);
    budget.weigh(seconds_since(pass), 1, draft.size(), n_right);
    result.n_guesses += draft.size();
    result.n_right += n_right;
  }
  result.tokens_per_second = static_cast<double>(text.size()) / seconds_since(start);
  return result;
}

}  // namespace

nlohmann::ordered_json bench(Engine& engine, const BenchOptions& options) {
  const size_t longest = std::max<size_t>(options.depth + std::max(options.prompt_tokens, options.predict_tokens), 1);
  if (longest > engine.n_ctx)
    throw Error(ExitCode::kContextExceeded, "--depth and the longer of --prompt-tokens and --predict-tokens take " +
                                                std::to_string(longest) + " positions, the context holds " +
                                                std::to_string(engine.n_ctx));
  std::mt19937 random(1);
  std::vector<TokenId> tokens(longest);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % engine.config().n_vocab);
  const std::span<const TokenId> all(tokens);

  Session session(engine);
  ReadBuffer buffer;
  session.evaluate(all.first(std::max<size_t>(options.depth, 1)));
  while (engine.model.settle(engine.pool, kernels_for(engine.isa))) {
  }
  // Positions differ by the token that is read: the cache's share is that of the middle of the run.
  const double cache_bytes = static_cast<double>(KvCache::bytes_per_position(engine.config(), engine.kv_type)) *
                             (static_cast<double>(options.depth) + static_cast<double>(options.predict_tokens) / 2.0);
  const auto n_sequences = static_cast<double>(options.sequences);
  const double whole_bytes =
      static_cast<double>(engine.model.bytes_per_token(kernels_for(engine.isa))) + n_sequences * cache_bytes;

  if (options.sequences > engine.transformer.max_batch())
    throw Error(ExitCode::kUsage, "--sequences " + std::to_string(options.sequences) + " is above --batch-size " +
                                      std::to_string(engine.transformer.max_batch()));
  SideBySide texts(engine, options.sequences, all.first(options.depth));

  if (const size_t n = options.replay_prompt.size() + options.replay.size(); n > engine.n_ctx)
    throw Error(ExitCode::kContextExceeded, "--replay: the prompt and the text take " + std::to_string(n) +
                                                " positions, the context holds " + std::to_string(engine.n_ctx));

  std::vector<double> prefill, decode, bandwidth, fraction, bytes, kept, said, said_plainly;
  Replay last_replay{};
  for (size_t i = 0; i < options.repetitions; i++) {
    if (options.prompt_tokens > 0) {
      session.truncate(options.depth);
      const Clock::time_point start = Clock::now();
      session.evaluate(all.subspan(options.depth, options.prompt_tokens));
      engine.transformer.output().best(0, kTopK);
      prefill.push_back(static_cast<double>(options.prompt_tokens) / seconds_since(start));
    }
    const double before = buffer.bytes_per_second(engine.pool);
    if (options.predict_tokens > 0) {
      // Beside each token one of a short context, since the memory of a virtual machine is not as fast from one second
      // to the next.
      double seconds = 0.0, short_seconds = 0.0;
      uint64_t refined = 0, skipped = 0;
      for (size_t t = 0; t < options.predict_tokens; t++) {
        const uint64_t refined_before = engine.transformer.output().bytes_refined();
        const uint64_t skipped_before = engine.transformer.bytes_skipped();
        Clock::time_point start = Clock::now();
        texts.evaluate(all[options.depth + t], options.depth + t);
        seconds += seconds_since(start);
        refined += engine.transformer.output().bytes_refined() - refined_before;
        skipped += engine.transformer.bytes_skipped() - skipped_before;
        if (options.depth <= kShortContext) continue;
        start = Clock::now();
        texts.evaluate(all[t], kShortContext);
        short_seconds += seconds_since(start);
      }
      const double n_steps = static_cast<double>(options.predict_tokens), steps = n_steps / seconds;
      decode.push_back(n_sequences * steps);
      if (options.depth > kShortContext) kept.push_back(short_seconds / seconds);
      const double bytes_per_step =
          whole_bytes + (static_cast<double>(refined) - static_cast<double>(skipped)) / n_steps;
      bytes.push_back(bytes_per_step / n_sequences);
      // Before and after, for the same reason.
      bandwidth.push_back((before + buffer.bytes_per_second(engine.pool)) / 2.0);
      fraction.push_back(bytes_per_step * steps / bandwidth.back());
    } else {
      bandwidth.push_back(before);
    }
    if (options.replay.empty()) continue;
    said_plainly.push_back(replay(engine, options.replay_prompt, options.replay, false).tokens_per_second);
    last_replay = replay(engine, options.replay_prompt, options.replay, true);
    said.push_back(last_replay.tokens_per_second);
  }
  nlohmann::ordered_json out;
  out["model"] = to_valid_utf8(engine.config().name);
  out["threads"] = engine.pool.size();
  out["isa"] = name_of(engine.isa);
  out["kv_type"] = name_of(engine.kv_type);
  out["prompt_tokens"] = options.prompt_tokens;
  out["predict_tokens"] = options.predict_tokens;
  out["depth"] = options.depth;
  out["sequences"] = options.sequences;
  out["repetitions"] = options.repetitions;
  if (!prefill.empty()) report(out, "prefill_tokens_per_second", prefill);
  if (!decode.empty()) {
    report(out, "decode_tokens_per_second", decode);
    report(out, "decode_bytes_per_token", bytes);
    if (!kept.empty()) report(out, "decode_of_short_context", kept);
  }
  report(out, "read_bandwidth_bytes_per_second", bandwidth);
  if (!decode.empty()) report(out, "decode_bandwidth_fraction", fraction);
  if (!said.empty()) {
    report(out, "replay_tokens_per_second", said);
    report(out, "replay_without_guesses_tokens_per_second", said_plainly);
    out["replay_tokens"] = options.replay.size();
    out["replay_guesses"] = last_replay.n_guesses;
    out["replay_right_guesses"] = last_replay.n_right;
  }
  return out;
}

}  // namespace bitnet
