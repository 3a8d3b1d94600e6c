#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "error.h"

namespace bitnet {

KvCache::KvCache(const Config& config, size_t n_ctx, CacheType type)
    : n_ctx_(n_ctx),
      n_kv_heads_(config.n_kv_heads),
      head_dim_(config.head_dim),
      type_(type),
      part_bytes_(bitnet::chunk_bytes(type, config.head_dim)),
      chunk_bytes_(config.n_layers * n_kv_heads_ * 2 * part_bytes_),
      bytes_(bytes(config, n_ctx, type)) {
  void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED)
    throw Error(ExitCode::kOutOfMemory, "not enough memory: the KV cache of " + std::to_string(n_ctx) +
                                            " positions takes " + std::to_string(bytes_ >> 20) + " MiB");
  data_ = static_cast<std::byte*>(map);
  // Reading through small pages is a fifth slower, but a new large page takes milliseconds where the memory is a
  // guest's: the first chunk, in which every text begins, takes no more of them than it fills.
  madvise(data_, chunk_bytes_, MADV_NOHUGEPAGE);
  if (bytes_ > chunk_bytes_) madvise(data_ + chunk_bytes_, bytes_ - chunk_bytes_, MADV_HUGEPAGE);
}

KvCache::~KvCache() { munmap(data_, bytes_); }

void KvCache::copy_prefix(const KvCache& from, size_t n_positions) {
  from.for_each_range(n_positions, [&](std::span<const std::byte> range) {
    std::memcpy(data_ + (range.data() - from.data_), range.data(), range.size());
  });
}

size_t KvCache::bytes_per_position(const Config& config, CacheType type) {
  return config.n_layers * config.n_kv_heads * 2 * position_bytes(type, config.head_dim);
}

size_t KvCache::bytes(const Config& config, size_t n_ctx, CacheType type) {
  return round_up(n_ctx, kChunkPositions) * bytes_per_position(config, type);
}

}  // namespace bitnet
