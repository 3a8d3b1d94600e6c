// AVX2 + FMA + F16C: what every x86-64 processor of AWS Lambda has.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "half.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace bitnet {
namespace avx2 {

#include "lanes_avx2.h"

constexpr int kScoreBlocks = 1;
constexpr int kWeighVectors = 1;
#include "float_kernels.h"

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// R rows by N tokens; acc becomes four times the sums, lane by lane. Only one shift a block: codes two bits up in their
// nibble are multiplied where they are, as 4 c. Their 16-bit sums take 2 · 2 · 8 · 127 from each block, so they are
// emptied every 8 blocks.
template <int R, int N>
inline void tile(const uint8_t* codes, size_t stride, size_t n_blocks, const int8_t* x, size_t cols,
                 __m256i (&acc)[N][R]) {
  constexpr size_t kBlocksPerFlush = 8;
  const __m256i mask = _mm256_set1_epi8(3), mask4 = _mm256_set1_epi8(12);
  const __m256i ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
  for (int t = 0; t < N; t++)
    for (int r = 0; r < R; r++) acc[t][r] = _mm256_setzero_si256();
  for (size_t first = 0; first < n_blocks; first += kBlocksPerFlush) {
    const size_t last = first + kBlocksPerFlush < n_blocks ? first + kBlocksPerFlush : n_blocks;
    __m256i single[N][R], fourfold[N][R];
    for (int t = 0; t < N; t++)
      for (int r = 0; r < R; r++) single[t][r] = fourfold[t][r] = _mm256_setzero_si256();
    for (size_t b = first; b < last; b++) {
      const int8_t* a = x + b * kTernaryBlock;
      for (int r = 0; r < R; r++) {
        const uint8_t* row = codes + static_cast<size_t>(r) * stride + b * 32;
        if (N == 1 && b % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(row + kPrefetchRows * stride), _MM_HINT_T0);
        const __m256i low = load256(row);
        const __m256i high = _mm256_srli_epi16(low, 4);
        const __m256i c0 = _mm256_and_si256(high, mask4), c1 = _mm256_and_si256(high, mask);
        const __m256i c2 = _mm256_and_si256(low, mask4), c3 = _mm256_and_si256(low, mask);
        for (int t = 0; t < N; t++) {
          const int8_t* at = a + static_cast<size_t>(t) * cols;
          const __m256i p02 =
              _mm256_add_epi16(_mm256_maddubs_epi16(c0, load256(at)), _mm256_maddubs_epi16(c2, load256(at + 64)));
          const __m256i p13 =
              _mm256_add_epi16(_mm256_maddubs_epi16(c1, load256(at + 32)), _mm256_maddubs_epi16(c3, load256(at + 96)));
          fourfold[t][r] = _mm256_add_epi16(fourfold[t][r], p02);
          single[t][r] = _mm256_add_epi16(single[t][r], p13);
        }
      }
    }
    for (int t = 0; t < N; t++)
      for (int r = 0; r < R; r++)
        acc[t][r] = _mm256_add_epi32(acc[t][r], _mm256_add_epi32(_mm256_madd_epi16(single[t][r], fours),
                                                                 _mm256_madd_epi16(fourfold[t][r], ones)));
  }
}

inline int32_t sum_int(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int R, int N>
inline void tile_and_store(const TernaryRows& w, size_t r, const Activations& x, size_t t, int32_t* out,
                           size_t out_stride) {
  __m256i acc[N][R];
  tile<R, N>(w.data + r * (w.cols / 4), w.cols / 4, w.cols / kTernaryBlock, x.values + t * w.cols, w.cols, acc);
  for (int n = 0; n < N; n++)  // codes are weights + 1
    for (int i = 0; i < R; i++)
      out[(t + static_cast<size_t>(n)) * out_stride + r + static_cast<size_t>(i)] =
          sum_int(acc[n][i]) / 4 - x.sums[t + static_cast<size_t>(n)];
}

// Shapes that the sixteen registers hold.
template <int R>
inline void row_group(const TernaryRows& w, size_t r, const Activations& x, int32_t* out, size_t out_stride) {
  size_t t = 0;
  for (; t + 4 <= x.n_tokens; t += 4)
    for (size_t i = 0; i < R; i++) tile_and_store<1, 4>(w, r + i, x, t, out, out_stride);
  if (x.n_tokens - t == 3)
    for (size_t i = 0; i < R; i++) tile_and_store<1, 3>(w, r + i, x, t, out, out_stride);
  constexpr int kHalf = R >= 2 ? 2 : 1;
  if (x.n_tokens - t == 2)
    for (size_t i = 0; i < R; i += kHalf) tile_and_store<kHalf, 2>(w, r + i, x, t, out, out_stride);
  if (x.n_tokens - t == 1)
    for (size_t i = 0; i < R; i += kHalf) tile_and_store<kHalf, 1>(w, r + i, x, t, out, out_stride);
}

void ternary_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  size_t r = 0;
  for (; r + 4 <= w.rows; r += 4) row_group<4>(w, r, x, out, out_stride);
  for (; r < w.rows; r++) row_group<1>(w, r, x, out, out_stride);
}

#include "expand_trits.h"
#include "ternary_lut.h"

}  // namespace avx2

const Kernels kAvx2Kernels = {
    .isa = Isa::kAvx2,
    .rms_norm = avx2::rms_norm,
    .quantize = avx2::quantize,
    .ternary_matmul = avx2::ternary_matmul,
    .trit_matmul = nullptr,
    .expand_trits = avx2::expand_trits,
    .lut_lanes = avx2::kLutLanes,
    .lut_min_tokens = 9,
    .ternary_lut = avx2::ternary_lut,
    .transpose_tile = avx2::transpose_tile,
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
    .dot_rows = avx2::dot_rows,
};

}  // namespace bitnet

#pragma GCC pop_options
