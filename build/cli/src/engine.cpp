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

// Said before anything large is touched: an allocation succeeds on Linux long after the memory has run out.
void require_memory(const EngineOptions& options, const Model& model, size_t n_ctx, size_t n_threads) {
  const size_t weights = model.memory_bytes(kernels_for(options.isa));
  const size_t cache = n_ctx * KvCache::bytes_per_position(model.config(), options.kv_type);
  const size_t buffers = Transformer::buffer_bytes(model.config(), options.batch_size, n_ctx, n_threads);
  const size_t memory = available_memory(), addresses = available_address_space();
  const auto mib = [](size_t bytes) { return std::to_string((bytes + (size_t{1} << 20) - 1) >> 20) + " MiB"; };
  const std::string own =
      "the KV cache of " + std::to_string(n_ctx) + " positions takes " + mib(cache) + ", buffers " + mib(buffers);
  if (weights + cache + buffers > memory)
    throw Error(ExitCode::kOutOfMemory, "not enough memory: the weights take " + mib(weights) + ", " + own + "; " +
                                            mib(memory) + " are available");
  if (cache + buffers + model.settled_bytes(kernels_for(options.isa)) > addresses)  // the file is mapped already
    throw Error(ExitCode::kOutOfMemory,
                "not enough memory: " + own + "; the limit of the address space leaves " + mib(addresses));
}

size_t checked_threads(const EngineOptions& options, const Model& model, size_t n_ctx) {
  const size_t n = std::min(options.n_threads ? options.n_threads : usable_processors(), kMaxThreads);
  require_memory(options, model, n_ctx, n);
  return n;
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
      pool(checked_threads(options, model, n_ctx)),
      transformer(model, kernels_for(options.isa), pool, options.batch_size, n_ctx) {}

}  // namespace bitnet
