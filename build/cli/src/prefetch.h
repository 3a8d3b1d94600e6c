// Asking for memory ahead of its use.
#pragma once

#include <cstddef>

namespace bitnet {

// Into the second-level cache. Assembly, since GCC takes a function that only asks with __builtin_prefetch for one
// without effect and leaves out the calls of it.
inline void prefetch(const void* data, size_t bytes) {
  constexpr size_t kCacheLine = 64;
  for (size_t at = 0; at < bytes; at += kCacheLine)
    __asm__ volatile("prefetcht1 %0" : : "m"(static_cast<const char*>(data)[at]));
}

// One line, into the first-level cache.
inline void prefetch_line(const void* line) {
  __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(line)));
}

}  // namespace bitnet
