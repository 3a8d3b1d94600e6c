// The reference: plain C++ for any x86-64. It defines the result of every other table.
#include <bit>
#include <cmath>

#include "half.h"
#include "kernels.h"

namespace bitnet {
namespace scalar {

#include "lanes_scalar.h"

constexpr int kScoreBlocks = 1;
constexpr int kWeighVectors = 1;
#include "float_kernels.h"

void ternary_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  for (size_t t = 0; t < x.n_tokens; t++)
    for (size_t r = 0; r < w.rows; r++) {
      const uint8_t* codes = w.codes + r * (w.cols / 4);
      const int8_t* values = x.values + t * w.cols;
      int32_t total = 0;
      for (size_t k = 0; k < w.cols; k++) {
        const size_t block = k / kTernaryBlock, group = k % kTernaryBlock / 32, byte = k % 32;
        const int code = codes[block * 32 + byte] >> (6 - 2 * group) & 3;
        total += (code - 1) * values[k];
      }
      out[t * out_stride + r] = total;
    }
}

}  // namespace scalar

const Kernels kScalarKernels = {
    .isa = Isa::kScalar,
    .rms_norm = scalar::rms_norm,
    .quantize = scalar::quantize,
    .ternary_matmul = scalar::ternary_matmul,
    .lut_lanes = 0,
    .lut_min_tokens = 0,
    .ternary_lut = nullptr,
    .transpose_tile = nullptr,
    .dequantize = scalar::dequantize,
    .add = scalar::add_to,
    .relu2_mul = scalar::relu2_mul,
    .rope = scalar::rope,
    .store_key = scalar::store_key,
    .store_value = scalar::store_value,
    .attention = scalar::attention,
    .dot_rows = scalar::dot_rows,
};

size_t row_bytes(RowType type, size_t cols) {
  switch (type) {
    case RowType::kF32:
      return cols * 4;
    case RowType::kF16:
    case RowType::kBF16:
      return cols * 2;
    case RowType::kQ8_0:
      return cols / 32 * 34;
    case RowType::kQ6_K:
      return cols / 256 * 210;
  }
  return 0;
}

void decode_row(RowType type, const void* row, size_t cols, float* out) {
  const uint8_t* bytes = static_cast<const uint8_t*>(row);
  if (type == RowType::kQ6_K) {
    for (size_t i = 0; i < cols; i += 256) scalar::decode_q6_k(bytes + i / 256 * 210, out + i);
    return;
  }
  for (size_t i = 0; i < cols; i += kLanes) switch (type) {
      case RowType::kF32:
        scalar::store(out + i, scalar::load_weights<RowType::kF32>(bytes, i));
        break;
      case RowType::kF16:
        scalar::store(out + i, scalar::load_weights<RowType::kF16>(bytes, i));
        break;
      case RowType::kBF16:
        scalar::store(out + i, scalar::load_weights<RowType::kBF16>(bytes, i));
        break;
      default:
        scalar::store(out + i, scalar::load_weights<RowType::kQ8_0>(bytes, i));
        break;
    }
}

}  // namespace bitnet
