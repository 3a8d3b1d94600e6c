// AVX-512 with VNNI: F, BW, VL, DQ and VNNI are asked for at run time.
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "amx.h"
#include "avx512_vbmi.h"
#include "columns.h"
#include "half.h"
#include "kernels.h"
#include "prefetch.h"
#include "rounding.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace bitnet {
namespace avx512 {

#include "lanes_avx512.h"

// Of attention: how much the registers hold. Values of a token alone come from memory, best as one stream: whole.
constexpr int kScoreQueries = 8, kWeighQueries = 4, kWeighVectors = 4, kLoneQueries = 2, kLoneVectors = 8;
constexpr int kInt8Queries = 4, kInt8Sums = 2, kInt8Vectors = 4;
#include "float_kernels.h"

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// A register's low half for the first and third, its high half for the second and fourth code of a byte: a block is
// loaded into both, and its codes are taken two at a time, in the order of the activations.
inline __m512i load_twice(const uint8_t* p) { return _mm512_broadcast_i64x4(load256(p)); }
inline __m512i bytes(char low, char high) {
  return _mm512_inserti64x4(_mm512_set1_epi8(low), _mm256_set1_epi8(high), 1);
}
inline __m512i words(short low, short high) {
  return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}
inline __m512i doublewords(int low, int high) {
  return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
}

inline __m128i sums_of(const __m512i (&a)[4]) {
  const __m512i t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
  const __m256i v = _mm256_add_epi32(_mm512_castsi512_si256(u), _mm512_extracti64x4_epi64(u, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

// One row by one token: its sums, lane by lane. Codes are multiplied where they are in their bytes: the sums with those
// of bits 6, 4 and 2 are 64, 16 and 4 times too large.
template <bool kAlone>
inline __m512i one_row(const uint8_t* row, size_t n_blocks, const int8_t* x) {
  constexpr size_t kSide = 4;  // blocks that have sums of their own, so that none waits for another
  const __m512i mask01 = bytes(static_cast<char>(0xc0), 0x30), mask23 = bytes(0x0c, 0x03);
  __m512i acc01[kSide], acc23[kSide];
  for (size_t i = 0; i < kSide; i++) acc01[i] = acc23[i] = _mm512_setzero_si512();
  const auto add_block = [&](size_t i) {
    const __m512i codes = load_twice(row);
    acc01[i] = _mm512_dpbusd_epi32(acc01[i], _mm512_and_si512(codes, mask01), load512(x));
    acc23[i] = _mm512_dpbusd_epi32(acc23[i], _mm512_and_si512(codes, mask23), load512(x + 64));
    row += 32;
    x += kTernaryBlock;
  };
  for (; n_blocks >= kSide; n_blocks -= kSide)
    for (size_t i = 0; i < kSide; i++) {
      if (!kAlone && i % 2 == 0) prefetch_line(row + kPrefetchBytes);
      add_block(i);
    }
  for (; n_blocks > 0; n_blocks--) add_block(0);
  const auto total = [&](const __m512i(&a)[kSide]) {
    return _mm512_add_epi32(_mm512_add_epi32(a[0], a[1]), _mm512_add_epi32(a[2], a[3]));
  };
  return _mm512_add_epi32(_mm512_srav_epi32(total(acc01), doublewords(6, 4)),
                          _mm512_srav_epi32(total(acc23), doublewords(2, 0)));
}

// What the lanes of a row's sums come to, or of four; codes are weights + 1.
inline __m128i products(const __m512i (&acc)[4], int32_t sum) {
  return _mm_sub_epi32(sums_of(acc), _mm_set1_epi32(sum));
}

inline int32_t product(__m512i acc, int32_t sum) { return _mm512_reduce_add_epi32(acc) - sum; }

using RowSums = __m512i;
#include "columns_avx512.h"
#include "one_token.h"

// R rows by N tokens: their sums, lane by lane.
template <int R, int N>
inline void tile(const uint8_t* rows, size_t cols, const int8_t* x, __m512i (&acc)[N][R]) {
  const __m512i mask = _mm512_set1_epi8(3), shift01 = words(6, 4), shift23 = words(2, 0);
  for (int t = 0; t < N; t++)
    for (int r = 0; r < R; r++) acc[t][r] = _mm512_setzero_si512();
  for (size_t b = 0; b < cols / kTernaryBlock; b++) {
    __m512i codes[R];
    for (int r = 0; r < R; r++) {
      const uint8_t* p = rows + static_cast<size_t>(r) * (cols / 4) + b * 32;
      if (b % 2 == 0) prefetch_line(p + kPrefetchBytes);
      codes[r] = load_twice(p);
    }
    const auto add = [&](__m512i shift, const int8_t* at) {
      __m512i c[R];
      for (int r = 0; r < R; r++) c[r] = _mm512_and_si512(_mm512_srlv_epi16(codes[r], shift), mask);
      for (int t = 0; t < N; t++) {
        const __m512i a = load512(at + static_cast<size_t>(t) * cols);
        for (int r = 0; r < R; r++) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], c[r], a);
      }
    };
    add(shift01, x + b * kTernaryBlock);
    add(shift23, x + b * kTernaryBlock + 64);
  }
}

template <int N>
void by_tokens(const TernaryRows& w, const int8_t* x, const int32_t* sums, int32_t* out, size_t out_stride) {
  const uint8_t* row = w.data;
  size_t r = 0;
  for (; r + 4 <= w.rows; r += 4, row += w.cols) {
    __m512i acc[N][4];
    tile(row, w.cols, x, acc);
    for (int t = 0; t < N; t++)  // codes are weights + 1
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + static_cast<size_t>(t) * out_stride + r),
                       _mm_sub_epi32(sums_of(acc[t]), _mm_set1_epi32(sums[t])));
  }
  for (; r < w.rows; r++, row += w.cols / 4) {
    __m512i acc[N][1];
    tile(row, w.cols, x, acc);
    for (int t = 0; t < N; t++)
      out[static_cast<size_t>(t) * out_stride + r] = _mm512_reduce_add_epi32(acc[t][0]) - sums[t];
  }
}

