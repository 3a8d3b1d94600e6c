// Products of many tokens with the tiles of AMX: one instruction multiplies 16 tokens by 16 rows, 64 columns of each.
// Weights are laid out in tiles as codes of 8 bits, a block of columns at a time, while the sums of those before wait
// in memory. Activations are read where they are.
//
// A tile of weights has the codes of four columns of 16 rows side by side in each of its 16 lines of 64 bytes, row
// after row. Tiles 0 to 3 are sums, of 32 tokens and 32 rows; 4 and 5 activations, 6 and 7 weights.
#include "amx.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "avx512_vbmi.h"
#include "prefetch.h"

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,amx-tile,amx-int8")

namespace bitnet::amx {
namespace {

constexpr size_t kSide = AmxScratch::kTileRows;  // tokens or rows of a tile
constexpr size_t kStepCols = 64;                 // columns that one instruction takes
constexpr size_t kTileBytes = AmxScratch::kTileBytes;
constexpr size_t kSums = kSide * kSide;  // of a tile
constexpr size_t kStepsPerBlock = kTernaryBlock / kStepCols;

#include "trits_vbmi.h"

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Sets how many tokens the tiles of the first and of the second 16 have.
void configure(size_t first, size_t second) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t lines[16] = {};
  } config;
  for (const size_t tile : {0, 1, 2, 3, 4, 5, 6, 7}) config.line_bytes[tile] = kStepCols;
  for (const size_t tile : {0, 1, 4}) config.lines[tile] = static_cast<uint8_t>(first);
  for (const size_t tile : {2, 3, 5}) config.lines[tile] = static_cast<uint8_t>(std::max(second, size_t{1}));
  for (const size_t tile : {6, 7}) config.lines[tile] = kSide;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));  // GCC 12's own intrinsic lets it forget all but the first bytes
}

// A block's products with up to 16 tokens, or up to 32 where kBoth, are added to their sums, (2 halves of the tokens, 2
// halves of the rows) tiles.
template <bool kBoth>
inline void add_products(const int8_t* x, size_t cols, const uint8_t* weights, size_t n_steps, bool first,
                         int32_t* sums) {
  constexpr long kSumStride = kSide * sizeof(int32_t);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumStride);
    _tile_loadd(1, sums + kSums, kSumStride);
    if (kBoth) {
      _tile_loadd(2, sums + 2 * kSums, kSumStride);
      _tile_loadd(3, sums + 3 * kSums, kSumStride);
    }
  }
  for (size_t step = 0; step < n_steps; step++, x += kStepCols, weights += kTileBytes) {
    _tile_loadd(4, x, cols);
    _tile_loadd(6, weights, kStepCols);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights + AmxScratch::kStride, kStepCols);
    _tile_dpbsud(1, 4, 7);
    if (kBoth) {
      _tile_loadd(5, x + kSide * cols, cols);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kSums, kSumStride);
  if (kBoth) {
    _tile_stored(2, sums + 2 * kSums, kSumStride);
    _tile_stored(3, sums + 3 * kSums, kSumStride);
  }
}

