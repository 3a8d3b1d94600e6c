// What VBMI adds to AVX-512: a permutation of bytes looks up what a byte of five trits stands for, so that packed
// matrices need not be expanded first and a fifth fewer bytes are read for a token.
#include "avx512_vbmi.h"

#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "columns.h"
#include "kernels.h"
#include "prefetch.h"

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")

namespace bitnet {
namespace avx512_vbmi {

constexpr size_t kUnitBlocks = kCodeUnit / 32;
constexpr size_t kUnitCols = kUnitBlocks * kTernaryBlock;
constexpr size_t kTileRows = 4;             // that several tokens' pass does
constexpr int32_t kInverse81 = 2014922929;  // modulo 2³²: divides multiples of 81

#include "trits_vbmi.h"

// A table of 256 bytes in registers.
class ByteTable {
 public:
  explicit ByteTable(const uint8_t* table) {
    for (int i = 0; i < 4; i++) part_[i] = _mm512_load_si512(table + 64 * i);
  }
  __m512i operator[](__m512i bytes) const {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), _mm512_permutex2var_epi8(part_[0], bytes, part_[1]),
                                  _mm512_permutex2var_epi8(part_[2], bytes, part_[3]));
  }

 private:
  __m512i part_[4];
};

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes) {
  const ByteTable code_table(kTables.codes), fifth_table(kTables.fifths);
  for (size_t u = 0; u < units; u++, packed += kTritUnit, codes += kCodeUnit) {
    const __m512i low = load512(packed), high = load512(packed + 64);
    _mm512_storeu_si512(codes, code_table[low]);
    _mm512_storeu_si512(codes + 64, code_table[high]);
    const __m512i a = fifth_table[low], b = fifth_table[high];          // codes 0 and 1, 2 and 3 of the fifth block
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi16(a, 4), b);  // 0 and 2, 1 and 3
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(codes + 128),
        _mm256_or_si256(_mm256_slli_epi16(_mm512_castsi512_si256(pairs), 2), _mm512_extracti64x4_epi64(pairs, 1)));
  }
}

#include "columns_avx512.h"

// Zeros that GCC takes for numbers like others: sums that begin with the constant it moves to another register and back
// at every step.
inline __m512i zeros() {
  __m512i a = _mm512_setzero_si512();
  __asm__("" : "+v"(a));
  return a;
}

// A token's activations in the order in which trits are used: for each half of a unit, those of codes 0 to 3 of its two
// blocks side by side, then those of the fifth block. Zeros for the blocks that the last unit does not have.
void lay_out(const int8_t* x, size_t cols, size_t units, int8_t* out) {
  for (size_t u = 0; u < units; u++)
    for (size_t half = 0; half < 2; half++)
      for (size_t c = 0; c < 5; c++, out += 64)
        for (size_t side = 0; side < 2; side++) {
          const size_t block = c < 4 ? half * 2 + side : 4, code = c < 4 ? c : half * 2 + side;
          const size_t from = u * kUnitCols + block * kTernaryBlock + code * 32;
          const __m256i v = from < cols ? load256(x + from) : _mm256_setzero_si256();
          _mm256_store_si256(reinterpret_cast<__m256i*>(out + side * 32), v);
        }
}

// One row by one token, laid out; its sums lie in 16 lanes. v = 81 fifth + q; v − q is dotted as it is, 81 times too
// large. Codes stay where they are in their bytes: the sums with those of bits 2, 4 and 6 are 4, 16 and 64 times too
// large.
inline __m512i row_by_token(const uint8_t* row, size_t halves, const int8_t* laid) {
  __m512i acc[5];
  for (__m512i& a : acc) a = zeros();
  for (size_t half = 0; half < halves; half++, row += 64, laid += 5 * 64) {
    prefetch_line(row + kPrefetchBytes);
    const __m512i v = load512(row);
    const __m512i q = below81(v), codes = codes_of(q);
    for (int c = 0; c < 4; c++)
      acc[c] = _mm512_dpbusd_epi32(acc[c], _mm512_and_si512(codes, code_mask(c)), load512(laid + c * 64));
    acc[4] = _mm512_dpbusd_epi32(acc[4], _mm512_sub_epi8(v, q), load512(laid + 4 * 64));
  }
  const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(acc[0], 6), _mm512_srai_epi32(acc[1], 4));
  const __m512i low = _mm512_add_epi32(_mm512_srai_epi32(acc[2], 2), acc[3]);
  const __m512i fifth = _mm512_mullo_epi32(acc[4], _mm512_set1_epi32(kInverse81));
  return _mm512_add_epi32(_mm512_add_epi32(high, low), fifth);
}

