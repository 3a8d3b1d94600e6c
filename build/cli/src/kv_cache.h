// Keys and values of one sequence, in chunks of positions as kernels/kernels.h (AttentionChunk) says: what attention
// reads one after another lies so. Memory is taken from the system when it is first written, so a long context costs
// memory only as it fills.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "kernels/kernels.h"
#include "model.h"
#include "rounding.h"

namespace bitnet {

class KvCache {
 public:
  // Room for n_ctx positions. Error(kOutOfMemory) when the address space cannot be had.
  KvCache(const Config& config, size_t n_ctx, CacheType type);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  size_t n_ctx() const { return n_ctx_; }
  CacheType type() const { return type_; }
  static size_t bytes_per_position(const Config& config, CacheType type);
  static size_t bytes(const Config& config, size_t n_ctx, CacheType type);  // once it is full

  // Of the chunk with the positions from chunk · kChunkPositions on.
  std::byte* keys(size_t chunk, size_t layer, size_t kv_head) const { return part(chunk, layer, kv_head, 0); }
  std::byte* values(size_t chunk, size_t layer, size_t kv_head) const { return part(chunk, layer, kv_head, 1); }
  AttentionChunk chunk(size_t chunk, size_t layer, size_t kv_head, size_t n_positions,
                       const std::byte* next = nullptr) const {
    return {keys(chunk, layer, kv_head), values(chunk, layer, kv_head), type_, n_positions, head_dim_, next};
  }

  // The bytes of the first n positions, a run at a time, in an order that depends on nothing but n. A run may have
  // bytes of later positions too.
  template <class F>
  void for_each_range(size_t n_positions, F&& f) const {
    for (size_t chunk = 0; chunk * kChunkPositions < n_positions; chunk++) {
      const size_t n = std::min(kChunkPositions, n_positions - chunk * kChunkPositions);
      const size_t n_scales = type_ == CacheType::kI8 ? n : 0;
      const size_t numbers = number_bytes(type_, head_dim_);
      for (std::byte* part = data_ + chunk * chunk_bytes_; part < data_ + (chunk + 1) * chunk_bytes_;
           part += part_bytes_) {
        const bool is_keys = (part - data_) / static_cast<std::ptrdiff_t>(part_bytes_) % 2 == 0;
        const size_t together = is_keys ? kPositionsPerBlock : type_ == CacheType::kI8 ? 2 : 1;
        f(std::span(part, round_up(n, together) * numbers));
        if (n_scales > 0) f(std::span(part + kChunkPositions * numbers, n_scales * sizeof(float)));
      }
    }
  }

  // Takes over the first n positions of a cache of the same model, type and size.
  void copy_prefix(const KvCache& from, size_t n_positions);

 private:
  std::byte* part(size_t chunk, size_t layer, size_t kv_head, size_t which) const {
    return data_ + chunk * chunk_bytes_ + ((layer * n_kv_heads_ + kv_head) * 2 + which) * part_bytes_;
  }

  size_t n_ctx_, n_kv_heads_, head_dim_;
  CacheType type_;
  size_t part_bytes_;   // of the keys, or the values, of one chunk, layer and kv head
  size_t chunk_bytes_;  // of all of them
  size_t bytes_;
  std::byte* data_;  // (chunks, n_layers, n_kv_heads, 2, part_bytes_)
};

}  // namespace bitnet
