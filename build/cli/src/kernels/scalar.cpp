// The reference: plain C++ for any x86-64. It defines the result of every other table.
#include <bit>
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "rounding.h"

namespace bitnet {
namespace scalar {

#include "lanes_scalar.h"

// Of attention: how much the registers hold. Values of a token alone come from memory, best as one stream: whole.
constexpr int kScoreQueries = 4, kWeighQueries = 4, kWeighVectors = 1, kLoneQueries = 4, kLoneVectors = 1;
constexpr int kInt8Queries = 4, kInt8Sums = 1, kInt8Vectors = 1;
#include "float_kernels.h"

void ternary_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  for (size_t t = 0; t < x.n_tokens; t++)
    for (size_t r = 0; r < w.rows; r++) {
      const uint8_t* codes = w.data + r * w.row_bytes();
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

void ternary_select(const TernaryRows& w, const uint32_t* rows, size_t n, const Activations& x, int32_t* out) {
  for (size_t i = 0; i < n; i++) ternary_matmul(w.slice(rows[i], 1), x, &out[i], 1);
}

void add_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun, int32_t* sums) {
  for (size_t c = here.first; c < here.first + here.n; c++) {
    if (x[c] == 0) continue;
    const uint8_t* codes = w.data + c * w.column_bytes();
    for (size_t r = 0; r < w.n_units() * w.unit_rows(); r++) {
      const size_t unit = r / w.unit_rows(), plane = r % w.unit_rows() / kColumnUnit, byte = r % kColumnUnit;
      const int code = codes[unit * kColumnUnit + byte] >> (6 - 2 * plane) & 3;
      sums[r] += (code - 1) * x[c];
    }
  }
}

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes) {
  for (size_t u = 0; u < units; u++, packed += kTritUnit, codes += kCodeUnit)
    for (size_t p = 0; p < 32; p++) {
      unsigned fifth = 0;
      for (size_t i = 0; i < 4; i++) {
        const unsigned v = packed[i * 32 + p], w = v % 81;
        codes[i * 32 + p] = static_cast<uint8_t>(w / 27 << 6 | w / 9 % 3 << 4 | w / 3 % 3 << 2 | w % 3);
        fifth = fifth << 2 | (v < 162 ? v / 81 : 2);
      }
      codes[128 + p] = static_cast<uint8_t>(fifth);
    }
}

void pack_trits(const uint8_t* codes, size_t units, uint8_t* packed) {
  for (size_t u = 0; u < units; u++, codes += kCodeUnit, packed += kTritUnit)
    for (size_t p = 0; p < 32; p++)
      for (size_t i = 0; i < 4; i++) {
        unsigned number = codes[128 + p] >> (6 - 2 * i) & 3u;
        for (size_t digit = 0; digit < 4; digit++) number = 3 * number + (codes[i * 32 + p] >> (6 - 2 * digit) & 3u);
        packed[i * 32 + p] = static_cast<uint8_t>(number);
      }
}

}  // namespace scalar

const Kernels kScalarKernels = {
    .isa = Isa::kScalar,
    .rms_norm = scalar::rms_norm,
    .quantize = scalar::quantize,
    .ternary_matmul = scalar::ternary_matmul,
    .ternary_select = scalar::ternary_select,
    .trit_matmul = nullptr,
    .add_columns = scalar::add_columns,
    .add_trit_columns = nullptr,
    .expand_trits = scalar::expand_trits,
    .pack_trits = scalar::pack_trits,
    .lut_lanes = 0,
    .lut_min_tokens = 0,
    .lut_min_rest = 0,
    .lut_numbers = nullptr,
    .lut_column_numbers = nullptr,
    .ternary_lut = nullptr,
    .transpose_tile = nullptr,
    .steps_above_cap = nullptr,
    .cap = nullptr,
    .wide_lut = nullptr,
    .transpose_wide_tile = nullptr,
    .amx_min_tokens = 0,
    .amx_matmul = nullptr,
    .amx_column_matmul = nullptr,
    .dequantize = scalar::dequantize,
    .add = scalar::add_to,
    .relu2_mul = scalar::relu2_mul,
    .rope = scalar::rope,
    .store_key = scalar::store_key,
    .store_value = scalar::store_value,
    .attend = scalar::attend,
    .add_attention = scalar::add_attention,
    .divide_attention = scalar::divide_attention,
    .sketch_row = scalar::sketch_row,
    .find_not_below = scalar::find_not_below,
    .dot_rows = scalar::dot_rows,
};

FloatRows FloatRows::slice(size_t first, size_t count) const {
  return {type, data + first * row_bytes(type, cols), count, cols};
}

namespace {

template <RowType type>
void decode(const FloatRows& w, size_t row, float* out) {
  const FloatRows one = w.slice(row, 1);
  for (size_t i = 0; i < w.cols;) {
    scalar::F32x16 weights[scalar::kLoaded<type>];
    scalar::load_weights<type>(one.data, i, weights);
    for (const scalar::F32x16& v : weights) {
      scalar::store(out + i, v);
      i += kLanes;
    }
  }
}

}  // namespace

void decode_row(const FloatRows& w, size_t row, float* out) {
  switch (w.type) {
    case RowType::kF32:
      return decode<RowType::kF32>(w, row, out);
    case RowType::kF16:
      return decode<RowType::kF16>(w, row, out);
    case RowType::kBF16:
      return decode<RowType::kBF16>(w, row, out);
    case RowType::kQ8_0:
      return decode<RowType::kQ8_0>(w, row, out);
    case RowType::kQ6_K:
      return decode<RowType::kQ6_K>(w, row, out);
  }
}

}  // namespace bitnet
