// AVX2 + FMA + F16C + BMI2: what every x86-64 processor of AWS Lambda has.
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "columns.h"
#include "half.h"
#include "kernels.h"
#include "prefetch.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")

namespace bitnet {
namespace avx2 {

#include "lanes_avx2.h"

// Of attention: how much the registers hold. Values of a token alone come from memory, best as one stream: whole.
constexpr int kScoreQueries = 4, kWeighQueries = 4, kWeighVectors = 1, kLoneQueries = 4, kLoneVectors = 1;
constexpr int kInt8Queries = 4, kInt8Sums = 1, kInt8Vectors = 1;
#include "float_kernels.h"

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline int32_t sum_of(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline __m128i sums_of(const __m256i (&a)[4]) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// What 16-bit sums hold: each of one_row's takes up to 2 · 12 · 128 from a block, each of one_row_by_tokens' 4 · 2 · 3
// · 128.
constexpr size_t kBlocksPerSum = 10;

// One row by one token: four times its sums, lane by lane. Only one shift a block: codes two bits up in their nibble
// are multiplied where they are, as 4 c.
template <bool kAlone>
inline __m256i one_row(const uint8_t* row, size_t n_blocks, const int8_t* x) {
  const __m256i mask = _mm256_set1_epi8(3), mask4 = _mm256_set1_epi8(12);
  const __m256i ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
  __m256i acc = _mm256_setzero_si256();
  while (n_blocks > 0) {
    const size_t n = n_blocks < kBlocksPerSum ? n_blocks : kBlocksPerSum;
    __m256i sums[4];
    for (__m256i& s : sums) s = _mm256_setzero_si256();
    const auto add_block = [&] {
      const __m256i low = load256(row), high = _mm256_srli_epi16(low, 4);
      sums[0] = _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(_mm256_and_si256(high, mask4), load256(x)));
      sums[1] = _mm256_add_epi16(sums[1], _mm256_maddubs_epi16(_mm256_and_si256(high, mask), load256(x + 32)));
      sums[2] = _mm256_add_epi16(sums[2], _mm256_maddubs_epi16(_mm256_and_si256(low, mask4), load256(x + 64)));
      sums[3] = _mm256_add_epi16(sums[3], _mm256_maddubs_epi16(_mm256_and_si256(low, mask), load256(x + 96)));
      row += 32;
      x += kTernaryBlock;
    };
    for (size_t i = 0; i < n / 2; i++) {
      if (!kAlone) prefetch(row + kPrefetchBytes);
      add_block();
      add_block();
    }
    if (n % 2 != 0) add_block();
    n_blocks -= n;
    const __m256i fourfold = _mm256_add_epi32(_mm256_madd_epi16(sums[0], ones), _mm256_madd_epi16(sums[2], ones));
    const __m256i single = _mm256_madd_epi16(_mm256_add_epi16(sums[1], sums[3]), fours);
    acc = _mm256_add_epi32(acc, _mm256_add_epi32(fourfold, single));
  }
  return acc;
}

// What the lanes of a row's sums come to, or of four; codes are weights + 1.
inline __m128i products(const __m256i (&acc)[4], int32_t sum) {
  return _mm_sub_epi32(_mm_srai_epi32(sums_of(acc), 2), _mm_set1_epi32(sum));
}

inline int32_t product(__m256i acc, int32_t sum) { return sum_of(acc) / 4 - sum; }

using RowSums = __m256i;
#include "one_token.h"

// One row by N tokens: their sums, lane by lane. Up to four tokens' sums and the row's unpacked codes are what the
// sixteen registers hold.
template <int N>
inline void one_row_by_tokens(const uint8_t* row, size_t cols, const int8_t* x, __m256i (&acc)[4]) {
  const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const size_t n_blocks = cols / kTernaryBlock;
  for (__m256i& a : acc) a = _mm256_setzero_si256();
  for (size_t first = 0; first < n_blocks; first += kBlocksPerSum) {
    const size_t last = first + kBlocksPerSum < n_blocks ? first + kBlocksPerSum : n_blocks;
    __m256i sums[N];
    for (__m256i& s : sums) s = _mm256_setzero_si256();
    for (size_t b = first; b < last; b++) {
      if (b % 2 == 0) prefetch(row + b * 32 + kPrefetchBytes);
      const __m256i codes = load256(row + b * 32);
      const __m256i c0 = _mm256_and_si256(_mm256_srli_epi16(codes, 6), mask);
      const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
      const __m256i c2 = _mm256_and_si256(_mm256_srli_epi16(codes, 2), mask);
      const __m256i c3 = _mm256_and_si256(codes, mask);
      for (int t = 0; t < N; t++) {
        const int8_t* a = x + static_cast<size_t>(t) * cols + b * kTernaryBlock;
        const __m256i p01 =
            _mm256_add_epi16(_mm256_maddubs_epi16(c0, load256(a)), _mm256_maddubs_epi16(c1, load256(a + 32)));
        const __m256i p23 =
            _mm256_add_epi16(_mm256_maddubs_epi16(c2, load256(a + 64)), _mm256_maddubs_epi16(c3, load256(a + 96)));
        sums[t] = _mm256_add_epi16(sums[t], _mm256_add_epi16(p01, p23));
      }
    }
    for (int t = 0; t < N; t++) acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(sums[t], ones));
  }
}

template <int N>
void by_tokens(const TernaryRows& w, const int8_t* x, const int32_t* sums, int32_t* out, size_t out_stride) {
  for (size_t r = 0; r < w.rows; r++) {
    __m256i acc[4];
    one_row_by_tokens<N>(w.data + r * (w.cols / 4), w.cols, x, acc);
    alignas(16) int32_t products[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(products), sums_of(acc));
    for (size_t t = 0; t < N; t++) out[t * out_stride + r] = products[t] - sums[t];  // codes are weights + 1
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

inline NonZero find_nonzero(const int8_t* x, ColumnRun run) {
  NonZero out;
  for (size_t i = run.first; i < run.first + run.n; i += 32) {
    const __m256i zeros = _mm256_cmpeq_epi8(load256(x + i), _mm256_setzero_si256());
    for (uint32_t mask = ~static_cast<uint32_t>(_mm256_movemask_epi8(zeros)); mask != 0; mask &= mask - 1) {
      const size_t column = i + static_cast<size_t>(std::countr_zero(mask));
      out.columns[out.n] = static_cast<uint32_t>(column);
      out.values[out.n++] = x[column];
    }
  }
  return out;
}

// Two columns at a time: their bytes are brought side by side, so that one instruction multiplies two weights of a row
// by their activations, and the sums of half a unit stay in registers.
void add_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums) {
  constexpr size_t kGroupsPerSum = 42;  // of at most 2 · 3 · 128
  const NonZero now = find_nonzero(x, here), later = find_nonzero(x, next);
  const ColumnGroups<2> columns(w, now);
  ColumnsAhead ahead(w, later, w.column_bytes() / 32 * columns.n);
  const __m256i mask = _mm256_set1_epi8(3);
  for (size_t at = 0; at < w.column_bytes(); at += 32) {
    int32_t* to = sums + at / kColumnUnit * (4 * kColumnUnit) + at % kColumnUnit;
    for (size_t begin = 0; begin < columns.n; begin += kGroupsPerSum) {
      const size_t end = begin + kGroupsPerSum < columns.n ? begin + kGroupsPerSum : columns.n;
      __m256i acc[4][2];
      for (auto& plane : acc)
        for (__m256i& a : plane) a = _mm256_setzero_si256();
      for (size_t g = begin; g < end; g++) {
        ahead.step();
        const __m256i a = load256(columns.data(g, 0) + at), b = load256(columns.data(g, 1) + at);
        const __m256i activations = _mm256_set1_epi16(columns.values(g));
        const auto add = [&](__m256i codes, int i) {
          for (int p = 0; p < 4; p++)
            acc[p][i] = _mm256_add_epi16(
                acc[p][i],
                _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 6 - 2 * p), mask), activations));
        };
        add(_mm256_unpacklo_epi8(a, b), 0);
        add(_mm256_unpackhi_epi8(a, b), 1);
      }
      // A lane of 128 bits has the sums of eight rows, and the other half's have the eight after them.
      const __m256i total = _mm256_set1_epi32(begin == 0 ? columns.total : 0);  // codes are weights + 1
      for (int p = 0; p < 4; p++)
        for (int i = 0; i < 4; i++) {
          const __m256i v = acc[p][i % 2];
          const __m256i sum = _mm256_cvtepi16_epi32(i < 2 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1));
          __m256i* out = reinterpret_cast<__m256i*>(to + p * 64 + i * 8);
          _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), _mm256_sub_epi32(sum, total)));
        }
    }
  }
  ahead.finish();
}

