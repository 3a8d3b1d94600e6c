// A model ready to compute: the file, its tokenizer and weights, threads and buffers, put together once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "gguf.h"
#include "kernels/kernels.h"
#include "kv_cache.h"
#include "model.h"
#include "thread_pool.h"
#include "tokenizer.h"
#include "transformer.h"

namespace bitnet {

struct EngineOptions {
  std::string model_path;
  size_t n_ctx = 0;      // 0: the model's own, at most kDefaultContext
  size_t n_threads = 0;  // 0: what is fastest of usable_processors() and fewer
  size_t batch_size = 256;
  size_t n_parallel = 1;  // completions at a time; 0: as the memory allows, at most kDefaultParallel
  Isa isa = best_isa();
  CacheType kv_type = CacheType::kF16;
};

inline constexpr size_t kDefaultContext = 2048;
inline constexpr size_t kMaxThreads = 256;
inline constexpr size_t kDefaultParallel = 8;
inline constexpr size_t kMaxParallel = 64;

class Engine {
 public:
  // Throws Error for whatever is wrong with the file, the options or the memory.
  explicit Engine(const EngineOptions& options);

  const GgufFile file;
  const Tokenizer tokenizer;
  Model model;
  const size_t n_ctx;
  const CacheType kv_type;
  const Isa isa;
  const size_t n_parallel;
  ThreadPool pool;
  Transformer transformer;

  const Config& config() const { return model.config(); }
  // Tokens that may be guessed ahead: as many as the kernels compute in little more than the time of one.
  size_t max_draft() const { return std::min<size_t>(isa >= Isa::kAvx512 ? 7 : 3, transformer.max_batch() - 1); }
};

}  // namespace bitnet
