// Keys and values of one sequence, laid out as kernels/kernels.h (AttentionSpan) says. Pages are taken from the system
// when they are first written, so a long context costs memory only as it fills.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/kernels.h"
#include "model.h"

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
  size_t bytes() const { return bytes_; }
  static size_t bytes_per_position(const Config& config, CacheType type);

  void* keys(size_t layer, size_t kv_head) const { return part(layer, kv_head, 0); }
  void* values(size_t layer, size_t kv_head) const { return part(layer, kv_head, 1); }
  AttentionSpan span(size_t layer, size_t kv_head, size_t n_positions) const {
    return {keys(layer, kv_head), values(layer, kv_head), type_, n_positions, head_dim_};
  }

  // The bytes of the first n positions, a run at a time, in an order that depends on nothing but n. The last run of
  // keys may have bytes of later positions too.
  template <class F>
  void for_each_range(size_t n_positions, F&& f) const {
    const size_t blocks = (n_positions + kPositionsPerBlock - 1) / kPositionsPerBlock;
    const size_t position_bytes = head_dim_ * (type_ == CacheType::kF32 ? 4 : 2);
    for (std::byte* keys = data_; keys < data_ + bytes_; keys += 2 * part_bytes_) {
      f(std::span(keys, blocks * kPositionsPerBlock * position_bytes));
      f(std::span(keys + part_bytes_, n_positions * position_bytes));
    }
  }

  // Takes over the first n positions of a cache of the same model, type and size.
  void copy_prefix(const KvCache& from, size_t n_positions);

 private:
  void* part(size_t layer, size_t kv_head, size_t which) const {
    return data_ + ((layer * n_kv_heads_ + kv_head) * 2 + which) * part_bytes_;
  }

  size_t n_ctx_, n_kv_heads_, head_dim_;
  CacheType type_;
  size_t part_bytes_;  // of the keys, or the values, of one layer and kv head
  size_t bytes_;
  std::byte* data_;  // (n_layers, n_kv_heads, 2, n_ctx rounded up to 16, head_dim)
};

}  // namespace bitnet
