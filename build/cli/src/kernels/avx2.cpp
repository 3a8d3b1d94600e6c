// AVX2 + FMA + F16C + BMI2: what every x86-64 processor of AWS Lambda has.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "columns.h"
#include "half.h"
#include "kernels.h"
#include "prefetch.h"
#include "rounding.h"

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
      if (!kAlone) prefetch_line(row + kPrefetchBytes);
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
      if (b % 2 == 0) prefetch_line(row + b * 32 + kPrefetchBytes);
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

#include "expand_trits.h"
#include "ternary_lut.h"
#include "wide_lut.h"
// Uses its base3().
#include "pack_trits.h"

// The first of a run, and no more once there are `most`.
inline NonZero find_nonzero(const int8_t* x, ColumnRun run, size_t most = kMaxColumns) {
  NonZero out;
  for (size_t i = run.first; i < run.first + run.n && out.n < most; i += 32) {
    const __m256i zeros = _mm256_cmpeq_epi8(load256(x + i), _mm256_setzero_si256());
    for (uint32_t mask = ~static_cast<uint32_t>(_mm256_movemask_epi8(zeros)); mask != 0; mask &= mask - 1) {
      const size_t column = i + static_cast<size_t>(std::countr_zero(mask));
      out.columns[out.n] = static_cast<uint32_t>(column);
      out.values[out.n++] = x[column];
    }
  }
  return out;
}

// Columns in pairs with a table each, of what the two can give: entry 4 a + b is (a − 1) x₀ + (b − 1) x₁. Pairs whose
// sums fit in bytes together are blocks, of a few at most; the first of each has kBias in its table. Activations larger
// than kLargest are several.
class ColumnPairs {
 public:
  static constexpr int kBias = 128, kLargest = 63;  // of bytes: two of the largest are less than the bias
  static constexpr size_t kMaxBlock = 8;            // pairs
  static constexpr size_t kAhead = 24;              // columns: 15 kB of 2,560 rows, of an L1 cache's 32 or 48

  struct Block {
    const uint8_t* const* columns;  // two a pair, and what follows them
    const int8_t (*tables)[16];
    size_t n_pairs;
  };

  ColumnPairs(const TernaryColumns& w, const NonZero& x, const NonZero& next) {
    const size_t column_bytes = w.column_bytes();
    const auto column = [&](uint32_t i) { return w.data + i * column_bytes; };
    size_t n = 0;
    for (size_t i = 0; i < x.n; i++)
      for (int left = x.values[i]; left != 0; n++) {
        const int part = std::clamp(left, -kLargest, kLargest);
        columns_[n] = column(x.columns[i]);
        values_[n] = static_cast<int8_t>(part);
        left -= part;
      }
    if (n % 2 != 0) {
      columns_[n] = columns_[0];
      values_[n++] = 0;
    }
    for (size_t i = 0; i < kAhead; i++) columns_[n + i] = i < next.n ? column(next.columns[i]) : columns_[0];
    const size_t n_pairs = n / 2;
    int sizes = kBias;  // Σ |x| of the block
    for (size_t pair = 0; pair < n_pairs; pair++) {
      const int8_t first = values_[2 * pair], second = values_[2 * pair + 1];
      const int size = std::abs(first) + std::abs(second);
      const bool begins = sizes + size >= kBias || pair == begins_[n_blocks - 1] + kMaxBlock;
      if (begins) begins_[n_blocks++] = static_cast<uint16_t>(pair);
      sizes = begins ? size : sizes + size;
      const __m128i a = _mm_sign_epi8(_mm_set1_epi8(first), _mm_setr_epi32(-1, 0, 0x01010101, 0x01010101));
      const __m128i b = _mm_sign_epi8(_mm_set1_epi8(second), _mm_set1_epi32(0x010100ff));
      const __m128i bias = _mm_set1_epi8(static_cast<char>(begins ? kBias : 0));
      _mm_store_si128(reinterpret_cast<__m128i*>(tables_[pair]), _mm_add_epi8(_mm_add_epi8(a, b), bias));
    }
    begins_[n_blocks] = static_cast<uint16_t>(n_pairs);
  }

  size_t n_blocks = 0;
  Block block(size_t i) const {
    const size_t begin = begins_[i];
    return {columns_ + 2 * begin, tables_ + begin, begins_[i + 1] - begin};
  }

 private:
  static constexpr size_t kMost = 3 * kMaxColumns + 1;
  alignas(16) int8_t tables_[kMost / 2][16];
  const uint8_t* columns_[kMost + kAhead];
  int8_t values_[kMost];
  uint16_t begins_[kMost / 2 + 1];
};

// Bytes of the columns, four planes of rows in each: 16-bit sums of pairs of bytes, and of their upper ones alone, as
// in wide_lut.h.
struct PlaneSums {
  __m256i both[4], upper[4];
};

