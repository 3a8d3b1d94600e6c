#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "error.h"

namespace bitnet {
namespace {

size_t element_bytes(CacheType type) { return type == CacheType::kF32 ? 4 : 2; }

}  // namespace

KvCache::KvCache(const Config& config, size_t n_ctx, CacheType type)
    : n_ctx_(n_ctx), n_kv_heads_(config.n_kv_heads), head_dim_(config.head_dim), type_(type) {
  const size_t positions = (n_ctx + kPositionsPerBlock - 1) / kPositionsPerBlock * kPositionsPerBlock;
  part_bytes_ = positions * head_dim_ * element_bytes(type);
  bytes_ = config.n_layers * n_kv_heads_ * 2 * part_bytes_;
  void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED)
    throw Error(ExitCode::kOutOfMemory, "not enough memory: the KV cache of " + std::to_string(n_ctx) +
                                            " positions takes " + std::to_string(bytes_ >> 20) + " MiB");
  data_ = static_cast<std::byte*>(map);
}

KvCache::~KvCache() { munmap(data_, bytes_); }

void KvCache::copy_prefix(const KvCache& from, size_t n_positions) {
  from.for_each_range(n_positions, [&](std::span<const std::byte> range) {
    std::memcpy(data_ + (range.data() - from.data_), range.data(), range.size());
  });
}

size_t KvCache::bytes_per_position(const Config& config, CacheType type) {
  return config.n_layers * config.n_kv_heads * 2 * config.head_dim * element_bytes(type);
}

}  // namespace bitnet
