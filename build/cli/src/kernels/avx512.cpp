// AVX-512 with VNNI: F, BW, VL, DQ and VNNI are asked for at run time.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "avx512_vbmi.h"
#include "half.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace bitnet {
namespace avx512 {

#include "lanes_avx512.h"

constexpr int kScoreBlocks = 2;
constexpr int kWeighVectors = 4;
#include "float_kernels.h"

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline __m512i twice(const int8_t* p) { return _mm512_broadcast_i64x4(load256(p)); }

// Eight rows by N tokens. A register holds the same 32 columns of rows p (low half) and p + 4 (high half).
template <int N>
inline void tile8(const uint8_t* codes, size_t stride, size_t n_blocks, const int8_t* x, size_t cols,
                  __m512i (&acc)[N][4]) {
  const __m512i mask = _mm512_set1_epi8(3);
  for (int t = 0; t < N; t++)
    for (int p = 0; p < 4; p++) acc[t][p] = _mm512_setzero_si512();
  for (size_t b = 0; b < n_blocks; b++) {
    const int8_t* a = x + b * kTernaryBlock;
    for (int p = 0; p < 4; p++) {
      const uint8_t* row = codes + static_cast<size_t>(p) * stride + b * 32;
      if (N == 1 && b % 2 == 0) {
        prefetch(row + kPrefetchRows * stride);
        prefetch(row + (kPrefetchRows + 4) * stride);
      }
      const __m512i packed = _mm512_inserti64x4(_mm512_castsi256_si512(load256(row)), load256(row + 4 * stride), 1);
      const __m512i c0 = _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask);
      const __m512i c1 = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      const __m512i c2 = _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask);
      const __m512i c3 = _mm512_and_si512(packed, mask);
      for (int t = 0; t < N; t++) {
        const int8_t* at = a + static_cast<size_t>(t) * cols;
        acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], c0, twice(at));
        acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], c1, twice(at + 32));
        acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], c2, twice(at + 64));
        acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], c3, twice(at + 96));
      }
    }
  }
}

// Sums of the eight halves, in the order of the rows.
inline __m256i sum_rows(const __m512i (&a)[4]) {
  const __m512i t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
  const __m512i v = _mm512_add_epi32(u, _mm512_shuffle_i64x2(u, u, 0xb1));  // lane 0 + lane 1, lane 2 + lane 3
  return _mm512_castsi512_si256(_mm512_shuffle_i64x2(v, v, 0x08));          // lanes 0 and 2
}

template <int N>
inline void tile8_and_store(const TernaryRows& w, size_t r, const Activations& x, size_t t, int32_t* out,
                            size_t out_stride) {
  __m512i acc[N][4];
  tile8<N>(w.data + r * (w.cols / 4), w.cols / 4, w.cols / kTernaryBlock, x.values + t * w.cols, w.cols, acc);
  for (int n = 0; n < N; n++) {
    const size_t token = t + static_cast<size_t>(n);
    const __m256i sums = _mm256_sub_epi32(sum_rows(acc[n]), _mm256_set1_epi32(x.sums[token]));  // codes are weights + 1
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + token * out_stride + r), sums);
  }
}

inline void one_row(const TernaryRows& w, size_t r, const Activations& x, int32_t* out, size_t out_stride) {
  const __m256i mask = _mm256_set1_epi8(3);
  const uint8_t* row = w.data + r * (w.cols / 4);
  for (size_t t = 0; t < x.n_tokens; t++) {
    __m256i sums[4];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (size_t b = 0; b < w.cols / kTernaryBlock; b++) {
      const int8_t* a = x.values + t * w.cols + b * kTernaryBlock;
      const __m256i packed = load256(row + b * 32);
      sums[0] = _mm256_dpbusd_epi32(sums[0], _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask), load256(a));
      sums[1] = _mm256_dpbusd_epi32(sums[1], _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask), load256(a + 32));
      sums[2] = _mm256_dpbusd_epi32(sums[2], _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask), load256(a + 64));
      sums[3] = _mm256_dpbusd_epi32(sums[3], _mm256_and_si256(packed, mask), load256(a + 96));
    }
    const __m256i acc = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    out[t * out_stride + r] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1))) - x.sums[t];
  }
}

void ternary_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride) {
  size_t r = 0;
  for (; r + 8 <= w.rows; r += 8) {
    size_t t = 0;
    for (; t + 4 <= x.n_tokens; t += 4) tile8_and_store<4>(w, r, x, t, out, out_stride);
    if (x.n_tokens - t == 3) tile8_and_store<3>(w, r, x, t, out, out_stride);
    if (x.n_tokens - t == 2) tile8_and_store<2>(w, r, x, t, out, out_stride);
    if (x.n_tokens - t == 1) tile8_and_store<1>(w, r, x, t, out, out_stride);
  }
  for (; r < w.rows; r++) one_row(w, r, x, out, out_stride);
}

#include "expand_trits.h"
#include "ternary_lut.h"

}  // namespace avx512

namespace {

constexpr Kernels kTable = {
    .isa = Isa::kAvx512,
    .rms_norm = avx512::rms_norm,
    .quantize = avx512::quantize,
    .ternary_matmul = avx512::ternary_matmul,
    .trit_matmul = nullptr,
    .expand_trits = avx512::expand_trits,
    .lut_lanes = avx512::kLutLanes,
    .lut_min_tokens = 24,
    .ternary_lut = avx512::ternary_lut,
    .transpose_tile = avx512::transpose_tile,
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
    .dot_rows = avx512::dot_rows,
};

constexpr Kernels with_trits(Kernels table) {
  table.isa = Isa::kAvx512Vbmi;
  table.expand_trits = avx512_vbmi::expand_trits;
  table.trit_matmul = avx512_vbmi::trit_matmul;
  return table;
}

}  // namespace

// Without code that would run before anybody has asked what the processor can do.
constinit const Kernels kAvx512Kernels = kTable;
constinit const Kernels kAvx512VbmiKernels = with_trits(kTable);

}  // namespace bitnet

#pragma GCC pop_options