// Adds a block of so many pairs, bytes from `first` on, and asks for the columns that follow. No loop depends on how
// long a block is: a processor would guess wrong at the end of most.
template <int kPairs>
void add_block(const ColumnPairs::Block& block, size_t first, size_t bytes, PlaneSums* sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (size_t at = first; at < first + bytes; at += 32, sums++) {
    if (at % kColumnUnit == 0)
      for (int i = 0; i < 2 * kPairs; i++)
        prefetch_line(block.columns[ColumnPairs::kAhead + static_cast<size_t>(i)] + at);
    __m256i acc[4];
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; i++) {
      // A byte has four codes of a column, so a pair's bytes are brought together to nibbles that are numbers of their
      // table.
      const __m256i a = load256(block.columns[2 * i] + at), b = load256(block.columns[2 * i + 1] + at);
      const __m256i even = even_planes(a, b), odd = odd_planes(a, b);
      const __m256i table =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(block.tables[i])));
      const auto add = [&](__m256i& sum, __m256i number) {
        const __m256i found = _mm256_shuffle_epi8(table, _mm256_and_si256(number, nibble));
        sum = i == 0 ? found : _mm256_add_epi8(sum, found);
      };
      add(acc[0], _mm256_srli_epi16(even, 4));
      add(acc[1], _mm256_srli_epi16(odd, 4));
      add(acc[2], even);
      add(acc[3], odd);
    }
    for (int p = 0; p < 4; p++) {
      sums->both[p] = _mm256_add_epi16(sums->both[p], acc[p]);
      sums->upper[p] = _mm256_add_epi16(sums->upper[p], _mm256_srli_epi16(acc[p], 8));
    }
  }
}

constexpr void (*kAddBlock[ColumnPairs::kMaxBlock])(const ColumnPairs::Block&, size_t, size_t, PlaneSums*) = {
    add_block<1>, add_block<2>, add_block<3>, add_block<4>, add_block<5>, add_block<6>, add_block<7>, add_block<8>};

// The sums of 32 bytes, in which the bias is so many times → those of their rows.
inline void add_planes(const PlaneSums& found, size_t n_blocks, int32_t* sums) {
  const __m256i biases = _mm256_set1_epi16(static_cast<short>(ColumnPairs::kBias * n_blocks));
  for (int p = 0; p < 4; p++, sums += kColumnUnit) {
    const __m256i odd = _mm256_sub_epi16(found.upper[p], biases);
    const __m256i even =
        _mm256_sub_epi16(_mm256_sub_epi16(found.both[p], _mm256_slli_epi16(found.upper[p], 8)), biases);
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    const auto put = [&](int32_t* rows, __m128i eight) {
      __m256i* out = reinterpret_cast<__m256i*>(rows);
      _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), _mm256_cvtepi16_epi32(eight)));
    };
    put(sums, _mm256_castsi256_si128(low));
    put(sums + 8, _mm256_castsi256_si128(high));
    put(sums + 16, _mm256_extracti128_si256(low, 1));
    put(sums + 24, _mm256_extracti128_si256(high, 1));
  }
}

// Block after block, a few kB that stay in the first-level cache; the first columns of the next run are asked for with
// the last of this one.
void add_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums) {
  constexpr size_t kBytesAtOnce = 1024;  // of a column
  const NonZero now = find_nonzero(x, here), later = find_nonzero(x, next, ColumnPairs::kAhead);
  const size_t column_bytes = w.column_bytes();
  if (now.n == 0) {
    for (size_t i = 0; i < std::min(later.n, ColumnPairs::kAhead); i++)
      for (size_t at = 0; at < column_bytes; at += kColumnUnit)
        prefetch_line(w.data + later.columns[i] * column_bytes + at);
    return;
  }
  const ColumnPairs pairs(w, now, later);
  for (size_t first = 0; first < column_bytes; first += kBytesAtOnce) {
    const size_t bytes = std::min(kBytesAtOnce, column_bytes - first);
    PlaneSums found[kBytesAtOnce / 32];
    std::memset(found, 0, bytes / 32 * sizeof(PlaneSums));
    for (size_t i = 0; i < pairs.n_blocks; i++) {
      const ColumnPairs::Block block = pairs.block(i);
      kAddBlock[block.n_pairs - 1](block, first, bytes, found);
    }
    for (size_t at = first; at < first + bytes; at += 32)
      add_planes(found[(at - first) / 32], pairs.n_blocks,
                 sums + at / kColumnUnit * (4 * kColumnUnit) + at % kColumnUnit);
  }
}

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
    .lut_min_tokens = 11,
    .lut_min_rest = 8,
    .lut_numbers = avx2::lut_numbers,
    .lut_column_numbers = avx2::lut_column_numbers,
    .ternary_lut = avx2::ternary_lut,
    .transpose_tile = avx2::transpose_tile,
    .steps_above_cap = avx2::steps_above_cap,
    .cap = avx2::cap,
    .wide_lut = avx2::wide_lut,
    .transpose_wide_tile = avx2::transpose_wide_tile,
    .amx_min_tokens = 0,
    .amx_matmul = nullptr,
    .amx_column_matmul = nullptr,
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
