#include "cache_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"
#include "new_file.h"
#include "utf8.h"

namespace bitnet {
namespace {

constexpr char kMagic[8] = {'B', 'I', 'T', 'N', 'E', 'T', 'K', 'V'};
constexpr uint32_t kVersion = 3;  // to be raised with every change of the cache's layout or the model's fingerprint
constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr size_t kSampleBytes = size_t{1} << 20;  // of the embedding, in the model's fingerprint

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t kv_type;
  uint64_t model;
  uint32_t n_tokens;
  uint32_t checksum;  // of the tokens and of what stands before this
};
static_assert(sizeof(Header) == 32);

uint32_t crc(uint32_t so_far, const void* data, size_t n) {
  return static_cast<uint32_t>(crc32_z(so_far, static_cast<const Bytef*>(data), n));
}

uint32_t checksum(const Header& header, std::span<const TokenId> tokens) {
  return crc(crc(0, &header, offsetof(Header, checksum)), tokens.data(), tokens.size_bytes());
}

// Of what no two models have in common: shapes, norms, scales, rotations, some ternary weights and the first
// embeddings.
uint64_t fingerprint(const Model& model) {
  const Config& c = model.config();
  const uint64_t shape[] = {c.n_vocab, c.dim, c.n_layers, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim};
  const uint32_t weights = model.weights_checksum();
  uint32_t sum = crc(crc(0, shape, sizeof shape), &weights, sizeof weights);
  sum = crc(sum, &c.norm_epsilon, sizeof c.norm_epsilon);
  sum = crc(sum, model.rope_frequencies().data(), model.rope_frequencies().size() * sizeof(float));
  for (const Layer& layer : model.layers()) {
    sum = crc(sum, layer.attn_norm, c.dim * sizeof(float));
    sum = crc(sum, layer.attn_sub_norm, c.q_dim() * sizeof(float));
    sum = crc(sum, layer.ffn_norm, c.dim * sizeof(float));
    sum = crc(sum, layer.ffn_sub_norm, c.ffn_dim * sizeof(float));
    for (const TernaryMatrix* matrix :
         {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.gate, &layer.up, &layer.down})
      sum = crc(sum, &matrix->scale, sizeof matrix->scale);
  }
  const FloatRows& embedding = model.token_embedding();
  const size_t bytes = embedding.rows * row_bytes(embedding.type, embedding.cols);
  const uint32_t embeddings = crc(0, embedding.data, std::min(bytes, kSampleBytes));
  return uint64_t{sum} << 32 | embeddings;
}

std::string called(const std::string& path) { return "cache file " + quoted(path); }

[[noreturn]] void fail_to_read(const std::string& path) {
  throw Error(ExitCode::kFileUnreadable, called(path) + " cannot be read: " + std::strerror(errno));
}

[[noreturn]] void refuse(const std::string& path, const char* why) {
  throw Error(ExitCode::kInvalidModel, called(path) + " " + why);
}

void read_exactly(int file, void* data, size_t n, const std::string& path) {
  for (auto* at = static_cast<std::byte*>(data); n > 0;) {
    const ssize_t got = read(file, at, n);
    if (got < 0 && errno != EINTR) fail_to_read(path);
    if (got == 0) refuse(path, "is truncated");
    if (got > 0) {
      at += got;
      n -= static_cast<size_t>(got);
    }
  }
}

// Calls part(bytes, n) for the bytes of the first positions, in pieces that end where chunks do, and end(crc) there.
template <class Part, class End>
void for_each_chunk(const KvCache& cache, size_t n_positions, Part&& part, End&& end) {
  size_t left = kChunkBytes;
  uint32_t sum = 0;
  cache.for_each_range(n_positions, [&](std::span<std::byte> range) {
    while (!range.empty()) {
      const std::span<std::byte> piece = range.first(std::min(left, range.size()));
      part(piece.data(), piece.size());
      sum = crc(sum, piece.data(), piece.size());
      range = range.subspan(piece.size());
      left -= piece.size();
      if (left > 0) continue;
      end(std::exchange(sum, 0));
      left = kChunkBytes;
    }
  });
  if (left < kChunkBytes) end(sum);
}

}  // namespace

CacheFile::CacheFile(const std::string& path, const Model& model, const KvCache& cache)
    : path_(path), file_(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
  if (file_ < 0) fail_to_read(path);
  try {
    struct stat status;
    if (fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) refuse(path, "is no regular file");
    Header header;
    read_exactly(file_, &header, sizeof header, path);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) refuse(path, "is none: it begins with other bytes");
    if (header.version != kVersion) refuse(path, "has another layout");
    if (header.model != fingerprint(model)) refuse(path, "is of another model");
    if (header.kv_type != static_cast<uint32_t>(cache.type())) refuse(path, "has another --kv-type");
    if (header.n_tokens > cache.n_ctx()) refuse(path, "has more positions than the context");
    tokens_.resize(header.n_tokens);
    read_exactly(file_, tokens_.data(), tokens_.size() * sizeof(TokenId), path);
    if (header.checksum != checksum(header, tokens_)) refuse(path, "has a wrong checksum");
  } catch (...) {
    close(file_);
    throw;
  }
}

CacheFile::~CacheFile() { close(file_); }

bool CacheFile::exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

void CacheFile::restore(KvCache& cache) {
  for_each_chunk(
      cache, tokens_.size(), [&](std::byte* bytes, size_t n) { read_exactly(file_, bytes, n, path_); },
      [&](uint32_t sum) {
        uint32_t expected;
        read_exactly(file_, &expected, sizeof expected, path_);
        if (sum != expected) refuse(path_, "has a wrong checksum");
      });
}

void CacheFile::save(const std::string& path, const Model& model, const KvCache& cache,
                     std::span<const TokenId> tokens) {
  Header header{
      {}, kVersion, static_cast<uint32_t>(cache.type()), fingerprint(model), static_cast<uint32_t>(tokens.size()), 0};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.checksum = checksum(header, tokens);
  NewFile out(path, path + "." + std::to_string(getpid()) + ".tmp", called(path), 0600);
  out.append(&header, sizeof header);
  out.append(tokens.data(), tokens.size_bytes());
  for_each_chunk(
      cache, tokens.size(), [&](const std::byte* bytes, size_t n) { out.append(bytes, n); },
      [&](uint32_t sum) { out.append(&sum, sizeof sum); });
  out.finish(false);  // of a file that a crash leaves incomplete the checksums are wrong
}

}  // namespace bitnet
