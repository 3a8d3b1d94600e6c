#include "engine.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "error.h"
#include "machine.h"

namespace bitnet {
namespace {

size_t checked_context(const EngineOptions& options, const Config& config) {
  if (options.n_ctx == 0) return std::min(config.n_ctx, kDefaultContext);
  if (options.n_ctx > config.n_ctx)
    throw Error(ExitCode::kUsage, "--ctx-size " + std::to_string(options.n_ctx) +
                                      " is above the model's context length of " + std::to_string(config.n_ctx));
  return options.n_ctx;
}

// At most: a trial may show that fewer are faster.
size_t most_threads(const EngineOptions& options) {
  return std::min(options.n_threads ? options.n_threads : usable_processors(), kMaxThreads);
}

// The number of threads that is fastest here and now. Processors that the system counts need not be cores, nor wholly
// ours: so a few are tried with the first layers of the model itself, in turn, for 50 ms at most. The best time of each
// counts: what others did meanwhile may be over soon, and the choice stays. Fewer threads have to be clearly faster: a
// prompt, which is not tried, gains more from the others than a token does.
size_t fastest_threads(const EngineOptions& options, Model& model) {
  const size_t most = most_threads(options);
  if (options.n_threads > 0 || most == 1) return most;
  constexpr size_t kLayers = 2, kTurns = 2, kRuns = 6;
  constexpr auto kLimit = std::chrono::milliseconds(50);
  constexpr double kWorthIt = 0.9;  // of the time with more threads
  struct Trial {
    Trial(Model& model, const EngineOptions& options, size_t n_threads)
        : pool(n_threads),
          transformer(model, kernels_for(options.isa), pool, 1),
          cache(model.config(), kChunkPositions, options.kv_type) {}
    void run() {
      const BatchToken token{0, 0, &cache, false};
      size_t layers = 0;
      transformer.forward({&token, 1}, [&] { return layers++ == kLayers; });
    }
    ThreadPool pool;
    Transformer transformer;
    KvCache cache;
    std::chrono::steady_clock::duration best = std::chrono::steady_clock::duration::max();
  };
  std::vector<std::unique_ptr<Trial>> trials;  // from many threads to few: the time may not last for all
  for (const size_t n : {most, most - most / 4, most / 2})
    if (trials.empty() || n < trials.back()->pool.size()) trials.push_back(std::make_unique<Trial>(model, options, n));
  for (const auto& trial : trials) trial->run();  // finds no pages yet
  const auto start = std::chrono::steady_clock::now();
  for (size_t turn = 0; turn < kTurns; turn++)
    for (const auto& trial : trials)
      for (size_t run = 0; run < kRuns && std::chrono::steady_clock::now() - start < kLimit; run++) {
        const auto before = std::chrono::steady_clock::now();
        trial->run();
        trial->best = std::min(trial->best, std::chrono::steady_clock::now() - before);
      }
  const Trial* fastest = trials.front().get();
  for (const auto& trial : trials)
    if (static_cast<double>(trial->best.count()) < kWorthIt * static_cast<double>(fastest->best.count()))
      fastest = trial.get();
  return fastest->pool.size();
}

// How many completions run at a time. What does not fit is said before anything large is touched: an allocation
// succeeds on Linux long after the memory has run out.
size_t checked_parallel(const EngineOptions& options, const Model& model, size_t n_ctx) {
  const size_t weights = model.memory_bytes(kernels_for(options.isa));
  const size_t cache = KvCache::bytes(model.config(), n_ctx, options.kv_type);
  const size_t buffers = Transformer::buffer_bytes(model.config(), options.batch_size, n_ctx, most_threads(options));
  const size_t n = std::max<size_t>(options.n_parallel, 1);
  const size_t memory = available_memory(), addresses = available_address_space();
  const auto mib = [](size_t bytes) { return std::to_string((bytes + (size_t{1} << 20) - 1) >> 20) + " MiB"; };
  const std::string own = (n > 1 ? std::to_string(n) + " KV caches" : "the KV cache") + " of " + std::to_string(n_ctx) +
                          " positions " + (n > 1 ? "take " : "takes ") + mib(n * cache) + ", buffers " + mib(buffers);
  const size_t needed_memory = weights + n * cache + buffers;
  if (needed_memory > memory)
    throw Error(ExitCode::kOutOfMemory, "not enough memory: the weights take " + mib(weights) + ", " + own + "; " +
                                            mib(memory) + " are available");
  const size_t needed_addresses =
      n * cache + buffers + model.settled_bytes(kernels_for(options.isa));  // the file is mapped already
  if (needed_addresses > addresses)
    throw Error(ExitCode::kOutOfMemory,
                "not enough memory: " + own + "; the limit of the address space leaves " + mib(addresses));
  if (options.n_parallel > 0) return n;
  const size_t left = std::min(memory - needed_memory, addresses - needed_addresses);
  return std::min(kDefaultParallel, 1 + left / 2 / cache);  // the other half is for those around us
}

const Model& matching(const Model& model, const Tokenizer& tokenizer, const std::string& path) {
  if (model.config().n_vocab != tokenizer.vocab_size())
    throw Error(ExitCode::kInvalidModel, path + ": the output matrix has " + std::to_string(model.config().n_vocab) +
                                             " rows, the tokenizer " + std::to_string(tokenizer.vocab_size()) +
                                             " tokens");
  return model;
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : file(options.model_path),
      tokenizer(file),
      model(file),
      n_ctx(checked_context(options, matching(model, tokenizer, file.path()).config())),
      kv_type(options.kv_type),
      isa(options.isa),
      n_parallel(checked_parallel(options, model, n_ctx)),
      pool(fastest_threads(options, model)),
      transformer(model, kernels_for(options.isa), pool, options.batch_size) {}

}  // namespace bitnet