void ternary_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  for (size_t t = 0; t < x.n_tokens; t += 4) {
    const size_t n = x.n_tokens - t;
    const int8_t* values = x.values + t * w.cols;
    const int32_t* sums = x.sums + t;
    int32_t* to = out + t * out_stride;
    if (n == 1)
      by_one_token(w, values, sums[0], to);
    else if (n == 2)
      by_tokens<2>(w, values, sums, to, out_stride);
    else if (n == 3)
      by_tokens<3>(w, values, sums, to, out_stride);
    else
      by_tokens<4>(w, values, sums, to, out_stride);
  }
}

// Four columns at a time, as in avx512_vbmi.cpp.
void add_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums) {
  const NonZero now = find_nonzero(x, here), later = find_nonzero(x, next);
  const ColumnGroups columns(w, now);
  ColumnsAhead ahead(w, later, w.n_units() * columns.n);
  for (size_t at = 0; at < w.column_bytes(); at += kColumnUnit, sums += 4 * kColumnUnit) {
    __m512i acc[4][4];
    for (auto& plane : acc)
      for (__m512i& a : plane) a = zero32();
    for (size_t g = 0; g < columns.n; g++) {
      ahead.step();
      const __m512i a = load512(columns.data(g, 0) + at), b = load512(columns.data(g, 1) + at);
      const __m512i c = load512(columns.data(g, 2) + at), d = load512(columns.data(g, 3) + at);
      const __m512i low01 = _mm512_unpacklo_epi8(a, b), high01 = _mm512_unpackhi_epi8(a, b);
      const __m512i low23 = _mm512_unpacklo_epi8(c, d), high23 = _mm512_unpackhi_epi8(c, d);
      const __m512i codes[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
      const __m512i activations = _mm512_set1_epi32(columns.values(g));
      for (int p = 0; p < 4; p++)
        for (int i = 0; i < 4; i++)
          acc[p][i] = _mm512_dpbusd_epi32(acc[p][i], _mm512_and_si512(codes[i], code_mask(p)), activations);
    }
    for (int p = 0; p < 4; p++) {
      for (__m512i& a : acc[p]) a = _mm512_srai_epi32(a, static_cast<unsigned>(6 - 2 * p));
      add_plane(acc[p], columns.total, sums + p * 64);
    }
  }
  ahead.finish();
}

#include "expand_trits.h"
#include "ternary_lut.h"
#include "wide_lut.h"
// Uses its base3().
#include "pack_trits.h"

}  // namespace avx512

namespace {

constexpr Kernels kTable = {
    .isa = Isa::kAvx512,
    .rms_norm = avx512::rms_norm,
    .quantize = avx512::quantize,
    .ternary_matmul = avx512::ternary_matmul,
    .ternary_select = avx512::ternary_select,
    .trit_matmul = nullptr,
    .add_columns = avx512::add_columns,
    .add_trit_columns = nullptr,
    .expand_trits = avx512::expand_trits,
    .pack_trits = avx512::pack_trits,
    .lut_lanes = avx512::kLutLanes,
    .lut_min_tokens = 54,
    .lut_min_rest = 22,
    .lut_numbers = avx512::lut_numbers,
    .lut_column_numbers = avx512::lut_column_numbers,
    .ternary_lut = avx512::ternary_lut,
    .transpose_tile = avx512::transpose_tile,
    .steps_above_cap = avx512::steps_above_cap,
    .cap = avx512::cap,
    .wide_lut = avx512::wide_lut,
    .transpose_wide_tile = avx512::transpose_wide_tile,
    .amx_min_tokens = 0,
    .amx_matmul = nullptr,
    .amx_column_matmul = nullptr,
    .dequantize = avx512::dequantize,
    .add = avx512::add_to,
    .relu2_mul = avx512::relu2_mul,
    .rope = avx512::rope,
    .store_key = avx512::store_key,
    .store_value = avx512::store_value,
    .attend = avx512::attend,
    .add_attention = avx512::add_attention,
    .divide_attention = avx512::divide_attention,
    .sketch_row = avx512::sketch_row,
    .find_not_below = avx512::find_not_below,
    .dot_rows = avx512::dot_rows,
};

constexpr Kernels with_trits(Kernels table) {
  table.isa = Isa::kAvx512Vbmi;
  table.expand_trits = avx512_vbmi::expand_trits;
  table.lut_min_tokens = 26;  // multiplying is slower from trits than from codes
  table.lut_min_rest = 18;
  table.trit_matmul = avx512_vbmi::trit_matmul;
  table.lut_column_numbers = avx512_vbmi::lut_column_numbers;
  table.add_trit_columns = avx512_vbmi::add_trit_columns;
  return table;
}

// Tiles instead of look-up.
constexpr Kernels with_tiles(Kernels table) {
  table.isa = Isa::kAmx;
  table.lut_lanes = 0;
  table.amx_min_tokens = 8;
  table.amx_matmul = amx::matmul;
  table.amx_column_matmul = amx::column_matmul;
  return table;
}

}  // namespace

// Without code that would run before anybody has asked what the processor can do.
constinit const Kernels kAvx512Kernels = kTable;
constinit const Kernels kAvx512VbmiKernels = with_trits(kTable);
constinit const Kernels kAmxKernels = with_tiles(with_trits(kTable));

}  // namespace bitnet

#pragma GCC pop_options