// out[t · out_stride + r] = float(Σ codes · x − Σ x) / activation_scales[t] · weight_scale. tiles_of(pair, begin, n)
// has the tiles of 32 rows, of n columns from `begin` on; it is asked for one pair after another.
template <class TilesOf>
void multiply(size_t rows, size_t cols, const Activations& x, const float* activation_scales, float weight_scale,
              AmxScratch& scratch, float* out, size_t out_stride, TilesOf&& tiles_of) {
  const size_t n_pairs = (rows + 2 * kSide - 1) / (2 * kSide), n_groups = (x.n_tokens + 2 * kSide - 1) / (2 * kSide);
  const auto tokens_of = [&](size_t group) { return std::min(x.n_tokens - group * 2 * kSide, 2 * kSide); };
  const auto sums_of = [&](size_t pair, size_t group) { return &scratch.sums[(pair * n_groups + group) * 4 * kSums]; };
  size_t configured = 0;  // for so many tokens
  for (size_t begin = 0; begin < cols; begin += kAmxCols) {
    const size_t n = std::min(kAmxCols, cols - begin);
    for (size_t pair = 0; pair < n_pairs; pair++) {
      const uint8_t* tiles = tiles_of(pair, begin, n);
      __asm__ volatile("" : : : "memory");  // GCC 12 does not know that tiles are read from memory
      for (size_t group = 0; group < n_groups; group++) {
        const size_t n_tokens = tokens_of(group), low = std::min(n_tokens, kSide);
        if (configured != n_tokens) configure(low, n_tokens - low);
        configured = n_tokens;
        const auto add = n_tokens > kSide ? add_products<true> : add_products<false>;
        add(x.values + group * 2 * kSide * cols + begin, cols, tiles, n / kStepCols, begin == 0, sums_of(pair, group));
      }
    }
  }
  _tile_release();  // or the kernel would save tiles whenever it takes the processor from this thread
  const __m512 weight = _mm512_set1_ps(weight_scale);
  for (size_t group = 0; group < n_groups; group++)
    for (size_t i = 0; i < tokens_of(group); i++) {
      const size_t t = group * 2 * kSide + i;
      const __m512i sum = _mm512_set1_epi32(x.sums[t]);  // codes are weights + 1
      const __m512 activation = _mm512_set1_ps(activation_scales[t]);
      for (size_t r = 0; r < rows; r += kSide) {
        const int32_t* sums = sums_of(r / (2 * kSide), group) + (i / kSide * 2 + r / kSide % 2) * kSums;
        const __m512i v = _mm512_sub_epi32(_mm512_load_si512(sums + i % kSide * kSide), sum);
        _mm512_storeu_ps(out + t * out_stride + r,
                         _mm512_mul_ps(_mm512_div_ps(_mm512_cvtepi32_ps(v), activation), weight));
      }
    }
}

// Codes c of bytes.
template <int kCode>
inline __m512i code(__m512i bytes) {
  return _mm512_and_si512(_mm512_srli_epi16(bytes, 6 - 2 * kCode), _mm512_set1_epi8(3));
}

// 16 rows of codes, `stride` bytes apart, n_cols columns of each → their tiles.
void put_codes(const uint8_t* codes, size_t stride, size_t n_cols, uint8_t* tiles) {
  for (size_t b = 0; b < n_cols / kTernaryBlock; b++, codes += 32, tiles += kStepsPerBlock * kTileBytes) {
    __m512i quads[2][4];  // a double word of four rows and one of the next four, of 32 bytes; rows 0 to 7, then 8 to 15
    for (size_t half = 0; half < 2; half++) {
      const auto rows = [&](size_t i) {
        const uint8_t* p = codes + (half * 8 + i) * stride;
        return _mm512_inserti64x4(_mm512_castsi256_si512(load256(p)), load256(p + 4 * stride), 1);
      };
      const __m512i m[4] = {rows(0), rows(1), rows(2), rows(3)};
      const __m512i a = _mm512_unpacklo_epi32(m[0], m[1]), b = _mm512_unpackhi_epi32(m[0], m[1]);
      const __m512i c = _mm512_unpacklo_epi32(m[2], m[3]), d = _mm512_unpackhi_epi32(m[2], m[3]);
      quads[half][0] = _mm512_unpacklo_epi64(a, c);
      quads[half][1] = _mm512_unpackhi_epi64(a, c);
      quads[half][2] = _mm512_unpacklo_epi64(b, d);
      quads[half][3] = _mm512_unpackhi_epi64(b, d);
    }
    for (size_t i = 0; i < 8; i++) {
      const __m512i low = quads[0][i % 4], high = quads[1][i % 4];
      const __m512i bytes = i < 4 ? _mm512_shuffle_i32x4(low, high, 0x88) : _mm512_shuffle_i32x4(low, high, 0xdd);
      uint8_t* line = tiles + i * kStepCols;
      _mm512_store_si512(line, code<0>(bytes));
      _mm512_store_si512(line + kTileBytes / 2, code<1>(bytes));
      _mm512_store_si512(line + kTileBytes, code<2>(bytes));
      _mm512_store_si512(line + kTileBytes + kTileBytes / 2, code<3>(bytes));
    }
  }
}