// Sums of four times 16 lanes.
inline __m128i sum_lanes(const __m512i (&a)[4]) {
  const __m512i t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
  const __m256i v = _mm256_add_epi32(_mm512_castsi512_si256(u), _mm512_extracti64x4_epi64(u, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

// Row after row, as they lie in memory: several side by side would be several streams, and the processor fetches one
// long stream ahead better than many short ones.
void by_one_token(const TernaryRows& w, const int8_t* laid, int32_t sum, int32_t* out) {
  const size_t stride = w.row_bytes(), halves = stride / 64;
  size_t r = 0;
  for (; r + 4 <= w.rows; r += 4) {
    __m512i lanes[4];
    for (size_t i = 0; i < 4; i++) lanes[i] = row_by_token(w.data + (r + i) * stride, halves, laid);
    // Codes are weights + 1.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r), _mm_sub_epi32(sum_lanes(lanes), _mm_set1_epi32(sum)));
  }
  for (; r < w.rows; r++) out[r] = _mm512_reduce_add_epi32(row_by_token(w.data + r * stride, halves, laid)) - sum;
}

// R rows by N tokens, laid out one after another.
template <int R, int N>
inline void rows_by_tokens(const TernaryRows& w, size_t first, const int8_t* laid, const int32_t* sums, int32_t* out,
                           size_t out_stride) {
  const ByteTable code_table(kTables.codes), fifth_table(kTables.fifths);
  const __m512i mask = _mm512_set1_epi8(3);
  const size_t stride = w.row_bytes(), units = stride / kTritUnit;
  const uint8_t* data = w.data + first * stride;
  __m512i acc[R][N];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < N; t++) acc[r][t] = _mm512_setzero_si512();
  for (size_t half = 0; half < 2 * units; half++) {
    __m512i four[R], fifth[R];
    for (int r = 0; r < R; r++) {
      const uint8_t* p = data + static_cast<size_t>(r) * stride + half * 64;
      prefetch_line(p + kPrefetchBytes);
      const __m512i trits = load512(p);
      four[r] = code_table[trits];
      fifth[r] = fifth_table[trits];
    }
    const auto add = [&](auto&& codes_of, size_t c) {
      __m512i codes[R];
      for (int r = 0; r < R; r++) codes[r] = codes_of(r);
      for (int t = 0; t < N; t++) {
        const __m512i a = load512(laid + (static_cast<size_t>(t) * units * 10 + half * 5 + c) * 64);
        for (int r = 0; r < R; r++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], codes[r], a);
      }
    };
    add([&](int r) { return _mm512_and_si512(_mm512_srli_epi16(four[r], 6), mask); }, 0);
    add([&](int r) { return _mm512_and_si512(_mm512_srli_epi16(four[r], 4), mask); }, 1);
    add([&](int r) { return _mm512_and_si512(_mm512_srli_epi16(four[r], 2), mask); }, 2);
    add([&](int r) { return _mm512_and_si512(four[r], mask); }, 3);
    add([&](int r) { return fifth[r]; }, 4);
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < N; t++)  // codes are weights + 1
      out[static_cast<size_t>(t) * out_stride + first + static_cast<size_t>(r)] =
          _mm512_reduce_add_epi32(acc[r][t]) - sums[t];
}

template <int N>
inline void by_tokens(const TernaryRows& w, const int8_t* laid, const int32_t* sums, int32_t* out, size_t out_stride) {
  size_t r = 0;
  for (; r + kTileRows <= w.rows; r += kTileRows) rows_by_tokens<kTileRows, N>(w, r, laid, sums, out, out_stride);
  for (; r < w.rows; r++) rows_by_tokens<1, N>(w, r, laid, sums, out, out_stride);
}

void trit_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  constexpr size_t kTokens = 4;  // whose sums the registers hold
  const size_t units = w.row_bytes() / kTritUnit, laid_bytes = units * kUnitCols;
  alignas(64) int8_t laid[kTokens * (kMaxTritCols + kUnitCols)];
  for (size_t t = 0; t < x.n_tokens; t += kTokens) {
    const size_t n = x.n_tokens - t < kTokens ? x.n_tokens - t : kTokens;
    for (size_t i = 0; i < n; i++) lay_out(x.values + (t + i) * w.cols, w.cols, units, laid + i * laid_bytes);
    int32_t* to = out + t * out_stride;
    if (n == 4) by_tokens<4>(w, laid, x.sums + t, to, out_stride);
    if (n == 3) by_tokens<3>(w, laid, x.sums + t, to, out_stride);
    if (n == 2) by_tokens<2>(w, laid, x.sums + t, to, out_stride);
    if (n == 1) by_one_token(w, laid, x.sums[t], to);
  }
}

