// Keys and values of a prompt in a file, for a process that has not computed them.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kv_cache.h"
#include "model.h"
#include "tokenizer.h"

namespace bitnet {

// The file: a header and its tokens, guarded by a CRC-32; then the bytes of KvCache::for_each_range in chunks of 1 MiB,
// each followed by its CRC-32. Numbers are little-endian. It fits one model, one type of cache and one layout only.
class CacheFile {
 public:
  // Reads what tokens the file at `path` has. Error(kFileUnreadable) where it cannot be read, and Error(kInvalidModel)
  // where it is no such file of this model and cache type, or longer than the cache.
  CacheFile(const std::string& path, const Model& model, const KvCache& cache);
  ~CacheFile();
  CacheFile(const CacheFile&) = delete;
  CacheFile& operator=(const CacheFile&) = delete;

  static bool exists(const std::string& path);

  std::span<const TokenId> tokens() const { return tokens_; }

  // Fills the first positions of `cache`, as many as there are tokens. When it throws they hold nothing of use.
  void restore(KvCache& cache);

  // Writes the first positions of `cache`, under a temporary name first. Error(kFileUnreadable); nothing is left then.
  static void save(const std::string& path, const Model& model, const KvCache& cache, std::span<const TokenId> tokens);

 private:
  std::string path_;
  int file_;
  std::vector<TokenId> tokens_;
};

}  // namespace bitnet