// 16 rows from the first on, n columns from `begin` on → their tiles. Asks for the rows that follow those of the pair.
void put_rows(const TernaryRows& w, size_t first, size_t begin, size_t n, AmxScratch& scratch, uint8_t* tiles) {
  constexpr size_t kUnitCols = kCodeUnit * 4, kAhead = 2 * kSide;
  const bool trits = w.type == TernaryType::kTrits;
  const size_t stride = w.row_bytes(), units = (n + kUnitCols - 1) / kUnitCols;
  const size_t bytes = trits ? units * kTritUnit : n / 4;
  const uint8_t* rows = w.data + first * stride + (trits ? begin / kUnitCols * kTritUnit : begin / 4);
  for (size_t i = 0; i < kSide; i++) {
    prefetch(rows + (i + kAhead) * stride, bytes);
    if (trits) avx512_vbmi::expand_trits(rows + i * stride, units, &scratch.codes[i * kAmxCols / 4]);
  }
  if (trits)
    put_codes(scratch.codes.data(), kAmxCols / 4, n, tiles);
  else
    put_codes(rows, stride, n, tiles);
}

// Four columns of a unit's 64 bytes → the bytes of each 16 rows, those of a row side by side.
struct Bytes {
  __m512i rows[4];
};
inline Bytes side_by_side(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(high_ab, high_cd),
           _mm512_unpackhi_epi16(high_ab, high_cd)}};
}

// Columns of a unit → the tiles of its rows.
void put_columns(const TernaryColumns& w, size_t unit, size_t begin, size_t n_cols, uint8_t* tiles) {
  constexpr size_t kAhead = 16;  // columns
  const size_t stride = w.column_bytes();
  // Or side_by_side(), which works within lanes of 128 bits, would leave each four rows of 16 in a register of its own.
  const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const uint8_t* data = w.data + begin * stride + unit * kColumnUnit;
  for (size_t c = 0; c < n_cols; c += 4) {
    uint8_t* line = tiles + c / kStepCols * kTileBytes + c % kStepCols / 4 * kStepCols;
    __m512i codes[4], fifths[4];
    for (size_t i = 0; i < 4; i++) {
      prefetch_line(data + (c + i + kAhead) * stride);
      codes[i] = _mm512_permutexvar_epi32(transposed, load512(data + (c + i) * stride));
      if (w.type == TernaryType::kCodes) continue;
      const Trits trits = split(codes[i]);
      codes[i] = trits.codes;
      fifths[i] = trits.fifths;
    }
    const Bytes bytes = side_by_side(codes[0], codes[1], codes[2], codes[3]);
    for (size_t i = 0; i < 4; i++) {
      const auto put = [&](size_t plane, __m512i v) {
        _mm512_store_si512(line + (4 * plane + i) * AmxScratch::kStride, v);
      };
      put(0, code<0>(bytes.rows[i]));
      put(1, code<1>(bytes.rows[i]));
      put(2, code<2>(bytes.rows[i]));
      put(3, code<3>(bytes.rows[i]));
    }
    if (w.type == TernaryType::kCodes) continue;
    const Bytes fifth = side_by_side(fifths[0], fifths[1], fifths[2], fifths[3]);
    for (size_t i = 0; i < 4; i++) _mm512_store_si512(line + (16 + i) * AmxScratch::kStride, fifth.rows[i]);
  }
}

}  // namespace

bool permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of Linux's asm/prctl.h
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
}

void matmul(const TernaryRows& w, const Activations& x, const float* activation_scales, float weight_scale,
            AmxScratch& scratch, float* out, size_t out_stride) {
  uint8_t* const tiles = scratch.tiles.data();
  multiply(w.rows, w.cols, x, activation_scales, weight_scale, scratch, out, out_stride,
           [&](size_t pair, size_t begin, size_t n) {
             const size_t first = pair * 2 * kSide, end = std::min(first + 2 * kSide, w.rows);
             for (size_t r = first; r < end; r += kSide)
               put_rows(w, r, begin, n, scratch, tiles + (r - first) / kSide * AmxScratch::kStride);
             return tiles;
           });
}

void column_matmul(const TernaryColumns& w, size_t first_row, size_t n_rows, const Activations& x,
                   const float* activation_scales, float weight_scale, AmxScratch& scratch, float* out,
                   size_t out_stride) {
  multiply(n_rows, w.cols, x, activation_scales, weight_scale, scratch, out, out_stride,
           [&](size_t pair, size_t begin, size_t n) {
             if (pair == 0) put_columns(w, first_row / w.unit_rows(), begin, n, scratch.tiles.data());
             return &scratch.tiles[2 * pair * AmxScratch::kStride];
           });
}

}  // namespace bitnet::amx

#pragma GCC pop_options
