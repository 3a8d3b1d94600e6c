// Asking for memory ahead of its use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitnet {

// Into the second-level cache. Assembly, since GCC takes a function that only asks with __builtin_prefetch for one
// without effect and leaves out the calls of it.
inline void prefetch(const void* data, size_t bytes) {
  constexpr size_t kCacheLine = 64;
  for (size_t at = 0; at < bytes; at += kCacheLine)
    __asm__ volatile("prefetcht1 %0" : : "m"(static_cast<const char*>(data)[at]));
}

inline void prefetch_line(const uint8_t* line) { __asm__ volatile("prefetcht0 %0" : : "m"(*line)); }

// Runs of lines that lie apart are asked for in two steps: first two lines of each four, and later, nearer to their
// use, the others. A core waits for some twenty lines that it has named and no more; but two neighbours make the
// second-level cache fetch on its own what follows them (Zen 5: two fifths more bytes a second).
enum class Lines { kFirstPairs, kSecondPairs };
inline void prefetch(const uint8_t* data, size_t bytes, Lines lines) {
  for (size_t at = lines == Lines::kFirstPairs ? 0 : 128; at < bytes; at += 256) {
    prefetch_line(data + at);
    prefetch_line(data + at + 64);
  }
}

}  // namespace bitnet