#include "expand_trits.h"
#include "ternary_lut.h"
#include "wide_lut.h"
// Uses its base3().
#include "pack_trits.h"

}  // namespace avx2

const Kernels kAvx2Kernels = {
    .isa = Isa::kAvx2,
    .rms_norm = avx2::rms_norm,
    .quantize = avx2::quantize,
    .ternary_matmul = avx2::ternary_matmul,
    .ternary_select = avx2::ternary_select,
    .trit_matmul = nullptr,
    .add_columns = avx2::add_columns,
    .add_trit_columns = nullptr,
    .expand_trits = avx2::expand_trits,
    .pack_trits = avx2::pack_trits,
    .lut_lanes = avx2::kLutLanes,
    .lut_min_tokens = 13,
    .lut_min_rest = 13,
    .lut_numbers = avx2::lut_numbers,
    .lut_column_numbers = avx2::lut_column_numbers,
    .ternary_lut = avx2::ternary_lut,
    .transpose_tile = avx2::transpose_tile,
    .steps_above_cap = avx2::steps_above_cap,
    .cap = avx2::cap,
    .wide_lut = avx2::wide_lut,
    .transpose_wide_tile = avx2::transpose_wide_tile,
    .dequantize = avx2::dequantize,
    .add = avx2::add_to,
    .relu2_mul = avx2::relu2_mul,
    .rope = avx2::rope,
    .store_key = avx2::store_key,
    .store_value = avx2::store_value,
    .attend = avx2::attend,
    .add_attention = avx2::add_attention,
    .divide_attention = avx2::divide_attention,
    .sketch_row = avx2::sketch_row,
    .find_not_below = avx2::find_not_below,
    .dot_rows = avx2::dot_rows,
};

}  // namespace bitnet

#pragma GCC pop_options
