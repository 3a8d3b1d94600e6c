// Rows of weights in ggml's quantised types (ggml-quants.c).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bitnet {

inline constexpr size_t kQ8Block = 32, kQ6Block = 256;  // weights that a row is a multiple of

// Q8_0, bit for bit as ggml does it: for each 32 weights an f16 scale, largest magnitude / 127, and int8 numbers,
// halves rounded away from zero. `out` takes row_bytes(RowType::kQ8_0, row.size()). False where a weight is not finite,
// or too large for the scale.
bool quantize_q8_0(std::span<const float> row, uint8_t* out);

// Q6_K: for each 256 weights an f16 scale, sixteen int8 scales that multiply it, and numbers from −32 to 31. The scales
// are those, of a few candidates each, with the least squared error. The rest as above.
bool quantize_q6_k(std::span<const float> row, uint8_t* out);

}  // namespace bitnet
