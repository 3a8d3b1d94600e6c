// Working memory of the products by tiles, one for each thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../aligned_vector.h"

namespace bitnet {

inline constexpr size_t kAmxRows = 320;  // most rows of a call: a unit of trits by columns
inline constexpr size_t kAmxTokens =
    256;  // most tokens of a call: their sums, and a block of their activations, stay in L2
inline constexpr size_t kAmxCols =
    1280;  // of a block, whose weights are laid out in tiles at a time: whole units of trits

struct AmxScratch {
  static constexpr size_t kTileRows = 16, kTileBytes = 1024;
  // From the tiles of 16 rows to the next ones: a line more than needed, or all would compete for the same sets of L1.
  static constexpr size_t kStride = kAmxCols * kTileRows + 64;

  AlignedVector<uint8_t> tiles = AlignedVector<uint8_t>(kAmxRows / kTileRows * kStride);  // weights of a block
  AlignedVector<int32_t> sums = AlignedVector<int32_t>(kAmxRows * kAmxTokens);
  AlignedVector<uint8_t> codes = AlignedVector<uint8_t>(kTileRows * kAmxCols / 4);  // of trits

  static size_t bytes() {
    return kAmxRows / kTileRows * kStride + kAmxRows * kAmxTokens * sizeof(int32_t) + kTileRows * kAmxCols / 4;
  }
};

}  // namespace bitnet
