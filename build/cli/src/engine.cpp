#include "engine.h"

#include <algorithm>

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

size_t checked_threads(const EngineOptions& options) {
  return std::min(options.n_threads ? options.n_threads : usable_processors(), kMaxThreads);
}

// How many completions run at a time. What does not fit is said before anything large is touched: an allocation
// succeeds on Linux long after the memory has run out.
size_t checked_parallel(const EngineOptions& options, const Model& model, size_t n_ctx) {
  const size_t weights = model.memory_bytes(kernels_for(options.isa));
  const size_t cache = KvCache::bytes(model.config(), n_ctx, options.kv_type);
  const size_t buffers = Transformer::buffer_bytes(model.config(), options.batch_size, n_ctx, checked_threads(options));
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
      pool(checked_threads(options)),
      transformer(model, kernels_for(options.isa), pool, options.batch_size) {}

}  // namespace bitnet