// The sums of half a unit's bytes: of those that kHigh says of each lane of 128 bits. Four columns at a time: their
// bytes are brought side by side, so that one instruction multiplies four weights of a row by their activations.
template <bool kHigh>
inline void add_half(const ColumnGroups& columns, size_t at, ColumnsAhead& ahead, __m512i (&out)[5][4]) {
  __m512i acc[5][2];
  for (auto& plane : acc)
    for (__m512i& a : plane) a = zeros();
  for (size_t g = 0; g < columns.n; g++) {
    ahead.step();
    const __m512i a = load512(columns.data(g, 0) + at), b = load512(columns.data(g, 1) + at);
    const __m512i c = load512(columns.data(g, 2) + at), d = load512(columns.data(g, 3) + at);
    const __m512i ab = kHigh ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
    const __m512i cd = kHigh ? _mm512_unpackhi_epi8(c, d) : _mm512_unpacklo_epi8(c, d);
    const __m512i activations = _mm512_set1_epi32(columns.values(g));
    for (int i = 0; i < 2; i++) {
      const __m512i v = i == 0 ? _mm512_unpacklo_epi16(ab, cd) : _mm512_unpackhi_epi16(ab, cd);
      const __m512i q = below81(v), codes = codes_of(q);
      for (int p = 0; p < 4; p++)
        acc[p][i] = _mm512_dpbusd_epi32(acc[p][i], _mm512_and_si512(codes, code_mask(p)), activations);
      acc[4][i] = _mm512_dpbusd_epi32(acc[4][i], _mm512_sub_epi8(v, q), activations);
    }
  }
  for (int p = 0; p < 5; p++)
    for (int i = 0; i < 2; i++) out[p][kHigh ? 2 + i : i] = acc[p][i];
}

void add_trit_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums) {
  const NonZero now = find_nonzero(x, here), later = find_nonzero(x, next);
  const ColumnGroups columns(w, now);
  ColumnsAhead ahead(w, later, 2 * w.n_units() * columns.n);
  for (size_t at = 0; at < w.column_bytes(); at += kColumnUnit, sums += 5 * kColumnUnit) {
    __m512i acc[5][4];
    add_half<false>(columns, at, ahead, acc);
    add_half<true>(columns, at, ahead, acc);
    for (int p = 0; p < 5; p++) {
      for (__m512i& a : acc[p])
        a = p < 4 ? _mm512_srai_epi32(a, static_cast<unsigned>(6 - 2 * p))
                  : _mm512_mullo_epi32(a, _mm512_set1_epi32(kInverse81));
      add_plane(acc[p], columns.total, sums + p * 64);
    }
  }
  ahead.finish();
}

#include "column_numbers.h"

void lut_column_numbers(const TernaryColumns& w, size_t first_row, size_t n_rows, LutScratch& scratch) {
  const bool trits = w.type == TernaryType::kTrits;
  numbers_by_columns(w, first_row, n_rows, scratch, [trits](const uint8_t* line, uint8_t* codes, uint8_t* fifths) {
    const __m512i v = load512(line);
    if (!trits) return _mm512_store_si512(codes, v);
    const Trits trits = split(v);
    _mm512_store_si512(codes, trits.codes);
    _mm512_store_si512(fifths, trits.fifths);
  });
}

}  // namespace avx512_vbmi
}  // namespace bitnet

#pragma GCC pop_options
